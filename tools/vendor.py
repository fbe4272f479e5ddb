#!/usr/bin/env python3
"""Fetches the pinned upstream source, checks it, and applies the patch queue in vendor/patches.

Needs Python 3.10 and nothing else: CMake calls it on machines that have neither git nor patch.
stdout carries results (the path of a tree, a report); everything said along the way goes to stderr.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent

# The patches only insert call sites; more lines than this means that logic leaked out of the overlay.
MAX_ADDED_LINES = 300

# Written into every patched tree: what it was made from, and what each patched file held then.
STAMP = ".llamamix.json"


class VendorError(Exception):
    """A failure that one sentence explains; the message names the file and what to do."""


def say(text: str) -> None:
    print(f"vendor.py: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# files


def default_cache() -> Path:
    """The folder shared by all checkouts and builds of one user."""
    if path := os.environ.get("LLAMAMIX_CACHE"):
        return Path(path).absolute()
    if path := os.environ.get("XDG_CACHE_HOME"):
        return Path(path).absolute() / "llamamix"
    if sys.platform == "win32" and (path := os.environ.get("LOCALAPPDATA")):
        return Path(path) / "llamamix" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llamamix"
    return Path.home() / ".cache" / "llamamix"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(tree: Path, skip: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in list_tree(tree, skip):
        digest.update(f"{name}\0{sha256_file(tree / name)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def list_tree(tree: Path, skip: tuple[str, ...] = ()) -> list[str]:
    """The files below tree as sorted POSIX paths, without the top-level entries in skip."""
    names = []
    for folder, folders, files in os.walk(tree):
        if Path(folder) == tree:
            folders[:] = [name for name in folders if name not in skip]
            files = [name for name in files if name not in skip]
        names += [(Path(folder) / name).relative_to(tree).as_posix() for name in files]
    return sorted(names)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder beside the final place, so that the last step can be a rename."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=parent) as path:
        yield Path(path)


def place_tree(made: Path, final: Path) -> None:
    """Renames a finished tree to its place; when another run was faster, its tree stays."""
    try:
        made.rename(final)
    except OSError:
        if not (final / STAMP).is_file():
            raise


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step."""
    with scratch(path.parent) as tmp:
        new = tmp / path.name
        new.write_bytes(data)
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)


# ---------------------------------------------------------------------------------------------------------------------
# pin


