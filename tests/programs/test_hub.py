"""Models of a hub, hf:ORG/REPO[:FILE or QUANT]: from one that is served here, into a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub import Hub, serve_hub

from llamamix import PullError
from llamamix.hub import choose
from llamamix.pull import pull, resolve

# what no test may look at: only what is fetched into tmp_path is there
FOREIGN = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_XET_CACHE")


@pytest.fixture
def hub(tiny_model_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    model = tiny_model_path.read_bytes()
    files = {"README.md": b"# tiny", "tiny-Q8_0.gguf": model, "tiny-Q4_K_M.gguf": model, "mmproj-tiny.gguf": b"GGUF"}
    with serve_hub({"some/tiny-GGUF": files, "some/empty": {"README.md": b""}}) as served:
        yield served


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    places = {"HF_HOME": str(tmp_path / "hf"), "LLAMAMIX_CACHE": str(tmp_path / "own")}

    def run(*args: object, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llamamix", *map(str, args)]
        environment = kept | places | {"HF_ENDPOINT": hub.url} | changes
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def assert_error(result: subprocess.CompletedProcess[str], text: str) -> None:
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("llamamix: ") and result.stderr.count("\n") == 1 and text in result.stderr


def test_a_model_is_fetched_once_and_used(run: Run, hub: Hub, tiny_model_path: Path, tmp_path: Path) -> None:
    first = run("pull", "hf:some/tiny-GGUF")
    assert (first.returncode, first.stderr) == (0, "")
    path = Path(first.stdout.rstrip("\n"))
    assert path.name == "tiny-Q4_K_M.gguf" and path.is_relative_to(tmp_path / "hf")
    assert path.read_bytes() == tiny_model_path.read_bytes()

    flags = ("-p", "in the", "-n", 5, "-t", 1, "-c", 256, "--temp", 0)
    expected = run("generate", "-m", tiny_model_path, *flags).stdout
    hub.requests.clear()
    result = run("generate", "-m", "hf:some/tiny-GGUF:q4_k_m", *flags)
    assert (result.returncode, result.stdout, result.stderr) == (0, expected, "") and expected.strip()
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]

    # a hub that can not be reached does not matter then
    for changes in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        for name in ("hf:some/tiny-GGUF", "hf:some/tiny-GGUF:Q4_K_M", "hf:some/tiny-GGUF:tiny-Q4_K_M.gguf"):
            again = run("pull", name, **changes)
            assert (again.returncode, again.stdout, again.stderr) == (0, f"{path}\n", ""), name


def test_a_file_by_its_name_or_quantisation(run: Run) -> None:
    for wanted in ("Q8_0", "tiny-Q8_0.gguf"):
        result = run("info", f"hf:some/tiny-GGUF:{wanted}", "-o", "json")
        assert (result.returncode, result.stderr) == (0, "") and '"arch": "llama"' in result.stdout


def test_what_can_not_be_fetched(run: Run) -> None:
    has = "it has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf."
    assert_error(run("pull", "hf:some/tiny-GGUF:Q2_K"), f"has no Q2_K; {has}")
    assert_error(run("pull", "hf:some/tiny-GGUF:other.gguf"), f"has no other.gguf; {has}")
    assert_error(run("pull", "hf:some/empty"), "the repository has no GGUF file")
    assert_error(run("pull", "hf:some/other"), "/some/other, or it is private")
    assert_error(run("pull", "hf:gated/model"), "accept its terms")
    assert_error(run("pull", "hf:gated/model:m.gguf"), "accept its terms")
    assert_error(run("pull", "hf:tiny"), "hf:tiny names no repository; it is hf:ORG/REPO")


@pytest.mark.parametrize("name", ["hf:some/tiny-GGUF", "hf:some/tiny-GGUF:tiny-Q8_0.gguf"])
def test_no_network(run: Run, name: str) -> None:
    closed = "http://127.0.0.1:9"  # discard: nothing listens there
    assert_error(run("pull", name, HF_ENDPOINT=closed), f"there is no network: {closed} can not be reached.")
    assert_error(run("pull", name, HF_HUB_OFFLINE="1"), "is not in the cache")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for function in (pull, resolve):
        with pytest.raises(PullError, match=r"pip install 'llamamix\[hf\]'"):
            function("hf:some/tiny-GGUF")


def test_a_repository_without_hf_before_it() -> None:
    with pytest.raises(PullError, match="neither a file nor .*; hf:some/tiny-GGUF is a repository of a hub"):
        resolve("some/tiny-GGUF")


def test_a_path_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hf:some").mkdir()
    Path("hf:some/m.gguf").write_bytes(b"")
    assert resolve("hf:some/m.gguf") == Path("hf:some/m.gguf")


def test_which_file() -> None:
    def chosen(wanted: str, *files: str) -> list[str]:
        return choose(files, wanted, "it")

    plain = ("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m.IQ4_NL.gguf", "imatrix.gguf", "mmproj-m-Q8_0.gguf")
    assert chosen("", *plain) == ["m-Q4_K_M.gguf"]
    assert chosen("iq4_nl", *plain) == ["m.IQ4_NL.gguf"]
    assert chosen("Q8_0", *plain) == ["m-Q8_0.gguf"]
    assert chosen("UD-Q4_K_M", *plain) == ["m-UD-Q4_K_M.gguf"]
    assert chosen("", "b.gguf", "a-F16.gguf") == ["a-F16.gguf"]
    for wanted in ("Q4_K", "4_K_M", "gguf"):  # a part of a name is none
        with pytest.raises(PullError, match=f"has no {wanted}"):
            chosen(wanted, *plain)

    parts = [f"Q4_K_M/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    others = [f"Q8_0/m-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    for wanted in ("", "Q4_K_M", parts[0], parts[2]):
        assert chosen(wanted, *others, *reversed(parts)) == parts
    assert chosen("q8_0", *others, *parts) == others
    many = [f"m-{i}.gguf" for i in range(20)]
    with pytest.raises(PullError, match="m-0.gguf, m-1.gguf, .* and 12 more"):
        chosen("Q4_0", *many)
