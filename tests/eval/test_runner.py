"""What is computed with which cache, what is kept, and what comes of it: on a tiny model, against contexts by hand."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model

from llamamix import Context, ContextError, KVMixedParams, Model, ParamsError, _ffi
from llamamix.bench import machine
from llamamix.bench.caches import plan_bytes
from llamamix.eval import Case, EvalError, Plan, Recall, Row, Runner, Store, Text, cases, lockstep, runner
from llamamix.eval.cases import ABLATION, CANDIDATE, NOISE, REFERENCE, changed
from llamamix.eval.compare import Scores
from llamamix.eval.store import Measured, library_digest
from llamamix.shape import ModelShape

N_CTX = 512
MIXED = "hot=64,cold=q4_0,group=16"
PLAN = Plan(n_ctx=(N_CTX,), n_decode=64, n_batch=128, n_ubatch=64, n_threads=1)

# 2 layers, 2 K/V heads of 64: bytes of K and V of one token
BYTES = {"f16": 2 * 2 * 128 * 2, "q8_0": 2 * 2 * 128 // 32 * 34, "q4_0": 2 * 2 * 128 // 32 * 18}


def some_text(name: str = "words", n: int = 4000) -> Text:
    words = ["the", "man", "of", "all", "and", "a", "den", "on", "hill", "at", "ten", "then"]
    return Text(name, "made up", " ".join(np.random.default_rng(0).choice(words, n)))


def some_cases(*types: str, kv_mixed: str = MIXED, **options: Any) -> tuple[Case, ...]:
    return cases("f16", PLAN.n_ubatch, types or ("q8_0",), None, "auto", [kv_mixed], **options)


class Steps:
    """What a runner says of its progress."""

    def __init__(self) -> None:
        self.n_expected = 0
        self.n_done = 0
        self.texts: list[str] = []

    def begin(self, n_tokens: int) -> None:
        self.n_expected += n_tokens

    def advance(self, n_tokens: int) -> None:
        self.n_done += n_tokens

    def describe(self, what: str) -> None:
        self.texts.append(what)


def evaluate(
    model: Model, plan: Plan = PLAN, made: tuple[Case, ...] | None = None, sources: Any = None, store: Any = None
) -> tuple[list[Row], Steps]:
    rows: list[Row] = []
    steps = Steps()
    Runner(
        model,
        plan,
        made or some_cases(),
        sources or [some_text()],
        store or Store(None),
        model_sha256="0" * 64,
        emit=rows.extend,
        progress=steps,
    ).run()
    return rows, steps


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], list[Scores]]:
    """Scores by leg and cache, whatever becomes of them."""
    found: dict[tuple[str, str], list[Scores]] = {}
    original = lockstep.Lockstep.measured

    def measured(self: Any, shape: Any) -> Any:
        result = original(self, shape)
        for (leg, case), value in result.items():
            found.setdefault((leg, case.name), []).append(value.scores)
        return result

    monkeypatch.setattr(lockstep.Lockstep, "measured", measured)
    return found


def logits_by_hand(model: Model, tokens: np.ndarray, case: Case, leg: str) -> np.ndarray:
    """Of the second half of the tokens but the last, or of those that are decoded one by one."""
    params = {"n_ctx": N_CTX, "n_batch": 128, "n_ubatch": case.n_ubatch or 64, "n_threads": 1, "swa_full": False}
    rows = []
    with Context(model, **params, **case.configuration.context_params()) as context:
        n_prompt = N_CTX if leg == "prompt" else N_CTX - PLAN.n_decode
        for start in range(0, n_prompt, 128):
            context.decode(tokens[start : min(start + 128, n_prompt)], logits="all")
            rows.append(context.logits)
        if leg == "prompt":
            return np.concatenate(rows)[N_CTX // 2 : -1]
        rows.clear()
        for i in range(n_prompt, N_CTX - 1):
            context.decode(tokens[i : i + 1])
            rows.append(context.logits)
    return np.concatenate(rows)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.longdouble)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("leg", ["prompt", "decode"])
def test_values(tiny_model: Model, kept: dict, leg: str) -> None:
    """Of contexts that are computed one by one, in long double: the same to the last bits, position by position."""
    text = some_text()
    rows, _ = evaluate(tiny_model, replace(PLAN, legs=(leg,)))
    tokens = text.chunks(tiny_model, N_CTX, 1)[0].tokens
    first = N_CTX // 2 if leg == "prompt" else N_CTX - 64
    targets = tokens[first + 1 :]
    at = np.arange(len(targets))
    reference, *others = some_cases()
    log_p = log_softmax(logits_by_hand(tiny_model, tokens, reference, leg))
    for row, case in zip(rows[1:], others, strict=True):
        log_q = log_softmax(logits_by_hand(tiny_model, tokens, case, leg))
        kld = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        (found,) = kept[leg, case.name]
        assert found.positions.tolist() == list(range(first, N_CTX - 1))
        # see test_compare.py; logarithms are up to 30 here
        assert np.abs(found.kld - kld).max() < 1e-13
        assert np.abs(found.nll + log_q[at, targets]).max() < 1e-13
        assert (found.same_top == (log_p.argmax(1) == log_q.argmax(1))).all()
        # and what a row has of them
        n = len(at)
        assert row.cache == case.name and row.n_positions == n == (255 if leg == "prompt" else 63)
        assert row.kld_mean == pytest.approx(float(kld.mean()), rel=1e-9)
        assert row.kld_mean_err == pytest.approx(float(kld.std() / np.sqrt(n - 1)), rel=1e-9)
        assert row.kld_median == pytest.approx(float(np.median(kld)), rel=1e-9)
        assert row.kld_p99 == pytest.approx(float(np.quantile(kld.astype(float), 0.99)), rel=1e-9)
        assert row.kld_max == pytest.approx(float(kld.max()), rel=1e-9)
        assert row.same_top == pytest.approx(np.mean(log_p.argmax(1) == log_q.argmax(1)))
        nll, nll_ref = -log_q[at, targets], -log_p[at, targets]
        assert row.ppl == pytest.approx(float(np.exp(nll.mean())), rel=1e-9)
        assert row.ppl_ratio == pytest.approx(float(np.exp((nll - nll_ref).mean())), rel=1e-9)
    assert rows[1].kld_mean < 1e-3 < rows[2].kld_mean * 10 < rows[3].kld_mean  # noise, q8_0, mixed
    assert (rows[0].role, rows[0].kld_mean, rows[0].ppl_ratio) == ("reference", None, None)
    assert rows[0].ppl == pytest.approx(float(np.exp(nll_ref.mean())), rel=1e-9)


def test_rows_say_what_was_run(tiny_model: Model) -> None:
    rows, _ = evaluate(tiny_model, replace(PLAN, stride=3))
    names = ["f16", "f16 again", "q8_0", f"mixed {MIXED}"]
    assert [(row.leg, row.cache) for row in rows] == [(leg, name) for leg in ("prompt", "decode") for name in names]
    assert [row.role for row in rows[:4]] == [REFERENCE, NOISE, CANDIDATE, CANDIDATE]
    with Context(tiny_model, n_ctx=N_CTX, n_threads=1, kv_mixed=MIXED) as context:
        spec, mixed_bytes = context.kv_mixed.spec(), context.stats.bytes_total
    # and perhaps means of K: an F16 row for 128 cells
    assert 0 <= mixed_bytes - 64 * BYTES["f16"] - (N_CTX - 64) * BYTES["q4_0"] <= (N_CTX // 128) * BYTES["f16"] // 2
    sizes = dict(zip(names, (BYTES["f16"], BYTES["f16"], BYTES["q8_0"]), strict=False))
    for row in rows:
        assert (row.model_type, row.model_filename) == (tiny_model.desc, tiny_model.path.name)
        assert (row.text, row.text_source, row.text_sha256) == ("words", "made up", some_text().sha256)
        assert (row.n_ctx, row.n_decode, row.stride, row.n_chunks) == (N_CTX, 64, 3, 1)
        assert (row.n_batch, row.n_ubatch, row.n_threads) == (128, 32 if row.role == NOISE else 64, 1)
        assert row.n_positions == (len(range(258, N_CTX - 1, 3)) if row.leg == "prompt" else 63)
        assert row.flash_attn == ("off" if row.role == NOISE else "auto")
        assert row.f16_bytes == N_CTX * BYTES["f16"]
        assert row.kv_bytes == (mixed_bytes if row.kv_mixed else N_CTX * sizes[row.cache])
        assert row.kv_mixed == (spec if row.cache.startswith("mixed") else None)
        assert row.library == library_digest()[:12] and row.rotation
        assert row.lookup_found == ()


def test_what_contexts_are_made_with(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Noted(Context):
        def __init__(self, model: Model, **params: Any) -> None:
            made.append(params)
            super().__init__(model, **params)

    monkeypatch.setattr(lockstep, "Context", Noted)
    evaluate(tiny_model)
    common = {"n_ctx": N_CTX, "n_batch": 128, "n_threads": 1, "swa_full": False}
    f16, plain = {"type_k": "f16", "type_v": "f16"}, {"kv_mixed": False, "flash_attn": "auto", "n_ubatch": 64}
    assert made == [
        common | f16 | plain,
        common | f16 | plain | {"flash_attn": "off", "n_ubatch": 32},
        common | plain | {"type_k": "q8_0", "type_v": "q8_0"},
        common | f16 | plain | {"kv_mixed": MIXED},
    ]


def test_lookups(tiny_model: Model, kept: dict) -> None:
    """A model that knows nothing finds nothing; one that is told the next token finds all."""
    source = Recall(some_text(n=9000))
    (chunk,) = source.chunks(tiny_model, N_CTX, 1)
    rows, _ = evaluate(tiny_model, sources=[source])
    assert all(set(row.lookup_found) <= {0} for row in rows)
    n_decoded = sum(lookup.start - 1 >= N_CTX - 64 for lookup in chunk.lookups)
    assert [len(row.lookup_found) for row in rows] == [4] * 4 + [n_decoded] * 4 and 0 < n_decoded < 4
    assert rows[0].lookup_distances == tuple(lookup.distance for lookup in chunk.lookups)
    assert rows[-1].lookup_distances == tuple(lookup.distance for lookup in chunk.lookups[-n_decoded:])

    scores = kept["prompt", "f16"][0]
    told = replace(scores, hit=np.ones(len(scores), bool))
    assert [hit for _, hit in runner._lookups(chunk, told)] == [True] * 4
    last = np.searchsorted(scores.positions, chunk.lookups[1].end - 2)
    told.hit[last] = False  # the last token of a value
    assert [hit for _, hit in runner._lookups(chunk, told)] == [True, False, True, True]


def test_one_pass_gives_what_two_give(tiny_model: Model, kept: dict) -> None:
    """Both legs begin with the same batches, all of the second's prompt, a part of it, or none."""
    made = some_cases("q4_0")
    for n_batch, n_common in ((64, 448), (128, 384), (448, 448), (449, 0), (512, 0)):
        plan = replace(PLAN, n_batch=n_batch)
        kept.clear()
        _, steps = evaluate(tiny_model, plan, made)
        assert steps.n_expected == steps.n_done == 4 * (2 * N_CTX - 1 - n_common)
        shared = {key: Scores.join(parts) for key, parts in kept.items()}
        kept.clear()
        for leg in ("prompt", "decode"):
            evaluate(tiny_model, replace(plan, legs=(leg,)), made)
        for key, scores in shared.items():
            (alone,) = kept[key]
            for name in Scores.__dataclass_fields__:
                assert (getattr(scores, name) == getattr(alone, name)).all(), (key, name)


