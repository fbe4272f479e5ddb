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
from helpers.allowances import rms

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

logits = {}
with Model(sys.argv[1]) as model:
    for cold in ("q4_0", "f16"):
        with Context(model, n_ctx=768, n_threads=1, n_threads_batch=1, kv_mixed=f"hot=64,group=16,cold={cold}") as ctx:
            ctx.decode(json.loads(sys.argv[2]))
            assert ctx.stats.cold_used >= 300, ctx.stats
            logits[cold] = np.asarray(ctx.logits[-1], np.float64).tolist()
    print(json.dumps(logits))
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


def logits(package: Path, model: Path, prompt: list[int], cpu: str | None) -> tuple[dict[str, np.ndarray], str]:
    """Of the last token with each format of cold, and which of ggml's kernels made them."""
    command = [*emulated(cpu), sys.executable, "-c", PROGRAM, str(model), json.dumps(prompt)]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA", "GGML"))}
    env |= {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, cwd=package, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    values, files = map(json.loads, result.stdout.splitlines())
    (name,) = {re.sub(r"libggml-cpu-(\w+)\.so", r"\1", file) for file in files}
    return {cold: np.array(row) for cold, row in values.items()}, name


@pytest.mark.parametrize("cpu", [cpu for cpu in KERNELS if cpu])
def test_the_same_words_on_an_old_processor(package: Path, tiny_model_path: Path, cpu: str) -> None:
    prompt = np.random.default_rng(0).integers(3, 400, 400).tolist()
    here, _ = logits(package, tiny_model_path, prompt, None)
    there, kernels = logits(package, tiny_model_path, prompt, cpu)
    assert kernels == KERNELS[cpu]
    # Sums in another order move a logit by less than a thousandth of what logits have as their standard deviation. With cold
    # in Q4_0 products are in BF16 where a processor has them, and some values of K and V round to the next step. That is as
    # large an error as rounding to steps is itself, but only for the few that were close to the middle between two: 1 % of
    # all values would make it 0.35 of that error, since a whole step is sqrt(12) of its standard deviation.
    assert rms(here["f16"]) > 1
    assert rms(there["f16"] - here["f16"]) < 0.001 * rms(here["f16"])
    assert rms(there["q4_0"] - here["q4_0"]) < 0.35 * rms(here["q4_0"] - here["f16"])


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
