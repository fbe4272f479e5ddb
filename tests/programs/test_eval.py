"""llamamix eval: what comes out, what was recorded, what llama-perplexity says to the same, and Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.processes import environment, find_program

from llamamix import Context, Model
from llamamix.cli import main
from llamamix.eval import Text

MIXED = "hot=64,group=16"
SMALL = ("-c", 512, "--n-decode", 32, "-b", 128, "-ub", 64, "-t", 1)


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    try:
        code = main(["eval", *map(str, args)])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


def assert_error(result: tuple[int, str, str], code: int, text: str) -> None:
    assert result[0] == code and result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1 and lines[0].startswith("llamamix: ") and text in lines[0]


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    words = ["the", "man", "of", "all", "and", "a", "den", "on", "hill", "at", "ten", "then"]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(words, 6000)))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with the novel, and nothing else."""
    from llamamix.pull import cached, find

    novel = cached(find("botchan"))
    folder = tmp_path / "cache"
    (folder / "models").mkdir(parents=True)
    if novel is not None:
        (folder / "models" / novel.name).symlink_to(novel)
    monkeypatch.setenv("LLAMAMIX_CACHE", str(folder))
    return folder


#
# what comes out
#


def test_forms(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, text_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    flags = ("-f", text_path, "--text", "recall", *SMALL, "-ctk", "q8_0,q4_0", "--kv-mixed", f"{MIXED};hot=32")
    code, tables, err = run(capsys, "-m", tiny_model_path, *flags, "--jsonl", record)
    assert (code, err) == (0, "")
    captions = [line for line in tables.splitlines() if line and not line.startswith("|")]
    assert [re.split("[.:] ", caption)[0] for caption in captions] == [
        *(f"{text}, 512 tokens, {leg}" for text in ("words.txt", "recall") for leg in ("prompt", "decode")),
        "Mean KLD, 512 tokens", "Values found, by how many tokens back they are, 512 tokens",
    ]  # fmt: skip
    records = [json.loads(line) for line in record.read_text().splitlines()]
    names = ["f16", "f16 again", "q8_0", "q4_0", f"mixed {MIXED}", "mixed hot=32"]
    assert [(r["text"], r["leg"], r["cache"]) for r in records] == [
        (text, leg, name) for text in ("words.txt", "recall") for leg in ("prompt", "decode") for name in names
    ]
    for name in names:
        lines = re.findall(rf"^\| {re.escape(name)} +\|", tables, re.MULTILINE)
        assert len(lines) == 6 - (name == "f16")  # the reference is not in the overview

    # a replay shows the same, in every form; nothing is computed twice either
    assert run(capsys, "--replay", record) == (0, tables, "")
    assert run(capsys, "--replay", record, "-o", "md") == (0, tables, "")
    assert run(capsys, "-m", tiny_model_path, *flags) == (0, tables, "")
    for form in ("json", "jsonl", "csv"):
        code, out, err = run(capsys, "--replay", record, "-o", form)
        assert code == 0 and "mixed hot=32" in err  # the tables
        if form == "csv":
            flat = list(csv.DictReader(io.StringIO(out)))
            assert not any(name.startswith("lookup_") for name in flat[0])
            for row, full in zip(flat, records, strict=True):
                assert row["kld_mean"] == ("" if full["kld_mean"] is None else str(full["kld_mean"]))
                assert (int(row["n_lookups"]), int(row["n_found"])) == (
                    len(full["lookup_found"]), sum(full["lookup_found"]),
                )  # fmt: skip
        else:
            found = json.loads(out) if form == "json" else [json.loads(line) for line in out.splitlines()]
            assert found == records
    # several recordings together: what is in both is there once
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(r | {"text": "b"}) + "\n" for r in records[-2:]) + json.dumps(records[0]))
    code, out, _ = run(capsys, "--replay", record, "--replay", other, "-o", "jsonl")
    assert code == 0 and len(out.splitlines()) == len(records) + 2


def test_several_models_and_contexts(capsys: pytest.CaptureFixture, tiny_model_path: Path, text_path: Path) -> None:
    code, out, _ = run(
        capsys, "-m", tiny_model_path, "-m", tiny_model_path, "-f", text_path, "-c", "256,512", "--chunks", "2,1",
        "--leg", "decode", "--n-decode", 8, "-t", 1, "-ctk", "q8_0", "--stride", 4, "-fa", "off", "-ctv",
        "f16", "-o", "jsonl", "--no-keep",
    )  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["n_ctx"], r["n_chunks"], r["n_positions"]) for r in records] == (
        [(256, 2, 14)] * 3 + [(512, 1, 7)] * 3
    ) * 2
    assert {r["leg"] for r in records} == {"decode"}
    assert [(r["cache"], r["flash_attn"]) for r in records[:3]] == [
        ("f16", "off"), ("f16 again", "on"), ("k=q8_0 v=f16 fa=off", "off"),
    ]  # fmt: skip


