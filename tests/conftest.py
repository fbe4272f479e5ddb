"""What the tests share."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_model import write_tiny_model

from llamamix import Context, Model, PullError
from llamamix.pull import pull


@pytest.fixture(autouse=True, scope="session")
def heed_ctrl_c() -> None:
    """A shell's background job ignores SIGINT, and so would the programs that the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def quiet_log() -> None:
    """llama.cpp's log is long; tests that read it raise the level themselves."""
    logging.getLogger("llamamix").setLevel(logging.CRITICAL)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny llama model with F32 weights and its own tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_path: Path) -> Iterator[Model]:
    with Model(tiny_model_path) as model:
        yield model


@pytest.fixture
def make_context(tiny_model: Model) -> Iterator[Callable[..., Context]]:
    """Makes contexts of the tiny model: one thread, 256 cells and a plain F16 cache unless asked otherwise."""
    contexts = []

    def make(model: Model = tiny_model, **params: Any) -> Context:
        contexts.append(Context(model, **{"n_ctx": 256, "n_threads": 1, "kv_mixed": False} | params))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


def _pulled(name: str) -> Path:
    try:
        return pull(name)
    except PullError as error:
        pytest.fail(f"this test needs {name}, and it can not be pulled: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    return _pulled("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M Q4_K_M."""
    return _pulled("gemma3")


@pytest.fixture(scope="session")
def botchan_path() -> Path:
    """279 kB of English text."""
    return _pulled("botchan")
