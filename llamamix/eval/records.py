"""What an evaluation found, as lines of JSON and back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .. import rows
from .cases import ABLATION, CANDIDATE, NOISE, REFERENCE
from .plan import LEGS
from .texts import EvalError

_DIGITS = re.compile(r"(?<=\.F32)-[0-9a-f]{12}$")  # see weights.py


@dataclass(frozen=True, slots=True)
class Row:
    """A cache in one leg of one text and context, as ``llamamix eval`` measured it.

    Kullback-Leibler divergences are of the next token's distribution from the reference's, Σ p (ln p − ln q), in nats,
    over all positions that were scored; an error is a standard error, None: not known. [How they are
    measured](../fidelity.md#what-is-measured).

    Attributes:
        llamamix: Version of the package.
        library: The first digits of the library's SHA-256.
        cpu_info: The processor.
        model_filename: Name of the model's file.
        model_type: Architecture, size and type.
        model_size: Bytes of all tensors.
        model_sha256: Of the model's file.
        text: "prose", "code", "recall" or a file's name.
        text_source: Where it is from.
        text_sha256: Of the text.
        n_ctx: Tokens of a context, and cells of the cache.
        leg: "prompt" or "decode".
        n_decode: Tokens decoded one by one, as asked for.
        stride: Every so many-th position of a prompt is scored, as asked for.
        n_chunks: Contexts.
        n_positions: Positions that were scored in all of them.
        n_batch: The most tokens in a call.
        n_ubatch: The most tokens in a graph.
        n_threads: Threads.
        flash_attn: "on", "off" or "auto".
        reference: Type of the cache that this one is compared with.
        role: "reference", "noise", "cache" or "ablation".
        cache: Name of the configuration.
        type_k: ggml type of K (of the hot rows when the cache is a mixed one).
        type_v: ggml type of V, likewise.
        kv_mixed: The mixed KV cache's parameters in force; None: a plain cache.
        rotation: False: rows were not rotated before they were quantised.
        kv_bytes: Bytes of the cache, all in.
        f16_bytes: Bytes of an F16 cache of as many cells.
        kld_mean: Mean divergence; None, as are the others: this is the reference.
        kld_mean_err: Its error.
        kld_median: Median divergence.
        kld_median_err: Its error.
        kld_p99: What 99 % of the divergences are below.
        kld_p99_err: Its error.
        kld_p999: What 99.9 % of the divergences are below.
        kld_p999_err: Its error.
        kld_max: The largest divergence.
        same_top: Share of positions where the most likely token is the reference's.
        same_top_err: Its error.
        ppl: Perplexity.
        ppl_err: Its error.
        ppl_ratio: Perplexity as a multiple of the reference's.
        ppl_ratio_err: Its error.
        lookup_distances: Of every value that was looked up: how many tokens before it had come.
        lookup_found: 1 where it was found, 0 where not.
        backends: What computes, CPU or names with commas between them.
        gpu_info: The GPUs.
        n_gpu_layers: As asked for, -1: all.
    """

    llamamix: str
    library: str
    cpu_info: str
    model_filename: str
    model_type: str
    model_size: int
    model_sha256: str
    text: str
    text_source: str
    text_sha256: str
    n_ctx: int
    leg: str
    n_decode: int
    stride: int
    n_chunks: int
    n_positions: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    flash_attn: str
    reference: str
    role: str
    cache: str
    type_k: str
    type_v: str
    kv_mixed: str | None
    rotation: bool
    kv_bytes: int
    f16_bytes: int
    kld_mean: float | None
    kld_mean_err: float | None
    kld_median: float | None
    kld_median_err: float | None
    kld_p99: float | None
    kld_p99_err: float | None
    kld_p999: float | None
    kld_p999_err: float | None
    kld_max: float | None
    same_top: float | None
    same_top_err: float | None
    ppl: float
    ppl_err: float | None
    ppl_ratio: float | None
    ppl_ratio_err: float | None
    lookup_distances: tuple[int, ...]
    lookup_found: tuple[int, ...]
    backends: str = "CPU"
    gpu_info: str = ""
    n_gpu_layers: int = -1

    @property
    def model(self) -> str:
        """The model's name: that of its file without the ending, and without the digits of an expanded one."""
        return _DIGITS.sub("", self.model_filename.removesuffix(".gguf"))

    @property
    def share(self) -> float:
        """Bytes as a share of an F16 cache's."""
        return self.kv_bytes / self.f16_bytes

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """For CSV: how many were looked up and found in place of all of them."""
        values = asdict(self)
        del values["lookup_distances"], values["lookup_found"]
        return values | {"n_lookups": len(self.lookup_found), "n_found": sum(self.lookup_found)}


def unique(rows: Iterable[Row]) -> list[Row]:
    """Rows without those that have been there before: a cache of that name in the same leg, text, context and model."""
    seen: dict[tuple[object, ...], Row] = {}
    for row in rows:
        where = (row.model_sha256, row.n_ctx, row.text, row.text_sha256, row.leg, row.n_decode, row.stride)
        seen.setdefault((*where, row.reference, row.cache), row)
    return list(seen.values())


def read_records(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a recorded evaluation.

    Args:
        path: The file, as ``llamamix eval -o jsonl`` or ``--jsonl`` writes it.

    Raises:
        EvalError: When the file is no recording or is damaged, with the line.
        OSError: When it can not be read.
    """
    return rows.read_rows(path, _read, "recorded evaluation", "measurements", EvalError)


def _read(line: str) -> Row:
    row = rows.row_from_json(Row, line)
    if row.leg not in LEGS or row.role not in (REFERENCE, NOISE, CANDIDATE, ABLATION):
        raise ValueError("its leg or role is unknown")
    if min(row.n_ctx, row.n_positions, row.kv_bytes, row.f16_bytes) <= 0:
        raise ValueError("it has no positions, or no bytes")
    if len(row.lookup_distances) != len(row.lookup_found) or not {0, 1} >= set(row.lookup_found):
        raise ValueError("lookup_found does not have every lookup")
    if row.role != REFERENCE and None in (row.kld_mean, row.kld_median, row.kld_p99, row.kld_p999, row.same_top):
        raise ValueError("only the reference has no divergence")
    return row
