"""Parameters: what they refuse, and that they mean the same as the library's."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamamix import ContextParams, KVMixedParams, LlamamixError, Model, ModelParams, ParamsError, SamplingParams
from llamamix._ffi import ffi, lib
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
    assert {name for name, format in FORMATS.items() if format.fused} == {"q4_0", "q8_0"}
    assert {name for name, format in FORMATS.items() if format.direct} == {"f32", "f16", "bf16", "q4_0", "q8_0"}


def test_kv_mixed_defaults_are_the_librarys() -> None:
    c_params = ffi.new("struct llama_kv_mixed_params *", lib.llama_kv_mixed_default_params())
    assert KVMixedParams.from_c(c_params) == KVMixedParams()
    expected = KVMixedParams(hot=512, cold="q4_0", group=128, threshold=0.8, sink=4, cold_size=0, attn="auto")
    assert KVMixedParams() == expected


def test_kv_mixed_spec_is_the_documented_text() -> None:
    assert KVMixedParams().spec() == "hot=512,cold=q4_0,group=128,threshold=0.8,sink=4"
    params = KVMixedParams(hot=64, cold_k="q8_0", group=16, threshold=0.5, sink=0, cold_size=100)
    assert params.spec() == "hot=64,cold_k=q8_0,cold_v=q4_0,group=16,threshold=0.5,sink=0,cold_size=100"
    assert KVMixedParams(attn="fused").spec() == "hot=512,cold=q4_0,group=128,threshold=0.8,sink=4,attn=fused"


@given(
    st.builds(
        KVMixedParams,
        hot=st.integers(100, 999_999_999),
        cold=st.sampled_from(list(FORMATS)),
        cold_k=st.none() | st.sampled_from(list(FORMATS)),
        cold_v=st.none() | st.sampled_from(list(FORMATS)),
        group=st.integers(1, 999_999_999),
        threshold=st.floats(1e-6, 1.0),
        sink=st.integers(0, 99),
        cold_size=st.integers(0, 999_999_999),
        attn=st.sampled_from(["auto", "fused", "compose"]),
    )
)
def test_kv_mixed_spec_is_read_back(params: KVMixedParams) -> None:
    again = KVMixedParams.parse(params.spec())
    assert again.spec() == params.spec()
    assert (again.type_cold_k, again.type_cold_v) == (params.type_cold_k, params.type_cold_v)
    assert again.attn == params.attn


def test_kv_mixed_parse_leaves_the_rest_at_defaults() -> None:
    assert KVMixedParams.parse("1") == KVMixedParams()
    assert KVMixedParams.parse("hot=256,cold=q8_0") == KVMixedParams(hot=256, cold="q8_0")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", "empty"),
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


def test_unknown_options_are_refused(tiny_model_path, make_context) -> None:
    with pytest.raises(ParamsError, match="n_gpu_layer .*n_gpu_layers"):
        Model(tiny_model_path, n_gpu_layer=1)
    with pytest.raises(ParamsError, match="n_contxt"):
        make_context(n_contxt=1)


def test_what_kv_mixed_takes() -> None:
    assert resolve_kv_mixed(True) == KVMixedParams()
    assert resolve_kv_mixed("hot=64,sink=0") == KVMixedParams(hot=64, sink=0)
    assert resolve_kv_mixed(KVMixedParams(hot=64)) == KVMixedParams(hot=64)
    assert resolve_kv_mixed(False) is None
    assert resolve_kv_mixed("off") is None


def test_context_params_reach_the_library() -> None:
    c_params = ContextParams(n_ctx=1024, n_seq_max=3, flash_attn="off", type_v="q8_0", kv_unified=True).to_c(7)
    assert (c_params.n_ctx, c_params.n_seq_max, c_params.flash_attn_type) == (1024, 3, 0)
    assert (c_params.type_k, c_params.type_v, c_params.kv_unified) == (1, 8, True)
    assert (c_params.n_threads, c_params.n_threads_batch, c_params.no_perf) == (7, 7, False)
