"""What was measured, as lines of JSON and back."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .. import rows
from ..errors import LlamamixError
from .plan import name_of_test


class BenchError(LlamamixError):
    """A measurement can not be made, read or drawn."""


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration's samples of one test. Names are llama-bench's where it has one.

    Attributes:
        llamamix: Version of the package.
        backends: What computes, CPU or names with commas between them.
        cpu_info: The processor.
        gpu_info: The GPUs.
        model_filename: Path of the model.
        model_type: Architecture, size and type.
        model_size: Bytes of all tensors.
        model_n_params: Weights.
        n_batch: The most tokens in a call, as asked for.
        n_ubatch: The most tokens in a graph, as asked for.
        n_threads: Threads.
        n_gpu_layers: As asked for, -1: all.
        cache: Name of the configuration.
        type_k: ggml type of K (of the hot rows when the cache is a mixed one).
        type_v: ggml type of V, likewise.
        flash_attn: 1: on, 0: off, -1: auto.
        kv_mixed: The mixed KV cache's parameters in force; None: a plain cache.
        kv_bytes: Bytes of the KV cache.
        n_ctx: Its cells.
        seed: Of the random tokens; None: they are those of a text.
        n_prompt: Tokens computed as a prompt.
        n_gen: Tokens computed one by one.
        n_depth: Tokens in the cache before.
        test_time: When the first repetition began, UTC.
        samples_ns: Nanoseconds of every repetition.
        samples_token_ns: Nanoseconds of every token of every repetition, nothing for a prompt.
        samples_migrate_us: Microseconds that every repetition spent moving tokens to cold; None: a plain cache.
    """

    llamamix: str
    backends: str
    cpu_info: str
    gpu_info: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_gpu_layers: int
    cache: str
    type_k: str
    type_v: str
    flash_attn: int
    kv_mixed: str | None
    kv_bytes: int
    n_ctx: int
    seed: int | None
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    samples_ns: tuple[int, ...]
    samples_token_ns: tuple[tuple[int, ...], ...]
    samples_migrate_us: tuple[int, ...] | None

    @property
    def test(self) -> str:
        """The test's name."""
        return name_of_test(self.n_prompt, self.n_gen, self.n_depth)

    @property
    def n_tokens(self) -> int:
        """Tokens of a repetition."""
        return self.n_prompt + self.n_gen


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a recorded run.

    Args:
        path: The file, as ``llamamix bench -o jsonl`` or ``--jsonl`` writes it.

    Raises:
        BenchError: When the file is no recording or is damaged, with the line.
        OSError: When it can not be read.
    """
    return rows.read_rows(path, _read, "recorded benchmark", "measurements", BenchError)


def _read(line: str) -> Row:
    row = rows.row_from_json(Row, line)
    _check_samples(row)
    return row


def _check_samples(row: Row) -> None:
    n = len(row.samples_ns)
    if n == 0 or min(row.samples_ns) <= 0 or row.n_tokens <= 0 or min(row.n_prompt, row.n_gen) < 0:
        raise ValueError("it has no samples, or no tokens")
    if len(row.samples_token_ns) != n or any(len(times) != row.n_gen for times in row.samples_token_ns):
        raise ValueError("samples_token_ns does not have the time of every token")
    if any(ns < 0 for times in row.samples_token_ns for ns in times):
        raise ValueError("a token took less than no time")
    if (row.samples_migrate_us is None) != (row.kv_mixed is None):
        raise ValueError("kv_mixed and samples_migrate_us do not go together")
    if row.samples_migrate_us is not None and len(row.samples_migrate_us) != n:
        raise ValueError("samples_migrate_us does not have every repetition")
