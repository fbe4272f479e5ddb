"""llama.cpp with a mixed KV cache: the newest tokens in F16, older ones quantised, attention over both.

    with Model("model.gguf") as model, Context(model, n_ctx=8192) as context:
        for piece in context.generate("Once upon a time", max_tokens=64):
            print(piece, end="", flush=True)

Importing loads nothing: the modules come with the first name that is used, the library with the first call.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

_MODULES = {
    "batch": ("Batch",),
    "cache": ("MixedKVCache", "UnifiedKVCache"),
    "context": ("Context",),
    "generation": ("GeneratedToken", "Generation", "TokenLogprob"),
    "grammar": ("json_schema_to_grammar",),
    "errors": (
        "CacheError",
        "ContextError",
        "ContextFullError",
        "DecodeAborted",
        "LibraryError",
        "LlamamixError",
        "ModelError",
        "ParamsError",
        "ProgramError",
        "PullError",
        "ServerError",
    ),
    "model": ("Model",),
    "params": ("ContextParams", "KVMixedParams", "ModelParams", "SamplingParams"),
    "presets": ("PRESETS",),
    "sampling": ("Sampler",),
    "sbatch": ("SBatch", "UBatch"),
    "stats": ("CacheStats", "PerfData", "PromptProgress"),
    "tier": ("Cell", "Tier"),
    "trace": ("Trace", "TraceError"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*sorted(_MODULE_OF), "__version__"]

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .cache import MixedKVCache as MixedKVCache
    from .cache import UnifiedKVCache as UnifiedKVCache
    from .context import Context as Context
    from .errors import CacheError as CacheError
    from .errors import ContextError as ContextError
    from .errors import ContextFullError as ContextFullError
    from .errors import DecodeAborted as DecodeAborted
    from .errors import LibraryError as LibraryError
    from .errors import LlamamixError as LlamamixError
    from .errors import ModelError as ModelError
    from .errors import ParamsError as ParamsError
    from .errors import ProgramError as ProgramError
    from .errors import PullError as PullError
    from .errors import ServerError as ServerError
    from .generation import GeneratedToken as GeneratedToken
    from .generation import Generation as Generation
    from .generation import TokenLogprob as TokenLogprob
    from .grammar import json_schema_to_grammar as json_schema_to_grammar
    from .model import Model as Model
    from .params import ContextParams as ContextParams
    from .params import KVMixedParams as KVMixedParams
    from .params import ModelParams as ModelParams
    from .params import SamplingParams as SamplingParams
    from .presets import PRESETS as PRESETS
    from .sampling import Sampler as Sampler
    from .sbatch import SBatch as SBatch
    from .sbatch import UBatch as UBatch
    from .stats import CacheStats as CacheStats
    from .stats import PerfData as PerfData
    from .stats import PromptProgress as PromptProgress
    from .tier import Cell as Cell
    from .tier import Tier as Tier
    from .trace import Trace as Trace
    from .trace import TraceError as TraceError

    __version__: str
    """Version of the package, as its metadata say; ``"0+unknown"`` in a checkout that is not installed."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    try:
        return importlib.metadata.version("llamamix")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
