"""The memory of cold is in huge pages where Linux has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from llamamix import MixedKVCache

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Mapping(NamedTuple):
    address: int
    size: int  # bytes; there: those that memory is behind; huge: those in huge pages
    there: int
    huge: int


def advised() -> list[Mapping]:
    """What huge pages were asked for."""
    res, values = [], {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            address, end = (int(x, 16) for x in name.split("-"))
        elif name == "VmFlags:" and "hg" in rest:
            res.append(Mapping(address, end - address, values["Rss:"] << 10, values["AnonHugePages:"] << 10))
        elif rest[0].isdecimal():
            values[name] = int(rest[0])
    return res


@pytest.mark.skipif(not sys.platform.startswith("linux") or not SETTING.exists(), reason="no huge pages")
def test_cold_is_in_huge_pages() -> None:
    n_layer, n_head, n_embd, n_cells = 4, 2, 32, 1 << 17
    before = {x.address for x in advised()}
    with MixedKVCache(
        hot=64, cold="q4_0", cold_size=n_cells, n_layer=n_layer, n_head_kv=n_head, head_size_k=n_embd
    ):  # fmt: skip
        n_bytes = 2 * n_layer * n_cells * n_head * n_embd // 32 * 18
        (cold,) = [x for x in advised() if x.size >= n_bytes - (1 << 16) and x.address not in before]
        assert cold.there == cold.size  # all of it is there from the start, as it is without
        if "[never]" not in SETTING.read_text():
            assert cold.huge > 0
