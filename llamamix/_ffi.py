"""libllama through cffi in ABI mode: where it is found, how it is checked, and its log.

The library is loaded by the first use of ``lib``, not by importing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cffi

from .errors import LibraryError

ffi: Any = cffi.FFI()

log = logging.getLogger("llamamix")
log.addHandler(logging.NullHandler())

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent

# structs that cross the interface by value or are filled by the library
_STRUCTS = (
    "llama_model_params",
    "llama_model_quantize_params",
    "llama_context_params",
    "llama_batch",
    "llama_kv_mixed_params",
    "llama_kv_mixed_stats",
    "llama_kv_mixed_event",
    "llama_kv_mixed_format_info",
    "llama_kv_mixed_preset",
    "llama_kv_mixed_layer",
    "llama_kv_mixed_layer_error",
    "llama_kv_mixed_shape",
    "llama_kv_mixed_tier",
    "llama_kv_mixed_cell",
    "llama_kv_mixed_ubatch",
    "llama_kv_mixed_attn_args",
    "llama_sampler_chain_params",
    "llama_perf_context_data",
    "llama_chat_message",
)


#
# finding
#


def _installed(suffix: str) -> list[Path]:
    """Files of the installed distribution whose path ends so; an editable install keeps them away from the package."""
    try:
        files = importlib.metadata.files("llamamix") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(f.locate()) for f in files if f.as_posix().endswith(suffix)]


def _file_name(name: str) -> str:
    if sys.platform == "win32":
        return f"{name}.dll"
    return f"lib{name}.dylib" if sys.platform == "darwin" else f"lib{name}.so"


def _lib_dirs() -> list[Path]:
    env = os.environ.get("LLAMAMIX_LIB_PATH")
    if env:
        return [Path(env)]  # asked for by name: no other library may stand in for it
    installed = {p.parent for p in _installed(f"llamamix/lib/{_file_name('llama')}")}
    return [_PACKAGE / "lib", *sorted(installed), _CHECKOUT / "build" / "cpu" / "bin"]


def library_file() -> Path:
    """The libllama to load. Raises LibraryError when there is none."""
    dirs = _lib_dirs()
    for folder in dirs:
        path = folder / _file_name("llama")
        if path.is_file():
            return path
    raise LibraryError(
        f"{_file_name('llama')} is in none of {', '.join(str(d) for d in dirs)};"
        " build it, or set LLAMAMIX_LIB_PATH to the folder that has it."
    )


def _decl_files() -> list[Path]:
    own = [_PACKAGE / "_decl" / name for name in ("llama.h", "ggml.h", "schema.h")]
    name = "llama-kv-mixed.decl.h"
    places = [
        _PACKAGE / "_decl" / name,
        *_installed(f"llamamix/_decl/{name}"),
        _CHECKOUT / "vendor" / "overlay" / "include" / name,
    ]
    for place in places:
        if place.is_file():
            return [*own, place]
    raise LibraryError(f"{name} is in none of {', '.join(str(p.parent) for p in places)}.")


for _file in _decl_files():
    ffi.cdef(_file.read_text(encoding="utf-8"))


#
# loading
#


class _Library:
    """libllama and the ggml libraries beside it as one namespace of C functions, loaded on first use."""

    _lock = threading.RLock()
    _handles: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        with self._lock:
            if not self._handles:
                self._load()
        for handle in self._handles:
            with contextlib.suppress(AttributeError):
                function = getattr(handle, name)
                setattr(self, name, function)  # __getattr__ is not asked again
                return function
        raise LibraryError(f"The loaded libllama has no function {name}().")

    def _load(self) -> None:
        path = library_file()
        folder = path.parent
        if sys.platform == "win32":
            os.add_dll_directory(str(folder.resolve()))

        handles = []
        for name in ("llama", "ggml-base", "ggml", "llamamix-schema"):
            file = folder / _file_name(name)
            if file.is_file():
                try:
                    handles.append(ffi.dlopen(str(file.resolve())))
                except OSError as error:
                    raise LibraryError(f"{file} can not be loaded: {error}") from None

        _check_layout(handles[0], path)
        self._handles = tuple(handles)
        self.llama_log_set(_C_ON_LOG, ffi.NULL)
        if self.ggml_backend_reg_count() == 0:  # a build whose backends are plug-ins
            self.ggml_backend_load_all_from_path(os.fsencode(folder))
        self.llama_backend_init()


def _check_layout(handle: Any, path: Path) -> None:
    try:
        sizeof = handle.llama_kv_mixed_sizeof
    except AttributeError:
        raise LibraryError(
            f"{path} is a libllama without the mixed KV cache (it has no llama_kv_mixed functions)."
        ) from None
    for name in _STRUCTS:
        ours, theirs = ffi.sizeof(f"struct {name}"), sizeof(name.encode())
        if ours != theirs:
            raise LibraryError(
                f"{path} does not match these bindings: struct {name} has {theirs} bytes there and {ours} here."
            )


lib: Any = _Library()


#
# what most functions need
#


def sized(c_type: str) -> Any:
    """A new struct, zeroed but for its size, which the library wants in it; ``c_type`` is a pointer type."""
    struct = ffi.new(c_type)
    struct.struct_size = ffi.sizeof(struct[0])
    return struct


def last_error() -> str:
    """Why the last function of the mixed cache's interface failed on this thread, without a full stop."""
    return " ".join(ffi.string(lib.llama_kv_mixed_last_error()).decode("utf-8", "replace").split()).rstrip(".")