@pytest.mark.parametrize("arch", ["gemma4", "lfm2"])
def test_one_pass_with_other_memories(arch: str, tmp_path: Path, kept: dict) -> None:
    """Sliding windows and recurrent layers are brought back as well, with all that is counted."""
    shape = {"gemma4": {"n_layer": 6}, "lfm2": {"n_layer": 4, "n_embd": 256}}[arch]
    plan = replace(PLAN, n_batch=64)
    with Model(write_tiny_model(tmp_path / "tiny.gguf", arch=arch, **shape)) as model:
        evaluate(model, plan)
        shared = {key: Scores.join(parts) for key, parts in kept.items()}
        kept.clear()
        rows, _ = evaluate(model, replace(plan, legs=("decode",)))
    for key, (alone,) in kept.items():
        # cells may come back in another order, and sums be rounded otherwise: logits by 1e-5, this by the square
        assert np.abs(shared[key].kld - alone.kld).max() < 1e-9
        assert np.abs(shared[key].nll - alone.nll).max() < 1e-4
    if arch == "gemma4":  # two layers with 2 heads of 32 have a window of 64 and room for a ubatch, in cells by the 256
        windows = 256 * 2 * 2 * 2 * 32 * 2
        assert rows[0].kv_bytes == rows[0].f16_bytes == N_CTX * BYTES["f16"] + windows
        assert rows[2].kv_bytes == N_CTX * BYTES["q8_0"] + windows * 34 // 64


