"""LLAMA_KV_MIXED: what can be said in it, and that a cache which can not be had is an error and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.gguf_copy import rewrite_gguf
from helpers.processes import environment, library_dir
from helpers.tiny_model import write_tiny_model

import llamamix
from llamamix import Context, ContextError, KVMixedParams, Model, ParamsError

TYPES = "auto, f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1"

GOOD: dict[str, dict[str, Any]] = {
    "1": {},
    " 1 ": {},
    "hot=auto": {},
    "hot=256": {"hot": 256},
    "hot=1,sink=0": {"hot": 1, "sink": 0},
    "hot=999999999": {"hot": 999999999},
    "cold=q8_0": {"cold": "q8_0"},
    "cold=Q5_1": {"cold": "q5_1"},
    "cold_k=q8_0": {"cold_k": "q8_0", "cold_v": "auto"},
    "cold_v=f16": {"cold_k": "auto", "cold_v": "f16"},
    "cold=bf16,cold_v=iq4_nl": {"cold_k": "bf16", "cold_v": "iq4_nl"},
    "cold_v=iq4_nl,cold=bf16": {"cold_k": "bf16", "cold_v": "iq4_nl"},
    "cold_size=4096": {"cold_size": 4096},
    "group=1": {"group": 1},
    "sink=0": {"sink": 0},
    "sink=511": {"sink": 511},
    "threshold=1": {"threshold": 1.0},
    "threshold=0.25": {"threshold": 0.25},
    "threshold=1e-3": {"threshold": 1e-3},
    "attn=auto": {},
    "v_skip=0": {},
    "v_skip=0.01,cold=f16": {"v_skip": 0.01, "cold": "f16"},
    "mean=off": {"mean": False},
    "mean=0": {"mean": False},
    "mean=on": {},
    "on": {},
    "default": {},
    " default , hot = 64": {"hot": 64},
    "1,hot=64": {"hot": 64},
    "quality": {"cold_k": "q5_0", "cold_v": "auto"},
    "quality,cold=q8_0": {"cold": "q8_0"},
    "quality,cold_v=f16,hot=1024": {"cold_k": "q5_0", "cold_v": "f16", "hot": 1024},
    "memory": {"hot": 256},
    "attn=fused": {"attn": "fused"},
    " attn = compose ": {"attn": "compose"},
    " hot = 64 , cold = f32,\tgroup=8 ": {"hot": 64, "cold": "f32", "group": 8},
    "hot=64,cold=q5_0,cold_size=9,group=7,threshold=0.5,sink=3": {
        "hot": 64, "cold": "q5_0", "cold_size": 9, "group": 7, "threshold": 0.5, "sink": 3,
    },
}  # fmt: skip

NO_PRESET = ", nor a preset (default, quality, memory) at the begin"

BAD = {
    "mean=yes": "mean=yes is not on or off",
    "hot": f"'hot' is not key=value{NO_PRESET}",
    "hot=": f"'hot=' is not key=value{NO_PRESET}",
    "=5": f"'=5' is not key=value{NO_PRESET}",
    "hot=64,,sink=0": f"'' is not key=value{NO_PRESET}",
    "hot=64,1": f"'1' is not key=value{NO_PRESET}",
    "fast": f"'fast' is not key=value{NO_PRESET}",
    "quality,default": f"'default' is not key=value{NO_PRESET}",
    "hot=0": "hot must be at least 1 cell",
    "hot=-1": "hot=-1 is not a whole number",
    "hot=Auto": "hot=Auto is not a whole number",
    "sink=512,hot=auto": "sink=512 leaves no room in hot=512",
    "off,hot=64": f"'off' is not key=value{NO_PRESET}",
    "hot=1e3": "hot=1e3 is not a whole number",
    "hot=64 k": "hot=64 k is not a whole number",
    "hot=1000000000": "hot=1000000000 is not a whole number",
    "group=0": "group must be at least 1 token",
    "group=0x10": "group=0x10 is not a whole number",
    "cold_size=all": "cold_size=all is not a whole number",
    "sink=1.5": "sink=1.5 is not a whole number",
    "sink=64,hot=64": "sink=64 leaves no room in hot=64",
    "threshold=0": "threshold=0 is outside (0, 1]",
    "threshold=80": "threshold=80 is outside (0, 1]",
    "threshold=-0.5": "threshold=-0.5 is outside (0, 1]",
    "threshold=80%": "threshold=80% is not a number",
    "threshold=nan": "threshold=nan is not a number",
    "v_skip=1": "v_skip=1 is outside [0, 1)",
    "v_skip=-1e-3": "v_skip=-0.001 is outside [0, 1)",
    "v_skip=off": "v_skip=off is not a number",
    "attn=flash": "attn=flash is not auto, fused or compose",
    "attn=Fused": "attn=Fused is not auto, fused or compose",
    "attn=1": "attn=1 is not auto, fused or compose",
    "attn=fused,attn=fused": "attn is given twice",
    "cold=q9_0": f"cold=q9_0 is not a KV cache type ({TYPES})",
    "cold_k=q4_K": f"cold_k=q4_K is not a KV cache type ({TYPES})",
    "cold_v=i8": f"cold_v=i8 is not a KV cache type ({TYPES})",
    "hot=64,hot=64": "hot is given twice",
    "warm=64": "unknown key 'warm' (hot, cold, cold_k, cold_v, cold_size, group, threshold, sink, mean, attn, v_skip)",
    "HOT=64": "unknown key 'HOT' (hot, cold, cold_k, cold_v, cold_size, group, threshold, sink, mean, attn, v_skip)",
}


@pytest.mark.parametrize("spec", GOOD)
def test_good(spec: str) -> None:
    assert KVMixedParams.parse(spec) == KVMixedParams(**GOOD[spec])


@pytest.mark.parametrize("spec", BAD)
def test_bad(spec: str) -> None:
    with pytest.raises(ParamsError) as error:
        KVMixedParams.parse(spec)
    assert str(error.value).rstrip(".").endswith(BAD[spec])


OFF = ["", "0", "off", "  ", " 0 "]


@pytest.mark.parametrize("spec", OFF)
def test_off(spec: str) -> None:
    assert KVMixedParams.parse(spec) is None


# What a program does that knows nothing of a mixed cache: llama_init_from_model(), for one value of the variable after
# the other. Prints what the log says about the cache and about errors, and whether there is a context.
PROGRAM = """
import json, os, sys
from pathlib import Path
import cffi

