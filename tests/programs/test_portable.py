"""The portable wheel on processors that this machine is not: emulated ones, without AVX and without AVX-512.

$LLAMAMIX_PORTABLE_WHEEL names the wheel, which tools/wheel.py makes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

WHEEL = os.environ.get("LLAMAMIX_PORTABLE_WHEEL")
QEMU = shutil.which("qemu-x86_64")

pytestmark = [
    pytest.mark.skipif(WHEEL is None, reason="no LLAMAMIX_PORTABLE_WHEEL: python tools/wheel.py"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64: apt-get install qemu-user"),
]

# the first processor with SSE4.2, one with AVX2, and what this machine has
KERNELS = {"Nehalem": "sse42", "Haswell": "haswell", None: None}

PROGRAM = """
import json, sys
import numpy as np
from llamamix import Context, Model

with Model(sys.argv[1]) as model, Context(model, n_ctx=768, n_threads=1, n_threads_batch=1, kv_mixed="hot=64,group=16") as ctx:
    ctx.decode(json.loads(sys.argv[2]))
    assert ctx.stats.cold_used >= 300, ctx.stats
    print(json.dumps(np.asarray(ctx.logits[-1], np.float64).tolist()))
    with open("/proc/self/maps") as maps:
        print(json.dumps([line.split("/")[-1].strip() for line in maps if "libggml-cpu" in line]))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(WHEEL) as file:
        file.extractall(folder)
        for info in file.infolist():  # the mode, which extractall() forgets
            os.chmod(folder / info.filename, (info.external_attr >> 16) & 0o777 or 0o644)
    return folder


def emulated(cpu: str | None) -> list[str]:
    return [QEMU, "-cpu", cpu] if cpu else []


def logits(package: Path, model: Path, prompt: list[int], cpu: str | None) -> tuple[np.ndarray, str]:
    """Of the last token, and which of ggml's kernels made them."""
    command = [*emulated(cpu), sys.executable, "-c", PROGRAM, str(model), json.dumps(prompt)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA", "GGML"))}
    env |= {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, cwd=package, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    values, files = map(json.loads, result.stdout.splitlines())
    (name,) = {re.sub(r"libggml-cpu-(\w+)\.so", r"\1", file) for file in files}
    return np.array(values), name


@pytest.mark.parametrize("cpu", [cpu for cpu in KERNELS if cpu])
def test_the_same_words_on_an_old_processor(package: Path, tiny_model_path: Path, cpu: str) -> None:
    prompt = np.random.default_rng(0).integers(3, 400, 400).tolist()
    here, _ = logits(package, tiny_model_path, prompt, None)
    there, kernels = logits(package, tiny_model_path, prompt, cpu)
    assert kernels == KERNELS[cpu]
    # Another order of summation moves logits, which have a standard deviation of 3, by less than 1e-3, but where a value of
    # K or V then rounds to the next step of its cold block: that moves them by some hundredths.
    assert np.abs(there - here).max() < 0.1 and np.abs(here).std() > 1


@pytest.mark.parametrize("cpu", KERNELS)
def test_programs_start(package: Path, cpu: str | None) -> None:
    command = [*emulated(cpu), package / "llamamix" / "lib" / "llama-bench", "--list-devices"]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "Available devices" in result.stdout, result.stderr[-2000:]
    if KERNELS[cpu]:
        assert f"libggml-cpu-{KERNELS[cpu]}.so" in result.stderr


def test_quantised_weights_on_this_processor(package: Path, smollm2_path: Path) -> None:
    """Some compilers make kernels for AMX that stop the program; no other test of the wheel has weights for them."""
    command = [package / "llamamix" / "lib" / "llama-bench", "-m", smollm2_path, "-t", "1", "-p", "64", "-n", "4", "-r", "1"]
    result = subprocess.run([*command, "-o", "json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [test["avg_ts"] > 1 for test in json.loads(result.stdout)] == [True, True]
