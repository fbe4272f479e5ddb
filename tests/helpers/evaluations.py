"""Rows of evaluations that were not made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llamamix.eval import Row


def make_row(**changes: Any) -> Row:
    row = Row(
        llamamix="1.0",
        library="0123456789ab",
        cpu_info="some",
        model_filename="m.F32-0123456789ab.gguf",
        model_type="llama 1B Q4_0",
        model_size=3 << 29,
        model_sha256="0" * 64,
        text="prose",
        text_source="a novel",
        text_sha256="1" * 64,
        n_ctx=2048,
        leg="prompt",
        n_decode=256,
        stride=1,
        n_chunks=1,
        n_positions=1023,
        n_batch=2048,
        n_ubatch=512,
        n_threads=2,
        flash_attn="auto",
        reference="f16",
        role="cache",
        cache="q8_0",
        type_k="q8_0",
        type_v="q8_0",
        kv_mixed=None,
        rotation=True,
        kv_bytes=34,
        f16_bytes=64,
        kld_mean=0.00026,
        kld_mean_err=0.000012,
        kld_median=0.00014,
        kld_median_err=0.000004,
        kld_p99=0.0023,
        kld_p99_err=0.0004,
        kld_p999=0.0077,
        kld_p999_err=None,
        kld_max=0.008,
        same_top=0.994,
        same_top_err=0.0024,
        ppl=12.0,
        ppl_err=0.5,
        ppl_ratio=1.00034,
        ppl_ratio_err=0.00016,
        lookup_distances=(),
        lookup_found=(),
    )
    return replace(row, **changes)


_NO_DIVERGENCE = dict.fromkeys(
    [name for name in Row.__dataclass_fields__ if name.startswith(("kld_", "same_top", "ppl_ratio"))]
)


def reference(**changes: Any) -> Row:
    values = {"role": "reference", "cache": "f16", "type_k": "f16", "type_v": "f16", "kv_bytes": 64}
    return make_row(**_NO_DIVERGENCE | values | changes)


def noise(**changes: Any) -> Row:
    return make_row(**{"role": "noise", "cache": "f16 again", "kv_bytes": 64, "kld_mean": 1.5e-6} | changes)
