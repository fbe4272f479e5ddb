"""Parameters: what they refuse, and that they mean the same as the library's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from llamamix import (
    PRESETS,
    Batch,
    Context,
    ContextParams,
    KVMixedParams,
    LlamamixError,
    MixedKVCache,
    Model,
    ModelParams,
    ParamsError,
    SamplingParams,
    SBatch,
)
from llamamix._ffi import ffi, lib, sized
from llamamix.attention import Attention
from llamamix.formats import FORMATS, format_name
from llamamix.ggml import row_size
from llamamix.params import resolve_kv_mixed


def test_formats_are_the_types_that_a_cache_can_have() -> None:
    """Upstream's programs list the same in their help, and ggml has the same names and sizes."""
    assert set(FORMATS) == {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"}
    for name, format in FORMATS.items():
        assert ffi.string(lib.ggml_type_name(format.type)).decode() == name
        assert format_name(format.type) == name
        assert (lib.ggml_blck_size(format.type), lib.ggml_type_size(format.type)) == (format.n_block, format.size_block)
        assert row_size(name, 256) == format.row_size(256)
    assert {name for name, format in FORMATS.items() if format.hot} == {"f32", "f16", "bf16"}
    assert all(format.fused and format.direct for format in FORMATS.values())


def test_kv_mixed_defaults_are_the_librarys() -> None:
    c_params = ffi.new("struct llama_kv_mixed_params *", lib.llama_kv_mixed_default_params())
    assert KVMixedParams.from_c(c_params) == KVMixedParams()
    expected = KVMixedParams(hot="auto", cold="auto", group=128, threshold=0.8, sink=4, cold_size=0, attn="auto")
    assert KVMixedParams() == expected


def test_kv_mixed_spec_is_the_documented_text() -> None:
    assert KVMixedParams().spec() == "hot=auto,cold=auto,group=128,threshold=0.8,sink=4"
    params = KVMixedParams(hot=64, cold_k="q8_0", group=16, threshold=0.5, sink=0, cold_size=100)
    assert params.spec() == "hot=64,cold_k=q8_0,cold_v=auto,group=16,threshold=0.5,sink=0,cold_size=100"
    assert KVMixedParams(attn="fused").spec() == "hot=auto,cold=auto,group=128,threshold=0.8,sink=4,attn=fused"


any_kv_mixed = st.builds(
    KVMixedParams,
    hot=st.just("auto") | st.integers(100, 999_999_999),
    cold=st.sampled_from(["auto", *FORMATS]),
    cold_k=st.none() | st.sampled_from(["auto", *FORMATS]),
    cold_v=st.none() | st.sampled_from(list(FORMATS)),
    group=st.integers(1, 999_999_999),
    threshold=st.floats(1e-6, 1.0),
    sink=st.integers(0, 99),
    cold_size=st.integers(0, 999_999_999),
    attn=st.sampled_from(["auto", "fused", "compose"]),
)


@given(any_kv_mixed)
def test_kv_mixed_spec_is_read_back(params: KVMixedParams) -> None:
    again = KVMixedParams.parse(params.spec())
    assert again.spec() == params.spec()
    assert (again.type_cold_k, again.type_cold_v) == (params.type_cold_k, params.type_cold_v)
    assert again.attn == params.attn


@given(any_kv_mixed)
def test_the_librarys_text_is_read_back(params: KVMixedParams) -> None:
    c_params, buffer = params.to_c(), ffi.new("char[200]")
    n = lib.llama_kv_mixed_params_format(c_params, buffer, len(buffer))
    text = ffi.string(buffer).decode()
    assert n == len(text)
    again = KVMixedParams.parse(text)
    assert bytes(ffi.buffer(again.to_c())) == bytes(ffi.buffer(c_params))
    # a smaller buffer gets the beginning
    assert lib.llama_kv_mixed_params_format(c_params, buffer, 6) == n
    assert ffi.string(buffer).decode() == text[:5]


def test_the_librarys_text_is_short() -> None:
    def text(spec: str) -> str:
        buffer = ffi.new("char[200]")
        lib.llama_kv_mixed_params_format(KVMixedParams.parse(spec).to_c(), buffer, len(buffer))
        return ffi.string(buffer).decode()

    assert text("1") == "hot=auto,cold=auto"
    assert text("quality,threshold=0.80,mean=1") == "hot=auto,cold_k=q5_0,cold_v=auto"
    everything = "hot=100,cold=q8_0,group=64,threshold=0.123,sink=0,cold_size=9,mean=off,attn=compose,v_skip=0.01"
    assert text(everything) == everything


def test_what_contexts_get_when_nothing_else_is_said() -> None:
    c_params = sized("struct llama_kv_mixed_params *")
    try:
        for spec, hot in (("hot=77", 77), ("off", None), ("quality,hot=5", 5)):
            assert lib.llama_kv_mixed_set_default(spec.encode()) == 0
            assert lib.llama_kv_mixed_get_default(c_params) == (hot is not None)
            if hot is not None:
                assert c_params.n_hot == hot
        assert lib.llama_kv_mixed_set_default(b"hot=some") == -1
        assert ffi.string(lib.llama_kv_mixed_last_error()) == b"hot=some is not a whole number"
        assert lib.llama_kv_mixed_get_default(c_params) == 1 and c_params.n_hot == 5  # nothing changed
    finally:
        lib.llama_kv_mixed_set_default(ffi.NULL)


def test_kv_mixed_parse_leaves_the_rest_at_defaults() -> None:
    assert KVMixedParams.parse("1") == KVMixedParams()
    assert KVMixedParams.parse("hot=256,cold=q8_0") == KVMixedParams(hot=256, cold="q8_0")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("hot", "key=value"),
        ("warm=1", "warm"),
        ("hot=x", "hot"),
        ("hot=0", "hot"),
        ("hot=1,hot=2", "hot"),
        ("cold=q9_9", "q9_9"),
        ("threshold=1.5", "threshold"),
        ("sink=512", "sink"),
        ("group=0", "group"),
        ("attn=flash", "attn"),
        ("hot=1\0", "text"),
    ],
)
def test_kv_mixed_parse_refuses_with_the_reason(spec: str, named: str) -> None:
    with pytest.raises(ParamsError, match=named):
        KVMixedParams.parse(spec)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (KVMixedParams, "hot", 0),
        (KVMixedParams, "hot", 1.5),
        (KVMixedParams, "hot", True),
        (KVMixedParams, "hot", 10**9),
        (KVMixedParams, "group", 0),
        (KVMixedParams, "sink", -1),
        (KVMixedParams, "sink", 512),
        (KVMixedParams, "threshold", 0.0),
        (KVMixedParams, "threshold", 1e-60),
        (KVMixedParams, "threshold", 1.01),
        (KVMixedParams, "threshold", float("nan")),
        (KVMixedParams, "threshold", "0.5"),
        (KVMixedParams, "cold", "q4_k"),
        (KVMixedParams, "cold", None),
        (KVMixedParams, "cold_k", "F16"),
        (KVMixedParams, "cold_v", 2),
        (KVMixedParams, "cold_size", -1),
        (KVMixedParams, "attn", "flash"),
        (KVMixedParams, "attn", 1),
        (ModelParams, "n_gpu_layers", -2),
        (ModelParams, "split_mode", "rows"),
        (ModelParams, "load_mode", "MMAP"),
        (ModelParams, "vocab_only", 1),
        (ContextParams, "n_ctx", -1),
        (ContextParams, "n_ctx", 2**31),
        (ContextParams, "n_batch", 0),
        (ContextParams, "n_ubatch", 0),
        (ContextParams, "n_seq_max", 0),
        (ContextParams, "n_seq_max", 257),
        (ContextParams, "n_threads", 0),
        (ContextParams, "n_threads", 513),
        (ContextParams, "n_threads_batch", -1),
        (ContextParams, "flash_attn", True),
        (ContextParams, "type_k", "i32"),
        (ContextParams, "type_v", "q8_1"),
        (ContextParams, "pooling", "sum"),
        (ContextParams, "kv_unified", 0),
        (ContextParams, "rope_freq_base", -1.0),
        (ContextParams, "kv_mixed", 3),
        (SamplingParams, "temperature", -0.1),
        (SamplingParams, "temperature", float("inf")),
        (SamplingParams, "top_k", -1),
        (SamplingParams, "top_p", 1.1),
        (SamplingParams, "min_p", -0.1),
        (SamplingParams, "typical_p", "1"),
        (SamplingParams, "repeat_penalty", 0.0),
        (SamplingParams, "frequency_penalty", float("nan")),
        (SamplingParams, "presence_penalty", None),
        (SamplingParams, "repeat_last_n", -1),
        (SamplingParams, "seed", 2**32 - 1),
        (SamplingParams, "grammar", " "),
        (SamplingParams, "grammar", "root ::= \0"),
        (SamplingParams, "logit_bias", [1, 2]),
        (SamplingParams, "logit_bias", {1.5: 0.0}),
        (SamplingParams, "logit_bias", {1: float("inf")}),
    ],
)
def test_a_bad_value_is_refused_by_the_fields_name(cls: type, field: str, value: object) -> None:
    with pytest.raises(ParamsError, match=field) as caught:
        cls(**{field: value})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, LlamamixError)


