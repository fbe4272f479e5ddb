"""A model with its weights expanded to F32, in the folder of what is pulled."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..pull import models_dir

_CHUNK = 1 << 20
_SOURCE = "llamamix.expanded_from"  # metadata of an expanded file: the SHA-256 of the one that it was made of
_ALL_F32 = 0  # general.file_type, LLAMA_FTYPE_ALL_F32

#: Told what is being done, and the bytes done and in all.
Progress = Callable[[str, int, int], None]


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file, as hexadecimal digits. Raises OSError."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    n_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            n_bytes += len(chunk)
            if progress is not None:
                progress(f"checking {path.name}", n_bytes, size)
    return digest.hexdigest()


def expand(path: Path, progress: Progress | None = None) -> Path:
    """The path of a GGUF file with the same model, whose weights are all F32; it is made unless it is there.

    Every value is what gguf's own dequantisation makes of the file's. A file whose weights are F32 is returned itself.
    Raises ModelError when it is no GGUF file, has weights of a type that gguf can not expand, or can not be stored;
    nothing half-done is left behind.
    """
    import gguf

    source = sha256_of(path, progress)
    target = models_dir() / f"{_stem(path.name)}.F32-{source[:12]}.gguf"
    if target.is_file():
        return target
    reader = _read(path)
    if all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors):
        return path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".expand-", dir=target.parent) as folder:
            file = Path(folder) / target.name
            _write(reader, file, source, progress)
            _check(reader, file, progress)
            os.replace(file, target)
    except OSError as error:
        raise ModelError(f"{target.name} can not be stored in {target.parent}: {error.strerror or error}.") from None
    return target


def _stem(name: str) -> str:
    """A file's name without its ending and, where that comes before it, without the weights' type."""
    stem = name.removesuffix(".gguf")
    base, _, last = stem.rpartition(".")
    return base if base and last.upper().startswith(("Q", "IQ", "F16", "BF16")) else stem


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
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_file_type(_ALL_F32)
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