folder, declarations, model_path, specs = json.loads(sys.argv[1])
ffi = cffi.FFI()
ffi.cdef(Path(declarations).read_text(encoding="utf-8"))
ffi.cdef("struct llama_context * llama_init_from_model(struct llama_model *, struct llama_context_params);")
suffix = {"darwin": "lib%s.dylib", "win32": "%s.dll"}.get(sys.platform, "lib%s.so")
lib = ffi.dlopen(str(Path(folder) / (suffix % "llama")))
ggml = ffi.dlopen(str(Path(folder) / (suffix % "ggml")))
lines = []
log = ffi.callback("void(int32_t, char *, void *)", lambda level, text, data: lines.append(ffi.string(text).decode()))
lib.llama_log_set(log, ffi.NULL)
if ggml.ggml_backend_reg_count() == 0:
    ggml.ggml_backend_load_all_from_path(folder.encode())
model = lib.llama_model_load_from_file(model_path.encode(), lib.llama_model_default_params())
for spec in specs:
    os.environ["LLAMA_KV_MIXED"] = spec
    lines.clear()
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads = 1024, 1
    context = lib.llama_init_from_model(model, params)
    words = "KV cache", "LLAMA_KV_MIXED", "error", "failed"
    text = "".join(line for line in lines if any(word in line for word in words))
    print(json.dumps([context != ffi.NULL, text]))
    if context != ffi.NULL:
        lib.llama_free(context)