#
# log
#

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_LEVEL_CONT = 5  # the text continues the line before

_thread = threading.local()  # .line: [level, text] not ended yet; .errors: list that collects error lines; .raised


def _on_log_raised(_type: Any, error: BaseException, _traceback: Any) -> None:
    # Ctrl-C or a logging handler's exception; C can not pass it on
    _thread.raised = error


def _on_log(level: int, text: Any, _user_data: Any) -> None:
    line = getattr(_thread, "line", None)
    if level != _LEVEL_CONT:
        if line is not None:
            _emit(*line)
        line = [_LEVELS.get(level, logging.INFO), ""]
        if line[0] < logging.ERROR and not log.isEnabledFor(line[0]):
            line = None  # every decode logs something, and it should cost nothing
    if line is None:
        _thread.line = None
        return
    line[1] += ffi.string(text).decode("utf-8", "replace")
    if line[1].endswith("\n"):
        _thread.line = None
        _emit(*line)
    else:
        _thread.line = line


_C_ON_LOG = ffi.callback("void(int32_t, char *, void *)", _on_log, onerror=_on_log_raised)


def _emit(level: int, text: str) -> None:
    text = text.strip("\n")
    if not text:
        return
    errors = getattr(_thread, "errors", None)
    if errors is not None and level >= logging.ERROR:
        errors.append(text)
    log.log(level, "%s", text)


class ErrorLines(list[str]):
    """Errors that the library logged."""

    def reason(self) -> str:
        """The first, which names the cause, on one line and without what all begin with; "" when there was none."""
        if not self:
            return ""
        text = " ".join(self[0].split())
        what = r"error loading (model|state|\w+ file)|failed to initialize the context|failed to quantize"
        return re.sub(rf"^\w+: (({what}): )?", "", text)


@contextlib.contextmanager
def error_lines() -> Iterator[ErrorLines]:
    """Collect what the library logs as errors on this thread, for the exception that follows.

    An exception that came up while it logged is raised at the end.
    """
    before = getattr(_thread, "errors", None)
    _thread.errors = lines = ErrorLines()
    try:
        yield lines
    finally:
        _thread.errors = before
        raised, _thread.raised = getattr(_thread, "raised", None), None
        if raised is not None:
            raise raised
