"""The memory of cold is in huge pages where Linux has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llamamix import MixedKVCache

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Memory(NamedTuple):
    size: int  # bytes; there: those that memory is behind; huge: those in huge pages
    there: int
    huge: int


def advised() -> Memory:
    """What huge pages were asked for, of the whole process."""
    res, size, values = Memory(0, 0, 0), 0, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            size = end - begin
        elif name == "VmFlags:" and "hg" in rest:
            one = (size, values["Rss:"] << 10, values["AnonHugePages:"] << 10)
            res = Memory(*(x + y for x, y in zip(res, one, strict=True)))
        elif rest[0].isdecimal():
            values[name] = int(rest[0])
    return res


@pytest.mark.skipif(not sys.platform.startswith("linux") or not SETTING.exists(), reason="no huge pages")
def test_cold_is_in_huge_pages() -> None:
    n_layer, n_head, n_embd, n_cells = 4, 2, 32, 1 << 17
    with MixedKVCache(
        hot=64, cold="q4_0", cold_size=n_cells, n_layer=n_layer, n_head_kv=n_head, head_size_k=n_embd
    ):  # fmt: skip
        n_bytes = 2 * n_layer * n_cells * n_head * n_embd // 32 * 18
        memory = advised()  # other caches may have asked for it before
        assert memory.size >= n_bytes - (1 << 16)
        assert memory.there >= n_bytes - (1 << 16)  # all of it is there from the start, as it is without
        if "[never]" not in SETTING.read_text():
            assert memory.huge > 0
