"""The reference: every public name is in it once, and its docstrings say what there is to say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from helpers.paths import DOCS, ROOT

import llamamix

if TYPE_CHECKING:
    import griffe

_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)

SHOWN = [name for page in sorted((DOCS / "reference").glob("*.md")) for name in _DIRECTIVE.findall(page.read_text())]

# what the site does not show: what a class or a module has for others of the package, and what is deprecated
_HIDDEN = re.compile(
    r"^_|_c$|^(handle|check_servers|use|use_memory|note_loaded|copy_stream|n_cells|state_read|state_write|make|links_of"
    r"|graph|buffer)$"
)

# nobody but the package makes one
_MADE_BY_THE_PACKAGE = {"Generation", "Memory", "Tier"}


def test_every_public_name_is_shown_once() -> None:
    counts = Counter(SHOWN)
    assert {name: counts[f"llamamix.{name}"] for name in llamamix.__all__} == dict.fromkeys(llamamix.__all__, 1)
    assert max(counts.values()) == 1
    # not once more by the module that it is defined in
    defined = {f"{getattr(llamamix, name).__module__}.{name}" for name in llamamix.__all__ if name[0].isupper()
               and hasattr(getattr(llamamix, name), "__module__")}  # fmt: skip
    modules = {name for name in SHOWN if name.count(".") == 1 and name.split(".")[1].islower()}
    assert not defined & set(SHOWN) and not {name.rpartition(".")[0] for name in defined} & modules


@pytest.fixture(scope="module")
def package() -> griffe.Object | griffe.Alias:
    return pytest.importorskip("griffe").load("llamamix", search_paths=[ROOT], resolve_aliases=True)


def _sections(shown: Any) -> dict[str, set[str]]:
    """The names in each section of a docstring, and all of its kinds."""
    import griffe

    found: dict[str, set[str]] = {}
    if shown.docstring is not None:
        for section in griffe.parse_google(shown.docstring, warnings=False, returns_named_value=False):
            named = section.value if isinstance(section.value, list) else []
            found.setdefault(section.kind.value, set()).update(str(getattr(item, "name", "")) for item in named)
    return found


def _objects(shown: Any) -> Iterator[Any]:
    """An object of the reference and its members, inherited ones as well, that the site shows."""
    yield shown
    if shown.is_class or shown.is_module:
        for name, member in {**shown.inherited_members, **shown.members}.items():
            if not _HIDDEN.search(name) and not (member.is_alias and shown.is_module):
                yield from _objects(member)


def _bases(cls: Any) -> list[Any]:
    return cls.mro() if cls.is_class else []


def _missing(shown: Any) -> list[str]:
    """What an object's docstring does not tell."""
    if shown.is_attribute and "property" not in shown.labels:
        cls = shown.target.parent if shown.is_alias else shown.parent
        told = _sections(shown.parent), _sections(cls), *map(_sections, _bases(shown.parent))
        is_named = any(shown.name in each.get(kind, ()) for each in told for kind in ("attributes", "parameters"))
        is_fixed = "enum" in "".join(map(str, getattr(shown.parent, "bases", []))).lower() or shown.name.isupper()
        return [] if shown.docstring is not None or is_named or is_fixed else [f"{shown.path} has no docstring"]
    if shown.docstring is None:
        return [f"{shown.path} has no docstring"]
    if shown.is_module or shown.is_attribute:
        return []
    is_made = shown.is_class and ("__init__" in shown.members or "dataclass" in shown.labels)
    if shown.is_class and not is_made or shown.name in _MADE_BY_THE_PACKAGE:
        return []
    sections = _sections(shown)
    told = sections.get("parameters", set()) | (sections.get("attributes", set()) if shown.is_class else set())
    parameters = [p for p in shown.parameters if p.name not in ("self", "cls")]
    return [f"{shown.path}: {p.name}" for p in parameters if p.name not in {name.lstrip("*") for name in told}]


def test_docstrings_tell_every_parameter(package: Any) -> None:
    missing = []
    n_objects = 0
    for name in SHOWN:
        if name != "llamamix.__version__":
            for shown in _objects(package[name.removeprefix("llamamix.")]):
                n_objects += 1
                missing += _missing(shown)
    assert missing == []
    assert n_objects > 250


def test_what_is_missing_is_found(tmp_path: Any) -> None:
    griffe = pytest.importorskip("griffe")
    (tmp_path / "poor.py").write_text(
        'class A:\n    """A.\n\n    Args:\n        x: One.\n    """\n\n'
        "    def __init__(self, x: int, y: int) -> None: ...\n\n"
        '    def f(self, n: int) -> None:\n        """F."""\n\n    def g(self) -> None: ...\n\n'
        '    @property\n    def p(self) -> int:\n        """P."""\n        return 1\n'
    )
    module = griffe.load("poor", search_paths=[tmp_path])
    found = [text for shown in _objects(module["A"]) for text in _missing(shown)]
    assert sorted(found) == ["poor.A.f: n", "poor.A.g has no docstring", "poor.A: y"]
