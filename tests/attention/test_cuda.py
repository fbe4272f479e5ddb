"""The kernels for CUDA without a GPU: emulated on the CPU (cuda_emulation.h), and compiled where nvcc is.

What they may be off by is derived in helpers/attention_f16.py. What the emulation can not see is what tools/gpu_check.py
looks at on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import attention_f16, device_cases
from helpers.attention_cases import Case
from helpers.paths import ROOT
from helpers.processes import environment, find_program, library_dir
from helpers.requests import Program, Refused

COST_MAX = 2_000_000  # products: the emulation takes its time
CASES = [case for case in device_cases.cases() if case.cost <= COST_MAX]

# of their threads: what is right in one order only lacks a barrier
ORDERS = {"forward": {}, "reverse": {"EMULATION_REVERSE": "1"}}


@pytest.fixture(scope="module", params=ORDERS)
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    path = find_program("cuda-emulated")
    res = Program([path], os.environ | {"LD_LIBRARY_PATH": str(library_dir())} | ORDERS[request.param])
    yield res
    res.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, program: Program) -> None:
    """By blocks of 8 and of 16 query rows."""
    item = device_cases.prepare(case, ["node"])
    data, options = item.data, item.data.options
    if options["mask"] is None:
        shape = (case.n_stream, case.n_tokens, case.n_cold + case.n_hot)
        options = options | {"mask": np.zeros(shape, np.float16)}
    for how in program.names:
        out = program.attention(how, data.q, data.segments, **options)
        judgement = attention_f16.judge(out, data, item.expected, item.limits["node"], "node")
        assert judgement.ok, f"{how}: {judgement}"
    if case.n_cold > 0:
        assert max(device_cases.judge_join(program, data, which) for which in (0, 1)) <= 1


def test_the_cases_have_every_value() -> None:
    for axis in set(device_cases.AXES) - {"n_embd"}:
        assert {getattr(case, axis) for case in CASES} >= set(device_cases.AXES[axis]), axis


@pytest.mark.parametrize("n_rot", [0, 16, 64, 128, 256])
@pytest.mark.parametrize("has_means", [False, True])
@pytest.mark.parametrize("cold", ["q4_0", "q5_0", "q8_0", "iq4_nl"])
def test_migration(cold: str, has_means: bool, n_rot: int, program: Program) -> None:
    hot = "bf16" if n_rot in (16, 256) else "f16"
    seen = device_cases.judge_migration(program, "move", hot, cold, n_rot, has_means, n_rows=256, n=256)
    assert seen.ok, seen
    if n_rot == 0 and not has_means:  # nothing is added up; ggml divides in another way where it stores 8 bits
        assert seen.same >= {"q4_0": 1.0, "q8_0": 0.99}.get(cold, 0)
    if cold in ("iq4_nl", "q5_0"):  # scales are searched
        assert seen.rms < 0.99


def test_rows_that_no_kernel_stores(program: Program) -> None:
    with pytest.raises(Refused, match="there is no kernel"):
        device_cases.judge_migration(program, "move", "f16", "q4_1", 0)


#
# with nvcc
#


def nvcc() -> str | None:
    return shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.exists()), None)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_they_compile(arch: str, tmp_path: Path) -> None:
    """Whole kernels with all formats, for every generation that they are meant for; none spills registers."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc is not there")
    source = tmp_path / "kernels.cu"
    source.write_text(
        '#include "attend.cuh"\n#include "join.cuh"\n#include "move.cuh"\n'
        "template __global__ void kv_attend<128, 8, KV_Q4_0, KV_Q4_0, KV_F16>(const kv_mixed_attend);\n"
        "template __global__ void kv_attend<128, 16, KV_ANY, KV_ANY, KV_ANY>(const kv_mixed_attend);\n"
        "template __global__ void kv_attend<256, 8, KV_IQ4_NL, KV_IQ4_NL, KV_F16>(const kv_mixed_attend);\n"
        "template __global__ void kv_combine<128>(const kv_mixed_attend);\n"
        "template __global__ void kv_join_cold<128, KV_ANY>(const kv_mixed_join);\n"
        "template __global__ void kv_join_hot<128>(const kv_mixed_join);\n"
        "template __global__ void kv_move<4, KV_IQ4_NL>(const kv_mixed_move);\n"
        "template __global__ void kv_mean<4>(const kv_mixed_move);\n"
    )
    # in place of ggml's, which needs libraries that are not always there
    (tmp_path / "common.cuh").write_text(
        "#pragma once\n#include <cuda_fp16.h>\n"
        "static __device__ __forceinline__ void ggml_cuda_pdl_sync() {}\n"
        "static __device__ __forceinline__ void ggml_cuda_pdl_lc() {}\n"
    )
    command = [
        compiler, "-cubin", "-O3", "-std=c++17", "-use_fast_math", f"-arch={arch}", "-Xptxas", "-v",
        f"-I{tmp_path}", f"-I{ROOT / 'vendor/overlay/src/cuda'}", str(source), "-o", str(tmp_path / "kernels.cubin"),
    ]  # fmt: skip
    without_sanitizer = environment(LD_PRELOAD=None)  # NVIDIA's compiler ends with that of these tests
    result = subprocess.run(command, env=without_sanitizer, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line for line in result.stderr.splitlines() if "spill stores" in line]
    assert len(lines) >= 8 and all("0 bytes spill stores" in line for line in lines), result.stderr[-4000:]
