"""A mixed cache on a real device with memory of its own: Vulkan, on Mesa's lavapipe where there is no GPU.

Run where libllama has Vulkan: LLAMAMIX_LIB_PATH=build/vulkan/bin GGML_VK_VISIBLE_DEVICES=0 pytest tests/cache/test_vulkan.py

Attention is composed there. Vulkan's products round more than the CPU's: they are compared by root mean squares, as a
share of what the types of rows do to the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.allowances import rms
from helpers.processes import library_dir
from helpers.tiny_model import random_tokens

from llamamix import Context, ContextError, KVMixedParams, Model
from llamamix.formats import FORMATS

pytestmark = pytest.mark.skipif(
    not any(library_dir().glob("*ggml-vulkan*")), reason="libllama has no Vulkan: cmake --build --preset vulkan"
)

QUANTISED = [name for name in FORMATS if name not in ("f32", "f16", "bf16")]
F32 = {"type_k": "f32", "type_v": "f32"}
F16 = {"type_k": "f16", "type_v": "f16"}

# Sums of products of 64 to 512 values, some of them rounded to F16 before they are multiplied (2^-11 of each): below a
# hundredth of the logits' size after two layers.
NOISE = 0.01

Make = Callable[..., Context]


def mixed(cold: str, **params: Any) -> KVMixedParams:
    return KVMixedParams(**{"hot": 256, "group": 32, "sink": 4, "cold": cold} | params)


class Models:
    def __init__(self, path: Path) -> None:
        self.cpu = Model(path, n_gpu_layers=0)
        self.whole = Model(path, n_gpu_layers=99)
        self.upper = Model(path, n_gpu_layers=2)  # the second layer and the output

    def close(self) -> None:
        for model in (self.cpu, self.whole, self.upper):
            model.close()


@pytest.fixture(scope="module")
def models(tiny_model_path: Path) -> Iterator[Models]:
    res = Models(tiny_model_path)
    yield res
    res.close()


@pytest.fixture
def make(models: Models, make_context: Make) -> Make:
    def make(model: Model | None = None, **params: Any) -> Context:
        on_cpu = {"offload_kqv": False} if model is models.cpu else {}
        return make_context(model or models.whole, **{"n_ctx": 1024, "n_ubatch": 64, "flash_attn": "off"} | on_cpu | params)

    return make


def decode(context: Context, n_prompt: int = 400, n_tokens: int = 420) -> np.ndarray:
    tokens = random_tokens(n_tokens)
    context.decode(tokens[:n_prompt], logits="all")
    rows = [context.logits[-60:]]
    for token in tokens[n_prompt:]:
        context.decode([token])
        rows.append(context.logits)
    return np.concatenate(rows)


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(actual).all()
    assert rms(actual - expected) < NOISE * rms(expected)


def test_the_cache_is_there(make: Make) -> None:
    with pytest.raises(ContextError, match="Vulkan0 has no kernels for it"):
        make(kv_mixed=mixed("q4_0", attn="fused"), **F16)


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("kv", [F32, F16], ids=["f32", "f16"])
def test_cold_rows_like_hot_ones_are_a_plain_cache(kv: dict[str, str], flash_attn: str, make: Make) -> None:
    if kv is F32 and flash_attn == "on":
        pytest.skip("flash attention is for rows of F16 there")
    context = make(kv_mixed=mixed(kv["type_k"]), flash_attn=flash_attn, **kv)
    actual = decode(context)
    assert context.stats.cold_used > 100 and context.stats.n_migrations > 2
    assert_close(actual, decode(make(kv_mixed=False, flash_attn=flash_attn, **kv)))


@pytest.mark.parametrize("cold", QUANTISED)
def test_any_cold_type(cold: str, models: Models, make: Make) -> None:
    """As on the CPU, or refused by name when the context is made."""
    try:
        context = make(kv_mixed=mixed(cold), **F16)
    except ContextError as error:
        assert "Vulkan0" in str(error) and cold in str(error)
        pytest.skip(str(error))
    actual = decode(context)
    assert context.stats.cold_used > 100
    expected = decode(make(models.cpu, kv_mixed=mixed(cold, attn="compose"), **F16))
    plain = decode(make(models.cpu, kv_mixed=False, **F16))
    effect, noise = rms(expected - plain), NOISE * rms(plain)
    # ggml's operations store rows there; for two types the CPU's kernels search other scales, whose errors are then
    # independent of these, and a twentieth smaller: sqrt(1 + 1.06^2) = 1.46
    share = 1.5 if cold in ("iq4_nl", "q5_0") else 0.5 if cold == "q8_0" else 0.25
    assert 0 < rms(actual - expected) < share * effect + noise
    assert rms(actual - plain) < 1.3 * effect + noise


@pytest.mark.parametrize("flash_attn", ["off", "on"])
def test_some_layers_here_some_there(flash_attn: str, models: Models, make: Make) -> None:
    params = {"kv_mixed": mixed("q8_0"), "flash_attn": flash_attn, **F16}
    assert_close(decode(make(models.upper, **params)), decode(make(models.cpu, **params)))


def test_a_context_shift(models: Models, make: Make) -> None:
    def run(model: Model | None, kv_mixed: Any) -> np.ndarray:
        context = make(model, kv_mixed=kv_mixed, **F32)
        context.decode(random_tokens(500))
        context.memory.seq_rm(0, 4, 100)
        context.memory.seq_add(0, 100, -1, -96)
        context.decode(random_tokens(40, 1), logits="all")
        return context.logits

    for cold in ("f32", "q8_0"):
        assert_close(run(None, mixed(cold)), run(models.cpu, mixed(cold, attn="compose")))


def test_a_state_goes_to_the_cpu(models: Models, make: Make) -> None:
    context = make(kv_mixed=mixed("q4_0"), **F16)
    context.decode(random_tokens(500))
    state = context.state_save()
    on_cpu = make(models.cpu, kv_mixed=mixed("q4_0", attn="compose"), **F16)
    on_cpu.state_load(state)
    assert on_cpu.state_save() == state
    back = make(kv_mixed=mixed("q4_0"), **F16)
    back.state_load(state)
    for other in (context, on_cpu, back):
        other.decode(random_tokens(40, 1), logits="all")
    assert_close(on_cpu.logits, context.logits)
    np.testing.assert_array_equal(back.logits, context.logits)


def test_views_of_whole_pages(make: Make) -> None:
    """Cold cells in use grow page by page: a row of every size is right."""
    mixed_, plain = make(kv_mixed=mixed("f16"), **F16), make(kv_mixed=False, **F16)
    for i in range(24):
        for context in (mixed_, plain):
            context.decode(random_tokens(40, i))
        assert_close(mixed_.logits, plain.logits)
    assert mixed_.stats.cold_used > 640
