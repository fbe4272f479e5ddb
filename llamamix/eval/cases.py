"""The caches to compare: a reference, the same another way, plain and mixed ones, mixed ones that lack something."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bench import Configuration, configurations
from ..errors import ParamsError
from ..formats import FORMATS
from ..params import KVMixedParams

REFERENCE, NOISE, CANDIDATE, ABLATION = "reference", "noise", "cache", "ablation"

_EXACT = "f32"
_ROTATION_OFF = "LLAMA_ATTN_ROT_DISABLE"  # upstream's: rows of quantised caches are not rotated
_N_WINDOW_OFF = 32  # hot cells beside the sinks where there is to be no window; a ubatch goes through them


@dataclass(frozen=True, slots=True)
class Case:
    """A cache to compute with.

    Attributes:
        configuration: Its name and what makes it.
        role: "reference", "noise" (the reference computed otherwise), "cache", or "ablation" (a cache that lacks
            something).
        n_ubatch: The most tokens that one graph computes; None: the plan's.
        rotation: False: rows are not rotated before they are quantised.
    """

    configuration: Configuration
    role: str
    n_ubatch: int | None = None
    rotation: bool = True

    @property
    def name(self) -> str:
        """The configuration's name."""
        return self.configuration.name

    def settings(self, n_ubatch: int) -> dict[str, Any]:
        """What decides what it computes, whatever it is called.

        Args:
            n_ubatch: The plan's.
        """
        c = self.configuration
        return {
            "type_k": c.type_k,
            "type_v": c.type_v,
            "flash_attn": c.flash_attn,
            "kv_mixed": None if c.kv_mixed is None else KVMixedParams.parse(c.kv_mixed).spec(),
            "n_ubatch": self.n_ubatch or n_ubatch,
            "rotation": self.rotation and os.environ.get(_ROTATION_OFF, "0") in ("", "0"),
        }

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """What the library looks at while it makes the context."""
        before = os.environ.get(_ROTATION_OFF)
        if not self.rotation:
            os.environ[_ROTATION_OFF] = "1"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(_ROTATION_OFF, None)
            else:
                os.environ[_ROTATION_OFF] = before


def cases(
    reference: str,
    n_ubatch: int,
    types_k: Sequence[str] | None = None,
    types_v: Sequence[str] | None = None,
    flash_attn: str = "auto",
    kv_mixed: Sequence[str] | None = None,
    *,
    ablate: bool = False,
    note: Callable[[str], None] = lambda _text: None,
) -> tuple[Case, ...]:
    """The reference, its noise, then the others.

    Args:
        reference: Type of the plain cache that all are compared with: "f16", or "f32", which is without flash
            attention.
        n_ubatch: The plan's.
        types_k: Types of K of plain caches, in pairs with those of V. None, with no other caches either: q8_0 and q4_0.
        types_v: Types of V, likewise.
        flash_attn: "on", "off" or "auto".
        kv_mixed: Mixed caches, texts with one specification or several with ";" between them. None, with no types
            either: the defaults.
        ablate: Every mixed cache without each of its ingredients as well.
        note: Is told which of these there is not in this build of the library.

    Raises:
        ParamsError: For what can not be.
    """
    usual = types_k is None and types_v is None and kv_mixed is None
    if usual:
        types_k = ("q8_0", "q4_0")
    specs = ["1"] if usual else [spec.strip() for text in kv_mixed or () for spec in text.split(";") if spec.strip()]
    if types_k is None and types_v is None:
        types_k = ("f16",)
    made = configurations(types_k, types_v, (flash_attn,), specs)
    # flash attention makes F16 of rows in F32 before it looks at them
    first = configurations((reference,), None, ("off" if reference == _EXACT else flash_attn,), ())[0]
    first = replace(first, name=reference)

    found = [Case(first, REFERENCE), _noise(first, n_ubatch)]
    others = [c for c in made if (c.kv_mixed, c.type_k, c.type_v) != (None, reference, reference)]
    for configuration in others:
        found.append(Case(configuration, CANDIDATE))
        if ablate and configuration.kv_mixed is not None:
            found += _ablations(configuration, note)
    if not others:
        raise ParamsError(f"There is no cache to compare with {reference}: give --kv-mixed or -ctk.")
    if ablate and all(c.kv_mixed is None for c in others):
        raise ParamsError("--ablate needs a mixed cache, with --kv-mixed.")
    return tuple(found)


def _noise(reference: Configuration, n_ubatch: int) -> Case:
    """The reference with ubatches of half the size; an F16 one with flash attention where it has none, and without."""
    fa = reference.flash_attn
    if reference.type_k != _EXACT:
        fa = "on" if fa == "off" else "off"
    again = replace(reference, name=f"{reference.name} again", flash_attn=fa)
    return Case(again, NOISE, n_ubatch=max(1, n_ubatch // 2))


#
# without one ingredient
#


def _ablations(configuration: Configuration, note: Callable[[str], None]) -> list[Case]:
    assert configuration.kv_mixed is not None
    params = KVMixedParams.parse(configuration.kv_mixed)
    found = []

    def add(what: str, **changes: str) -> None:
        spec = changed(params, **changes)
        if KVMixedParams.parse(spec) != params:
            other = replace(configuration, name=f"{configuration.name}, {what}", kv_mixed=spec)
            found.append(Case(other, ABLATION))

    if params.n_hot > params.sink + _N_WINDOW_OFF:
        add("no window", hot=str(params.sink + _N_WINDOW_OFF))
    add("no sinks", sink="0")
    for format in ("q8_0", "q4_0"):
        add(f"cold={format}", cold=format)
    if getattr(params, "has_means", True):
        try:
            add("no page means", mean="off")
        except ParamsError:
            note("This build of the library has no page means to leave out.")
    if any(not FORMATS[cold].hot for cold in (params.type_cold_k, params.type_cold_v)):
        unrotated = replace(configuration, name=f"{configuration.name}, no rotation")
        found.append(Case(unrotated, ABLATION, rotation=False))
    return found


def changed(params: KVMixedParams, **changes: str) -> str:
    """The text of parameters with other values for some keys; ``cold`` stands for ``cold_k`` and ``cold_v`` too."""
    items = dict(item.split("=", 1) for item in params.spec().split(","))
    if "cold" in changes:
        items = {key: value for key, value in items.items() if key not in ("cold_k", "cold_v")}
    return ",".join(f"{key}={value}" for key, value in (items | changes).items())
