"""The notebook in examples/: every cell runs, and what it shows is what there is to see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

import llamamix

NOTEBOOK = ROOT / "examples" / "mixed_cache.ipynb"


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def kinds(notebook: Any) -> list[str]:
    """The richest form of every rich output, in their order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [next(kind for kind in ("image/png", "text/html", "text/plain") if kind in output.data)
            for output in outputs if "data" in output]  # fmt: skip


def test_every_notebook_is_run() -> None:
    assert list(NOTEBOOK.parent.glob("*.ipynb")) == [NOTEBOOK]


def test_notebook(smollm2_path: Path, botchan_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    assert smollm2_path.is_file() and botchan_path.is_file()
    monkeypatch.setenv("PYTHONPATH", str(Path(llamamix.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    kept = printed(notebook), kinds(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()

    out = printed(notebook)
    print(out)
    # all but the divergences is the same on every machine; these are of the kept run's size
    assert kinds(notebook) == kept[1] == ["text/html", "image/png", "image/png", "image/png"]
    number = r"mean KLD ([\d.]+), same top (\d+)"
    assert re.sub(number, "", out) == re.sub(number, "", kept[0])
    mixed, quality, q4_0 = [float(kld) for kld, _ in re.findall(number, out)]
    # noise of the model's quantised weights is some 0.004 nats (docs/fidelity.md), a uniform 4-bit cache is far above
    assert 0 < mixed < 0.25 * q4_0 and 0 < quality < 0.25 * q4_0
