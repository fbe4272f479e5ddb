"""The device with memory of its own, for the tests that are about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.own_memory import Device

from llamamix import Context, Model


@pytest.fixture(scope="module")
def loaded(tiny_model_path: Path) -> Iterator[Device]:
    device = Device(tiny_model_path)
    yield device
    device.close()


@pytest.fixture
def device(loaded: Device) -> Iterator[Device]:
    yield loaded
    loaded.refuse()
    loaded.claim_custom(False)
    loaded.emulate_cuda(False)


Make = Callable[..., Context]


@pytest.fixture
def make(device: Device, make_context: Make) -> Make:
    """Makes a context whose layers and cache are on the device, or another model's."""

    def make(model: Model | None = None, **params: Any) -> Context:
        return make_context(model or device.whole, **{"n_ctx": 512, "n_ubatch": 64} | params)

    return make
