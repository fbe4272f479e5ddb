"""Sentences about parameters, with their names on the command line."""

from __future__ import annotations

import re

# what the parameters of the Python interface are called on the command line
_FLAGS = {
    "n_ctx": "-c",
    "n_batch": "-b",
    "n_ubatch": "-ub",
    "n_threads": "-t",
    "n_threads_batch": "-tb",
    "n_gpu_layers": "-ngl",
    "n_prompt": "-p",
    "n_gen": "-n",
    "n_depth": "-d",
    "n_decode": "--n-decode",
    "n_chunks": "--chunks",
    "flash_attn": "-fa",
    "type_k": "-ctk",
    "type_v": "-ctv",
    "kv_mixed": "--kv-mixed",
    "max_tokens": "-n",
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "typical_p": "--typical",
    "repeat_penalty": "--repeat-penalty",
    "repeat_last_n": "--repeat-last-n",
    "frequency_penalty": "--frequency-penalty",
    "presence_penalty": "--presence-penalty",
    "json_schema": "--json-schema",
}
# words as well, and so parameters only where a sentence begins with them
_WORDS = {
    "seed": "-s",
    "grammar": "--grammar",
    "repetitions": "-r",
    "stride": "--stride",
    "rpc": "--rpc",
    "weights": "--weights",
}

_NAMES = "|".join(sorted(_FLAGS, key=len, reverse=True))
# not a part of another name, and not what somebody wrote, which stands in quotation marks
_PARAMETER = re.compile(rf"(?<![\w'\"\-])({_NAMES})(?![\w'\"])(?:=(?:'([^']*)'|(\w+)))?")
_FIRST = re.compile(rf"^({'|'.join(_WORDS)})\b")


def with_flags(text: str) -> str:
    """A sentence about parameters of the Python interface as one about options of the command line.

    ``flash_attn='off' and kv_mixed=False`` becomes ``-fa off and --kv-mixed off``.
    """

    def flag(match: re.Match[str]) -> str:
        value = match[2] or match[3]
        return _FLAGS[match[1]] + (f" {'off' if value == 'False' else value}" if value else "")

    return _PARAMETER.sub(flag, _FIRST.sub(lambda match: _WORDS[match[1]], text))
