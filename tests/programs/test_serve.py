"""llamamix serve: what it starts, what it prints, how it ends. A script stands in for llama-server where it can."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from helpers.processes import environment, library_dir

from llamamix import KVMixedParams, ServerError
from llamamix.server import Server, find_server

NO_PAGE = "llamamix: this llama-server has no web page; the API is at http://127.0.0.1:1/v1."

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs scripts and signals")

# says how it was called and what it was told; its text makes it a server that knows the mixed KV cache
STAND_IN = """#!{python}
# llama_kv_mixed_get_stats
import json, os, signal, sys
def ended(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, ended)
print("called", json.dumps([os.environ.get("LLAMA_KV_MIXED"), sys.argv[1:]]), flush=True)
{lines}
print("0.00.017.879 I srv  llama_server: listening on http://127.0.0.1:1", flush=True)
signal.pause()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    """Makes scripts that run ``lines`` and then say that they are ready."""

    def make(lines: str = "") -> Path:
        path = tmp_path / "bin" / "llama-server"
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN.format(python=sys.executable, lines=lines))
        path.chmod(0o755)
        return path

    return make


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "llamamix", "serve", *map(str, args)]


def run(program: Path | None, *args: object, **variables: str | None) -> subprocess.CompletedProcess:
    env = environment(**({"LLAMAMIX_SERVER": program and str(program)} | variables))
    return subprocess.run(command(*args), env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    processes = []

    def begin(program: Path | None, *args: object) -> subprocess.Popen:
        env = environment(LLAMAMIX_SERVER=program and str(program))
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command(*args), env=env, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def assert_error(result: subprocess.CompletedProcess, code: int, text: str) -> None:
    assert (result.returncode, result.stdout) == (code, "")
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0], result.stderr


#
# what is started
#


def test_flags_and_environment(start: Callable, stand_in: Callable, tiny_model_path: Path) -> None:
    flags = ("-c", 512, "-np", 3, "-t", 1, "-ngl", 0, "--port", 0, "--kv-mixed", "hot=64,cold=q8_0")
    process = start(stand_in(), "-v", "-m", tiny_model_path, *flags, "--", "--alias", "me", "-m2")
    assert process.stdout.readline() == "http://127.0.0.1:1\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "")  # the server's own code
    called, ready, page, told = err.splitlines()
    assert page == NO_PAGE
    spec, args = json.loads(called.removeprefix("called "))
    assert KVMixedParams.parse(spec) == KVMixedParams(hot=64, cold="q8_0")
    expected = f"-m {tiny_model_path} --host 127.0.0.1 --port 0 -c 512 -np 3 -t 1 -ngl 0 --alias me -m2"
    assert args == expected.split()
    assert ready.endswith("listening on http://127.0.0.1:1") and told == "got SIGTERM"


@pytest.mark.parametrize(("args", "spec"), [((), KVMixedParams().spec()), (("--kv-mixed", "off"), "0")])
def test_the_cache(start: Callable, stand_in: Callable, tiny_model_path: Path, args: tuple, spec: str) -> None:
    process = start(stand_in(), "-v", "-m", tiny_model_path, *args)
    called = json.loads(process.stderr.readline().removeprefix("called "))
    assert called == [spec, ["-m", str(tiny_model_path), "--host", "127.0.0.1", "--port", "8080"]]