def test_a_context_begins_anew(tiny_model: Model, kept: dict) -> None:
    """Chunks and texts do not see what was in the caches before."""
    made = some_cases("q4_0")
    evaluate(tiny_model, replace(PLAN, n_chunks=(2,)), made, [some_text(), Recall(some_text(n=9000))])
    twice = {key: list(parts) for key, parts in kept.items()}
    kept.clear()
    evaluate(tiny_model, PLAN, made, [Recall(some_text(n=9000))])
    for key, (alone,) in kept.items():
        behind = twice[key][2]  # two chunks of the other text
        assert len(twice[key]) == 4
        assert (alone.positions == behind.positions).all() and (alone.kld == behind.kld).all()


def test_reference_f32(tiny_model: Model) -> None:
    """All that is rounded shows: an F16 cache is one among others."""
    made = cases("f32", 64, None, None, "auto", [MIXED])
    assert [(case.name, case.role) for case in made] == [
        ("f32", REFERENCE), ("f32 again", NOISE), ("f16", CANDIDATE), (f"mixed {MIXED}", CANDIDATE),
    ]  # fmt: skip
    rows, _ = evaluate(tiny_model, replace(PLAN, reference="f32"), made)
    for _, noise, f16, mixed in (rows[:4], rows[4:]):
        assert noise.kld_mean < f16.kld_mean / 100 and f16.kld_mean < mixed.kld_mean / 100
    # flash attention makes F16 of F32
    assert [row.flash_attn for row in rows[:4]] == ["off", "off", "auto", "auto"]
    assert {row.reference for row in rows} == {"f32"} and rows[0].share == 2


