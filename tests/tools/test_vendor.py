"""tools/vendor.py on small made-up archives and patches; nothing here needs a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.paths import TOOLS
from helpers.tools import load_tool

SCRIPT = TOOLS.resolve() / "vendor.py"


vendor = load_tool("vendor")

GRAPH = "".join(f"line {n}\n" for n in range(1, 21))
UPSTREAM = {
    "CMakeLists.txt": "project(up)\n",
    "src/graph.cpp": GRAPH,
    "src/other.cpp": "int a;\nint b;\nint c;\n",
    "docs/big.md": "left out\n",
    "run.sh": "#!/bin/sh\n",
}
PATCH = """Call the hook after line 10.

--- a/src/graph.cpp
+++ b/src/graph.cpp
@@ -10,2 +10,3 @@
 line 10
+hook();
 line 11
"""
PATCHED = GRAPH.replace("line 10\n", "line 10\nhook();\n")


def make_archive(path: Path, version: str, files: dict[str, str], extra: list[tarfile.TarInfo] = ()) -> str:
    """Writes a source archive and returns its sha256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"up-{version}/vendor/llama.cpp/{name}")
            info.size = len(text.encode())
            info.mode = 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
        log = b"- feat: update llama.cpp to ggml-org/llama.cpp@abc1234de\n"
        info = tarfile.TarInfo(f"up-{version}/CHANGELOG.md")
        info.size = len(log)
        tar.addfile(info, io.BytesIO(log))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Project:
    """A vendor folder, a cache folder and an archive that the pin names."""

    root: Path
    archive: Path = field(init=False)

    def __post_init__(self) -> None:
        self.vendor = self.root / "vendor"
        self.cache = self.root / "cache"
        self.archive = self.root / "up-1.0.tar.gz"
        (self.vendor / "patches").mkdir(parents=True)
        self.write_pin(make_archive(self.archive, "1.0", UPSTREAM))
        self.write_patch("0001-graph.patch", PATCH)

    def write_pin(self, sha256: str) -> None:
        pin = {
            "project": "up",
            "version": "1.0",
            "archive": "up-1.0.tar.gz",
            "sha256": sha256,
            "subdir": "up-1.0/vendor/llama.cpp",
            "commit": "0000000",
            "skip": ["docs"],
        }
        (self.vendor / "pin.json").write_text(json.dumps(pin))

    def write_patch(self, name: str, text: str) -> Path:
        path = self.vendor / "patches" / name
        path.write_bytes(text.encode())
        return path

    def write_source(self) -> Path:
        for name, text in UPSTREAM.items():
            path = self.root / "source" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self.root / "source"

    def command(self, *args: object) -> list[str]:
        return ["--vendor", str(self.vendor), "--cache", str(self.cache), *map(str, args)]

    def run(self, *args: object) -> int:
        return vendor.main(self.command(*args))

    def apply(self, *args: object) -> int:
        return self.run("apply", "--archive", self.archive, *args)


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("LLAMAMIX_UPSTREAM_ARCHIVE", "LLAMAMIX_UPSTREAM_SOURCE", "LLAMAMIX_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    # no test may reach an index, whatever it does wrong
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    return Project(tmp_path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(capsys) -> str:
    """The one line a failed command wrote; stdout stays empty."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("vendor.py: ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


#
# fetch
#


def test_fetch_copies_a_checked_archive(project, capsys):
    assert project.run("fetch", "--archive", project.archive) == 0
    target = project.cache / "up-1.0.tar.gz"
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes() == project.archive.read_bytes()
    assert [path.name for path in project.cache.iterdir()] == ["up-1.0.tar.gz"]


def test_wrong_hash_is_refused_before_unpacking(project, capsys, monkeypatch):
    project.write_pin("0" * 64)
    monkeypatch.setattr(vendor, "unpack", lambda *_: pytest.fail("unpacked an unchecked archive"))
    assert project.apply() == 1
    message = failure(capsys)
    assert str(project.archive) in message and "0" * 64 in message
    assert list(project.cache.iterdir()) == []


def test_wrong_hash_is_refused_although_the_tree_is_cached(project, capsys):
    assert project.apply() == 0
    capsys.readouterr()
    make_archive(project.archive, "1.0", {**UPSTREAM, "src/other.cpp": "evil\n"})
    assert project.apply() == 1
    assert "has sha256" in failure(capsys)


def test_downloaded_archive_with_a_wrong_hash_leaves_nothing(project, capsys, monkeypatch):
    def download(name, version, folder):
        assert (name, version) == ("up", "1.0")
        path = folder / "up-1.0.tar.gz"
        path.write_bytes(b"something else")
        return path

    monkeypatch.setattr(vendor, "download", download)
    assert project.run("apply") == 1
    assert "the pin asks for" in failure(capsys)
    assert list(project.cache.iterdir()) == []


def test_damaged_archive_in_the_cache_is_fetched_again(project, monkeypatch, capsys):
    project.cache.mkdir()
    (project.cache / "up-1.0.tar.gz").write_bytes(b"cut off")

    def download(name, version, folder):
        (folder / "up-1.0.tar.gz").write_bytes(project.archive.read_bytes())
        return folder / "up-1.0.tar.gz"

    monkeypatch.setattr(vendor, "download", download)
    assert project.run("fetch") == 0
    assert "is damaged" in capsys.readouterr().err
    assert (project.cache / "up-1.0.tar.gz").read_bytes() == project.archive.read_bytes()


def test_missing_archive(project, capsys):
    missing = project.root / "gone.tar.gz"
    assert project.run("fetch", "--archive", missing) == 1
    assert f"{missing} is not a file" in failure(capsys)
    assert list(project.cache.iterdir()) == []


def test_archive_from_the_environment(project, monkeypatch):
    monkeypatch.setenv("LLAMAMIX_UPSTREAM_ARCHIVE", str(project.archive))
    assert project.run("fetch") == 0
    assert (project.cache / "up-1.0.tar.gz").is_file()


def test_failed_download_says_what_pip_said(project, capsys):
    assert project.run("fetch") == 1
    message = failure(capsys)
    assert "pip could not fetch up 1.0 (ERROR: No matching distribution found for up==1.0)" in message
    assert "--archive FILE" in message
    assert list(project.cache.iterdir()) == []


def test_broken_archive(project, capsys):
    data = project.archive.read_bytes()
    project.archive.write_bytes(data[: len(data) // 2])
    project.write_pin(hashlib.sha256(project.archive.read_bytes()).hexdigest())
    assert project.apply() == 1
    assert "up-1.0.tar.gz cannot be unpacked" in failure(capsys)
    assert [path.name for path in project.cache.iterdir()] == ["up-1.0.tar.gz"]


def test_interrupt_leaves_nothing(project, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vendor, "place_tree", interrupt)
    assert project.apply() == 130
    assert "interrupted" in failure(capsys)
    assert [path.name for path in project.cache.iterdir()] == ["up-1.0.tar.gz"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_termination_leaves_nothing(project):
    # a pip that never ends stands in for a slow download
    slow = project.root / "slow" / "pip"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("")
    (slow / "__main__.py").write_text(
        "import sys, time\n"
        "if '--version' not in sys.argv:\n"
        "    open(sys.argv[-2] + '/part', 'w').close()\n"
        "    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(slow.parent)}
    process = subprocess.Popen([sys.executable, SCRIPT, *project.command("fetch")], env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not list(project.cache.glob(".tmp-*/part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert list(project.cache.iterdir()) == []


#
# unpack
#


@pytest.mark.parametrize(
    "name",
    ["up-1.0/vendor/llama.cpp/../../../../evil", "/evil", "../evil", "up-1.0/vendor/llama.cpp/..\\evil", "C:/evil"],
)
def test_path_traversal_is_refused(project, capsys, name):
    info = tarfile.TarInfo(name)
    info.size = 1
    project.write_pin(make_archive(project.archive, "1.0", UPSTREAM, [info]))
    assert project.apply() == 1
    assert f"unsafe path {name!r}" in failure(capsys)
    assert [path.name for path in project.cache.iterdir()] == ["up-1.0.tar.gz"]
    assert not list(project.root.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(project, capsys, kind):
    info = tarfile.TarInfo("up-1.0/vendor/llama.cpp/src/link")
    info.type = kind
    info.linkname = "/etc/passwd"
    project.write_pin(make_archive(project.archive, "1.0", UPSTREAM, [info]))
    assert project.apply() == 1
    assert "which is no regular file" in failure(capsys)
    assert [path.name for path in project.cache.iterdir()] == ["up-1.0.tar.gz"]


def test_archive_without_the_tree(project, capsys):
    project.write_pin(make_archive(project.archive, "2.0", UPSTREAM))
    assert project.apply() == 1
    assert "holds nothing below up-1.0/vendor/llama.cpp" in failure(capsys)


#
# apply
#


def test_apply_gives_the_patched_tree(project, capsys):
    assert project.apply() == 0
    out = capsys.readouterr().out
    tree = Path(out.rstrip("\n"))
    assert out == f"{tree}\n" and tree.parent == project.cache
    files = snapshot(tree)
    del files[vendor.STAMP]
    want = {name: text.encode() for name, text in UPSTREAM.items() if name != "docs/big.md"}
    assert files == {**want, "src/graph.cpp": PATCHED.encode()}
    if os.name == "posix":
        assert [oct((tree / name).stat().st_mode & 0o777) for name in ("run.sh", "src/graph.cpp")] == ["0o755", "0o644"]


def test_apply_is_idempotent(project, capsys):
    assert project.apply() == 0
    first = capsys.readouterr()
    stat = {path: path.stat().st_mtime_ns for path in project.cache.rglob("*") if path.name != "up-1.0.tar.gz"}
    project.archive.unlink()
    assert project.run("apply") == 0  # nothing is fetched or written again
    second = capsys.readouterr()
    assert second.out == first.out and second.err == ""
    assert {path: path.stat().st_mtime_ns for path in stat} == stat


def test_changed_patch_gives_a_new_tree(project, capsys):
    assert project.apply() == 0
    first = Path(capsys.readouterr().out.strip())
    project.write_patch("0001-graph.patch", PATCH.replace("hook()", "hook2()"))
    assert project.apply() == 0
    second = Path(capsys.readouterr().out.strip())
    assert second != first
    assert (first / "src/graph.cpp").read_text() == PATCHED
    assert (second / "src/graph.cpp").read_text() == PATCHED.replace("hook()", "hook2()")


def test_failing_patch_names_patch_file_and_hunk(project, capsys):
    second = "@@ -15,2 +16,3 @@\n line 15\n+more();\n line 17\n"
    path = project.write_patch("0001-graph.patch", PATCH + second)
    assert project.apply() == 1
    message = failure(capsys)
    assert f"{path}: hunk 2 does not apply to src/graph.cpp: its context is not in the file" in message
    assert not list(project.cache.glob("patched-*")) and not list(project.cache.glob(".tmp-*"))


def test_missing_target_names_the_patch(project, capsys):
    path = project.write_patch("0002-gone.patch", PATCH.replace("src/graph.cpp", "src/gone.cpp"))
    assert project.apply() == 1
    assert f"{path}: hunk 1 does not apply: upstream has no file src/gone.cpp" in failure(capsys)


def test_moved_hunk_is_applied_at_the_only_place(project, capsys):
    project.write_patch("0001-graph.patch", PATCH.replace("@@ -10,2 +10,3 @@", "@@ -4,2 +4,3 @@"))
    assert project.apply() == 0
    tree = Path(capsys.readouterr().out.strip())
    assert (tree / "src/graph.cpp").read_text() == PATCHED
    assert project.run("check", "--archive", project.archive) == 0
    assert "0001-graph.patch: hunk 1 moved from line 4 to 10" in capsys.readouterr().err


def test_moved_hunk_is_refused_when_ambiguous(project, capsys):
    text = "start\n}\n\nmiddle\n}\n\nend\n"
    project.write_pin(make_archive(project.archive, "1.0", {**UPSTREAM, "src/twice.cpp": text}))
    patch = "--- a/src/twice.cpp\n+++ b/src/twice.cpp\n@@ -{},2 +1,3 @@\n }}\n+x\n \n"
    path = project.write_patch("0002-twice.patch", patch.format(3))
    assert project.apply() == 1
    assert f"{path}: hunk 1 does not apply to src/twice.cpp: its context moved and is at lines 2, 5" in failure(capsys)

    # at its stated line the same context is no question
    project.write_patch("0002-twice.patch", patch.format(5))
    assert project.apply() == 0
    tree = Path(capsys.readouterr().out.strip())
    assert (tree / "src/twice.cpp").read_text() == "start\n}\n\nmiddle\n}\nx\n\nend\n"


def test_several_hunks_remove_and_add(project, capsys):
    project.write_patch(
        "0001-graph.patch",
        "--- a/src/graph.cpp\n+++ b/src/graph.cpp\n"
        "@@ -1 +1,2 @@\n-line 1\n+first\n+second\n"
        "@@ -3,3 +4,2 @@\n line 3\n-line 4\n line 5\n"
        "@@ -20,1 +20,2 @@\n line 20\n+last\n",
    )
    assert project.apply() == 0
    tree = Path(capsys.readouterr().out.strip())
    want = GRAPH.replace("line 1\n", "first\nsecond\n", 1).replace("line 4\n", "") + "last\n"
    assert (tree / "src/graph.cpp").read_text() == want


def test_hunks_out_of_order_are_refused(project, capsys):
    first = "@@ -15,2 +15,3 @@\n line 15\n+x\n line 16\n"
    path = project.write_patch("0001-graph.patch", PATCH.replace("@@ -10", first + "@@ -10"))
    assert project.apply() == 1
    assert f"{path}: hunk 2 does not apply to src/graph.cpp: it overlaps hunk 1" in failure(capsys)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nothing\n", "is not a unified diff"),
        (PATCH.replace("+10,3", "+10,4"), "hunk 1 (line 5) holds 2 old and 3 new lines, its header says 2 and 4"),
        (PATCH.replace("@@ -10,2", "@@ 10,2"), "hunk 1 (line 5) should start with '@@ -A,B +C,D @@'"),
        (PATCH.replace(" line 11", "line 11"), "line 8 starts with neither"),
        (PATCH.replace("b/src/graph.cpp", "b/src/other.cpp"), "must change one file in place"),
        (PATCH.replace("src/graph.cpp", "../graph.cpp"), "must change one file in place"),
        (PATCH.replace("+++ b/src/graph.cpp", "+++ /dev/null"), "must change one file in place"),
        (PATCH + PATCH, "line 9 starts with neither"),
        ("--- a/src/graph.cpp\n+++ b/src/graph.cpp\n@@ -3,0 +4 @@\n+x\n", "has no context"),
        ("--- a/src/graph.cpp\n+++ b/src/graph.cpp\n", "holds no hunk"),
    ],
)
def test_malformed_patch(project, capsys, text, reason):
    path = project.write_patch("0001-graph.patch", text)
    assert project.apply() == 1
    message = failure(capsys)
    assert str(path) in message and reason in message


def test_two_patches_for_one_file_are_refused(project, capsys):
    project.write_patch("0002-again.patch", PATCH)
    assert project.apply() == 1
    assert "0001-graph.patch and" in (message := failure(capsys)) and "both change src/graph.cpp" in message


def test_source_tree_is_never_written(project, capsys):
    source = project.write_source()
    before = snapshot(source)
    dest = project.root / "dest"
    assert project.run("apply", "--source", source) == 0
    tree = Path(capsys.readouterr().out.strip())
    assert project.run("apply", "--source", source, "--dest", dest) == 0
    for made in (tree, dest):
        assert (made / "src/graph.cpp").read_text() == PATCHED
        assert not (made / "docs").exists()
    (dest / "src/other.cpp").write_text("int d;\n")
    assert project.run("refresh", "--source", source, "--tree", dest) == 0
    assert snapshot(source) == before


def test_changed_source_tree_gives_a_new_tree(project, capsys):
    source = project.write_source()
    assert project.run("apply", "--source", source) == 0
    first = capsys.readouterr().out
    (source / "src/other.cpp").write_text("int z;\n")
    assert project.run("apply", "--source", source) == 0
    second = capsys.readouterr().out
    assert first != second and (Path(second.strip()) / "src/other.cpp").read_text() == "int z;\n"


def test_folder_that_is_no_source_tree(project, capsys):
    assert project.run("apply", "--source", project.vendor) == 1
    assert f"{project.vendor} is no llama.cpp source tree" in failure(capsys)


def test_concurrent_applies(project):
    project.cache.mkdir()
    command = [sys.executable, str(SCRIPT), *project.command("apply", "--archive", project.archive)]
    dest = ["--dest", str(project.root / "dest")]
    runs = [
        subprocess.Popen(command + (dest if n % 2 else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(8)
    ]
    results = [(*run.communicate(), run.returncode) for run in runs]
    assert [code for _, _, code in results] == [0] * 8, results
    assert len({out for out, _, _ in results}) == 2
    names = sorted(path.name.split("-")[0] for path in project.cache.iterdir())
    assert names == ["patched", "up", "upstream"]
    assert sorted(path.name for path in project.root.iterdir()) == ["cache", "dest", "up-1.0.tar.gz", "vendor"]
    for out, _, _ in results:
        assert (Path(out.strip()) / "src/graph.cpp").read_text() == PATCHED


#
# apply --dest
#


def test_dest_is_updated_in_place(project):
    dest = project.root / "dest"
    project.write_patch(
        "0002-other.patch", "--- a/src/other.cpp\n+++ b/src/other.cpp\n@@ -1 +1,2 @@\n int a;\n+int x;\n"
    )
    assert project.apply("--dest", dest) == 0
    assert (dest / "src/other.cpp").read_text() == "int a;\nint x;\nint b;\nint c;\n"
    for path in dest.rglob("*"):
        os.utime(path, (1, 1))

    (project.vendor / "patches" / "0002-other.patch").unlink()
    project.write_patch(
        "0003-cmake.patch", "--- a/CMakeLists.txt\n+++ b/CMakeLists.txt\n@@ -1 +1,2 @@\n project(up)\n+x()\n"
    )
    assert project.apply("--dest", dest) == 0
    assert (dest / "src/other.cpp").read_text() == UPSTREAM["src/other.cpp"]
    assert (dest / "CMakeLists.txt").read_text() == "project(up)\nx()\n"
    # what did not change keeps its time, so that a build there does not compile it again
    fresh = [path for path in dest.rglob("*") if path.is_file() and path.stat().st_mtime > 1]
    assert {path.relative_to(dest).as_posix() for path in fresh} == {"CMakeLists.txt", "src/other.cpp", vendor.STAMP}


def test_dest_keeps_edits(project, capsys):
    dest = project.root / "dest"
    assert project.apply("--dest", dest) == 0
    (dest / "src/graph.cpp").write_text("edited\n")
    assert project.apply("--dest", dest) == 0
    capsys.readouterr()
    project.write_patch("0001-graph.patch", PATCH.replace("hook()", "hook2()"))
    assert project.apply("--dest", dest) == 1
    assert f"{dest / 'src/graph.cpp'} was edited by hand" in failure(capsys)
    assert (dest / "src/graph.cpp").read_text() == "edited\n"


def test_dest_that_holds_something_else(project, capsys):
    assert project.apply("--dest", project.vendor) == 1
    assert f"{project.vendor} is not a tree made by 'vendor.py apply'" in failure(capsys)
    assert sorted(path.name for path in project.vendor.iterdir()) == ["patches", "pin.json"]


def test_dest_from_another_upstream(project, capsys):
    dest = project.root / "dest"
    assert project.apply("--dest", dest) == 0
    capsys.readouterr()
    project.write_pin(make_archive(project.archive, "1.0", {**UPSTREAM, "src/other.cpp": "new\n"}))
    assert project.apply("--dest", dest) == 1
    assert f"{dest} was made from another upstream source" in failure(capsys)


def test_empty_dest(project):
    dest = project.root / "dest"
    dest.mkdir()
    assert project.apply("--dest", dest) == 0
    assert (dest / "src/graph.cpp").read_text() == PATCHED


#
# refresh
#


def test_refresh_round_trip(project, capsys):
    tree = project.root / "tree"
    assert project.apply("--dest", tree) == 0
    graph = PATCHED.replace("line 3\n", "line three\n").replace("hook();\n", "hook();\nhook2();\n")
    (tree / "src/graph.cpp").write_text(graph)
    (tree / "src/other.cpp").write_text("int a;\nint b;\nint x;\nint c;\n")
    assert project.run("refresh", "--tree", tree) == 0
    assert snapshot(project.vendor / "patches") == {
        "0001-graph.patch": b"Call the hook after line 10.\n\n"
        b"--- a/src/graph.cpp\n+++ b/src/graph.cpp\n"
        b"@@ -2,3 +2,3 @@\n line 2\n-line 3\n+line three\n line 4\n"
        b"@@ -10,2 +10,4 @@\n line 10\n+hook();\n+hook2();\n line 11\n",
        "0002-other.patch": b"--- a/src/other.cpp\n+++ b/src/other.cpp\n@@ -2,2 +2,3 @@\n int b;\n+int x;\n int c;\n",
    }
    capsys.readouterr()
    assert project.run("apply") == 0
    fresh = Path(capsys.readouterr().out.strip())
    assert (fresh / "src/graph.cpp").read_text() == graph
    assert (fresh / "src/other.cpp").read_text() == "int a;\nint b;\nint x;\nint c;\n"

    # a second refresh has nothing to do, and the tree is up to date
    assert project.run("refresh", "--tree", tree) == 0
    assert project.apply("--dest", tree) == 0
    assert capsys.readouterr().out == f"{tree}\n"


def test_refresh_deletes_the_patch_of_a_restored_file(project, capsys):
    tree = project.root / "tree"
    assert project.apply("--dest", tree) == 0
    (tree / "src/graph.cpp").write_text(GRAPH)
    assert project.run("refresh", "--tree", tree) == 0
    assert "src/graph.cpp is as upstream has it" in capsys.readouterr().out
    assert snapshot(project.vendor / "patches") == {}


def test_refresh_refuses_a_tree_behind_the_patches(project, capsys):
    tree = project.root / "tree"
    assert project.apply("--dest", tree) == 0
    capsys.readouterr()
    path = project.write_patch("0001-graph.patch", PATCH.replace("hook()", "hook2()"))
    assert project.run("refresh", "--tree", tree) == 1
    assert f"the patches changed since {tree} was made" in failure(capsys)
    assert "hook2()" in path.read_text()


def test_refresh_needs_a_tree_of_ours(project, capsys):
    assert project.run("refresh", "--archive", project.archive, "--tree", project.root / "gone") == 1
    assert "is not a tree made by 'vendor.py apply'" in failure(capsys)


def test_refresh_leaves_new_files_out(project, capsys):
    tree = project.root / "tree"
    assert project.apply("--dest", tree) == 0
    (tree / "src/mine.cpp").write_text("int mine;\n")
    assert project.run("refresh", "--tree", tree) == 0
    assert "the overlay): src/mine.cpp" in capsys.readouterr().err
    assert list(snapshot(project.vendor / "patches")) == ["0001-graph.patch"]


def test_refresh_refuses_a_deleted_file(project, capsys):
    tree = project.root / "tree"
    assert project.apply("--dest", tree) == 0
    capsys.readouterr()
    (tree / "run.sh").unlink()
    assert project.run("refresh", "--tree", tree) == 1
    assert f"{tree / 'run.sh'} is missing" in failure(capsys)


#
# check and bump
#


def test_check_counts_added_lines(project, capsys):
    assert project.run("check", "--archive", project.archive) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0001-graph.patch: src/graph.cpp, 1 added lines",
        "1 patches, 1 added lines (limit 300)",
    ]


def test_check_fails_above_the_limit(project, capsys):
    def patch(count):
        return (
            f"--- a/src/graph.cpp\n+++ b/src/graph.cpp\n@@ -1 +1,{count + 1} @@\n line 1\n" + "+more();\n" * count
        )

    project.write_patch("0001-graph.patch", patch(300))
    assert project.run("check", "--archive", project.archive) == 0
    project.write_patch("0001-graph.patch", patch(301))
    assert project.run("check", "--archive", project.archive) == 1
    assert "adds 301 lines, more than 300" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a pin"),
        ('{"version": "1"}', "is not a pin"),
        ('{"sha256": "0", "skip": []}', "is not a pin"),
        (None, "is missing"),
    ],
)
def test_bad_pin(project, capsys, text, reason):
    path = project.vendor / "pin.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert project.run("check", "--archive", project.archive) == 1
    assert f"{path} {reason}" in failure(capsys)


def test_bump_pins_a_release_that_takes_every_patch(project, capsys):
    archive = project.root / "up-1.1.tar.gz"
    sha256 = make_archive(archive, "1.1", {**UPSTREAM, "src/graph.cpp": "line 0\n" + GRAPH})
    assert project.run("bump", "1.1", "--archive", archive) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0001-graph.patch: applies; hunk 1 moved from line 10 to 11",
        "1.1 (commit abc1234de): 1 of 1 patches apply",
    ]
    pin = json.loads((project.vendor / "pin.json").read_text())
    assert pin == {
        "project": "up",
        "version": "1.1",
        "archive": "up-1.1.tar.gz",
        "sha256": sha256,
        "subdir": "up-1.1/vendor/llama.cpp",
        "commit": "abc1234de",
        "skip": ["docs"],
    }
    assert project.run("apply") == 0  # the archive is in the cache
    tree = Path(capsys.readouterr().out.strip())
    assert (tree / "src/graph.cpp").read_text() == "line 0\n" + PATCHED


def test_bump_keeps_the_pin_when_a_patch_fails(project, capsys):
    before = (project.vendor / "pin.json").read_bytes()
    archive = project.root / "up-1.1.tar.gz"
    make_archive(archive, "1.1", {**UPSTREAM, "src/graph.cpp": "rewritten\n"})
    assert project.run("bump", "1.1", "--archive", archive) == 1
    out, err = capsys.readouterr()
    assert "0001-graph.patch: FAILS: " in out and "0 of 1 patches apply" in out
    assert "is unchanged, 1 patches do not apply" in err
    assert (project.vendor / "pin.json").read_bytes() == before
    assert list(project.cache.iterdir()) == []

    assert project.run("bump", "1.1", "--archive", archive, "--force") == 0
    assert json.loads((project.vendor / "pin.json").read_text())["version"] == "1.1"


def test_bump_points_at_a_doubtful_place(project, capsys):
    archive = project.root / "up-1.1.tar.gz"
    make_archive(archive, "1.1", {**UPSTREAM, "src/graph.cpp": GRAPH + "line 10\nline 11\n"})
    assert project.run("bump", "1.1", "--archive", archive) == 0
    assert "applies; hunk 1 is at its line, but its context is at 2 places" in capsys.readouterr().out


#
# command line
#


@pytest.mark.parametrize("args", [[], ["no-such"], ["apply", "--no-such"], ["bump"], ["bump", "-x"], ["bump", "a;b"]])
def test_bad_usage_exits_2(args):
    done = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "usage: vendor.py" in done.stderr


def test_debug_shows_the_traceback(project, monkeypatch):
    monkeypatch.setenv("LLAMAMIX_DEBUG", "1")
    with pytest.raises(vendor.VendorError):
        project.run("fetch", "--archive", "gone")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "a"))
    assert vendor.default_cache() == tmp_path / "a"
    monkeypatch.delenv("LLAMAMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert vendor.default_cache() == tmp_path / "b" / "llamamix"


#
# the repository's own queue
#


def test_own_patches_only_insert_call_sites():
    patches = vendor.read_patches(SCRIPT.parent.parent / "vendor")
    assert sum(patch.added for patch in patches) <= vendor.MAX_ADDED_LINES
    for patch in patches:
        assert patch.header.strip(), f"{patch.path} does not say what it is for"


def test_the_readme_says_how_much_is_patched() -> None:
    patches = vendor.read_patches(SCRIPT.parent.parent / "vendor")
    readme = " ".join((TOOLS.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(patches)} patches that add {sum(patch.added for patch in patches)} lines" in readme