def test_the_usual_texts_and_caches(capsys: pytest.CaptureFixture, cache: Path, tiny_model_path: Path) -> None:
    code, out, _ = run(capsys, "-m", tiny_model_path, *SMALL, "--leg", "prompt", "--stride", 16, "-o", "jsonl")
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["text"], r["cache"]) for r in records] == [
        (text, name) for text in ("prose", "code", "recall") for name in ("f16", "f16 again", "q8_0", "q4_0", "mixed")
    ]
    assert {r["text"]: r["text_source"] for r in records}["recall"] == "made of botchan.txt"
    # what was measured is in the cache folder, and nowhere where that is not wanted
    assert len(list((cache / "eval").rglob("*.npz"))) == 15
    assert run(capsys, "-m", tiny_model_path, *SMALL, "--leg", "prompt", "--text", "code", "--no-keep")[0] == 0
    assert len(list((cache / "eval").rglob("*.npz"))) == 15


def test_ablations_and_a_reference(capsys: pytest.CaptureFixture, tiny_model_path: Path, text_path: Path) -> None:
    spec = "hot=160,group=16"  # a window that is much of what positions see: its effect is not one of chance
    code, out, err = run(
        capsys, "-m", tiny_model_path, "-f", text_path, *SMALL, "--kv-mixed", spec, "--ablate", "--reference", "f32",
        "-o", "jsonl", "--no-keep",
    )  # fmt: skip
    assert code == 0
    decode = {r["cache"].removeprefix(f"mixed {spec}"): r for r in map(json.loads, out.splitlines())}
    kld = {name: r["kld_mean"] for name, r in decode.items()}
    assert list(kld)[:4] == ["f32", "f32 again", "f16", ""]
    assert kld["f32 again"] < min(kld["f16"], kld[", cold=q8_0"])
    assert max(kld["f16"], kld[", cold=q8_0"]) < kld[""] < kld[", no window"], kld
    assert {r["role"] for name, r in decode.items() if name.startswith(", ")} == {"ablation"}
    assert [name for name, r in decode.items() if not r["rotation"]] == [", no rotation"]
    assert decode[", no window"]["kv_bytes"] < decode[""]["kv_bytes"]
    assert "no page means" in out or "has no page means to leave out" in err


def test_weights_in_f32(capsys: pytest.CaptureFixture, cache: Path, tmp_path: Path, text_path: Path) -> None:
    import gguf
    from helpers.tiny_model import write_tiny_model

    path = write_tiny_model(tmp_path / "tiny.Q8_0.gguf", weight_type=gguf.GGMLQuantizationType.Q8_0)
    noise = {}
    for flags in ((), ("--f32",)):
        code, out, _ = run(
            capsys, "-m", path, "-f", text_path, *SMALL, "--leg", "prompt", "-ctk", "q8_0", "-o", "jsonl", *flags
        )
        assert code == 0
        _, again, _ = map(json.loads, out.splitlines())
        noise[again["model_filename"]] = again["kld_mean"]
    (made,) = [file.name for file in (cache / "models").iterdir() if file.name != "botchan.txt"]
    assert list(noise) == ["tiny.Q8_0.gguf", made] and made.startswith("tiny.F32-")
    # activations that are rounded to 8 bits make a small difference larger
    assert noise[made] < noise["tiny.Q8_0.gguf"] / 3


