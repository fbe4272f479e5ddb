"""Exceptions as a sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ..errors import LlamamixError, ParamsError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_PIPE = 141  # 128 + SIGPIPE


def exit_code(run: Callable[[Any], int | None], args: Any) -> int:
    """Run a command, which returns its exit code or None for 0. LLAMAMIX_DEBUG=1 shows where an error comes from."""
    try:
        code = run(args)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # the reader has gone; Python must not find that out again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (LlamamixError, OSError, UnicodeDecodeError) as error:
        if os.environ.get("LLAMAMIX_DEBUG") == "1":
            traceback.print_exc()
        print(f"llamamix: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ParamsError) else EXIT_ERROR
