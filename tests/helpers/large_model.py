"""Writes a model with a large model's shape and random weights, for times: speed does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from .tiny_model import add_vocab

BLOCK = 32
_N_BLOCKS = 32749  # of random numbers, which all matrices repeat; a prime number, so that hardly two rows are the same


@dataclass(frozen=True)
class Shape:
    n_layer: int = 32
    n_head: int = 32
    n_head_kv: int = 8
    head_size: int = 128
    n_embd: int = 4096
    n_ff: int = 14336
    n_vocab: int = 1024  # the one thing that is small: what a large vocabulary costs is the same for all caches

    @property
    def matrices(self) -> list[tuple[str, int, int, float]]:
        """Name, rows, columns, and the standard deviation that a row's product with unit numbers has."""
        res = [
            ("token_embd", self.n_vocab, self.n_embd, self.n_embd**0.5),
            ("output", self.n_vocab, self.n_embd, 3.0),
        ]
        n_q, n_kv = self.n_head * self.head_size, self.n_head_kv * self.head_size
        for i in range(self.n_layer):
            res += [
                (f"blk.{i}.attn_q", n_q, self.n_embd, 2.0),
                (f"blk.{i}.attn_k", n_kv, self.n_embd, 1.0),
                (f"blk.{i}.attn_v", n_kv, self.n_embd, 1.0),
                (f"blk.{i}.attn_output", self.n_embd, n_q, 3.0),
                (f"blk.{i}.ffn_gate", self.n_ff, self.n_embd, 1.0),
                (f"blk.{i}.ffn_up", self.n_ff, self.n_embd, 1.0),
                (f"blk.{i}.ffn_down", self.n_embd, self.n_ff, 1.0),
            ]
        return res

    @property
    def n_bytes(self) -> int:
        """Of the matrices."""
        return sum(n_out * n_in for _, n_out, n_in, _ in self.matrices) * 18 // BLOCK


LLAMA_3_8B = Shape()


def write_large_model(path: str | Path, shape: Shape = LLAMA_3_8B) -> Path:
    """Write a GGUF file of a llama with Q4_0 matrices and return its path. Seconds for some GB."""
    path = Path(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("large")
    writer.add_context_length(1 << 18)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(shape.n_vocab)
    add_vocab(writer, shape.n_vocab)

    norms = ["output_norm", *(f"blk.{i}.{name}" for i in range(shape.n_layer) for name in ("attn_norm", "ffn_norm"))]
    ones = np.ones(shape.n_embd, np.float32)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", ones.shape, ones.dtype, ones.nbytes)
    for name, n_out, n_in, _ in shape.matrices:
        row = n_in // BLOCK * 18
        writer.add_tensor_info(f"{name}.weight", (n_out, row), np.dtype(np.uint8), n_out * row, raw_dtype=Type.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    for _ in norms:
        writer.write_tensor_data(ones)
    values = np.random.default_rng(0).standard_normal((_N_BLOCKS, BLOCK), np.float32)
    unit = gguf.quants.quantize(values, Type.Q4_0)  # [block, 18], a scale in F16 first
    for _, n_out, n_in, gain in shape.matrices:
        blocks = unit.copy()
        scales = unit[:, :2].copy().view(np.float16)
        blocks[:, :2] = (scales * np.float32(gain / n_in**0.5)).astype(np.float16).view(np.uint8)
        writer.write_tensor_data(np.resize(blocks, (n_out, n_in // BLOCK * 18)))
    writer.close()
    return path
