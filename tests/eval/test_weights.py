"""Weights expanded to F32: the very values, whole or not at all, and once."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model

from llamamix import Context, Model, ModelError
from llamamix.eval import weights
from llamamix.eval.weights import expand, sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMAMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny.Q8_0.gguf", weight_type=gguf.GGMLQuantizationType.Q8_0)


def q8_0(data: np.ndarray) -> np.ndarray:
    """The values of rows of blocks: a scale in F16, then 32 whole numbers of 8 bits."""
    blocks = data.reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return (scales * blocks[:, 2:].view(np.int8)).reshape(*data.shape[:-1], -1)


def test_every_value(quantised: Path, cache: Path) -> None:
    path = expand(quantised)
    assert path == cache / f"tiny.F32-{sha256_of(quantised)[:12]}.gguf"
    source, made = gguf.GGUFReader(quantised), gguf.GGUFReader(path)
    assert [t.name for t in made.tensors] == [t.name for t in source.tensors]
    n_quantised = 0
    for before, after in zip(source.tensors, made.tensors, strict=True):
        assert after.tensor_type == gguf.GGMLQuantizationType.F32
        assert after.shape.tolist() == before.shape.tolist()
        is_quantised = before.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert (after.data == (q8_0(before.data) if is_quantised else before.data)).all()
        n_quantised += is_quantised
    assert n_quantised == 2 + 2 * 7
    # all that the file says but what its weights are
    for key, field in source.fields.items():
        if not key.startswith("GGUF."):
            assert made.get_field(key).contents() == field.contents()
            assert made.get_field(key).types == field.types
    assert made.get_field("general.file_type").contents() == 0
    assert made.get_field("llamamix.expanded_from").contents() == sha256_of(quantised)


def test_the_model_is_the_same(quantised: Path) -> None:
    """Within what is computed of quantised weights: activations rounded to 8 bits."""
    tokens = np.arange(64) + 300
    logits = []
    for path in (quantised, expand(quantised)):
        with Model(path) as model, Context(model, n_ctx=256, n_threads=1, kv_mixed=False) as context:
            assert model.tokenize("the end") == [1, 361, 385] or model.tokenize("the end")[0] == 1
            context.decode(tokens, logits="all")
            logits.append(context.logits)
    error = np.sqrt(((logits[1] - logits[0]) ** 2).mean() / (logits[1] ** 2).mean())
    assert 0 < error < 0.05  # one rounding to 8 bits is 0.4 % of a row's largest value, and there are 14 in a row


def test_it_is_made_once(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    path = expand(quantised, lambda what, done, total: steps.append((what.partition(" ")[0], done <= total)))
    assert dict(steps) == {"checking": True, "writing": True}
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(weights, "_write", lambda *_args: pytest.fail("written again"))
    assert expand(quantised) == path and path.stat().st_mtime_ns == before
    assert expand(path) == path  # there is nothing to expand


def test_nothing_half_done_is_left(quantised: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights._values
    calls = [0]

    def interrupted(tensor: object) -> np.ndarray:
        calls[0] += 1
        if calls[0] > 5:
            raise KeyboardInterrupt
        return original(tensor)

    monkeypatch.setattr(weights, "_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        expand(quantised)
    assert list(cache.iterdir()) == []

    # what is not what it should be is not kept: a value that is read again as another one
    n_written = len(gguf.GGUFReader(quantised).tensors)
    calls[0] = 0

    def changed(tensor: object) -> np.ndarray:
        calls[0] += 1
        values = original(tensor)
        return values if calls[0] <= n_written + 3 else np.nextafter(values, np.float32(9))

    monkeypatch.setattr(weights, "_values", changed)
    with pytest.raises(ModelError, match="was not written as it should be"):
        expand(quantised)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(weights, "_values", original)
    assert expand(quantised).is_file()


def test_what_can_not_be_expanded(
    tmp_path: Path, quantised: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUFx" * 100)
    with pytest.raises(ModelError, match=r"no\.gguf is not a GGUF file, or damaged"):
        expand(tmp_path / "no.gguf")

    original = gguf.quants.dequantize

    def unknown(data: np.ndarray, type_: gguf.GGMLQuantizationType) -> np.ndarray:
        if type_ == gguf.GGMLQuantizationType.Q8_0:
            raise NotImplementedError
        return original(data, type_)

    monkeypatch.setattr("gguf.quants.dequantize", unknown)
    with pytest.raises(ModelError, match="type Q8_0 can not be expanded to F32"):
        expand(quantised)
    monkeypatch.undo()
    monkeypatch.setenv("LLAMAMIX_CACHE", str(quantised))  # a file
    with pytest.raises(ModelError, match="can not be stored in"):
        expand(quantised)


def test_names() -> None:
    names = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf", "a.IQ4_XS.gguf", "b.BF16.gguf", "v1.5.gguf")
    assert [weights._stem(name) for name in names] == ["SmolLM2-135M-Instruct", "gemma-3-270m", "a", "b", "v1.5"]
