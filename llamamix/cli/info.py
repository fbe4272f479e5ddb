"""llamamix info: what a model's KV cache takes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ._options import MODEL_HELP, add_command, add_kv_mixed, model_path
from ._output import FORMS, render, show

if TYPE_CHECKING:
    from ..grid import Grid
    from ..shape import ModelShape


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "info",
        "Show a model's shape and the bytes of its KV cache by type. No weights are loaded. Layers with a sliding "
        "window have a small cache of their own, which is part of the bytes and not of those per token.",
        usage="MODEL [OPTION ...]",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-c", "--ctx-size", type=int, default=0, metavar="N", help="0: from the model (default)")
    parser.add_argument(
        "-o", "--output", metavar="FORM", choices=FORMS, help="md, json, jsonl or csv; default: a table, in Markdown"
        " when stdout is no terminal; json, jsonl and csv: the shape and plain numbers of bytes",
    )  # fmt: skip
    add_kv_mixed(parser)


def _run(args: argparse.Namespace) -> None:
    from ..gguf_file import GgufFile
    from ..params import ContextParams, KVMixedParams, resolve_kv_mixed
    from ..presets import PRESETS
    from ..shape import ModelShape, kv_bytes

    ContextParams(n_ctx=args.ctx_size)
    kv_mixed = resolve_kv_mixed(args.kv_mixed)
    path = model_path(args.model)
    file = GgufFile(path)
    shape = ModelShape.of(file, path)
    n_ctx = shape.n_ctx_padded(args.ctx_size)

    plain = {
        name: (shape.kv_bytes_per_token(name), shape.kv_bytes(n_ctx, name))
        for name in ("f16", "q8_0", "q4_0")
    }  # fmt: skip
    sizes = dict(plain)
    mixed = {} if kv_mixed is None else {kv_mixed.spec(): kv_mixed}
    if args.kv_mixed is True:  # nothing was asked for
        mixed = {name: KVMixedParams.parse(name) for name in PRESETS}
    for name, params in mixed.items():
        cold = shape.kv_bytes_per_token(params.type_cold_k, params.type_cold_v)
        sizes[f"mixed {name}"] = (cold, kv_bytes(shape, n_ctx, params))
    records = [
        {
            "arch": shape.arch,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_head_kv": shape.n_head_kv_max,
            "head_k": shape.head_size_k,
            "head_v": shape.head_size_v,
            "n_ctx": n_ctx,
            "kv_cache": name,
            "bytes_per_token": per_token,
            "bytes": total,
            "ratio": total / plain["f16"][1] if total else 0.0,
        }
        for name, (per_token, total) in sizes.items()
    ]
    if args.output in (None, "md"):
        show([_grid(file.get("general.name") or path.name, path.stat().st_size, shape, records)], args.output)
    else:
        print(render(records, args.output), end="")


def _grid(name: str, n_file: int, shape: ModelShape, records: list[dict[str, Any]]) -> Grid:
    from ..display import n_bytes
    from ..grid import grid

    heads = f"{shape.n_head} heads, {shape.n_head_kv_max} of K and V" if shape.layers else "no attention"
    caption = f"{name}: {shape.arch}, {n_bytes(n_file)}, {shape.n_layer} layers, {heads}"
    n_ctx = records[0]["n_ctx"]
    return grid(
        caption,
        (
            ("KV cache", False, [record["kv_cache"] for record in records]),
            ("a token", True, [n_bytes(record["bytes_per_token"]) for record in records]),
            (f"{n_ctx} tokens", True, [n_bytes(record["bytes"]) for record in records]),
            ("of f16", True, [f"{record['ratio']:.3f}" for record in records]),
        ),
    )