#
# what is kept
#


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The caches that a context was made for."""
    made: list[str] = []
    original = lockstep.Contexts.__getitem__

    def get(self: Any, case: Case) -> Context:
        if case not in self:
            made.append(case.name)
        return original(self, case)

    monkeypatch.setattr(lockstep.Contexts, "__getitem__", get)
    return made


def test_nothing_is_computed_twice(tiny_model: Model, tmp_path: Path, contexts: list[str]) -> None:
    store = Store(tmp_path)
    first, steps = evaluate(tiny_model, store=store)
    assert steps.n_done > 0 and contexts == ["f16", "f16 again", "q8_0", f"mixed {MIXED}"]
    contexts.clear()
    again, steps = evaluate(tiny_model, store=store)
    assert again == first and (steps.n_expected, steps.n_done, contexts) == (0, 0, [])

    # one more cache: with it the reference, and nothing else
    more, steps = evaluate(tiny_model, made=some_cases("q8_0", "q4_0"), store=store)
    assert contexts == ["f16", "q4_0"]
    assert steps.n_expected == steps.n_done == 2 * (2 * N_CTX - 1 - 384)
    assert [row for row in more if row.cache != "q4_0"] == first
    # the same cache by another name
    contexts.clear()
    renamed, _ = evaluate(tiny_model, made=some_cases(kv_mixed="group=16,cold=q4_0,hot=64"), store=store)
    assert contexts == [] and renamed[3].kld_mean == first[3].kld_mean

    # what could give something else is computed
    for changes in ({"n_ubatch": 32}, {"n_batch": 64}, {"stride": 2}, {"n_decode": 32}):
        contexts.clear()
        evaluate(tiny_model, replace(PLAN, **changes), store=store)
        assert contexts, changes
    contexts.clear()
    evaluate(tiny_model, replace(PLAN, reference="f32"), cases("f32", 64, ["q8_0"]), store=store)
    assert contexts == ["f32", "f32 again", "q8_0"]
    contexts.clear()
    evaluate(tiny_model, replace(PLAN, n_threads=2), store=store)  # which gives the same
    assert contexts == []


@pytest.mark.parametrize("what", ["library", "model", "cpu", "devices", "rotation"])
def test_what_is_another_is_computed(
    tiny_model: Model, tmp_path: Path, contexts: list[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = Store(tmp_path)
    plan = replace(PLAN, legs=("decode",))
    evaluate(tiny_model, plan, store=store)
    contexts.clear()
    if what == "library":
        monkeypatch.setattr(runner, "library_digest", lambda: "0" * 64)
    if what == "cpu":
        monkeypatch.setattr(machine, "cpu_info", lambda: "another")
    if what == "devices":
        monkeypatch.setattr(machine, "backends", lambda with_servers: "CUDA")
    if what == "rotation":
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    if what == "model":
        Runner(
            tiny_model, plan, some_cases(), [some_text()], store, model_sha256="1" * 64, emit=lambda _: None,
            progress=Steps(),
        ).run()  # fmt: skip
    else:
        evaluate(tiny_model, plan, store=store)
    assert "q8_0" in contexts


def test_what_is_damaged_is_computed_again(tiny_model: Model, tmp_path: Path, contexts: list[str]) -> None:
    store = Store(tmp_path)
    first, _ = evaluate(tiny_model, store=store)
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) == 8
    for i, file in enumerate(files):
        data = bytearray(file.read_bytes())
        if i % 3 == 0:
            file.write_bytes(data[: len(data) // 2])
        elif i % 3 == 1:
            file.write_bytes(b"")
        else:
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
    contexts.clear()
    again, steps = evaluate(tiny_model, store=store)
    assert again == first and set(contexts) == {"f16", "f16 again", "q8_0", f"mixed {MIXED}"}
    assert steps.n_done == 4 * (2 * N_CTX - 1 - 384)
    assert sorted(tmp_path.rglob("*.npz")) == files


def test_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    n = 3
    scores = Scores(
        np.arange(n, dtype=np.int32), np.array([0.1, 0.2, 1e-12]), np.ones(n), np.zeros(n), np.ones(n, bool),
        np.array([True, False, True]),
    )  # fmt: skip
    assert store.load("ab12") is None
    store.save("ab12", Measured(scores, 1 << 40, "hot=64", 2))
    found = store.load("ab12")
    assert (found.kv_bytes, found.kv_mixed, found.n_threads) == (1 << 40, "hot=64", 2)
    for name in Scores.__dataclass_fields__:
        assert (getattr(found.scores, name) == getattr(scores, name)).all()
    store.save("ab13", Measured(scores, 7, None, 1))
    assert store.load("ab13").kv_mixed is None
    assert [path.name for path in sorted((tmp_path / "a" / "b" / "ab").iterdir())] == ["ab12.npz", "ab13.npz"]
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="can not be kept in"):
        Store(tmp_path / "file").save("ab12", found)


def test_a_library_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libllama and all of ggml, whichever of them a change is in."""
    (tmp_path / "other").mkdir()
    names = [_ffi._file_name(name) for name in ("llama", "ggml", "ggml-base", "ggml-cpu", "mtmd")]
    for name in names:
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(_ffi, "_lib_dirs", lambda: [tmp_path / "other", tmp_path])
    first = library_digest()
    for name in names[:4]:
        (tmp_path / name).write_text("two")
        assert library_digest() != first
        (tmp_path / name).write_text("one")
    (tmp_path / names[4]).write_text("two")  # which is no part of it
    (tmp_path / f"{names[1]}.0").symlink_to(tmp_path / names[1])
    assert library_digest() == first


