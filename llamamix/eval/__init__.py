"""What a KV cache does to a model's words, against the same model with an F16 or F32 cache.

plan, cases      what is computed, and with which caches
texts, recall    on what
weights          a model's weights expanded to F32
lockstep, runner compute it; compare, statistics: what is measured, and what follows from it
store            what was measured before
records          what was found, and reading it back
table, plot      what people look at
"""

from __future__ import annotations

from .cases import Case, cases
from .plan import Plan
from .recall import Recall
from .records import Row, read_records
from .runner import Runner
from .store import Store
from .texts import Chunk, EvalError, Lookup, Source, Text

__all__ = [
    "Case",
    "Chunk",
    "EvalError",
    "Lookup",
    "Plan",
    "Recall",
    "Row",
    "Runner",
    "Source",
    "Store",
    "Text",
    "cases",
    "read_records",
]