def test_the_servers_own_variable_has_no_say(
    stand_in: Callable, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMA_ARG_KV_MIXED comes before LLAMA_KV_MIXED."""
    monkeypatch.setenv("LLAMA_ARG_KV_MIXED", "off")
    log: list[str] = []
    program = stand_in('print("own", os.environ.get("LLAMA_ARG_KV_MIXED"), flush=True)')
    with Server(["-m", str(tiny_model_path)], KVMixedParams(hot=64), program=program, on_line=log.append) as server:
        server.wait_ready(60.0)
    assert "own None" in log


def test_a_name_that_pull_knows(start: Callable, stand_in: Callable, smollm2_path: Path) -> None:
    process = start(stand_in(), "-v", "-m", "smollm2")
    assert json.loads(process.stderr.readline().removeprefix("called "))[1][:2] == ["-m", str(smollm2_path)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_go_to_the_server(start: Callable, stand_in: Callable, tiny_model_path: Path, number: int) -> None:
    process = start(stand_in(), "-v", "-m", tiny_model_path)
    assert process.stdout.readline() == "http://127.0.0.1:1\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and err.splitlines()[-1] == f"got {signal.Signals(number).name}"


def test_quiet_unless_asked(start: Callable, stand_in: Callable, tiny_model_path: Path) -> None:
    process = start(stand_in(), "-m", tiny_model_path)
    assert process.stdout.readline() == "http://127.0.0.1:1\n"
    assert process.stderr.readline() == f"{NO_PAGE}\n"
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")


def test_a_server_that_is_killed(start: Callable, stand_in: Callable, tiny_model_path: Path) -> None:
    process = start(stand_in('print("pid", os.getpid(), flush=True)'), "-v", "-m", tiny_model_path)
    process.stderr.readline()
    pid = int(process.stderr.readline().split()[1])
    assert process.stdout.readline()
    os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL


#
# errors
#


def test_bad_usage_exits_2(stand_in: Callable, tiny_model_path: Path) -> None:
    program = stand_in()
    for args in ((), ("-m", tiny_model_path, "--no-such-flag"), ("-m", tiny_model_path, "-c", "many")):
        result = run(program, *args)
        assert (result.returncode, result.stdout) == (2, "") and "usage: llamamix" in result.stderr
    assert_error(run(program, "-m", tiny_model_path, "--port", 70000), 2, "--port must be 0 to 65535, not 70000")
    assert_error(run(program, "-m", tiny_model_path, "--kv-mixed", "warm=1"), 2, "unknown key 'warm'")


def test_there_is_no_server(tmp_path: Path, tiny_model_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    for file in library_dir().glob("lib*"):
        (tmp_path / "lib" / file.name).symlink_to(file)
    # where libraries are and no program, which is what -DLLAMAMIX_PROGRAMS=OFF installs
    result = run(None, "-m", tiny_model_path, LLAMAMIX_LIB_PATH=f"{tmp_path}/lib", PATH="")
    assert_error(result, 1, "There is no llama-server: this install has the library alone. 'pip install .' in a")

    result = run(tmp_path / "nothing", "-m", tiny_model_path)
    assert_error(result, 1, f"LLAMAMIX_SERVER names {tmp_path}/nothing, which is not a program.")


def test_the_path_is_searched(tmp_path: Path, stand_in: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMAMIX_SERVER", raising=False)
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(stand_in().parent))
    assert find_server() == stand_in()
    monkeypatch.setenv("LLAMAMIX_LIB_PATH", str(stand_in().parent))
    monkeypatch.setenv("PATH", "")
    assert find_server() == stand_in()


def test_a_model_that_is_not_there(stand_in: Callable, tmp_path: Path) -> None:
    assert_error(run(stand_in(), "-m", tmp_path / "missing.gguf"), 1, "is neither a file nor one of the models")


def test_a_server_without_the_mixed_cache(stand_in: Callable, tiny_model_path: Path, start: Callable) -> None:
    program = stand_in()
    program.write_text(program.read_text().replace("llama_kv_mixed_get_stats", ""))
    assert_error(run(program, "-m", tiny_model_path), 1, f"{program} is a llama-server without the mixed KV cache.")
    # which does not matter to a plain one
    process = start(program, "-m", tiny_model_path, "--kv-mixed", "off")
    assert process.stdout.readline() == "http://127.0.0.1:1\n"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("print('one'); print('two'); print(); sys.exit(7)", "two"),
        ("print('0.01 E llama: the cause'); print('0.02 E srv: a consequence.'); sys.exit(7)", "llama: the cause"),
        ("print('error: invalid argument: --x'); print('see -h'); sys.exit(7)", "invalid argument: --x"),
    ],
)
def test_a_server_that_dies_at_its_start(stand_in: Callable, tiny_model_path: Path, lines: str, reason: str) -> None:
    result = run(stand_in(lines), "-m", tiny_model_path)
    assert_error(result, 1, f"llama-server ended at its start with code 7: {reason}.")


def test_a_server_that_is_not_ready_in_time(stand_in: Callable) -> None:
    server = Server([], None, program=stand_in("signal.pause()"))
    with server, pytest.raises(ServerError, match=r"not ready after 0\.2 s"):
        server.wait_ready(0.2)
    assert not server.is_running


def test_a_server_is_asked_to_end(stand_in: Callable) -> None:
    with Server([], None, program=stand_in()) as server:
        server.wait_ready(60)
    assert server.wait() == 3  # as its own handler of SIGTERM ends it


def test_a_server_that_does_not_heed_is_killed(stand_in: Callable) -> None:
    with Server([], None, program=stand_in("signal.signal(signal.SIGTERM, signal.SIG_IGN)")) as server:
        server.wait_ready(60)
        assert server.stop(0.2) == 128 + signal.SIGKILL


#
# the real one
#


@pytest.fixture(scope="module")
def llama_server() -> Path:
    try:
        return find_server()
    except ServerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_llama_server(start: Callable, llama_server: Path, tiny_model_path: Path, number: int) -> None:
    process = start(llama_server, "-m", tiny_model_path, "-c", 512, "-t", 1, "--port", 0, "--", "--alias", "small")
    url = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["small"]
    said = process.stderr.readline()
    try:
        urllib.request.urlopen(urllib.request.Request(f"{url}/", headers={"Accept-Encoding": "gzip"}), timeout=60)
    except urllib.error.HTTPError as error:
        assert error.code == 404 and said == f"llamamix: this llama-server has no web page; the API is at {url}/v1.\n"
    else:
        assert said == f"llamamix: chat in a browser at {url}/; the API is at {url}/v1.\n"
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    with socket.socket() as probe:
        host, port = url.removeprefix("http://").split(":")
        assert probe.connect_ex((host, int(port))) != 0  # nobody is there


def test_what_llama_server_says_when_it_can_not(llama_server: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    flags = ("-m", tiny_model_path, "-t", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_error(run(llama_server, *flags, "--port", port), 1, f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {port}")  # fmt: skip
    assert_error(run(llama_server, *flags, "--port", 0, "--", "--no-such"), 1, "invalid argument: --no-such")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "none-of-ours")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    result = run(llama_server, "-m", tmp_path / "other.gguf", "--port", 0)
    assert_error(result, 1, "llama-server ended at its start")
    assert "none-of-ours" in result.stderr
    (tmp_path / "text.gguf").write_text("This is not a model.")
    assert_error(run(llama_server, "-m", tmp_path / "text.gguf", "--port", 0), 1, "text.gguf is not a GGUF file.")
    result = run(llama_server, *flags, "--port", 0, "-c", 4608, "--kv-mixed", "hot=64,cold_size=100")
    assert_error(result, 1, "hot=64 and cold_size=100 hold fewer tokens than the context of 4608")