@dataclass(frozen=True)
class Pin:
    """Which upstream source is built: one archive, known by its hash."""

    project: str
    version: str
    archive: str
    sha256: str
    subdir: str  # where the wanted tree lies in the archive
    commit: str
    skip: tuple[str, ...]  # top-level entries of that tree that no build needs

    @property
    def ident(self) -> str:
        """Names an unpacked tree: changes when the archive or what is taken from it does."""
        return sha256("\n".join([self.sha256, self.subdir, *self.skip]).encode())

    @staticmethod
    def load(path: Path) -> Pin:
        try:
            values = json.loads(path.read_text("utf-8"))
            pin = Pin(**{**values, "skip": tuple(values["skip"])})
        except FileNotFoundError:
            raise VendorError(f"{path} is missing: restore it from version control") from None
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(field.name for field in fields(Pin))
            raise VendorError(f"{path} is not a pin ({error}): it needs {names}") from error
        if not re.fullmatch(r"[0-9a-f]{64}", pin.sha256):
            raise VendorError(f"{path}: sha256 must be 64 lower-case hex digits")
        return pin

    def save(self, path: Path) -> None:
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        write_file(path, (json.dumps(values, indent=2) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# patches


@dataclass(frozen=True)
class Hunk:
    start: int  # first line in the old file, from 1
    old: list[str]
    new: list[str]
    added: int


@dataclass(frozen=True)
class Patch:
    """One patch file: free text, then the hunks for exactly one upstream file."""

    path: Path
    header: str
    target: str
    hunks: list[Hunk]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def added(self) -> int:
        return sum(hunk.added for hunk in self.hunks)


def split_lines(text: str) -> list[str]:
    """Lines with their ends; unlike str.splitlines it splits at newlines only."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def read_patch(path: Path) -> Patch:
    lines = split_lines(decode(path.read_bytes()))
    first = next(
        (i for i in range(len(lines) - 1) if lines[i].startswith("--- ") and lines[i + 1].startswith("+++ ")), None
    )
    if first is None:
        raise VendorError(f"{path} is not a unified diff: no '--- a/FILE' line followed by '+++ b/FILE'")
    old, new = (line[4:].split("\t")[0].strip() for line in lines[first : first + 2])
    target = old[2:]
    if not (old.startswith("a/") and new == f"b/{target}") or not is_safe_name(target):
        raise VendorError(f"{path} must change one file in place ('--- a/FILE', '+++ b/FILE'), not {old} to {new}")

    hunks: list[Hunk] = []
    i = first + 2
    while i < len(lines):
        where = f"{path}: hunk {len(hunks) + 1} (line {i + 1})"
        match = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", lines[i])
        if match is None:
            raise VendorError(f"{where} should start with '@@ -A,B +C,D @@'; a patch file changes one file only")
        n_old, n_new = (int(count or 1) for count in match.group(2, 3))
        if n_old == 0:
            raise VendorError(f"{where} has no context: make it with at least one line of context")
        start = i = i + 1
        while i < len(lines) and not lines[i].startswith("@@ "):
            if lines[i][0] not in " -+":
                raise VendorError(f"{path}: line {i + 1} starts with neither ' ', '-' nor '+': {lines[i].rstrip()!r}")
            i += 1
        body = lines[start:i]
        hunk = Hunk(
            start=int(match.group(1)),
            old=[line[1:] for line in body if line[0] != "+"],
            new=[line[1:] for line in body if line[0] != "-"],
            added=sum(line[0] == "+" for line in body),
        )
        if (len(hunk.old), len(hunk.new)) != (n_old, n_new):
            raise VendorError(
                f"{where} holds {len(hunk.old)} old and {len(hunk.new)} new lines, its header says {n_old} and {n_new}"
            )
        hunks.append(hunk)
    if not hunks:
        raise VendorError(f"{path} holds no hunk: delete it")
    return Patch(path, "".join(lines[:first]), target, hunks)


def is_safe_name(name: str) -> bool:
    """Whether a path from an archive or a patch stays below the folder it is meant for."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or ":" in name)


def read_patches(vendor: Path) -> list[Patch]:
    patches = [read_patch(path) for path in sorted((vendor / "patches").glob("*.patch"))]
    seen: dict[str, Patch] = {}
    for patch in patches:
        if other := seen.get(patch.target):
            raise VendorError(f"{other.path} and {patch.path} both change {patch.target}: make them one patch")
        seen[patch.target] = patch
    return patches


def patches_ident(patches: list[Patch]) -> str:
    return sha256(b"".join(sha256(patch.path.read_bytes()).encode() + patch.name.encode() for patch in patches))


def find_places(lines: list[str], hunk: Hunk) -> list[int]:
    size = len(hunk.old)
    return [i for i in range(len(lines) - size + 1) if lines[i : i + size] == hunk.old]


def apply_patch(patch: Patch, text: str) -> tuple[str, list[str]]:
    """The patched text, and a note for every hunk that a reader should look at.

    A hunk matches exactly: at the line it states or, when it is not there, at the only other place.
    """
    lines = split_lines(text)
    result: list[str] = []
    notes: list[str] = []
    done = 0
    for number, hunk in enumerate(patch.hunks, 1):
        where = f"{patch.path}: hunk {number} does not apply to {patch.target}"
        places = find_places(lines, hunk)
        at = hunk.start - 1
        if not places:
            raise VendorError(f"{where}: its context is not in the file, make the change by hand and run 'refresh'")
        if at in places:
            if len(places) > 1:
                notes.append(f"hunk {number} is at its line, but its context is at {len(places)} places")
        elif len(places) > 1:
            found = ", ".join(str(place + 1) for place in places)
            raise VendorError(f"{where}: its context moved and is at lines {found}, correct the line in its header")
        else:
            at = places[0]
            notes.append(f"hunk {number} moved from line {hunk.start} to {at + 1}")
        if at < done:
            raise VendorError(f"{where}: it overlaps hunk {number - 1}, make the two one")
        result += lines[done:at] + hunk.new
        done = at + len(hunk.old)
    return "".join(result + lines[done:]), notes


def read_target(patch: Patch, tree: Path) -> str:
    try:
        return decode((tree / patch.target).read_bytes())
    except OSError:
        raise VendorError(f"{patch.path}: hunk 1 does not apply: upstream has no file {patch.target}") from None


def patched_files(patches: list[Patch], pristine: Path) -> dict[str, bytes]:
    return {patch.target: encode(apply_patch(patch, read_target(patch, pristine))[0]) for patch in patches}


def format_patch(header: str, target: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(split_lines(old), split_lines(new), f"a/{target}", f"b/{target}", n=1)
    return header + "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# upstream


@dataclass(frozen=True)
class Upstream:
    """An unpatched source tree, never written to, and a name for what it holds."""

    tree: Path
    ident: str


def download(project: str, version: str, folder: Path) -> Path:
    """Downloads the source archive of a release with pip, which knows the user's index and certificates."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        found = shutil.which("pip3") or shutil.which("pip")
        if not found:
            raise VendorError(f"fetching {project} {version} needs pip: install it, or give a copy with --archive FILE")
        pip = [found]
    done = subprocess.run(
        [*pip, "download", "--no-input", "--no-deps", "--no-binary", project, "-d", folder, f"{project}=={version}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    files = list(folder.glob("*.tar.gz"))
    if done.returncode != 0 or len(files) != 1:
        lines = done.stdout.splitlines() or ["it said nothing"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise VendorError(
            f"pip could not fetch {project} {version} ({reason.strip()}): "
            "check the network, or give a copy with --archive FILE"
        )
    return files[0]


def verify(path: Path, pin: Pin) -> None:
    actual = sha256_file(path)
    if actual != pin.sha256:
        raise VendorError(f"{path} has sha256 {actual}, the pin asks for {pin.sha256}: get {pin.archive} again")


def fetch(pin: Pin, cache: Path, archive: Path | None) -> Path:
    """The pinned archive in the cache, checked."""
    target = cache / pin.archive
    if archive is None and target.is_file():
        if sha256_file(target) == pin.sha256:
            return target
        say(f"{target} is damaged, fetching it again")
    with scratch(cache) as tmp:
        if archive is not None:
            if not archive.is_file():
                raise VendorError(f"{archive} is not a file: give the path of {pin.archive}")
            verify(archive, pin)
            new = Path(shutil.copyfile(archive, tmp / pin.archive))
        else:
            say(f"fetching {pin.project} {pin.version} into {cache}")
            new = download(pin.project, pin.version, tmp)
            verify(new, pin)
        os.replace(new, target)
    return target


def unpack(archive: Path, pin: Pin, folder: Path) -> None:
    """Writes the wanted part of the archive to folder. Regular files only: links could lead outside."""
    prefix = pin.subdir.rstrip("/") + "/"
    count = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not is_safe_name(member.name):
                    raise VendorError(f"{archive} holds the unsafe path {member.name!r}: do not use it")
                name = member.name.removeprefix(prefix)
                if name == member.name or name.split("/")[0] in pin.skip or member.isdir():
                    continue
                if not member.isfile():
                    raise VendorError(f"{archive} holds {member.name!r}, which is no regular file: do not use it")
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
                count += 1
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise VendorError(f"{archive} cannot be unpacked ({error}): delete it and fetch it again") from error
    if count == 0:
        raise VendorError(f"{archive} holds nothing below {pin.subdir}: correct subdir in the pin")


def get_upstream(pin: Pin, cache: Path, archive: Path | None, source: Path | None) -> Upstream:
    if source is not None:
        if not (source / "CMakeLists.txt").is_file():
            raise VendorError(f"{source} is no llama.cpp source tree: it has no CMakeLists.txt")
        return Upstream(source, sha256_tree(source, pin.skip))
    tree = cache / f"upstream-{pin.version}-{pin.ident[:12]}"
    if archive is not None or not tree.is_dir():
        file = fetch(pin, cache, archive)
        if not tree.is_dir():
            with scratch(cache) as tmp:
                unpack(file, pin, tmp / "tree")
                write_stamp(tmp / "tree", {"upstream": pin.ident})
                place_tree(tmp / "tree", tree)
    return Upstream(tree, pin.ident)


# ---------------------------------------------------------------------------------------------------------------------
# patched trees


def write_stamp(tree: Path, stamp: dict) -> None:
    write_file(tree / STAMP, (json.dumps(stamp, indent=1, sort_keys=True) + "\n").encode())


def read_stamp(tree: Path) -> dict:
    try:
        stamp = json.loads((tree / STAMP).read_text("utf-8"))
    except (OSError, ValueError):
        stamp = {}
    if "patches" not in stamp:
        raise VendorError(f"{tree} is not a tree made by 'vendor.py apply': choose another folder, or delete it")
    return stamp


def make_stamp(upstream: Upstream, patches: list[Patch], files: dict[str, bytes]) -> dict:
    return {
        "upstream": upstream.ident,
        "patches": patches_ident(patches),
        "files": {name: sha256(data) for name, data in files.items()},
    }


def make_tree(upstream: Upstream, skip: tuple[str, ...], files: dict[str, bytes], stamp: dict, final: Path) -> None:
    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in skip] if Path(folder) == upstream.tree else []

    with scratch(final.parent) as tmp:
        tree = tmp / "tree"
        shutil.copytree(upstream.tree, tree, ignore=ignore)
        for name, data in files.items():
            (tree / name).write_bytes(data)
        write_stamp(tree, stamp)
        place_tree(tree, final)


def update_tree(upstream: Upstream, files: dict[str, bytes], stamp: dict, tree: Path) -> None:
    """Brings a tree to the present patches. Writes only what changed, so that a build there compiles only that."""
    old = read_stamp(tree)
    if old == stamp:
        return
    if old["upstream"] != stamp["upstream"]:
        raise VendorError(f"{tree} was made from another upstream source: delete it and run again")
    todo = {}
    for name in sorted({*old["files"], *files}):
        pristine = (upstream.tree / name).read_bytes()
        want = files.get(name, pristine)
        have = (tree / name).read_bytes()
        if have == want:
            continue
        if sha256(have) != old["files"].get(name, sha256(pristine)):
            raise VendorError(
                f"{tree / name} was edited by hand and the patches changed since: undo one of the two, or delete {tree}"
            )
        todo[name] = want
    for name, data in todo.items():
        write_file(tree / name, data)
    write_stamp(tree, stamp)


def apply(vendor: Path, pin: Pin, cache: Path, upstream: Upstream, dest: Path | None) -> Path:
    patches = read_patches(vendor)
    files = patched_files(patches, upstream.tree)
    stamp = make_stamp(upstream, patches, files)
    key = sha256((stamp["upstream"] + stamp["patches"]).encode())[:12]
    tree = dest or cache / f"patched-{pin.version}-{key}"
    if tree.is_dir() and not any(tree.iterdir()):
        tree.rmdir()
    if not tree.exists():
        say(f"making {tree} ({len(patches)} patches)")
        make_tree(upstream, pin.skip, files, stamp, tree)
    if dest:
        update_tree(upstream, files, stamp, tree)
    return tree


def refresh(vendor: Path, pin: Pin, upstream: Upstream, tree: Path) -> None:
    """Writes the patch queue anew from what differs between a tree and upstream."""
    patches = {patch.target: patch for patch in read_patches(vendor)}
    stamp = read_stamp(tree)
    if stamp["upstream"] != upstream.ident:
        raise VendorError(f"{tree} was made from another upstream source: make a new one with 'apply --dest'")
    if stamp["patches"] != patches_ident(list(patches.values())):
        raise VendorError(f"the patches changed since {tree} was made: run 'apply --dest {tree}' first")

    names = list_tree(upstream.tree, (*pin.skip, STAMP))
    for name in sorted({*list_tree(tree, (*pin.skip, STAMP))} - {*names}):
        say(f"left out, upstream has no such file (new files belong in the overlay): {name}")
    folder = vendor / "patches"
    number = max((int(m[0]) for p in patches.values() if (m := re.match(r"\d+", p.name))), default=0)
    made: dict[str, bytes] = {}
    for name in names:
        if not (tree / name).is_file():
            raise VendorError(f"{tree / name} is missing: a patch cannot delete a file, restore it")
        data = (tree / name).read_bytes()
        pristine = (upstream.tree / name).read_bytes()
        if data == pristine:
            continue
        old, new = decode(pristine), decode(data)
        if not (old.endswith("\n") and new.endswith("\n")):
            raise VendorError(f"{tree / name} does not end in a newline: patches here cannot express that")
        patch = patches.pop(name, None)
        if patch is None:
            number += 1
        path = patch.path if patch else folder / f"{number:04}-{Path(name).stem}.patch"
        made[path.name] = encode(format_patch(patch.header if patch else "", name, old, new))
    for name, data in made.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)
            print(f"wrote {path}")
    for patch in patches.values():
        patch.path.unlink()
        print(f"deleted {patch.path}: {patch.target} is as upstream has it")
    fresh = read_patches(vendor)
    write_stamp(tree, make_stamp(upstream, fresh, patched_files(fresh, upstream.tree)))


# ---------------------------------------------------------------------------------------------------------------------
# checks and bumps


def check(vendor: Path, upstream: Upstream) -> None:
    patches = read_patches(vendor)
    for patch in patches:
        notes = apply_patch(patch, read_target(patch, upstream.tree))[1]
        for note in notes:
            if "moved" in note:
                say(f"{patch.name}: {note}; 'refresh' corrects the line numbers")
        print(f"{patch.name}: {patch.target}, {patch.added} added lines")
    added = sum(patch.added for patch in patches)
    print(f"{len(patches)} patches, {added} added lines (limit {MAX_ADDED_LINES})")
    if added > MAX_ADDED_LINES:
        raise VendorError(
            f"{vendor / 'patches'} adds {added} lines, more than {MAX_ADDED_LINES}: move code to the overlay"
        )


def read_commit(archive: Path) -> str:
    """The upstream commit that the archive's change log names first."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if re.fullmatch(r"[^/]+/CHANGELOG\.md", member.name):
                text = decode(tar.extractfile(member).read())
                if match := re.search(r"llama\.cpp@([0-9a-f]{7,40})", text):
                    return match[1]
    return "unknown"


def bump(vendor: Path, pin: Pin, cache: Path, version: str, archive: Path | None, force: bool) -> None:
    patches = read_patches(vendor)
    with scratch(cache) as tmp:
        if archive is not None:
            if not archive.is_file():
                raise VendorError(f"{archive} is not a file: give the path of the archive of {pin.project} {version}")
            file = Path(shutil.copyfile(archive, tmp / archive.name))
        else:
            say(f"fetching {pin.project} {version}")
            file = download(pin.project, version, tmp)
        new = replace(
            pin,
            version=version,
            archive=file.name,
            sha256=sha256_file(file),
            subdir=pin.subdir.replace(pin.version, version),
        )
        unpack(file, new, tmp / "tree")
        new = replace(new, commit=read_commit(file))
        failed = 0
        for patch in patches:
            try:
                notes = apply_patch(patch, read_target(patch, tmp / "tree"))[1]
                print("; ".join([f"{patch.name}: applies", *notes]))
            except VendorError as error:
                failed += 1
                print(f"{patch.name}: FAILS: {error}")
        print(f"{version} (commit {new.commit}): {len(patches) - failed} of {len(patches)} patches apply")
        if failed and not force:
            raise VendorError(
                f"{vendor / 'pin.json'} is unchanged, {failed} patches do not apply: --force pins {version} anyway"
            )
        os.replace(file, cache / new.archive)
    new.save(vendor / "pin.json")
    say(f"{vendor / 'pin.json'} now pins {version}; the rest of the checklist is in vendor/README.md")


# ---------------------------------------------------------------------------------------------------------------------
# command line


def env_path(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).absolute() if value else None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def folder(text: str) -> Path:
        return Path(text).absolute()

    def release(text: str) -> str:
        if not re.fullmatch(r"[0-9][0-9A-Za-z.+!]*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is no version")
        return text

    parser = argparse.ArgumentParser(
        prog="vendor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--vendor", type=folder, default=ROOT / "vendor", metavar="DIR", help="holds pin.json and patches/")
    option("--cache", type=folder, default=default_cache(), metavar="DIR", help="shared folder (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    archive = argparse.ArgumentParser(add_help=False)
    archive.add_argument(
        "--archive",
        type=folder,
        default=env_path("LLAMAMIX_UPSTREAM_ARCHIVE"),
        metavar="FILE",
        help="a copy of the archive (default: $LLAMAMIX_UPSTREAM_ARCHIVE)",
    )
    upstream = argparse.ArgumentParser(add_help=False, parents=[archive])
    upstream.add_argument(
        "--source",
        type=folder,
        default=env_path("LLAMAMIX_UPSTREAM_SOURCE"),
        metavar="DIR",
        help="an unpacked llama.cpp to take instead of the archive (default: $LLAMAMIX_UPSTREAM_SOURCE)",
    )

    commands.add_parser("fetch", parents=[archive], help="get the pinned archive into the cache and print its path")

    command = commands.add_parser("apply", parents=[upstream], help="make a patched tree and print its path")
    command.add_argument("--dest", type=folder, metavar="DIR", help="make or update it here instead of in the cache")

    command = commands.add_parser("refresh", parents=[upstream], help="write the patches anew from an edited tree")
    command.add_argument(
        "--tree",
        type=folder,
        default=ROOT / "build" / "cpu" / "llama.cpp",
        metavar="DIR",
        help="made by 'apply --dest' (default: %(default)s)",
    )

    commands.add_parser("check", parents=[upstream], help="check pin, archive and patches")

    command = commands.add_parser("bump", parents=[archive], help="try the patches on another release and pin it")
    command.add_argument("version", type=release, metavar="VERSION")
    command.add_argument("--force", action="store_true", help="pin it although patches fail")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    pin = Pin.load(args.vendor / "pin.json")
    if args.command == "fetch":
        print(fetch(pin, args.cache, args.archive))
        return
    if args.command == "bump":
        bump(args.vendor, pin, args.cache, args.version, args.archive, args.force)
        return
    if args.command == "check" and args.source is None:
        fetch(pin, args.cache, args.archive)
    upstream = get_upstream(pin, args.cache, args.archive, args.source)
    if args.command == "apply":
        print(apply(args.vendor, pin, args.cache, upstream, args.dest))
    elif args.command == "refresh":
        refresh(args.vendor, pin, upstream, args.tree)
    else:
        check(args.vendor, upstream)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (VendorError, OSError) as error:
        if os.environ.get("LLAMAMIX_DEBUG") == "1":
            raise
        known = isinstance(error, VendorError) or not error.filename
        print(f"error: {error if known else f'{error.filename}: {error.strerror}'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing half-done is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # so that a build which is cancelled removes its temporary folders too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
