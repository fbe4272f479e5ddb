"""The formats in which rows of a KV cache can be stored: the library's own table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ._ffi import ffi, lib, sized


@dataclass(frozen=True)
class Format:
    """A way in which rows of K or V are stored.

    Attributes:
        name: What ``cold=``, ``cold_k=`` and ``cold_v=`` call it.
        type: Number of the ggml type of the tensors that hold the rows.
        n_block: Values that are stored together: heads must be multiples of it.
        size_block: Bytes of these.
        hot: New tokens may be stored like this as well.
        direct: On the CPU a token that is decoded meets the rows as they are stored; else they are expanded first.
        fused: On the CPU the rows of tokens that become cold are rotated and stored in one pass; else by ggml's
            operations.
    """

    name: str
    type: int
    n_block: int
    size_block: int
    hot: bool
    direct: bool
    fused: bool

    def row_size(self, n: int) -> int:
        """Bytes of a row.

        Args:
            n: Values of the row, a multiple of ``n_block``.
        """
        return n // self.n_block * self.size_block


@cache
def _table() -> dict[str, Format]:
    res: dict[str, Format] = {}
    info = sized("struct llama_kv_mixed_format_info *")
    while lib.llama_kv_mixed_get_format_info(len(res), info) == 0:
        name = ffi.string(info.name).decode()
        sizes = info.type, info.n_block, info.size_block
        res[name] = Format(name, *sizes, bool(info.is_hot), bool(info.is_direct), bool(info.is_fused))
    return res


class _Formats(Mapping[str, Format]):
    """The table as a mapping that asks the library for it when it is looked at, not when it is imported."""

    def __getitem__(self, name: str) -> Format:
        return _table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_table())

    def __len__(self) -> int:
        return len(_table())

    def __repr__(self) -> str:
        return f"FORMATS({', '.join(self)})"


FORMATS: Mapping[str, Format] = _Formats()
"""All formats by name, each a [Format][llamamix.formats.Format]; the library has the table."""


def format_name(type: int) -> str:
    """The name of the format whose rows are in tensors of this ggml type. Raises KeyError when there is none."""
    for format in FORMATS.values():
        if format.type == type:
            return format.name
    raise KeyError(type)
