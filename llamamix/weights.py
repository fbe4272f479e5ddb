"""A model with its weights in another type, in the folder of what is pulled: expanded to F32, or requantised."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ._ffi import error_lines, ffi, lib
from .errors import ModelError, ParamsError
from .gguf_file import GgufFile, check_file, path_bytes
from .pull import models_dir, sha256_of_file

_SOURCE = "llamamix.expanded_from"  # metadata of an expanded file: the SHA-256 of the one that it was made of
_FILE_TYPE = "general.file_type"

#: What weights can be requantised to, by llama-quantize's names: the types that need no importance matrix.
TYPES: tuple[str, ...] = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip

#: Told what is being done, and the bytes done and in all.
Progress = Callable[[str, int, int], None]


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file, as hexadecimal digits. Raises OSError."""
    size = path.stat().st_size

    def advance_to(n_bytes: int) -> None:
        if progress is not None:
            progress(f"checking {path.name}", n_bytes, size)

    return sha256_of_file(path, advance_to)


def check_type(weights: str) -> str:
    """The type's name in lower case. Raises ParamsError for what is none of TYPES."""
    name = weights.strip().lower()
    if name not in TYPES:
        raise ParamsError(f"weights must be of {', '.join(TYPES)}, not {weights!r}.")
    return name


def expand(path: Path, progress: Progress | None = None) -> Path:
    """The path of a GGUF file with the same model, whose weights are all F32; it is made unless it is there.

    Every value is what gguf's own dequantisation makes of the file's. A file whose weights are F32 is returned itself.
    Raises ModelError when it is no GGUF file, has weights of a type that gguf can not expand, or can not be stored;
    nothing half-done is left behind.
    """
    import gguf

    check_file(path)
    source = sha256_of(path, progress)
    target = _copy_of(path, "F32", source)
    if target.is_file():
        return target
    reader = _read(path)
    if all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors):
        return path
    with _new_file(target) as file:
        _write(reader, file, source, progress)
        _check(reader, file, progress)
    return target


def requantise(path: Path, weights: str, progress: Progress | None = None) -> Path:
    """The path of a GGUF file with the same model, its weights of another type; it is made unless it is there.

    It is what llama-quantize makes of the file: the output matrix has more bits than a 4-bit type, and rows that the
    blocks of a type do not divide get another one. No F32 file is needed in between, as llama_model_quantize() expands
    each tensor to F32 itself; so what was quantised before gets the same values as from its expansion. For "f32" it is
    expand()'s file. A file that says it is of that type (``general.file_type``) is returned itself.

    Args:
        path: The file, which is only read.
        weights: One of TYPES.
        progress: Is told how far it is.

    Raises:
        ParamsError: When there is no such type.
        ModelError: When the file is missing, damaged, or of an architecture that llama.cpp does not know, and when the
            copy can not be stored; nothing half-done is left behind.
    """
    weights = check_type(weights)
    if weights == "f32":
        return expand(path, progress)
    file_type = _file_type(weights)
    if GgufFile(path).get(_FILE_TYPE) == file_type:
        return path
    target = _copy_of(path, weights.upper(), sha256_of(path, progress))
    if target.is_file():
        return target
    size = path.stat().st_size
    with _new_file(target) as file:
        if progress is not None:
            progress(f"requantising {path.name} to {weights}", 0, size)
        _quantise(path, file, weights, file_type)
        if progress is not None:
            progress(f"requantising {path.name} to {weights}", size, size)
    return target


def _copy_of(path: Path, type_: str, sha256: str) -> Path:
    return models_dir() / f"{_stem(path.name)}.{type_}-{sha256[:12]}.gguf"


def _stem(name: str) -> str:
    """A file's name without its ending and, where that comes before it, without the weights' type."""
    stem = name.removesuffix(".gguf")
    base, _, last = stem.rpartition(".")
    return base if base and last.upper().startswith(("Q", "IQ", "F16", "BF16", "F32")) else stem


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A path to write to, in a folder beside the target, which it becomes at the end unless something is raised."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".weights-", dir=target.parent) as folder:
            file = Path(folder) / target.name
            yield file
            os.replace(file, target)
    except OSError as error:
        raise ModelError(f"{target.name} can not be stored in {target.parent}: {error.strerror or error}.") from None


#
# requantised
#


def _file_type(weights: str) -> int:
    """The value of ``enum llama_ftype``."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if weights == "f32" else f"MOSTLY_{weights.upper()}"])


def _quantise(source: Path, target: Path, weights: str, file_type: int) -> None:
    params = ffi.new("struct llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    params.ftype = file_type
    params.allow_requantize = True
    with error_lines() as errors:
        failed = lib.llama_model_quantize(path_bytes(source), path_bytes(target), params)
    if failed:
        reason = errors.reason() or "libllama gives no reason"
        if "iostream" in reason:  # all that C++'s libraries say of a file that can not be written
            raise OSError("it can not be written to its end; there may be too little space")
        raise ModelError(f"{source} can not be requantised to {weights}: {reason.rstrip('.')}.")


#
# expanded
#


def _read(path: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except OSError as error:
        raise ModelError(f"{path} can not be read: {error.strerror}.") from None
    except Exception as error:  # the reader has no exception of its own for damaged files
        raise ModelError(f"{path} is not a GGUF file, or damaged ({error}).") from None


def _values(tensor: Any) -> np.ndarray:
    """A tensor's weights, float32 in ggml's order of dimensions turned round."""
    import gguf

    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(
            f"Weights of type {tensor.tensor_type.name} can not be expanded to F32: gguf does not know how."
        ) from None
    return np.ascontiguousarray(values, np.float32).reshape([int(n) for n in tensor.shape[::-1]])


def _write(reader: Any, path: Path, source: str, progress: Progress | None) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", _FILE_TYPE):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(_SOURCE, source)
    for tensor in reader.tensors:
        shape = [int(n) for n in tensor.shape[::-1]]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    n_all, n = sum(int(tensor.n_elements) for tensor in reader.tensors), 0
    try:
        for tensor in reader.tensors:
            writer.write_tensor_data(_values(tensor))
            n += int(tensor.n_elements)
            if progress is not None:
                progress(f"writing {path.name}", 4 * n, 4 * n_all)
    finally:
        writer.close()


def _check(reader: Any, path: Path, progress: Progress | None) -> None:
    """Read the file again and compare every weight. Raises ModelError."""
    import gguf

    copies = {tensor.name: tensor for tensor in _read(path).tensors}
    n_all, n = sum(int(tensor.n_elements) for tensor in reader.tensors), 0
    for tensor in reader.tensors:
        copy, values = copies.get(tensor.name), _values(tensor)
        if (
            copy is None
            or copy.tensor_type != gguf.GGMLQuantizationType.F32
            or copy.data.shape != values.shape
            or not np.array_equal(copy.data.view(np.uint32), values.view(np.uint32))
        ):
            raise ModelError(f"{path.name} was not written as it should be: {tensor.name} is another one.")
        n += int(tensor.n_elements)
        if progress is not None:
            progress(f"checking {path.name}", 4 * n, 4 * n_all)
