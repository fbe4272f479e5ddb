"""How the package hangs together: which module imports which, and what is named alike."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import llamamix
from llamamix.markdown import table

ROOT = Path(llamamix.__file__).parent


def modules() -> dict[str, Path]:
    res = {}
    for path in ROOT.rglob("*.py"):
        parts = ("llamamix", *path.relative_to(ROOT).with_suffix("").parts)
        res[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return res


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that one imports anywhere in it, in functions and for type checkers as well."""
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    res = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            res |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            of_each = [f"{module}.{alias.name}" for alias in node.names]
            res |= {each if each in known else module for each in of_each}
    return res & known - {name}


def test_no_modules_import_each_other() -> None:
    known = modules()
    graph = {name: imports(name, path, set(known)) for name, path in known.items()}
    assert graph["llamamix.cache"] >= {"llamamix.sbatch", "llamamix.context"}  # the last for its type
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_two_classes_of_the_library_have_one_name() -> None:
    """Records and views of bench and trace are their own affair."""
    places = defaultdict(list)
    for name, path in modules().items():
        if name.count(".") == 1:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(name)
    assert {"Batch", "SBatch", "UBatch"} <= set(places)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_markdown_tables() -> None:
    columns, rows = ("a", "b|"), [("1", "x"), ("22222", "")]
    assert table(columns, rows, (True, False)) == (
        "|     a | b\\| |\n"
        "| ----: | --- |\n"
        "|     1 | x   |\n"
        "| 22222 |     |\n"
    )  # fmt: skip
    assert table(columns, rows, (True, False), padded=False) == "| a | b\\| |\n|---:|---|\n| 1 | x |\n| 22222 |  |\n"
    assert table(columns, [], padded=False) == "| a | b\\| |\n|---|---|\n"
