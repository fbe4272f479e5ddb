#!/usr/bin/env python3
"""What a mixed KV cache does with every architecture: upstream's toy models of all of them, one after the other.

    cmake --build --preset cpu --target test-llama-archs
    python tools/architectures.py > docs/architectures.md

Upstream's test program writes the models (a few MB each, random F32 weights). Every one is decoded with a plain F32
cache, and with a mixed one whose cold type is F32 too, so that the logits must be the same: hot is so small that nearly
all is cold, the prompt straddles the border several times, and sliding windows are left behind. See check() for how
close they must be. Then all that programs do with sequences is done with both, see play() and check_operations().
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llamamix import markdown

TOOL = Path(__file__).parent.parent / "build" / "cpu" / "bin" / "test-llama-archs"

N_PROMPT, N_TOKENS = 330, 400
N_LEARNED = 250  # positions of models that learn them one by one: the toys have 256

# As in test_identity.py: how far the order of sums may set two exact runs apart is measured with a plain cache
# against itself with its cells in another order, and the mixed one may be MARGIN times as far off. Toys are small enough
# for that to be 0; then it is what F32 sums allow: 4e-4 for logits of standard deviation 3, and in proportion.
MARGIN = 6.0
EXACT_NOISE_MAX = 4e-4 / 3
# ggml looks GELU up in a table of F16 numbers. A value next to a border, which the order of sums takes across it, changes by
# 2**-11 of its size, and so do about a token's logits; few tokens have such values (one token of one of 128 toys in 14 runs
# of all of them).
JUMP, JUMPS_MAX = 2.0**-10, 2

MIXED = {"hot": 32, "group": 8, "sink": 2, "cold": "f32"}

# Operations: the rows of one type are met by the fused kernel. With F16 ones, which upstream multiplies with queries
# rounded to F16, the composed attention does the same operations as a plain cache.
WAYS = (("f32", "auto"), ("f16", "compose"))
N_SEQ = 4
# A plain cache with its cells in another order differs from itself by some m, the median over tokens, and nowhere by more
# than ORDER_MAX of them unless values jump; the mixed one may by MARGIN as much. F16 weights of cells in two tiers may be
# rounded otherwise: what F32 sums allow, sqrt(512) * 2**-24 = 1.3e-6 of the logits' size, times 5 for two layers, times 5
# for the largest of many, is more than that.
ORDER_MAX = 4.0
EXACT_SUMS = 1.3e-6 * 5 * 5

PAGE = """# Architectures

What a mixed KV cache (`LLAMA_KV_MIXED`) does with upstream's toy model of every architecture. This page is written by

```sh
cmake --build --preset cpu --target test-llama-archs
python tools/architectures.py > docs/architectures.md
```

