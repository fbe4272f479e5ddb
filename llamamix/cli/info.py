"""llamamix info: what a model's KV cache takes."""

from __future__ import annotations

import argparse
from typing import Any

from ._options import add_command, add_kv_mixed, model_path
from ._output import FORMS, render


def register(commands: Any) -> None:
    parser = add_command(
        commands,
        "info",
        "Show a model's shape and the bytes of its KV cache by type. No weights are loaded. Layers with a sliding "
        "window have a small cache of their own, which is part of the bytes and not of those per token.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a name that 'pull' knows")
    parser.add_argument("-c", "--ctx-size", type=int, default=0, metavar="N", help="0: from the model (default)")
    parser.add_argument("-o", "--output", choices=FORMS, default="md", help="default: md")
    add_kv_mixed(parser)


def _run(args: argparse.Namespace) -> None:
    from ..params import ContextParams, KVMixedParams, resolve_kv_mixed
    from ..presets import PRESETS
    from ..shape import ModelShape, kv_bytes

    ContextParams(n_ctx=args.ctx_size)
    kv_mixed = resolve_kv_mixed(args.kv_mixed)
    shape = ModelShape.from_gguf(model_path(args.model))
    n_ctx = shape.n_ctx_padded(args.ctx_size)

    plain = {
        name: (shape.kv_bytes_per_token(name), shape.kv_bytes(n_ctx, name))
        for name in ("f16", "q8_0", "q4_0")
    }
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
    print(render(records, args.output), end="")