@pytest.mark.parametrize("cls", [KVMixedParams, ModelParams, ContextParams, SamplingParams])
def test_parameters_do_not_change(cls: type) -> None:
    params = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(params, dataclasses.fields(cls)[0].name, 1)


def test_what_kv_mixed_takes() -> None:
    assert resolve_kv_mixed(True) == KVMixedParams()
    assert resolve_kv_mixed("hot=64,sink=0") == KVMixedParams(hot=64, sink=0)
    assert resolve_kv_mixed(KVMixedParams(hot=64)) == KVMixedParams(hot=64)
    for value in (False, None, "off", "0", "", " "):
        assert resolve_kv_mixed(value) is None
        assert ContextParams(kv_mixed=value).kv_mixed == value
    for text in ("off", "0", "", " "):
        assert KVMixedParams.parse(text) is None


def test_context_params_reach_the_library() -> None:
    c_params = ContextParams(n_ctx=1024, n_seq_max=3, flash_attn="off", type_v="q8_0", kv_unified=True).to_c(7)
    assert (c_params.n_ctx, c_params.n_seq_max, c_params.flash_attn_type) == (1024, 3, 0)
    assert (c_params.type_k, c_params.type_v, c_params.kv_unified) == (1, 8, True)
    assert (c_params.n_threads, c_params.n_threads_batch, c_params.no_perf) == (7, 7, False)