def test_a_picture(capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, text_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record, png, svg = tmp_path / "run.jsonl", tmp_path / "a.png", tmp_path / "a.svg"
    flags = ("-f", text_path, *SMALL, "-ctk", "q8_0", "--kv-mixed", MIXED)
    assert run(capsys, "-m", tiny_model_path, *flags, "--jsonl", record, "--plot", png)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run(capsys, "--replay", record, "--plot", svg)[0] == 0 and "<svg" in svg.read_text()
    code, _, err = run(capsys, "--replay", record, "--plot", tmp_path / "a.nothing")
    assert code == 1 and "can not be drawn" in err


def test_a_picture_without_matplotlib(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for args in (("-m", "missing.gguf"), ("--replay", "missing.jsonl")):
        assert_error(run(capsys, *args, "--plot", "x.png"), 1, "needs matplotlib")


#
# llama-perplexity
#


@pytest.mark.parametrize("case", ["q4_0", MIXED])
def test_llama_perplexity_says_the_same(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, text_path: Path, case: str
) -> None:
    """On the same text, chunks, batches and cache.

    Its file of the reference keeps logarithms of probabilities in 65,535 steps over 16 nats (or less), so that each is
    off by up to 1.22e-4, and with it a position's divergence: sum p e (1 + log p - log q) with |e| <= 1.22e-4, where
    the logarithms of what has weight differ by less than 1. It leaves out what is less likely than exp(-16), here up to
    400 tokens, which makes 400 * 1.1e-7 * 1 at most. It prints 6 digits.
    """
    bound = 1.22e-4 * 2 + 4.5e-5 + 5e-7
    program = find_program("llama-perplexity")
    base = tmp_path / "base"
    options = ["-c", "512", "-b", "256", "-ub", "64", "--chunks", "2", "-t", "1"]
    command = [str(program), "-m", str(tiny_model_path), "-f", str(text_path), *options]

    def perplexity(last: str, *more: str, **changes: str) -> str:
        for _ in range(5):
            done = subprocess.run(
                [*command, *more], capture_output=True, text=True, env=environment(**changes), timeout=300
            )
            assert done.returncode == 0, done.stderr
            if last in done.stdout + done.stderr:
                return done.stdout + done.stderr
        pytest.fail(f"no {last} in five runs")  # another thread writes its log, and now and then not to the end

    def number(name: str, text: str) -> float:
        return float(re.search(rf"{re.escape(name)}\s*[:=]\s*([-\d.]+)", text).group(1))

    ppl_base = number("Final estimate: PPL", perplexity("Final estimate", "--save-all-logits", str(base)))
    kl = ["--kl-divergence", "--kl-divergence-base", str(base)]
    if case == MIXED:
        theirs = perplexity("Same top p:", *kl, LLAMA_KV_MIXED=MIXED)
    else:
        theirs = perplexity("Same top p:", *kl, "-ctk", case, "-ctv", case)

    caches = ["--kv-mixed", MIXED] if case == MIXED else ["-ctk", case]
    code, out, _ = run(
        capsys, "-m", tiny_model_path, "-f", text_path, *options, "--leg", "prompt", *caches, "-o", "jsonl", "--no-keep"
    )
    assert code == 0
    reference, _, ours = map(json.loads, out.splitlines())
    assert ours["n_positions"] == 2 * 255 and ours["kld_mean"] > 50 * bound
    for name, theirs_name in (
        ("kld_mean", "Mean    KLD"), ("kld_median", "Median  KLD"), ("kld_p99", "99.0%   KLD"),
        ("kld_p999", "99.9%   KLD"), ("kld_max", "Maximum KLD"),
    ):  # fmt: skip
        assert ours[name] == pytest.approx(number(theirs_name, theirs), abs=bound), name
    # the errors are of sums of squares of these: at most as much again, over the root of 509
    error = float(re.search(r"Mean    KLD:.*± +([\d.]+)", theirs).group(1))
    assert ours["kld_mean_err"] == pytest.approx(error, abs=2 * bound / 509**0.5 + 5e-7)
    # one position could have two tokens that are the most likely ones within a step
    top = number("Same top p", theirs) / 100
    assert ours["same_top"] == pytest.approx(top, abs=1.01 / 510)
    # float32 sums of exponentials: 1e-6 of the logarithm
    assert ours["ppl"] == pytest.approx(number("Mean PPL(Q)", theirs), rel=1e-5)
    assert reference["ppl"] == pytest.approx(ppl_base, rel=1e-5)
    assert ours["ppl_ratio"] == pytest.approx(number("Mean PPL(Q)", theirs) / ppl_base, rel=1e-5)


#
# what goes wrong
#


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("", "required"),
        ("-m x --replay y", "not allowed"),
        ("-m x -o xml", "invalid choice"),
        ("-m x --n-decode many", "invalid int"),
        ("-m x -c ten", "'ten'"),
        ("-m x -c 100", "-c must be"),
        ("-m x -c 1000", "multiple of 256"),
        ("-m x --chunks 0", "--chunks"),
        ("-m x -c 512,1024,2048 --chunks 1,2", "one for each"),
        ("-m x --leg left", "'left'"),
        ("-m x --n-decode 2000", "half of a context"),
        ("-m x --stride 0", "stride"),
        ("-m x -b 0", "-b must be"),
        ("-m x -ub 0", "-ub must be"),
        ("-m x -t 0", "-t must be"),
        ("-m x -ngl -2", "-ngl must be"),
        ("-m x --text poetry", "'poetry'; -f has files"),
        ("-m x -ctk q3_k", "q3_k"),
        ("-m x -ctk f16,q8_0 -ctv f16,q8_0,q4_0", "in pairs"),
        ("-m x -ctk q8_0 -fa off", "needs flash attention"),
        ("-m x -fa maybe", "maybe"),
        ("-m x --kv-mixed warm=1", "warm"),
        ("-m x --kv-mixed off", "no cache to compare"),
        ("-m x -ctk q8_0 --ablate", "--ablate needs a mixed cache"),
        ("-m x --reference q8_0", "f16, f32, not 'q8_0'"),
        ("-m x --keep y --no-keep", "do not go together"),
        ("--replay x -c 512", "--ctx-size is for a new one"),
        ("--replay x --kv-mixed hot=5", "--kv-mixed"),
        ("--replay x --ablate", "--ablate"),
    ],
)
def test_bad_usage_exits_2(capsys: pytest.CaptureFixture, args: str, text: str) -> None:
    code, out, err = run(capsys, *args.split())
    assert (code, out) == (2, "") and text in err.splitlines()[-1]


