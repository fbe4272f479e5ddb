"""Speed and memory of KV cache configurations, measured side by side.

configurations, plan  what is measured
runner                measures it
records               what was measured, and reading it back
summary               what follows from it: medians, ratios, latencies, the fit over depth
table, plot           what people look at
"""

from __future__ import annotations

from .configurations import Configuration, configurations
from .plan import BenchTest, Plan
from .records import BenchError, Row, read_rows
from .summary import Fit, Summary, fits, summarise

__all__ = [
    "BenchError",
    "BenchTest",
    "Configuration",
    "Fit",
    "Plan",
    "Row",
    "Summary",
    "configurations",
    "fits",
    "read_rows",
    "summarise",
]