#
# structs in the C interface
#

SIZED = {
    "params": "llama_kv_mixed_params",
    "stats": "llama_kv_mixed_stats",
    "layer": "llama_kv_mixed_layer",
    "tier": "llama_kv_mixed_tier",
    "ubatch": "llama_kv_mixed_ubatch",
    "spec": "llama_kv_mixed_params",
    "format": "llama_kv_mixed_format_info",
    "preset": "llama_kv_mixed_preset",
}


def last_error() -> str:
    return ffi.string(lib.llama_kv_mixed_last_error()).decode()


@pytest.fixture(scope="module")
def fill(tiny_model: Model) -> Iterator[Callable[[str, Any], int]]:
    """Calls that fill a struct, by its name."""
    params = {"n_ctx": 256, "kv_mixed": "hot=64,sink=1"}
    with Context(tiny_model, **params) as context, MixedKVCache.from_context(context) as cache:
        batch = Batch()
        for pos in range(5):
            batch.add(7, pos, [0])

        def call(name: str, struct: Any) -> int:
            if name == "spec":
                return lib.llama_kv_mixed_params_parse(b"hot=64,sink=1", struct)
            if name == "format":
                return lib.llama_kv_mixed_get_format_info(4, struct)
            if name == "preset":
                return lib.llama_kv_mixed_get_preset(1, struct)
            if name == "ubatch":
                with SBatch(batch) as sbatch, sbatch._handle as pointer:
                    n = lib.llama_kv_mixed_sbatch_split(pointer, 0, 3, struct)
                    return n if n < 0 else n - 3
            if name == "tier":
                with cache._handle as kv:
                    return lib.llama_kv_mixed_cache_get_tier(kv, 0, struct)
            with context._handle as ctx:
                if name == "layer":
                    return lib.llama_kv_mixed_get_layer(tiny_model.handle().pointer, 0, struct)
                return getattr(lib, f"llama_kv_mixed_get_{name}")(lib.llama_get_memory(ctx), struct)

        yield call


@pytest.mark.parametrize("name", SIZED)
def test_structs_are_filled_as_far_as_both_know_them(name: str, fill: Callable[[str, Any], int]) -> None:
    size = ffi.sizeof(f"struct {SIZED[name]}")

    def filled(size_given: int) -> tuple[int, int, bytes]:
        data = ffi.new("uint8_t[]", b"\xaa" * (size + 64))
        struct = ffi.cast(f"struct {SIZED[name]} *", data)
        struct.struct_size = size_given
        code = fill(name, struct)
        return code, struct.struct_size, bytes(ffi.buffer(data))[8:-1]

    code, n, whole = filled(size)
    assert (code, n) == (0, size) and whole[size - 8 :] == b"\xaa" * 64
    for size_given in (12, size - 8, size + 32):
        code, n, data = filled(size_given)
        end = min(size_given, size)
        assert (code, n) == (0, end)
        if name != "ubatch":  # has pointers
            assert data[: end - 8] == whole[: end - 8]
        assert set(data[end - 8 :]) == {0xAA}
    for size_given in (0, 8):
        code, n, data = filled(size_given)
        assert code == -1 and n == size_given and set(data) == {0xAA}
        assert last_error() == "struct_size must be the size of the struct, in bytes"


