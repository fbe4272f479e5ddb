"""Recorded evaluations, and what people see of them: by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import make_row, noise, reference

from llamamix.eval import EvalError, read_records
from llamamix.eval.plot import front, plot, points
from llamamix.eval.table import lookup_grids, overview_grids, results_grids, uncertain


def md_rows(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert all(re.fullmatch("-+:?", cell) for cell in rule)
    return [dict(zip(head, row, strict=True)) for row in rows]


#
# numbers
#


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (2.4189, 0.131, "2.42(13)"),
        (2.4189, 0.2, "2.4(2)"),
        (2.4189, 0.194, "2.42(19)"),
        (2.4189, 0.196, "2.4(2)"),  # which rounds to 2
        (2.4189, 0.98, "2.4(10)"),
        (149.2, 21.4, "150(20)"),
        (1493, 14, "1493(14)"),
        (1493, 140, "1490(140)"),
        (99.4, 3.3, "99(3)"),
        (99.4, 1.0, "99.4(10)"),
        (1.000341, 0.000163, "1.00034(16)"),
        (0.00000123, 0.00000004, "0.00000123(4)"),
        (-0.5, 0.26, "-0.5(3)"),
        (0.0, 0.0, "0"),
        (1.0, 0.0, "1.00"),
        (0.0077123, None, "0.00771"),
        (123.456, None, "123"),
        (98765.4, None, "98765"),
        (None, None, ""),
        (None, 1.0, ""),
    ],
)
def test_a_value_and_its_error(value: float | None, error: float | None, text: str) -> None:
    assert uncertain(value, error) == text


def test_a_table() -> None:
    rows = [reference(), noise(), make_row(), make_row(cache="mixed", kv_bytes=21, kv_mixed="hot=512", kld_mean=0.0024)]
    (grid,) = results_grids(rows)
    assert grid.caption == (
        "prose, 2048 tokens, prompt: 1023 positions in 1 chunk. m.F32, 2 threads. KLD in thousandths"
        " of a nat from f16; in brackets: standard errors"
    )
    table = md_rows(grid.markdown())
    assert table[0] == {
        "cache": "f16", "of F16": "1.000", "mean KLD": "", "median": "", "99 %": "", "99.9 %": "", "same top %": "",
        "PPL ratio": "",
    }  # fmt: skip
    assert table[2] == {
        "cache": "q8_0", "of F16": "0.531", "mean KLD": "0.260(12)", "median": "0.140(4)", "99 %": "2.3(4)",
        "99.9 %": "7.70", "same top %": "99.4(2)", "PPL ratio": "1.00034(16)",
    }  # fmt: skip
    assert (table[3]["of F16"], table[3]["mean KLD"]) == ("0.328", "2.400(12)")
    # where an interrupt came
    rows[2] = make_row(n_positions=900)
    assert [row["positions"] for row in md_rows(results_grids(rows)[0].markdown())] == ["1023", "1023", "900", "1023"]
    caption = results_grids([make_row(n_batch=256, n_ubatch=128, n_chunks=2, n_threads=1)])[0].caption
    assert "in 2 chunks" in caption and "1 thread, -b 256, -ub 128." in caption


def test_a_table_for_every_unit() -> None:
    rows = [
        make_row(text=text, n_ctx=n_ctx, leg=leg, model_sha256=model)
        for model in "ab"
        for n_ctx in (2048, 8192)
        for text in ("prose", "code")
        for leg in ("prompt", "decode")
    ]
    grids = results_grids(rows)
    assert len(grids) == 16 and all(len(grid.rows) == 1 for grid in grids)
    assert [grid.caption.partition(":")[0] for grid in grids[:4]] == [
        "prose, 2048 tokens, prompt", "prose, 2048 tokens, decode", "code, 2048 tokens, prompt",
        "code, 2048 tokens, decode",
    ]  # fmt: skip


def test_tables_fit_80_columns() -> None:
    from io import StringIO

    from rich.console import Console

    name = "mixed hot=512,cold_k=q8_0,cold_v=q4_0,sink=64"
    (grid,) = results_grids([reference(), noise(), make_row(), make_row(cache=name)])
    console = Console(width=80, file=StringIO())
    console.print(grid.rich(80))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    # only the name of a cache needs more lines than one; what belongs together stays together
    for cell in ("0.260(12)", "0.140(4)", "2.3(4)", "7.70", "99.4(2)", "1.00034(16)"):
        assert cell in text


def test_an_overview() -> None:
    rows = [
        row
        for text, leg, kld in (("prose", "prompt", 0.001), ("prose", "decode", 0.002), ("code", "prompt", 0.003))
        for row in (
            reference(text=text, leg=leg),
            make_row(text=text, leg=leg, kld_mean=kld, kld_mean_err=0.0002),
            *([make_row(text=text, leg=leg, cache="mixed", kv_bytes=21)] if text == "prose" else []),
        )
    ]
    (grid,) = overview_grids(rows)
    assert grid.caption.startswith("Mean KLD, 2048 tokens. m.F32")
    assert md_rows(grid.markdown()) == [
        {
            "cache": "q8_0", "of F16": "0.531", "prose prompt": "1.0(2)", "prose decode": "2.0(2)",
            "code prompt": "3.0(2)",
        },
        {
            "cache": "mixed", "of F16": "0.328", "prose prompt": "0.260(12)", "prose decode": "0.260(12)",
            "code prompt": "",
        },
    ]  # fmt: skip


def test_lookups() -> None:
    values = {"text": "recall", "lookup_distances": (100, 600, 700, 1700), "lookup_found": (1, 1, 0, 0)}
    rows = [
        reference(**values | {"lookup_found": (1, 1, 1, 0)}),
        make_row(**values),
        make_row(**values, leg="decode"),
        make_row(),
    ]
    (grid,) = lookup_grids(rows)
    assert md_rows(grid.markdown()) == [
        {"cache": "f16", "0 to 512": "1/1", "512 to 1024": "2/2", "1536 to 2048": "0/1", "all": "3/4"},
        {"cache": "q8_0", "0 to 512": "2/2", "512 to 1024": "2/4", "1536 to 2048": "0/2", "all": "4/8"},
    ]
    assert [row["found"] for row in md_rows(results_grids(rows[:2])[0].markdown())] == ["3/4", "2/4"]
    assert lookup_grids([make_row()]) == []


#
# records
#


def test_records_come_back(tmp_path: Path) -> None:
    rows = [
        reference(),
        make_row(rotation=False, role="ablation", kv_mixed="hot=8", lookup_distances=(5, 7), lookup_found=(1, 0)),
        make_row(kld_mean=1e-12),
    ]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(row.record()) + "\n" for row in rows))
    assert read_records(path) == rows
    flat = rows[1].flat()
    assert (flat["n_lookups"], flat["n_found"]) == (2, 1) and "lookup_found" not in flat
    assert rows[1].share == 34 / 64
    names = ("a.F32-0123456789ab.gguf", "b-c.gguf", "d.F32-x.gguf")
    assert [make_row(model_filename=name).model for name in names] == ["a.F32", "b-c", "d.F32-x"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cache": 5}, "cache must not be 5"),
        ({"n_ctx": 2.5}, "n_ctx must not be 2.5"),
        ({"kld_mean": "much"}, "kld_mean must not be 'much'"),
        ({"kld_mean": float("nan")}, "kld_mean must not be nan"),
        ({"ppl": None}, "ppl must not be None"),
        ({"ppl": 10**400}, "ppl must not be 1000"),
        ({"rotation": 1}, "rotation must not be 1"),
        ({"leg": "left"}, "leg or role is unknown"),
        ({"role": "king"}, "leg or role is unknown"),
        ({"n_positions": 0}, "no positions"),
        ({"f16_bytes": 0}, "no positions, or no bytes"),
        ({"lookup_found": [1]}, "every lookup"),
        ({"lookup_found": [2], "lookup_distances": [5]}, "every lookup"),
        ({"kld_p99": None}, "only the reference"),
    ],
)
def test_damaged_records_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    good = make_row().record()
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    with pytest.raises(EvalError, match=f"line 2: the file is damaged.*{text}"):
        read_records(path)


def test_records_from_before_devices_were_told_are_those_of_a_cpu(tmp_path: Path) -> None:
    record = make_row().record()
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({k: v for k, v in record.items() if k not in ("backends", "gpu_info", "n_gpu_layers")}))
    assert read_records(path) == [make_row(backends="CPU", gpu_info="", n_gpu_layers=-1)]
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "cpu_info"}))
    with pytest.raises(EvalError, match="cpu_info is missing"):
        read_records(path)


def test_what_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for content in (b"[]\n", b"{}\n", b"x\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(EvalError, match="line 1: the file is no recorded evaluation"):
            read_records(path)
    path.write_bytes(b"")
    with pytest.raises(EvalError, match="has no measurements"):
        read_records(path)


#
# the picture
#


def test_the_front() -> None:
    assert front([(0.5, 1.0), (0.3, 4.0), (0.4, 5.0), (0.3, 6.0), (0.6, 1.0), (0.7, 0.5)]) == [
        (0.3, 4.0), (0.5, 1.0), (0.7, 0.5),
    ]  # fmt: skip
    assert front([(0.5, 1.0)]) == [(0.5, 1.0)]


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    rows = [
        row
        for leg in ("prompt", "decode")
        for text in ("prose", "code")
        for row in (
            reference(text=text, leg=leg),
            noise(text=text, leg=leg),
            make_row(text=text, leg=leg),
            make_row(text=text, leg=leg, cache="mixed [$_$]", kv_bytes=21, kld_mean=0.0024),
            make_row(text=text, leg=leg, cache="mixed, no sinks", role="ablation"),
            make_row(text=text, leg=leg, cache="the same", kld_mean=0.0),
        )
    ]
    drawn: list[tuple[float, float]] = []
    lines: list[float] = []
    original, original_line = Axes.errorbar, Axes.axhline

    def errorbar(axis: Axes, x: list[float], y: list[float], *args: Any, **options: Any) -> Any:
        drawn.append((x[0], y[0]))
        return original(axis, x, y, *args, **options)

    def axhline(axis: Axes, y: float, **options: Any) -> Any:
        lines.append(y)
        return original_line(axis, y, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Axes, "axhline", axhline)
    path = tmp_path / "a.svg"
    plot(rows, path)
    assert drawn == [(34 / 64, 0.00026), (21 / 64, 0.0024)] * 4 and lines == [1.5e-6] * 4
    assert "<svg" in path.read_text()
    with pytest.raises(EvalError, match="can not be drawn"):
        plot(rows, tmp_path / "a.nothing")
    for nothing in ([reference(), noise()], [make_row(role="ablation")], [make_row(kld_mean=0.0)]):
        with pytest.raises(EvalError, match="nothing to draw"):
            plot(nothing, path)
    assert points([reference(), noise(), make_row(kld_mean=0.0)]) == []
