"""Parameters of a mixed KV cache that have a name: the library's own table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ._ffi import ffi, lib, sized


@dataclass(frozen=True)
class Preset:
    """Parameters that have a name: ``kv_mixed="quality"``, ``LLAMA_KV_MIXED=quality``.

    Attributes:
        name: What it is called.
        what: What it is good for.
        spec: Its parameters that are not the defaults, by the grammar of
            [KVMixedParams.parse][llamamix.KVMixedParams.parse].
    """

    name: str
    what: str
    spec: str


@cache
def _table() -> dict[str, Preset]:
    res: dict[str, Preset] = {}
    preset = sized("struct llama_kv_mixed_preset *")
    while lib.llama_kv_mixed_get_preset(len(res), preset) == 0:
        name, what, spec = (ffi.string(text).decode() for text in (preset.name, preset.what, preset.spec))
        res[name] = Preset(name, what, spec)
    return res


class _Presets(Mapping[str, Preset]):
    """The table as a mapping that asks the library for it when it is looked at, not when it is imported."""

    def __getitem__(self, name: str) -> Preset:
        return _table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_table())

    def __len__(self) -> int:
        return len(_table())

    def __repr__(self) -> str:
        return f"PRESETS({', '.join(self)})"


PRESETS: Mapping[str, Preset] = _Presets()
"""All presets by name, each a [Preset][llamamix.presets.Preset]; the library has the table."""