def test_structs_are_read_as_far_as_they_go(tiny_model: Model) -> None:
    shape = ffi.new("struct llama_kv_mixed_shape *")
    for name, value in (("n_layer", 1), ("n_head_kv", 1), ("n_embd_head_k", 32), ("n_embd_head_v", 32), ("n_ctx", 256)):
        setattr(shape, name, value)
    shape.n_seq_max, shape.type_k, shape.type_v = 1, FORMATS["f16"].type, FORMATS["f16"].type

    def make(shape_size: int, params: Any) -> KVMixedParams | None:
        shape.struct_size = shape_size
        kv = lib.llama_kv_mixed_cache_init(shape, params)
        if kv == ffi.NULL:
            return None
        found = ffi.new("struct llama_kv_mixed_params *")
        found.struct_size = ffi.sizeof(found[0])
        assert lib.llama_kv_mixed_get_params(lib.llama_kv_mixed_cache_get_memory(kv), found) == 0
        lib.llama_kv_mixed_cache_free(kv)
        return KVMixedParams.from_c(found)

    size_shape, size_params = ffi.sizeof("struct llama_kv_mixed_shape"), ffi.sizeof("struct llama_kv_mixed_params")
    params = KVMixedParams(hot=64, group=8, sink=1, threshold=0.5, attn="compose", cold="q8_0").to_c()
    assert make(size_shape, params).attn == "compose"
    params.struct_size = ffi.offsetof("struct llama_kv_mixed_params", "threshold")
    short = make(size_shape, params)
    assert (short.hot, short.group, short.sink) == (64, 8, 1)
    assert (short.threshold, short.type_cold_k, short.attn) == (KVMixedParams().threshold, "iq4_nl", "auto")
    model = tiny_model.handle().pointer
    cparams = lib.llama_context_default_params()
    cparams.n_ctx = 256
    ctx = lib.llama_kv_mixed_init_from_model(model, cparams, params)
    assert ctx != ffi.NULL
    lib.llama_free(ctx)
    for size, reason in (
        (0, "struct_size must be the size of the struct, in bytes"),
        (8, "struct_size must be the size of the struct, in bytes"),
        (size_params + 8, f"the struct has {size_params + 8} bytes, this library knows {size_params} of them"),
    ):
        params.struct_size = size
        assert make(size_shape, params) is None and reason in last_error()
        assert lib.llama_kv_mixed_init_from_model(model, cparams, params) == ffi.NULL and reason in last_error()
    # K and V types that are left out are 0, f32
    shape.type_k = shape.type_v = FORMATS["q4_0"].type
    for size in (0, 8, size_shape + 8):
        assert make(size, KVMixedParams(hot=64).to_c()) is None and "bytes" in last_error()
    assert make(ffi.offsetof("struct llama_kv_mixed_shape", "type_k"), KVMixedParams(hot=64).to_c()) is not None


@pytest.mark.parametrize(("size", "ok"), [(0, False), (8, False), (-48, True), (0x1000, False)])
def test_arguments_of_attention_are_read_as_far_as_they_go(size: int, ok: bool) -> None:
    rows = np.ones((1, 8, 1, 32), np.float16)
    attention = Attention(np.ones((1, 1, 1, 32), np.float32), None, (rows, rows), types=("f16", "f16"))
    args = attention._args
    args.struct_size = size if size >= 0 else ffi.sizeof(args[0]) + size
    code = lib.llama_kv_mixed_attn(args, 1, ffi.NULL)
    assert code == -1 and ("bytes" in last_error() or last_error() == "q and dst must not be NULL")
    assert ("dst" in last_error()) == ok  # the last field but the means of K and v_skip, which may be left out


def test_what_tests_need_is_no_part_of_the_interface() -> None:
    include = ROOT / "vendor" / "overlay" / "include"
    public = (include / "llama-kv-mixed.decl.h").read_text() + (include / "llama-kv-mixed.h").read_text()
    own = set(re.findall(r"llama_kv_mixed\w+(?=\()", (include / "llama-kv-mixed-test.decl.h").read_text()))
    assert own and not own & set(re.findall(r"\w+", public))
    for name in own:
        with pytest.raises(LlamamixError, match="no function"):
            getattr(lib, name)


def test_presets() -> None:
    """What the library has is what Python shows, by the same names."""
    assert list(PRESETS)[0] == "default" and len(PRESETS) >= 3
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.what
        assert KVMixedParams.parse(name) == (KVMixedParams.parse(preset.spec) if preset.spec else KVMixedParams())
    assert "fast" not in PRESETS and repr(PRESETS).startswith("PRESETS(default, ")
    sizes = {name: KVMixedParams.parse(name) for name in PRESETS}
    assert len(set(sizes.values())) == len(sizes)