*mixed*: hot and cold for all layers that attend to the whole context. With cold rows stored as exactly as hot ones the
logits are those of a plain cache: 400 tokens, of which 32 are hot, prompt and single tokens, both ways to compute
attention where both are possible, within what the order of floating point sums allows. And they are after a prompt, single tokens, a rollback, a
copy of a sequence, two sequences side by side, a shift, a state restored to the same and to another sequence and to a
context, with a unified cache and with a stream for every sequence. *rest*: what stays as it is, a small cache for layers with
a sliding window (in the context's own type), the state of recurrent layers. *refused*: the context is not created, and
the reason is what it says.

No toys are made of some architectures: Gemma 3n, T5 (refused for its relative position buckets) and Gemma 4, of which
`tests/helpers/tiny_model.py` writes one. The way in is the same for all: where upstream makes a plain cache for layers
that attend to the whole context, the mixed one takes its place; any other memory is refused.

"""
COLUMNS = ("architecture", "KV cache", "layers mixed", "attention", "rest", "largest difference / allowed")


def make_toys(tool: Path, folder: Path, pattern: str = "") -> list[Path]:
    """Write toy models of the architectures that match a regular expression."""
    command = [str(tool), "-s", "1", "-o", str(folder)] + (["-a", pattern] if pattern else [])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return sorted(folder.glob("*.gguf"))


def check(path: Path) -> dict[str, Any]:
    """Run one model plain and mixed.

    Returns its ``arch`` and ``status``: "mixed", "refused" or "differs", with the ``reason``. For mixed ones also
    ``n_layer`` of those that are mixed, of ``n_layer_all``, ``attn``, whether there is a ``rest``, and the largest ``difference`` of
    logits with the ``bound`` on it.
    """
    from llamamix import Context, KVMixedParams, LlamamixError, Model

    with Model(path) as model:
        res: dict[str, Any] = {"arch": path.stem, "n_layer_all": model.n_layer, "n_swa": model.n_swa}
        res["is_hybrid"] = model.is_hybrid
        learned = "position_embd.weight" in path.read_bytes()[:200_000].decode("latin-1")
        n_prompt, n_tokens = (N_LEARNED - 70, N_LEARNED) if learned else (N_PROMPT, N_TOKENS)
        tokens = np.random.default_rng(0).integers(3, model.n_vocab, n_tokens)

        try:
            with Context(model, n_ctx=512, n_ubatch=64, n_threads=1, kv_mixed=KVMixedParams(**MIXED)):
                pass
        except LlamamixError as error:
            return res | {"status": "refused", "reason": str(error).removeprefix("The context can not be created: ")}

        def run(kv_mixed: Any, shuffle: int = 0) -> tuple[np.ndarray, Any]:
            params: dict[str, Any] = {"type_k": "f32", "type_v": "f32", "flash_attn": "off", "swa_full": False}
            # (upstream's small cache of sliding windows can lose rows when another sequence comes and goes)
            params |= {"n_seq_max": 2, "kv_unified": True, "swa_full": True} if shuffle else {}
            with Context(model, n_ctx=512, n_ubatch=64, n_threads=1, kv_mixed=kv_mixed, **params) as context:
                rows = []

                def decode(start: int, end: int) -> None:
                    context.decode(tokens[start:end], logits="all")
                    rows.append(context.logits)

                if shuffle:  # free cells in the midst of others, which later tokens take
                    decode(0, 50)
                    context.decode(tokens[:shuffle], seq_id=1)
                    decode(50, 100)
                    context.memory.seq_rm(1)
                decode(100 if shuffle else 0, n_prompt)
                for i in range(n_prompt, n_tokens):
                    decode(i, i + 1)
                return np.concatenate(rows), context.stats

        def is_fused() -> bool:
            try:
                with Context(model, n_ctx=512, n_ubatch=64, n_threads=1, kv_mixed=KVMixedParams(attn="fused", **MIXED)):
                    return True
            except LlamamixError as error:
                assert "attn=fused is not possible" in str(error)
                return False

        expected, _ = run(False)
        noise = max(float(np.abs(run(False, shuffle=n)[0] - expected).max()) for n in (17, 30, 41))
        bound = max(MARGIN * noise, EXACT_NOISE_MAX * float(expected.std()))
        difference, status = 0.0, "mixed"
        for attn in ("compose", "auto"):
            actual, stats = run(KVMixedParams(attn=attn, **MIXED))
            assert stats.n_migrations > 20 and stats.hot_used + stats.cold_used == n_tokens
            by_token = np.sort(np.abs(actual - expected).max(axis=1))
            if by_token[-1 - JUMPS_MAX] > bound or by_token[-1] > max(bound, JUMP * float(expected.std())):
                status = "differs"
            difference = max(difference, float(by_token[-1]))
        operations = check_operations(model, tokens)
        return res | {
            "status": "differs" if operations else status,
            "n_layer": stats.n_layer,
            "attn": "fused" if is_fused() else "composed",
            "rest": stats.bytes_rest > 0,
            "difference": difference,
            "bound": bound,
            "reason": "; ".join(operations),
        }


#
# operations on sequences
#


def play(context: Any, tokens: np.ndarray, shuffle: bool = False) -> list[tuple[str, Any]]:
    """All that programs do with sequences, step by step: logits, or whether it can be done at all.

    Where the cache is mixed, tokens move in every step that decodes.
    """
    from llamamix import ContextError

    memory = context.memory
    results: list[tuple[str, Any]] = []
    n_migrations = 0

    def next_tokens(seq: int, n: int) -> np.ndarray:
        return np.resize(np.roll(tokens, -memory.seq_pos_max(seq) - 1 - 7 * seq), n)

    def moved() -> bool:
        nonlocal n_migrations
        before, n_migrations = n_migrations, context.stats.n_migrations if context.stats else n_migrations + 1
        return n_migrations > before

    def decode(name: str, seq: int, n: int, at_once: int = 1) -> None:
        rows = []
        for start in range(0, n, at_once):
            context.decode(next_tokens(seq, min(at_once, n - start)), seq_id=seq, logits="all")
            rows.append(context.logits)
        assert moved(), f"{name}: nothing has moved"
        results.append((name, np.concatenate(rows)))

    def attempt(name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except ContextError:
            results.append((name, False))
        else:
            results.append((name, True))
        return results[-1][1]

    if shuffle:  # free cells in the midst of others, which later tokens take
        context.decode(next_tokens(0, 10))
        context.decode(next_tokens(3, 13), seq_id=3)
        decode("prefill", 0, 20, 10)
        memory.seq_rm(3)
        decode("prefill", 0, 32, 32)
    else:
        context.decode(next_tokens(0, 10))
        decode("prefill", 0, 20, 10)
        decode("prefill", 0, 32, 32)
    decode("decode", 0, 9)
    attempt("rollback", lambda: memory.seq_rm(0, memory.seq_pos_max(0) - 4))
    decode("decode after a rollback", 0, 9)

    memory.seq_cp(0, 1)
    decode("decode a copy", 1, 9)
    decode("decode what was copied", 0, 9)
    start = [memory.seq_pos_max(seq) + 1 for seq in (0, 1)]
    both = np.stack([next_tokens(seq, 9) for seq in (0, 1)], axis=1).ravel()
    pos = np.arange(9)[:, None] + start
    context.decode_batch(both, [0, 1] * 9, pos=pos.ravel().tolist(), logits="all")
    assert moved(), "side by side: nothing has moved"
    results.append(("decode both", context.logits))

    if memory.can_shift and attempt("shift", lambda: memory.seq_rm(0, 5, 20)):
        memory.seq_add(0, 20, -1, -15)
        decode("decode after a shift", 0, 9)

    state = context.state_save(0)
    decode("decode on", 0, 9)
    context.state_load(state, 0)
    decode("decode a restored sequence", 0, 9)
    context.state_load(state, 2)
    decode("decode it as another sequence", 2, 9)
    state = context.state_save()
    memory.clear()
    context.state_load(state)
    for seq in (0, 1, 2):
        decode(f"decode sequence {seq} of a restored context", seq, 12, 6)
    results.append(("ends", [(memory.seq_pos_min(seq), memory.seq_pos_max(seq)) for seq in range(N_SEQ)]))
    return results


def by_token(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference of each token's logits."""
    return np.abs(actual - expected).max(axis=1)


class Comparison:
    """Results of play(), step by step, and what a plain cache gives: one as it is, one with its cells in another order.

    JUMPS_MAX tokens of a step may be off by more than the bound, and half of them where the other order shows that values
    jump: what is wrong with the cache is wrong for all that follow.
    """

    def __init__(self, rows: str, plain: list[tuple[str, Any]], other: list[tuple[str, Any]]) -> None:
        logits, others = (np.concatenate([x for _, x in r if isinstance(x, np.ndarray)]) for r in (plain, other))
        noise, size = by_token(logits, others), float(logits.std())
        order_max = ORDER_MAX * float(np.median(noise))
        self.jumps = bool(noise.max() > order_max)
        self.bound = MARGIN * order_max if rows == "f32" else EXACT_SUMS * size
        self.jump = max(self.bound, MARGIN * float(noise.max()), JUMP * size)

    def differing(self, actual: list[tuple[str, Any]], expected: list[tuple[str, Any]]) -> list[str]:
        """Names of the steps that are not as expected."""
        assert [name for name, _ in actual] == [name for name, _ in expected]
        return [name for (name, x), (_, y) in zip(actual, expected, strict=True) if not self._same(x, y)]

    def _same(self, actual: Any, expected: Any) -> bool:
        if not isinstance(expected, np.ndarray):
            return bool(actual == expected)
        differences = by_token(actual, expected)
        n_over_max = len(differences) // 2 if self.jumps else JUMPS_MAX
        return bool((differences > self.bound).sum() <= n_over_max and differences.max() <= self.jump)


def check_operations(model: Any, tokens: np.ndarray) -> list[str]:
    """What is not as with a plain cache: names of steps, for each way to compute and with and without streams."""
    from llamamix import Context, KVMixedParams

    def run(
        kv_mixed: Any, rows: str, unified: bool, tokens: np.ndarray = tokens, shuffle: bool = False
    ) -> list[tuple[str, Any]]:
        params = {"type_k": rows, "type_v": rows, "flash_attn": "off", "swa_full": True, "n_threads": 1}
        params |= {"n_ctx": N_SEQ * 192, "n_ubatch": 16, "n_seq_max": N_SEQ, "kv_unified": unified}
        with Context(model, kv_mixed=kv_mixed, **params) as context:
            return play(context, tokens, shuffle)

    wrong = []
    for rows, attn in WAYS:
        plain = {unified: run(False, rows, unified) for unified in (True, False)}
        comparison = Comparison(rows, plain[True], run(False, rows, True, shuffle=True))
        for unified, expected in plain.items():
            actual = run(KVMixedParams(**MIXED | {"cold": rows, "attn": attn}), rows, unified)
            how = f"({'unified' if unified else 'streams'}, {rows}, {attn})"
            wrong += [f"{name} {how}" for name in comparison.differing(actual, expected)]
        if rows == "f32":
            # a group of tokens, all of them cold, that are others would show
            other = tokens.copy()
            other[24:32] = (other[24:32] + 7) % model.n_vocab
            seen = comparison.differing(run(False, rows, True, other), plain[True])
            later = [name for name, x in plain[True][3:] if isinstance(x, np.ndarray)]
            wrong += [f"{name} would miss tokens" for name in later if name not in seen]
    return wrong


def check_apart(path: Path) -> dict[str, Any]:
    """check() in a process of its own: libllama aborts the process for some mistakes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, "--one", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no reason"])[-1]
        return {"arch": path.stem, "status": "fails", "reason": last}
    return json.loads(result.stdout)


def _rest(row: dict[str, Any]) -> str:
    parts = ["sliding windows"] if row["n_swa"] else []
    parts += ["recurrent state"] if row["is_hybrid"] else []
    return ", ".join(parts) if row["rest"] else ""


def cells_of(row: dict[str, Any]) -> list[str]:
    if row["status"] == "mixed":
        cells = ["mixed", f"{row['n_layer']} of {row['n_layer_all']}", row["attn"], _rest(row)]
        cells.append(f"{row['difference']:.1e} / {row['bound']:.1e}")
    else:
        reason = row.get("reason", "").rstrip(".").split(" model: ")[-1]  # without the architecture's name
        cells = [f"{row['status']}: {reason}".rstrip(": "), "", "", "", ""]
    return [row["arch"], *cells]


def table(rows: list[dict[str, Any]]) -> str:
    return markdown.table(COLUMNS, [cells_of(row) for row in rows], padded=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", type=Path, default=TOOL, help="upstream's test-llama-archs (default: %(default)s)")
    parser.add_argument("--toys", type=Path, help="a folder of models that it has written")
    parser.add_argument("-a", "--arch", default="", help="only those that match this regular expression")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.getLogger("llamamix").setLevel(logging.CRITICAL)

    if args.one:
        print(json.dumps(check(args.one)))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        toys = sorted(args.toys.glob("*.gguf")) if args.toys else make_toys(args.tool, Path(folder), args.arch)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(check_apart, toys))
    print(PAGE + table(rows), end="")
    return 0 if all(row["status"] in ("mixed", "refused") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
