"""The programs in tools/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from .paths import TOOLS


def load_tool(name: str) -> ModuleType:
    """A module of its own of tools/NAME.py, which is not run."""
    spec = importlib.util.spec_from_file_location(f"llamamix_tool_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
