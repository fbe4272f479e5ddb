"""Types and signatures: what a type checker, completion and help() make of the package."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers.paths import ROOT

import llamamix
from llamamix import Context, ContextParams, Model, ModelParams

PACKAGE = Path(llamamix.__file__).parent


def run(module: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_package_has_no_wrong_types() -> None:
    """mypy --strict, as pyproject.toml configures it."""
    result = run("mypy", cwd=ROOT)
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, [result.stdout.strip()]), result.stdout
    assert re.match(r"Success: no issues found in \d{2,} source files", result.stdout)


def test_every_public_name_has_a_type(tmp_path: Path) -> None:
    result = run("basedpyright", "--verifytypes", "llamamix", "--ignoreexternal", cwd=tmp_path)
    n = re.search(r'Symbols exported by "llamamix": (\d+)', result.stdout)
    assert n is not None and int(n[1]) > 1000, result.stdout
    assert "Type completeness score: 100%" in result.stdout, result.stdout


WRONG = """
from llamamix import Context, KVMixedParams, Model

model = Model("m.gguf", n_gpu_layer=1)
context = Context(model, n_ctxx=5)
context = Context(model, 4096)
context = Context(model, flash_attn="maybe")
context = Context(model, n_ctx="4096")
context.decode("text")
context.decode([1], logits="first")
text: int = context.generate("text")
right = Context(model, n_ctx=5, kv_mixed=KVMixedParams(hot=64), pooling="mean")
for piece in right.generate("text", 5):
    print(piece.upper())
"""


def test_mypy_finds_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    result = run("mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "wrong.py", cwd=tmp_path)
    found = [int(line) for line in re.findall(r"^wrong\.py:(\d+): error", result.stdout, re.MULTILINE)]
    assert sorted(set(found)) == [4, 5, 6, 7, 8, 9, 10, 11], result.stdout
    assert 'Unexpected keyword argument "n_ctxx" for "Context"' in result.stdout


@pytest.mark.parametrize(("cls", "params", "n_before"), [(Context, ContextParams, 2), (Model, ModelParams, 2)])
def test_signatures_are_those_of_the_parameter_classes(cls: type, params: type, n_before: int) -> None:
    given = list(inspect.signature(cls.__init__).parameters.values())[n_before:]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in given)
    declared = [(field.name, field.default, field.type) for field in fields(params)]
    assert [(parameter.name, parameter.default, parameter.annotation) for parameter in given] == declared
    for parameter in given:  # what help() shows
        for documented in (cls, params):
            assert re.search(rf"^ {{4,8}}{parameter.name}: \S", documented.__doc__ or "", re.MULTILINE), (
                parameter.name
            )


def test_a_name_that_is_no_parameter(tiny_model_path: Path, tiny_model: Model) -> None:
    with pytest.raises(TypeError, match="n_ctxx"):
        Context(tiny_model, n_ctxx=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="n_gpu"):
        Model(tiny_model_path, n_gpu=5)  # type: ignore[call-arg]


def test_parameter_classes_make_the_same(tiny_model_path: Path) -> None:
    params = ContextParams(n_ctx=512, n_threads=1, kv_mixed="hot=64")
    with Model.from_params(tiny_model_path, ModelParams(vocab_only=False, check_tensors=True)) as model:
        assert model.params == ModelParams(check_tensors=True)
        with Context.from_params(model, params) as context:
            assert context.params == params and context.n_ctx == 512
