"""Models made from others: a GGUF file copied with changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf


def rewrite_gguf(
    source: Path,
    target: Path,
    *,
    arch: str | None = None,
    n_layer: int | None = None,
    drop: Sequence[str] = (),
    extra: dict[str, float | int | bool | list[int]] | None = None,
) -> Path:
    """Copy a GGUF file with all weights as F32, and return the path of the copy.

    arch     under another architecture
    n_layer  the first layers only
    drop     without tensors whose name one of these regular expressions matches
    extra    more metadata; keys without the architecture
    """
    reader = gguf.GGUFReader(source)
    old = reader.get_field("general.architecture").contents()
    arch = arch or old
    n_layer = n_layer or reader.get_field(f"{old}.block_count").contents()
    writer = gguf.GGUFWriter(target, arch)

    for key, part in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        array = part.types[0] == gguf.GGUFValueType.ARRAY
        value = n_layer if key == f"{old}.block_count" else part.contents()
        name = key.replace(f"{old}.", f"{arch}.", 1) if key.startswith(f"{old}.") else key
        writer.add_key_value(name, value, part.types[0], part.types[-1] if array else None)
    for key, value in (extra or {}).items():
        add: Any = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }[type(value)]
        add(f"{arch}.{key}", value)

    for tensor in reader.tensors:
        layer = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "0"
        if int(layer) < n_layer and not any(re.match(d, tensor.name) for d in drop):
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, data.reshape(tensor.shape[::-1]))

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
