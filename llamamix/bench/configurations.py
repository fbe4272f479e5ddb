"""The KV caches to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ParamsError
from ..formats import FORMATS
from ..params import FLASH_ATTN, resolve_kv_mixed

DEFAULT_TYPES = ("f16", "q8_0", "q4_0")
DEFAULT_KV_MIXED = ("hot=512",)
_FLASH_ATTN = {name: name for name in FLASH_ATTN} | {"1": "on", "0": "off", "-1": "auto"}
_NOT_QUANTISED = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A KV cache to measure.

    Attributes:
        name: What tables call it.
        type_k: ggml type of K (of the hot rows when it is a mixed one).
        type_v: ggml type of V, likewise.
        flash_attn: "on", "off" or "auto".
        kv_mixed: The mixed KV cache's parameters as a text; None: a plain cache.
    """

    name: str
    type_k: str
    type_v: str
    flash_attn: str
    kv_mixed: str | None = None

    def context_params(self) -> dict[str, Any]:
        """The fields of ContextParams that make it."""
        return {
            "type_k": self.type_k,
            "type_v": self.type_v,
            "flash_attn": self.flash_attn,
            "kv_mixed": False if self.kv_mixed is None else self.kv_mixed,
        }


def configurations(
    types_k: Sequence[str] | None = None,
    types_v: Sequence[str] | None = None,
    flash_attn: Sequence[str] = ("auto",),
    kv_mixed: Sequence[str] = DEFAULT_KV_MIXED,
) -> tuple[Configuration, ...]:
    """Plain caches of the types, then mixed ones, each with every way of flash attention; the first is the baseline.

    Args:
        types_k: Types of K, in pairs with those of V: one list stands for both, one type goes with all of the other
            list.
        types_v: Types of V, likewise.
        flash_attn: "on", "off" or "auto", or llama-bench's "1", "0" and "-1"; quantised V needs it.
        kv_mixed: Texts such as "hot=512,cold=q8_0"; "off" is left out.

    Raises:
        ParamsError: For what can not be.
    """
    modes = list(dict.fromkeys(_mode(text) for text in flash_attn))
    asked = types_k is not None or types_v is not None
    pairs = _pairs(types_k or types_v or DEFAULT_TYPES, types_v or types_k or DEFAULT_TYPES)

    made = []
    for k, v in pairs:
        possible = [mode for mode in modes if mode != "off" or v in _NOT_QUANTISED]
        if asked and not possible:
            raise ParamsError(f"V of type {v} needs flash attention; -fa can not be off.")
        name = k if k == v else f"k={k} v={v}"
        made += [Configuration(_name(name, mode, modes), k, v, mode) for mode in possible]
    for spec in map(str.strip, kv_mixed):
        if resolve_kv_mixed(spec) is None:
            continue
        name = "mixed" if spec == "1" else f"mixed {spec}"
        made += [Configuration(_name(name, mode, modes), "f16", "f16", mode, spec) for mode in modes]
    return tuple(dict.fromkeys(made))


def _mode(text: str) -> str:
    if text not in _FLASH_ATTN:
        raise ParamsError(f"-fa must be on, off or auto, not {text!r}.")
    return _FLASH_ATTN[text]


def _pairs(types_k: Sequence[str], types_v: Sequence[str]) -> list[tuple[str, str]]:
    for name in (*types_k, *types_v):
        if name not in FORMATS:
            raise ParamsError(f"A cache's type must be one of {', '.join(FORMATS)}, not {name!r}.")
    n = max(len(types_k), len(types_v))
    types_k, types_v = (list(types) * n if len(types) == 1 else list(types) for types in (types_k, types_v))
    if len(types_k) != len(types_v):
        raise ParamsError(f"-ctk has {len(types_k)} types and -ctv has {len(types_v)}; they go together in pairs.")
    return list(zip(types_k, types_v, strict=True))


def _name(name: str, mode: str, modes: Sequence[str]) -> str:
    is_usual = mode == "auto" or (mode == "on" and "auto" not in modes)
    return name if is_usual else f"{name} fa={mode}"
