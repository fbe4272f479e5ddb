"""Small models whose layers do not all attend to the whole context."""

from __future__ import annotations

from pathlib import Path

from .gguf_copy import rewrite_gguf
from .tiny_model import write_tiny_model

N_SWA = 64


def write_iswa(path: Path) -> Path:
    """Three of four layers with a sliding window. Its layers add attention and FFN to the same input."""
    llama = write_tiny_model(path.with_suffix(".llama"), head_size=32, n_layer=4)
    extra = {"attention.sliding_window": N_SWA, "logit_scale": 0.3, "attention.layer_norm_epsilon": 1e-5}
    return rewrite_gguf(llama, path, arch="cohere2", drop=[r"output\.", r"blk\.\d\.ffn_norm"], extra=extra)


def write_shared(path: Path) -> Path:
    """Sliding windows with heads of another size, and two layers that use the K and V of others."""
    return write_tiny_model(path, arch="gemma4", n_layer=6)


def write_hybrid(path: Path) -> Path:
    """Every other layer recurrent."""
    return write_tiny_model(path, arch="lfm2", n_layer=4, n_head=4, head_size=32, n_embd=128)


WRITE = {"iswa": write_iswa, "shared": write_shared, "hybrid": write_hybrid}
