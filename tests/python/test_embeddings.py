"""Embeddings: of tokens, pooled, of several sequences; with which caches they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.allowances import F32, F32_LOGITS
from helpers.gguf_copy import rewrite_gguf
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, KVMixedParams, Model, ParamsError

MakeContext = Callable[..., Context]

N_VOCAB = 400


def test_embeddings(make_context: MakeContext) -> None:
    tokens = random_tokens(20)
    context = make_context(**F32, embeddings=True)
    context.decode(tokens)  # libllama keeps all of them
    each = context.embeddings
    assert (each.shape, each.dtype, context.logits.shape) == ((20, 128), np.float32, (20, N_VOCAB))

    mean = make_context(**F32, embeddings=True, pooling="mean")
    mean.decode(tokens)
    np.testing.assert_allclose(mean.embeddings_seq(0), each.mean(0), atol=F32_LOGITS)
    last = make_context(**F32, embeddings=True, pooling="last")
    last.decode(tokens)
    np.testing.assert_allclose(last.embeddings_seq(), each[-1], atol=F32_LOGITS)

    with pytest.raises(ContextError, match="embeddings_seq"):
        _ = mean.embeddings
    with pytest.raises(ContextError, match="no pooled embedding"):
        context.embeddings_seq(0)
    plain = make_context()
    plain.decode(tokens)
    with pytest.raises(ContextError, match="does not keep"):
        _ = plain.embeddings


@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last", "rank"])
@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_embeddings_are_those_of_a_plain_cache_or_refused(
    make_context: MakeContext, pooling: str, n_ubatch: int | None
) -> None:
    """Whatever cache is asked for, and however many tokens there are; what one refuses for its ubatches so do others."""
    refused = given = 0
    for kv_mixed, is_lossy in ((True, False), ("hot=64,group=16", True), ("hot=64,group=16,cold=f32", False)):
        for n in (50, 300, 600):
            results = []
            for kind in (False, kv_mixed):
                context = make_context(
                    **F32, n_ctx=1024, n_ubatch=n_ubatch, embeddings=True, pooling=pooling, kv_mixed=kind
                )
                try:
                    context.decode(random_tokens(n))
                    results.append(context.embeddings if pooling == "none" else context.embeddings_seq())
                except ParamsError as error:
                    assert "must be one ubatch" in str(error)
                    results.append(None)
                except ContextError as error:
                    assert "not those of a plain cache" in str(error) and is_lossy and kind is not False
                    refused += 1
                    assert context.logits.shape[1] == N_VOCAB  # they are what they are
                    results.append(results[0])
            plain, mixed = results
            assert (plain is None) == (mixed is None)
            if plain is not None:
                given += 1
                np.testing.assert_allclose(mixed, plain, atol=F32_LOGITS)
    # pooled in one ubatch nothing is cold, or it is refused for being longer; else 300 and 600 tokens do not stay hot
    assert (refused, given) == {"none": (2, 9), "last": (2, 9), "rank": (2, 9)}.get(pooling, (0, 3 if n_ubatch else 9))


def test_embeddings_have_a_plain_cache_by_default(make_context: MakeContext) -> None:
    assert make_context(n_ctx=1024, kv_mixed=True, embeddings=True).kv_mixed is None
    assert make_context(n_ctx=1024, kv_mixed=True).kv_mixed.hot == 512
    assert make_context(n_ctx=1024, kv_mixed=KVMixedParams(hot=64), embeddings=True).kv_mixed.hot == 64


def each_token(make_context: MakeContext, tokens: np.ndarray, **params: Any) -> np.ndarray:
    """The embeddings of all tokens of a sequence, which nothing pools."""
    context = make_context(**F32, n_ctx=1024, embeddings=True, pooling="none", **params)
    context.decode(tokens)
    return context.embeddings


def pooled(each: np.ndarray, pooling: str) -> np.ndarray:
    return {"mean": each.mean(0), "cls": each[0], "last": each[-1], "rank": each[-1, :1]}[pooling]


@pytest.mark.parametrize("kv_mixed", [False, "hot=1024"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "rank"])
def test_all_tokens_are_pooled(make_context: MakeContext, pooling: str, kv_mixed: object) -> None:
    tokens = random_tokens(600)
    context = make_context(**F32, n_ctx=1024, embeddings=True, pooling=pooling, kv_mixed=kv_mixed)
    context.decode(tokens)
    expected = pooled(each_token(make_context, tokens), pooling)
    np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_LOGITS)
    # a causal model's score is the last token's (the toy has no head, so it is the first value)
    assert context.n_ubatch == (1024 if pooling in ("mean", "cls") else 512)


@pytest.mark.parametrize("kv_mixed", [False, "hot=64,cold=f32"])
def test_a_batch_that_can_not_be_pooled_is_refused(make_context: MakeContext, kv_mixed: object) -> None:
    params = F32 | {"embeddings": True, "n_batch": 64, "n_ubatch": 16, "kv_mixed": kv_mixed}
    tokens = random_tokens(65)
    for pooling in ("mean", "cls"):
        context = make_context(**params, pooling=pooling)
        with pytest.raises(ParamsError, match=r"17 tokens .* n_ubatch is 16: .* n_batch and n_ubatch of 17 or more"):
            context.decode(tokens[:17])
        with pytest.raises(ParamsError, match="one batch .* n_batch is 64: .* of 65 or more"):
            context.decode(tokens)
        assert context.memory.seq_pos_max() == -1
        context.decode(tokens[:16])
        expected = pooled(each_token(make_context, tokens[:16]), pooling)
        np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_LOGITS)
    for pooling in ("last", "rank"):  # the last token is in the last ubatch
        context = make_context(**params, pooling=pooling)
        with pytest.raises(ParamsError, match="one batch .* n_batch is 64"):
            context.decode(tokens)
        context.decode(tokens[:64])
        expected = pooled(each_token(make_context, tokens[:64]), pooling)
        np.testing.assert_allclose(context.embeddings_seq(), expected, atol=F32_LOGITS)


@pytest.mark.parametrize("kv_mixed", [False, "hot=256"])
@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sequences_are_pooled_apart(
    make_context: MakeContext, pooling: str, kv_unified: bool, kv_mixed: object
) -> None:
    """Streams take as many tokens of each sequence at once, so that longer ones would be cut; "last" does not mind."""
    params = F32 | {"n_ctx": 768, "n_seq_max": 3, "kv_unified": kv_unified, "kv_mixed": kv_mixed}
    context = make_context(**params, embeddings=True, pooling=pooling)
    for lengths in ((40, 25, 70), (30, 30, 30), (7,)):
        context.memory.clear()
        parts = [random_tokens(n, n) + s for s, n in enumerate(lengths)]
        seq_ids = np.repeat(np.arange(len(lengths)), lengths)
        if not kv_unified and len(set(lengths)) > 1 and pooling != "last":
            with pytest.raises(
                ParamsError, match="of 25 to 70 tokens .* with kv_unified=True, or decode one at a time"
            ):
                context.decode_batch(np.concatenate(parts), seq_ids)
            assert context.memory.seq_pos_max(1) == -1
            continue
        context.decode_batch(np.concatenate(parts), seq_ids)
        for seq_id, tokens in enumerate(parts):
            expected = pooled(each_token(make_context, tokens), pooling)
            np.testing.assert_allclose(context.embeddings_seq(seq_id), expected, atol=F32_LOGITS)


@pytest.mark.parametrize("n_ctx", [0, 256, 700])
def test_means_of_any_number_of_sequences(make_context: MakeContext, n_ctx: int) -> None:
    """libllama aborts the process where the sequences do not divide the tokens of a ubatch."""
    context = make_context(n_ctx=n_ctx, n_seq_max=3, kv_unified=True, n_ubatch=128, embeddings=True, pooling="mean")
    assert context.n_ubatch == 126
    context.decode_batch(random_tokens(126), np.arange(126) % 3)
    assert np.isfinite(context.embeddings_seq(2)).all()
    with pytest.raises(ParamsError, match="127 tokens must be one ubatch"):
        context.decode_batch(random_tokens(127), np.arange(127) % 3)
    for params in ({"n_ubatch": 7}, {"n_batch": 7}):
        with pytest.raises(ContextError, match=r"n_ubatch, n_batch and n_ctx of n_seq_max \(8\) or more, not 7"):
            make_context(n_seq_max=8, embeddings=True, pooling="mean", **params)


def test_tokens_that_see_each_other_are_one_ubatch(
    tiny_model_path: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    path = rewrite_gguf(tiny_model_path, tmp_path / "both-ways.gguf", extra={"attention.causal": False})
    with Model(path) as model:
        tokens = random_tokens(600)
        # each token at once, and all at once: the first sees the last
        context = make_context(model, **F32, n_ctx=1024, embeddings=True)
        context.decode(tokens)
        assert context.n_ubatch == context.n_batch == 2048
        changed = np.append(tokens[:-1], tokens[-1] ^ 1)
        other = make_context(model, **F32, n_ctx=1024, embeddings=True)
        other.decode(changed)
        assert np.abs(context.embeddings[0] - other.embeddings[0]).max() > 2 * F32_LOGITS

        small = make_context(model, n_ubatch=16)
        with pytest.raises(
            ParamsError, match="17 tokens must be one ubatch as they see each other, and n_ubatch is 16"
        ):
            small.decode(tokens[:17])
        streams = make_context(model, n_ctx=512, n_seq_max=2)
        with pytest.raises(ParamsError, match="of 2 to 3 tokens can not be one ubatch as they see each other"):
            streams.decode_batch(tokens[:5], [0, 0, 1, 1, 1])
        assert (small.memory.seq_pos_max(), streams.memory.seq_pos_max()) == (-1, -1)