"""


def create(model: Path, specs: list[str]) -> dict[str, tuple[bool, str]]:
    declarations = Path(llamamix.__file__).parent / "_decl" / "llama.h"
    arguments = json.dumps([str(library_dir()), str(declarations), str(model), specs])
    command = [sys.executable, "-c", PROGRAM, arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    outcomes = [tuple(json.loads(line)) for line in result.stdout.splitlines()]
    return dict(zip(specs, outcomes, strict=True))


def test_environment(tiny_model_path: Path) -> None:
    fits = [spec for spec, params in GOOD.items() if params.get("cold_size", 1024) >= 1024]
    outcomes = create(tiny_model_path, [*fits, *BAD, *OFF])
    for spec in fits:
        created, log = outcomes[spec]
        assert created, spec
        n_hot = min(KVMixedParams(**GOOD[spec]).n_hot, 1024)
        assert f"creating hot KV cache (FP16), size = {n_hot} cells" in log
        assert ("creating cold KV cache" if n_hot < 1024 else "no cold KV cache: the 1024 tokens") in log
    for spec, sentence in BAD.items():
        created, log = outcomes[spec]
        assert not created, spec  # no context rather than one with a plain cache
        assert f"LLAMA_KV_MIXED: {sentence}" in log
    for spec in OFF:
        created, log = outcomes[spec]
        assert created
        assert "hot KV cache" not in log


#
# a good spec that does not suit the model or the context
#


@pytest.mark.parametrize(
    ("params", "spec", "sentence"),
    [
        (
            {"n_ctx": 1024},
            "hot=256,cold_size=700",
            "hot=256 and cold_size=700 hold fewer tokens than the context of 1024",
        ),
    ],
)
def test_a_context_that_can_not_be_had(
    params: dict[str, Any], spec: str, sentence: str, make_context: Callable[..., Context]
) -> None:
    with pytest.raises(ContextError) as error:
        make_context(kv_mixed=spec, **params)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("params", "spec"),
    [
        ({"n_ctx": 1024, "n_seq_max": 256}, "1"),
        ({"n_ctx": 512, "n_seq_max": 256, "embeddings": True}, "1"),  # llama-cpp-python with embedding=True
        ({"n_ctx": 4096, "n_seq_max": 256, "embeddings": True, "pooling": "mean", "n_ubatch": 512}, "1"),
        ({"n_ctx": 4096, "n_seq_max": 128}, "1"),  # llama-server -np 128 -kvu
        ({"n_ctx": 1024, "n_seq_max": 4}, "hot=64,sink=16"),
        ({"n_ctx": 256}, "hot=512,sink=300"),
        ({"n_ctx": 512, "n_seq_max": 7}, "hot=1,sink=0"),
    ],
)
def test_sinks_that_do_not_all_have_room(params: dict[str, Any], spec: str, make_context: Callable[..., Context]) -> None:
    """They are pinned while there is room for them: no number of sequences is refused that a plain cache takes."""
    context = make_context(kv_mixed=spec, kv_unified=True, **params)
    stats = context.stats
    assert stats.hot_size + stats.cold_size == params["n_ctx"]
    assert stats.bytes_total <= stats.bytes_plain
    for seq in range(context.n_seq_max):
        context.decode([5], seq_id=seq)
    assert context.stats.hot_used + context.stats.cold_used == context.n_seq_max


@pytest.mark.parametrize(("cold", "ok"), [("q4_0", False), ("iq4_nl", False), ("q8_0", False), ("bf16", True)])
def test_a_head_that_blocks_do_not_divide(cold: str, ok: bool, tmp_path: Path) -> None:
    with Model(write_tiny_model(tmp_path / "48.gguf", head_size=48)) as model:
        params = {"n_ctx": 256, "n_threads": 1, "kv_mixed": KVMixedParams(hot=64, cold="f16", cold_v=cold)}
        if ok:
            with Context(model, **params) as context:
                context.decode(list(range(3, 103)))
                assert context.stats.n_migrations > 0
            return
        with pytest.raises(ContextError) as error:
            Context(model, **params)
    sentence = f"cold_v={cold} stores blocks of 32 values, and the head size 48 of layer 0 is not a multiple of that"
    assert sentence in str(error.value)


TOO_MANY_HEADS = "attn=fused is not possible for layer 0: the heads are too large, or too many share a KV head"


def test_fused_attention_that_can_not_be_had(tmp_path: Path) -> None:
    """129 heads that share one are too many: asked for by name it is refused, else it is composed."""
    tokens = np.random.default_rng(0).integers(3, 400, 120)
    path = write_tiny_model(tmp_path / "129.gguf", n_layer=1, n_head=129, n_head_kv=1, head_size=32)

    with Model(path) as model:

        def logits(kv_mixed: Any) -> np.ndarray:
            types = {"type_k": "f32", "type_v": "f32", "flash_attn": "off"}
            with Context(model, n_ctx=256, n_threads=1, kv_mixed=kv_mixed, **types) as context:
                context.decode(tokens[:100], logits="all")
                rows = [context.logits]
                for token in tokens[100:]:
                    context.decode([token])
                    rows.append(context.logits)
                if kv_mixed:
                    assert context.kv_mixed.attn == kv_mixed.attn
                    assert context.stats.n_migrations > 0
                return np.concatenate(rows)

        shape = {"hot": 32, "group": 8, "cold": "f32"}
        with pytest.raises(ContextError) as error:
            logits(KVMixedParams(**shape, attn="fused"))
        assert TOO_MANY_HEADS in str(error.value)
        # sums of up to 4,000 products (129 heads of 32) are off by 4000 ** 0.5 * 2**-24 = 4e-6 of their size; logits
        # are 3 in size, and the largest of 50,000 errors is 5 times the typical one
        plain = logits(False)
        for attn in ("auto", "compose"):
            np.testing.assert_allclose(logits(KVMixedParams(**shape, attn=attn)), plain, rtol=0, atol=4e-6 * 3 * 5 * 2)

    created, log = create(path, ["hot=32,attn=fused"])["hot=32,attn=fused"]
    assert not created
    assert TOO_MANY_HEADS in log


def test_the_most_heads_that_can_be_fused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "128.gguf", n_layer=1, n_head=128, n_head_kv=1, head_size=32)
    kv_mixed = KVMixedParams(hot=32, attn="fused")
    with Model(path) as model, Context(model, n_ctx=256, n_threads=1, kv_mixed=kv_mixed) as context:
        context.decode(list(range(3, 103)))
        assert np.isfinite(context.logits).all()


def write_mamba(path: Path) -> Path:
    """A recurrent model of one layer, all zeros: no context with a mixed cache ever computes anything."""
    n_embd, n_vocab, n_inner, n_state, n_rank, n_conv = 32, 64, 64, 8, 4, 4
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(512)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(n_conv)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_state_size(n_state)
    writer.add_ssm_time_step_rank(n_rank)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("no_vocab")
    shapes = {
        "token_embd.weight": (n_vocab, n_embd),
        "output_norm.weight": (n_embd,),
        "blk.0.attn_norm.weight": (n_embd,),
        "blk.0.ssm_in.weight": (2 * n_inner, n_embd),
        "blk.0.ssm_conv1d.weight": (n_inner, n_conv),
        "blk.0.ssm_conv1d.bias": (n_inner,),
        "blk.0.ssm_x.weight": (n_rank + 2 * n_state, n_inner),
        "blk.0.ssm_dt.weight": (n_inner, n_rank),
        "blk.0.ssm_dt.bias": (n_inner,),
        "blk.0.ssm_a": (n_inner, n_state),
        "blk.0.ssm_d": (n_inner,),
        "blk.0.ssm_out.weight": (n_embd, n_inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_windows_only(path: Path) -> Path:
    """Recurrent layers, and a sliding window in all others."""
    hybrid = write_tiny_model(path.with_suffix(".hybrid"), arch="lfm2", head_size=32)
    return rewrite_gguf(hybrid, path, extra={"attention.sliding_window": 64})


def write_non_causal(path: Path) -> Path:
    return rewrite_gguf(write_tiny_model(path.with_suffix(".llama")), path, extra={"attention.causal": False})


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (write_mamba, "no mixed KV cache for a mamba model: its memory is a recurrent state, not a KV cache"),
        (write_windows_only, "no layer of this model attends to the whole context, there is nothing to mix"),
        (write_non_causal, "no mixed KV cache without causal attention"),
    ],
    ids=["recurrent", "windows", "non-causal"],
)
def test_a_model_that_is_not_supported(write: Callable[[Path], Path], sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    with Model(path) as model:
        with pytest.raises(ContextError) as error:
            Context(model, n_ctx=256, n_threads=1)
        assert sentence in str(error.value)
        with Context(model, n_ctx=256, n_threads=1, kv_mixed=False) as context:  # nothing else is wrong with it
            context.decode([5, 6, 7])
    created, log = create(path, ["1"])["1"]
    assert not created
    assert sentence in log