def test_errors_are_one_sentence(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, text_path: Path
) -> None:
    flags = ("-f", text_path, *SMALL)
    assert_error(run(capsys, "-m", tmp_path / "missing.gguf", *flags), 1, "neither a file")
    assert_error(run(capsys, "-m", tiny_model_path, "-f", tmp_path / "missing"), 1, "No such file")
    assert_error(run(capsys, "--replay", tmp_path / "missing"), 1, "No such file")
    assert_error(run(capsys, "-m", text_path, *flags), 1, "is not a GGUF file")
    assert_error(run(capsys, "-m", tiny_model_path, *flags, "--chunks", 500), 2, "500 chunks of 512 need 256000")
    assert_error(run(capsys, "-m", tiny_model_path, *flags, "-f", text_path), 2, "Two texts are called words.txt")
    assert_error(
        run(capsys, "-m", tiny_model_path, *flags, "--kv-mixed", "hot=8,cold_size=8"), 1, "mixed hot=8,cold_size=8: "
    )
    # what was measured before it is not lost
    code, out, err = run(
        capsys, "-m", tiny_model_path, "-f", text_path, "-c", "256,1024", "--n-decode", 8, "-t", 1, "--kv-mixed",
        "hot=200,cold_size=60",
    )  # fmt: skip
    assert code == 1 and "256 tokens, decode" in out and "1024 tokens" not in out
    assert err.startswith("llamamix: mixed hot=200,cold_size=60: ") and len(err.splitlines()) == 1


def test_an_interrupt_keeps_what_there_is(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny_model_path: Path, text_path: Path, monkeypatch: Any
) -> None:
    flags = ("-m", tiny_model_path, "-f", text_path, *SMALL, "-ctk", "q8_0", "--keep", tmp_path / "kept")
    n_decodes = [0]
    original = Context.decode

    def decode(context: Context, *args: Any, **options: Any) -> None:
        n_decodes[0] += 1
        if n_decodes[0] == n_stop:
            raise KeyboardInterrupt
        original(context, *args, **options)

    monkeypatch.setattr(Context, "decode", decode)
    # three caches: four batches, and one more as the prompt of the decode leg goes on behind the third, then 21 tokens;
    # one more of the first
    n_stop = 3 * (4 + 1 + 21) + 2
    code, out, err = run(capsys, *flags)
    assert (code, err) == (130, "")
    tables = out.split("\n\n")
    assert "255 positions" in tables[0] and "22 positions" in tables[2]
    assert [line.split("|")[-2].strip() for line in tables[3].splitlines() if "q8_0" in line] == ["21"]
    assert len(list((tmp_path / "kept").rglob("*.npz"))) == 3  # the prompt leg, which was complete

    n_stop = 1
    n_decodes[0] = 0
    assert run(capsys, *flags, "--keep", tmp_path / "empty") == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c(tmp_path: Path, tiny_model_path: Path, text_path: Path) -> None:
    """In the second context, which takes longer than the test; what the first gave is shown, and not computed again."""
    keep = tmp_path / "kept"
    command = [sys.executable, "-m", "llamamix", "eval", "-m", tiny_model_path, "-f", text_path, "-o", "jsonl"]
    flags = ["-ctk", "q8_0", "--n-decode", 64, "-t", 1, "--keep", keep]
    process = subprocess.Popen(
        list(map(str, [*command, *flags, "-c", "512,8192"])), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert {json.loads(line)["n_ctx"] for line in lines} == {512}
    assert all(json.loads(line)["n_ctx"] == 8192 for line in out.splitlines())  # a part, if there is any
    assert "Traceback" not in err and "words.txt, 512 tokens, decode" in err  # the tables of what there is
    assert len(list(keep.rglob("*.npz"))) == 6

    again = subprocess.run(list(map(str, [*command, *flags, "-c", 512])), capture_output=True, text=True, timeout=60)
    assert again.stdout.splitlines() == [line.rstrip("\n") for line in lines]


def test_chunks_are_those_of_the_model_s_tokens(tiny_model: Model, text_path: Path) -> None:
    """One byte order mark, or a line break at the end, is part of a text as it is of llama-perplexity's."""
    text = text_path.read_text()
    chunks = Text("a", "", text).chunks(tiny_model, 256, 1)
    assert chunks[0].tokens.tolist() == tiny_model.tokenize(text)[:256]
