"""Writes tiny models with random weights and a working tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_LETTERS = [chr(c) for c in range(ord(" ") + 1, 127)]
_WORDS = [
    f"{_SPACE}the", f"{_SPACE}of", f"{_SPACE}and", f"{_SPACE}to", f"{_SPACE}a", f"{_SPACE}in", "th", "he", "in", "er",
    "an", "re", "on", "at", "en", "nd", "the", "and", "ing", f"{_SPACE}t", f"{_SPACE}o", f"{_SPACE}i", "ng", "of", "to",
]  # fmt: skip

N_VOCAB_MIN = 3 + len(_BYTES) + 1 + len(_LETTERS) + len(_WORDS)


def write_tiny_model(
    path: str | Path,
    *,
    arch: str = "llama",
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_size: int = 64,
    head_size_v: int | None = None,
    n_embd: int = 128,
    n_ff: int = 256,
    n_vocab: int = 400,
    n_ctx_train: int = 8192,
    rope_freq_base: float = 10000.0,
    weight_type: Type = Type.F32,
    chat_template: str | list[dict[str, str]] | None = "chatml",
    seed: int = 0,
) -> Path:
    """Write a GGUF file and return its path.

    arch           "llama"; or "minicpm3", with ``n_head`` K and V heads whose sizes may differ (``head_size_v``); or
                   "lfm2", where every other layer is a short convolution, a recurrent one (``n_embd`` must be that of
                   the heads); or "gemma4", where every other layer has a sliding window of 64 tokens and heads of half
                   the size, and the last two layers use K and V of those two before
    weight_type    of the matrices
    n_vocab        beyond the words it is filled up with tokens that no text has
    chat_template  or several, each with its name; None leaves it out

    Weights are normal random numbers of a scale that gives keys unit variance and queries twice that: scores differ by
    a few units, so attention prefers some positions, and the logits (standard deviation about 3) depend on all of them.
    """
    if n_vocab < N_VOCAB_MIN:
        raise ValueError(f"n_vocab must be at least {N_VOCAB_MIN}")
    path = Path(path)
    writer = gguf.GGUFWriter(path, arch)
    weights = _Weights(writer, weight_type, np.random.default_rng(seed))

    writer.add_name("tiny")
    writer.add_context_length(n_ctx_train)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size_v or head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_freq_base)
    writer.add_vocab_size(n_vocab)
    add_vocab(writer, n_vocab)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    weights.norm("token_embd_norm" if arch == "lfm2" else "output_norm", n_embd)
    if arch == "llama":
        if head_size_v not in (None, head_size):
            raise ValueError("llama has K and V heads of one size")
        _add_llama(writer, weights, n_layer, n_head, n_head_kv, head_size, n_embd, n_ff, n_vocab)
    elif arch == "minicpm3":
        _add_minicpm3(writer, weights, n_layer, n_head, head_size, head_size_v or head_size, n_embd, n_ff, n_vocab)
    elif arch == "lfm2":
        _add_lfm2(writer, weights, n_layer, n_head, n_head_kv, head_size, n_ff, n_vocab)
    elif arch == "gemma4":
        _add_gemma4(writer, weights, n_layer, n_head, n_head_kv, head_size, n_embd, n_ff, n_vocab)
    else:
        raise ValueError(f"no tiny model of architecture {arch}")

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Weights:
    def __init__(self, writer: gguf.GGUFWriter, weight_type: Type, rng: np.random.Generator) -> None:
        self._writer = writer
        self._type = weight_type
        self._rng = rng

    def matrix(self, name: str, n_out: int, n_in: int, gain: float = 1.0) -> None:
        """Unit variance in gives a standard deviation of ``gain`` out."""
        weight = self._rng.standard_normal((n_out, n_in), np.float32) * np.float32(gain / np.sqrt(n_in))
        self._writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, self._type), raw_dtype=self._type)

    def norm(self, name: str, n: int, gain: float = 1.0) -> None:
        self._writer.add_tensor(f"{name}.weight", np.full(n, gain, np.float32))


def _add_llama(
    writer: gguf.GGUFWriter,
    weights: _Weights,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    head_size: int,
    n_embd: int,
    n_ff: int,
    n_vocab: int,
) -> None:
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(head_size)
    weights.matrix("token_embd", n_vocab, n_embd, np.sqrt(n_embd))
    weights.matrix("output", n_vocab, n_embd, 3.0)
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.matrix(f"blk.{i}.attn_q", n_head * head_size, n_embd, 2.0)
        weights.matrix(f"blk.{i}.attn_k", n_head_kv * head_size, n_embd)
        weights.matrix(f"blk.{i}.attn_v", n_head_kv * head_size, n_embd)
        weights.matrix(f"blk.{i}.attn_output", n_embd, n_head * head_size, 3.0)
        weights.norm(f"blk.{i}.ffn_norm", n_embd)
        weights.matrix(f"blk.{i}.ffn_gate", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_up", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_down", n_embd, n_ff)


def _add_minicpm3(
    writer: gguf.GGUFWriter,
    weights: _Weights,
    n_layer: int,
    n_head: int,
    head_size: int,
    head_size_v: int,
    n_embd: int,
    n_ff: int,
    n_vocab: int,
) -> None:
    n_rot = head_size // 2  # the rest of a K head has no position
    n_lora = n_embd
    writer.add_head_count_kv(n_head)
    writer.add_rope_dimension_count(n_rot)
    writer.add_q_lora_rank(n_lora)
    writer.add_kv_lora_rank(n_lora)
    weights.matrix("token_embd", n_vocab, n_embd, np.sqrt(n_embd) / 12)  # what the architecture multiplies by
    weights.matrix("output", n_vocab, n_embd, 3.0 * n_embd / 256)
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.matrix(f"blk.{i}.attn_q_a", n_lora, n_embd)
        weights.norm(f"blk.{i}.attn_q_a_norm", n_lora)
        weights.matrix(f"blk.{i}.attn_q_b", n_head * head_size, n_lora, 2.0)
        weights.matrix(f"blk.{i}.attn_kv_a_mqa", n_lora + n_rot, n_embd)
        weights.norm(f"blk.{i}.attn_kv_a_norm", n_lora)
        weights.matrix(f"blk.{i}.attn_kv_b", n_head * (head_size - n_rot + head_size_v), n_lora)
        weights.matrix(f"blk.{i}.attn_output", n_embd, n_head * head_size_v, 3.0)
        weights.norm(f"blk.{i}.ffn_norm", n_embd)
        weights.matrix(f"blk.{i}.ffn_gate", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_up", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_down", n_embd, n_ff)


def _add_lfm2(
    writer: gguf.GGUFWriter,
    weights: _Weights,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    head_size: int,
    n_ff: int,
    n_vocab: int,
) -> None:
    n_embd = n_head * head_size
    n_conv = 3
    writer.add_head_count_kv([n_head_kv if i % 2 == 0 else 0 for i in range(n_layer)])
    writer.add_rope_dimension_count(head_size)
    writer.add_shortconv_l_cache(n_conv)
    weights.matrix("token_embd", n_vocab, n_embd, np.sqrt(n_embd))
    weights.matrix("output", n_vocab, n_embd, 3.0)
    for i in range(n_layer):
        weights.norm(f"blk.{i}.attn_norm", n_embd)
        weights.norm(f"blk.{i}.ffn_norm", n_embd)
        if i % 2 == 0:
            weights.norm(f"blk.{i}.attn_q_norm", head_size, 2.0)
            weights.norm(f"blk.{i}.attn_k_norm", head_size)
            weights.matrix(f"blk.{i}.attn_q", n_embd, n_embd)
            weights.matrix(f"blk.{i}.attn_k", n_head_kv * head_size, n_embd)
            weights.matrix(f"blk.{i}.attn_v", n_head_kv * head_size, n_embd)
            weights.matrix(f"blk.{i}.attn_output", n_embd, n_embd, 3.0)
        else:
            weights.matrix(f"blk.{i}.shortconv.in_proj", 3 * n_embd, n_embd)
            weights.matrix(f"blk.{i}.shortconv.out_proj", n_embd, n_embd)
            weights.matrix(f"blk.{i}.shortconv.conv", n_embd, n_conv)
        weights.matrix(f"blk.{i}.ffn_gate", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_up", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_down", n_embd, n_ff)


def _add_gemma4(
    writer: gguf.GGUFWriter,
    weights: _Weights,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    head_size: int,
    n_embd: int,
    n_ff: int,
    n_vocab: int,
) -> None:
    n_shared = 2
    is_swa = [i % 2 == 0 for i in range(n_layer)]
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_dimension_count_swa(head_size // 2)
    writer.add_key_length_swa(head_size // 2)
    writer.add_value_length_swa(head_size // 2)
    writer.add_sliding_window(64)
    writer.add_sliding_window_pattern(is_swa)
    writer.add_shared_kv_layers(n_shared)
    writer.add_embedding_length_per_layer_input(0)
    weights.matrix("token_embd", n_vocab, n_embd)  # is multiplied by the root of the width
    weights.matrix("output", n_vocab, n_embd, 3.0)
    weights.norm("rope_freqs", head_size // 2)
    for i in range(n_layer):
        size = head_size // 2 if is_swa[i] else head_size
        for name in ("attn_norm", "post_attention_norm", "ffn_norm"):
            weights.norm(f"blk.{i}.{name}", n_embd)
        # ggml looks GELU up in a table of F16 values, which makes a small difference larger: it counts for little
        weights.norm(f"blk.{i}.post_ffw_norm", n_embd, 0.02)
        weights.matrix(f"blk.{i}.attn_q", n_head * size, n_embd)
        weights.norm(f"blk.{i}.attn_q_norm", size, 2.0 / np.sqrt(size))  # scores are not scaled
        if i < n_layer - n_shared:
            weights.matrix(f"blk.{i}.attn_k", n_head_kv * size, n_embd)
            weights.norm(f"blk.{i}.attn_k_norm", size)
            weights.matrix(f"blk.{i}.attn_v", n_head_kv * size, n_embd)
        weights.matrix(f"blk.{i}.attn_output", n_embd, n_head * size)
        weights.matrix(f"blk.{i}.ffn_gate", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_up", n_ff, n_embd)
        weights.matrix(f"blk.{i}.ffn_down", n_embd, n_ff)


def add_vocab(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """The tokens of tiny models, filled up with ones that no text has."""
    tokens = ["<unk>", "<s>", "</s>", *_BYTES, _SPACE, *_LETTERS, *_WORDS]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * len(_BYTES)
    n_unused = n_vocab - len(tokens)
    tokens += [f"<unused{i}>" for i in range(n_unused)]
    types += [gguf.TokenType.NORMAL] * (n_vocab - len(types) - n_unused) + [gguf.TokenType.UNUSED] * n_unused
    # longer pieces are merged first
    scores = [float(len(t)) if k == gguf.TokenType.NORMAL else 0.0 for t, k in zip(tokens, types, strict=True)]

    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    """Tokens of text, int64 [n]."""
    return np.random.default_rng(seed).integers(3, 400, n)