class _Interrupt:
    """Raises KeyboardInterrupt in the n-th decode from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        original = Context.decode
        self.n_left = n

        def decode(context: Context, *args: Any, **options: Any) -> None:
            self.n_left -= 1
            if self.n_left == 0:
                raise KeyboardInterrupt
            original(context, *args, **options)

        monkeypatch.setattr(Context, "decode", decode)


def test_an_interrupt_keeps_what_there_is(
    tiny_model: Model, tmp_path: Path, contexts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, n_chunks=(2,), n_batch=64)
    whole, _ = evaluate(tiny_model, plan)
    # four caches: 8 batches and 63 tokens each, so this is in the second chunk's batches, and the third cache
    n_before = 4 * (8 + 63)
    store = Store(tmp_path)
    rows: list[Row] = []
    made = Runner(
        tiny_model, plan, some_cases(), [some_text()], store, model_sha256="0" * 64, emit=rows.extend, progress=Steps()
    )
    _Interrupt(monkeypatch, n_before + 4 * 6 + 3)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    prompt, decode = rows[:4], rows[4:]
    # seven batches of the second chunk with the reference and its noise, six with the others; three or two are scored
    assert [row.n_positions for row in prompt] == [255 + 192, 255 + 192, 255 + 128, 255 + 128]
    assert [(row.n_positions, row.n_chunks) for row in decode] == [(63, 1)] * 4
    assert len(list(tmp_path.rglob("*.npz"))) == 8  # the first chunk's

    contexts.clear()
    again, steps = evaluate(tiny_model, plan, store=store)
    assert again == whole
    assert steps.n_done == 4 * (N_CTX + 63)  # the second chunk

    # in a decode leg, the prompts of the chunk are kept
    store = Store(tmp_path / "another")
    _Interrupt(monkeypatch, 4 * (8 + 20) + 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_model, plan, store=store)
    assert len(list((tmp_path / "another").rglob("*.npz"))) == 4
    again, steps = evaluate(tiny_model, plan, store=store)
    assert again == whole
    assert steps.n_done == 4 * (N_CTX - 1 + N_CTX + 63)


def test_short_of_memory(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 1 << 20)
    with pytest.raises(
        ParamsError, match=r"4 caches of 512 tokens and their results need \d MiB, and there are 1: take"
    ):
        evaluate(tiny_model)
    # K and V of four caches, and logits: 128 + 64 rows of 400 in each, and 2 * 128
    shape = ModelShape.from_model(tiny_model)
    n_bytes = sum(plan_bytes(shape, case.configuration, N_CTX) for case in some_cases())
    assert n_bytes > N_CTX * (2 * BYTES["f16"] + BYTES["q8_0"])
    n_bytes += 4 * 400 * (4 * (128 + 64) + 2 * 128)
    monkeypatch.setattr(machine, "memory_available", lambda: n_bytes)
    evaluate(tiny_model)
    monkeypatch.setattr(machine, "memory_available", lambda: n_bytes - 1)
    with pytest.raises(ParamsError, match="take a smaller -b"):
        evaluate(tiny_model)


def test_a_context_that_can_not_be_made(tiny_model: Model) -> None:
    with pytest.raises(ContextError, match=r"^mixed hot=64,cold_size=8: "):
        evaluate(tiny_model, made=some_cases(kv_mixed="hot=64,cold_size=8"))


def test_nothing_to_score(tiny_model: Model) -> None:
    class Blank(Text):
        def chunks(self, *args: Any) -> Any:
            return [replace(chunk, scored=np.zeros(N_CTX, bool)) for chunk in super().chunks(*args)]

    with pytest.raises(ParamsError, match="blank has no position to score in the prompt leg"):
        evaluate(tiny_model, sources=[Blank("blank", "", some_text().text)])


#
# caches
#


def test_cases() -> None:
    def names(*args: Any, **options: Any) -> list[str]:
        return [case.name for case in cases(*args, **options)]

    assert names("f16", 512) == ["f16", "f16 again", "q8_0", "q4_0", "mixed"]
    assert names("f16", 512, ["q8_0", "f16"], ["q8_0", "q4_0"]) == ["f16", "f16 again", "q8_0", "k=f16 v=q4_0"]
    assert names("f16", 512, kv_mixed=["1;hot=64", "hot=32 ; ", "off"]) == [
        "f16", "f16 again", "mixed", "mixed hot=64", "mixed hot=32",
    ]  # fmt: skip
    assert names("f32", 512, ["f32", "q8_0"]) == ["f32", "f32 again", "q8_0"]
    reference, noise, *_ = cases("f16", 512, flash_attn="off", kv_mixed=["1"])
    assert (reference.configuration.flash_attn, noise.configuration.flash_attn) == ("off", "on")
    assert (reference.n_ubatch, noise.n_ubatch) == (None, 256)
    assert cases("f16", 1)[1].n_ubatch == 1
    for options, text in (
        ({"types_k": ["f16"]}, "no cache to compare with f16"),
        ({"kv_mixed": ["off"]}, "no cache to compare"),
        ({"kv_mixed": ["warm=1"]}, "warm"),
        ({"types_k": ["q3_k"]}, "q3_k"),
        ({"flash_attn": "maybe"}, "maybe"),
        ({"types_k": ["q8_0"], "ablate": True}, "--ablate needs a mixed cache"),
    ):
        with pytest.raises(ParamsError, match=text):
            cases("f16", 512, **options)


def knows_means() -> bool:
    try:
        KVMixedParams.parse("mean=off")
    except ParamsError:
        return False
    return True


def test_ablations() -> None:
    """Each ingredient that there is, one at a time; what a build does not know is said."""
    notes: list[str] = []
    made = cases("f16", 512, kv_mixed=["hot=512,cold=q4_0,sink=4"], ablate=True, note=notes.append)
    base = KVMixedParams.parse("hot=512,cold=q4_0,sink=4")
    found = {case.name.rpartition(", ")[2]: case for case in made if case.role == ABLATION}
    expected = {
        "no window": replace(base, hot=36),
        "no sinks": replace(base, sink=0),
        "cold=q8_0": KVMixedParams.parse(changed(base, cold="q8_0")),
        "no rotation": base,
    }
    without_means = {name: case for name, case in found.items() if name != "no page means"}
    assert {name: KVMixedParams.parse(c.configuration.kv_mixed) for name, c in without_means.items()} == expected
    assert [name for name, case in found.items() if not case.rotation] == ["no rotation"]
    assert ("no page means" in found) == knows_means()
    assert notes == ([] if knows_means() else ["This build of the library has no page means to leave out."])

    def ingredients(spec: str) -> list[str]:
        made = cases("f16", 512, kv_mixed=[spec], ablate=True)
        return [case.name.removeprefix(f"mixed {spec}, ") for case in made if case.role == ABLATION]

    # what is off already is not left out once more
    assert ingredients("hot=36,sink=4,cold_k=f16,cold_v=bf16") == ["no sinks", "cold=q8_0", "cold=q4_0"]
    assert "cold=q8_0" not in ingredients("cold=q8_0") and "no rotation" in ingredients("cold=q8_0")
    assert "no sinks" not in ingredients("sink=0")


def test_changed_specs() -> None:
    params = KVMixedParams.parse("hot=64,cold_k=q8_0,cold_v=q4_0")
    assert KVMixedParams.parse(changed(params, cold="q5_0")) == KVMixedParams.parse("hot=64,cold=q5_0")
    assert KVMixedParams.parse(changed(params, hot="32")) == replace(params, hot=32)


def test_rotation_is_left_out(tiny_model: Model, kept: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the library's own switch does, and the switch is as it was."""
    made = cases("f16", 64, kv_mixed=[MIXED], ablate=True)
    rotated, unrotated = made[2], next(case for case in made if not case.rotation)
    plan = replace(PLAN, legs=("decode",))
    for before in (None, "0"):
        kept.clear()
        if before is not None:
            monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", before)
        evaluate(tiny_model, plan, (made[0], rotated, unrotated))
        assert os.environ.get("LLAMA_ATTN_ROT_DISABLE") == before
    ours = {name: scores.kld for (_, name), (scores,) in kept.items()}
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    kept.clear()
    evaluate(tiny_model, plan, (made[0], rotated))
    assert (kept["decode", rotated.name][0].kld == ours[unrotated.name]).all()
    assert (ours[unrotated.name] != ours[rotated.name]).all()
