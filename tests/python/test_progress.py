"""How far a long computation is: what the progress callback is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llamamix import Context, DecodeAborted, ParamsError, PromptProgress

TOKENS = [3 + i % 300 for i in range(200)]


def watched(context: Context) -> list[PromptProgress]:
    told: list[PromptProgress] = []
    context.set_progress_callback(told.append)
    return told


@pytest.fixture(autouse=True)
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two calls."""
    monkeypatch.setattr("llamamix.decoder._PROGRESS_INTERVAL", 0.0)


@pytest.mark.parametrize("n_batch", [64, 200])
def test_tokens_ubatch_by_ubatch(make_context: Callable[..., Context], n_batch: int) -> None:
    context = make_context(n_batch=n_batch, n_ubatch=32, kv_mixed="hot=64,group=16")
    told = watched(context)
    context.decode(TOKENS)
    # in ubatches of 32, of which the last has what is left of a batch
    ends = [0, 32, 64, 96, 128, 160, 192, 200]
    assert sorted({p.n_done for p in told}) == ends and [p.n_done for p in told] == sorted(p.n_done for p in told)
    assert {p.n_tokens for p in told} == {200}
    # the cache holds the ubatch that is computed, too
    for p in told:
        held = p.stats.hot_used + p.stats.cold_used
        assert held == (200 if p.n_done == 200 else ends[ends.index(p.n_done) + 1])
    assert told[-1].stats == context.stats


def test_tokens_of_several_sequences(make_context: Callable[..., Context]) -> None:
    context = make_context(n_seq_max=2, n_ubatch=32)
    context.decode(TOKENS[:50], seq_id=1)
    told = watched(context)
    context.decode_batch(TOKENS[:80], [i % 2 for i in range(80)])
    assert (told[0].n_done, told[-1].n_done, told[-1].n_tokens, told[-1].stats) == (0, 80, 80, None)


def test_what_a_conversation_keeps_does_not_count(make_context: Callable[..., Context]) -> None:
    context = make_context(n_ctx=512)
    messages = [{"role": "user", "content": "x" * 100}]
    answer = "".join(context.chat(messages, 4))
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "y" * 100}]
    told = watched(context)
    list(context.chat(messages, 1))  # (a token need not have text)
    assert context.n_kept > 100 and told[-1].n_tokens == context.memory.seq_pos_max() - context.n_kept


def test_it_changes_nothing(make_context: Callable[..., Context]) -> None:
    rows = []
    for is_watched in (False, True):
        context = make_context(n_ubatch=32, kv_mixed="hot=64,group=16")
        if is_watched:
            watched(context)
        context.decode(TOKENS, logits="all")
        rows.append(context.logits)
    assert rows[0].tobytes() == rows[1].tobytes()


def test_short_batches_are_not_told_of(make_context: Callable[..., Context]) -> None:
    context = make_context()
    told = watched(context)
    context.decode(TOKENS[:31])
    assert told == []
    context.decode(TOKENS[:32])
    assert (told[0].n_done, told[-1].n_done) == (0, 32)
    n_told = len(told)
    context.set_progress_callback(None)
    context.decode(TOKENS[:32])
    assert len(told) == n_told


def test_not_more_often_than_is_useful(make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamamix.decoder._PROGRESS_INTERVAL", 3600.0)
    context = make_context(n_ubatch=32)
    told = watched(context)
    context.decode(TOKENS)
    assert [p.n_done for p in told] == [0, 200]


def test_an_exception_ends_the_decode(make_context: Callable[..., Context]) -> None:
    context = make_context(n_ubatch=32)

    def fail(progress: PromptProgress) -> None:
        if progress.n_done >= 64:
            raise KeyError("enough")

    context.set_progress_callback(fail)
    with pytest.raises(KeyError, match="enough"):
        context.decode(TOKENS)
    n_held = context.memory.seq_pos_max() + 1
    assert 64 <= n_held < 200
    context.set_progress_callback(None)
    context.decode(TOKENS[:40])
    assert context.memory.seq_pos_max() + 1 == n_held + 40


def test_the_abort_callback_is_asked_as_well(make_context: Callable[..., Context]) -> None:
    context = make_context(n_ubatch=32)
    told = watched(context)
    context.set_abort_callback(lambda: len(told) > 0 and told[-1].n_done >= 64)
    with pytest.raises(DecodeAborted):
        context.decode(TOKENS)
    assert told[-1].n_done == 64


def test_what_is_no_function(make_context: Callable[..., Context]) -> None:
    with pytest.raises(ParamsError, match="The progress callback must be a function or None, not 3."):
        make_context().set_progress_callback(3)  # type: ignore[arg-type]
