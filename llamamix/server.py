"""llama-server with the mixed KV cache, as a child process."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import ProgramError, ServerError
from .params import KVMixedParams
from .programs import find_program

_N_LINES_MAX = 200  # of the log, kept for the reason why a server ended
_READY = re.compile(r"\blistening on (\S+)")
_ERROR = re.compile(r"^(?:[\d.]+ E |error\b)")
_PREFIX = re.compile(r"^(?:[\d.]+ [A-Z] +|error: )")  # of a line of the log: time and level
_MARK = b"llama_kv_mixed_get_stats"  # a function that only our libllama has


def find_server() -> Path:
    """The llama-server to run: $LLAMAMIX_SERVER, else the one of this install, else one on the PATH.

    Raises:
        ServerError: When there is none.
    """
    own = os.environ.get("LLAMAMIX_SERVER")
    if own:
        path = Path(own)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ServerError(f"LLAMAMIX_SERVER names {own}, which is not a program.")
        return path
    try:
        return find_program("llama-server")
    except ProgramError as error:
        raise ServerError(str(error)) from None


def has_mixed_cache(server: Path) -> bool:
    """Whether a llama-server, or the libllama beside it, knows the mixed KV cache."""
    folder = server.resolve().parent
    libraries = [p for d in (folder, folder.parent / "lib") for p in (*d.glob("libllama.*"), *d.glob("llama.dll"))]
    return any(_contains(path, _MARK) for path in (server, *libraries))


def _contains(path: Path, text: bytes) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) != -1
    except (OSError, ValueError):  # not readable, or empty
        return False


class Server:
    """A llama-server that was started, and is stopped by leaving the ``with`` block.

    The child has a session of its own: Ctrl-C in a terminal reaches only those that pass it on.

    Args:
        args: Arguments of llama-server, such as ``["-m", "model.gguf", "--port", "0"]``.
        kv_mixed: The mixed KV cache; None: a plain one.
        program: The llama-server; None: what find_server() finds.
        environment: More variables for it.
        on_line: Is given every line of its log, by another thread.

    Attributes:
        url (str | None): Where it listens; None: it is not ready yet.

    Raises:
        ServerError: When there is no llama-server, or none with the mixed KV cache, and when it can not be run.
    """

    def __init__(
        self,
        args: Iterable[str | os.PathLike[str]],
        kv_mixed: KVMixedParams | None,
        *,
        program: Path | None = None,
        environment: dict[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        program = program or find_server()
        if kv_mixed is not None and not has_mixed_cache(program):
            raise ServerError(f"{program} is a llama-server without the mixed KV cache.")
        self._lines: deque[str] = deque(maxlen=_N_LINES_MAX)
        self._error: str | None = None
        self._on_line = on_line
        self._changed = threading.Event()  # it is ready, or has ended
        self.url: str | None = None
        variables = os.environ | (environment or {}) | {"LLAMA_KV_MIXED": kv_mixed.spec() if kv_mixed else "0"}
        variables.pop("LLAMA_ARG_KV_MIXED", None)  # it would come first
        try:
            self._process = subprocess.Popen(
                [program, *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=variables, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ServerError(f"{program} can not be run: {error.strerror or error}.") from None
        self._reader = threading.Thread(target=self._read, name="llama-server log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True until it has ended."""
        return self._process.poll() is None

    def wait_ready(self, timeout: float | None = None) -> str:
        """The URL of the server once it has loaded the model.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            ServerError: When it ends before that, with the reason from its log, or is too slow.
        """
        if not self._changed.wait(timeout):
            raise ServerError(f"llama-server is not ready after {timeout:g} s.")
        if self.url is None:
            code = self.wait()
            raise ServerError(f"llama-server ended at its start with code {code}: {self._reason()}.", code)
        return self.url

    def has_page(self, prefix: str = "") -> bool:
        """Whether a ready server has a web page. Some were built without one.

        Args:
            prefix: Of its paths, behind its URL.
        """
        request = urllib.request.Request(f"{self.url}{prefix}/", headers={"Accept-Encoding": "gzip"})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return str(reply.headers.get_content_type()) == "text/html"
        except OSError:
            return False

    def send_signal(self, number: int) -> None:
        """Send it a signal.

        Args:
            number: Such as ``signal.SIGINT``.
        """
        self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Args:
            timeout: Seconds; None: as long as it takes.

        Returns:
            The exit code, as a shell gives it: 128 + N when signal N ended the server.

        Raises:
            subprocess.TimeoutExpired: When it has not ended by then.
        """
        code = self._process.wait(timeout)
        self._reader.join()
        return 128 - code if code < 0 else code

    def stop(self, timeout: float = 30.0) -> int:
        """End the server if it runs.

        Args:
            timeout: Seconds, after which it is ended by force.

        Returns:
            The exit code, as wait() gives it.
        """
        self._process.terminate()
        try:
            return self.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for raw in stream:
                line = raw.decode("utf-8", "replace").rstrip()
                self._lines.append(line)
                if self._error is None and _ERROR.match(line):
                    self._error = line
                ready = _READY.search(line) if self.url is None else None
                if self._on_line is not None:
                    self._on_line(line)
                if ready:
                    self.url = ready[1]
                    self._changed.set()
        self._changed.set()

    def _reason(self) -> str:
        """The first error of the log, which names the cause; else its last line."""
        last = next((line for line in reversed(self._lines) if line), "it wrote nothing")
        return " ".join(_PREFIX.sub("", self._error or last).split()).rstrip(".")
