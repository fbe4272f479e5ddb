"""A forward pass in float64 whose K and V rows are hot or cold as tiering.py says and stored as rows.py does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from .rows import Storage, quantise
from .tiering import View, attention_of

# called for each layer with K before and after it is quantised, then V, float64 [n_tokens, n_head_kv, head_size]; may
# change what is cold
Tamper = Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


class Llama:
    """A model of the llama architecture from a GGUF file with F32 weights."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def get(key: str) -> float:
            return reader.get_field(f"llama.{key}").contents()

        self.n_layer = get("block_count")
        self.n_head = get("attention.head_count")
        self.n_head_kv = get("attention.head_count_kv")
        self.head_size = get("attention.key_length")
        self.eps = get("attention.layer_norm_rms_epsilon")
        self.freq_base = get("rope.freq_base")
        self.weights = {t.name.removesuffix(".weight"): t.data.astype(np.float64) for t in reader.tensors}

    def logits(
        self,
        tokens: Sequence[int],
        views: Sequence[View],
        storage: Storage,
        tamper: Tamper | None = None,
        opened: dict[int, tuple[int, ...]] | None = None,
    ) -> np.ndarray:
        """Logits of all tokens, float64 of shape [n, n_vocab], in the order in which they were decoded.

        opened  by cold tokens: those whose mean K, in F16, its own is stored less of, see Tiering; None: it is stored as it is
        """
        w = self.weights
        visible, cold = attention_of(views)
        pos = np.empty(len(views), np.int64)
        pos[[v.index for v in views]] = [v.pos for v in views]
        cos, sin = self._angles(pos)
        rot_k, rot_v = storage.rotations(self.head_size)

        x = w["token_embd"][np.asarray(tokens)]
        for i in range(self.n_layer):
            h = self._norm(x) * w[f"blk.{i}.attn_norm"]
            q, k, v = (self._heads(h @ w[f"blk.{i}.attn_{name}"].T) for name in "qkv")
            q, k = _rope(q, cos, sin), _rope(k, cos, sin)
            k, v = quantise(k, storage.hot), quantise(v, storage.hot)
            k_rot, v_rot = k @ rot_k, v @ rot_v
            mean = np.zeros_like(k_rot)
            for token, others in (opened or {}).items():
                mean[token] = k_rot[list(others)].mean(axis=0).astype(np.float16)
            k_cold, v_cold = quantise(k_rot - mean, storage.cold_k) + mean, quantise(v_rot, storage.cold_v)
            if tamper:
                tamper(i, k_rot, k_cold, v_rot, v_cold)
            heads = []
            for head in range(self.n_head):
                kv = head // (self.n_head // self.n_head_kv)
                score = np.where(cold, q[:, head] @ rot_k @ k_cold[:, kv].T, q[:, head] @ k[:, kv].T)
                p = _softmax(np.where(visible, score / np.sqrt(self.head_size), -np.inf))
                heads.append((p * ~cold) @ v[:, kv] + (p * cold) @ v_cold[:, kv] @ rot_v)
            x = x + np.concatenate(heads, axis=1) @ w[f"blk.{i}.attn_output"].T
            h = self._norm(x) * w[f"blk.{i}.ffn_norm"]
            gate, up = h @ w[f"blk.{i}.ffn_gate"].T, h @ w[f"blk.{i}.ffn_up"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{i}.ffn_down"].T
        return (self._norm(x) * w["output_norm"]) @ w["output"].T

    def _norm(self, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)

    def _heads(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1, self.head_size)

    def _angles(self, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # ggml multiplies the angle from pair to pair in float32; at position 1,000 that is 1e-4 off, too much to ignore
        scale = np.float32(self.freq_base) ** np.float32(-2 / self.head_size)
        theta = np.empty((len(pos), self.head_size // 2), np.float32)
        theta[:, 0] = pos
        for j in range(1, theta.shape[1]):
            theta[:, j] = theta[:, j - 1] * scale
        return np.cos(theta.astype(np.float64)), np.sin(theta.astype(np.float64))


def _rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate the pairs (0, 1), (2, 3), ... of every head."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
