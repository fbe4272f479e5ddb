"""Programs that compute attention for tests: requests on stdin, answers on stdout (tests/attention/requests.h)."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llamamix import ggml
from llamamix.formats import FORMATS

ATTN, QUANTIZE, JOIN, MIGRATE, TIME, ABOUT = range(6)


class Refused(Exception):
    """The program says why it can not compute that."""


class Stopped(Exception):
    """The program has ended."""


class Program:
    """A process of the program. ``names``: the ways in which it can compute.

    timeout  seconds after which its start, and a request, end the process

    Raises:
        Stopped: When it does not start, and in all other methods when it ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        stderr: Any = None,
        timeout: float = 600.0,
    ) -> None:
        self.command = list(command)
        self.timeout = timeout
        env = {**(os.environ if env is None else env), "GGML_NO_BACKTRACE": "1"}  # gdb would write one to stdout
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=env
        )
        with self._limited():
            self.names = self._process.stdout.readline().decode().split()
        if not self.names:
            raise Stopped(f"{self.command[0]} does not start (exit status {self._process.wait()})")

    def ask(self, how: str, kind: int, *parts: Any) -> bytes:
        """The answer to a request that consists of bytes and arrays.

        Raises:
            Refused: When it can not be computed.
        """
        data = b"".join(x if isinstance(x, bytes) else np.ascontiguousarray(x).tobytes() for x in parts)
        with self._limited():
            return self._exchange(struct.pack("16sq", how.encode(), kind) + data)

    @contextlib.contextmanager
    def _limited(self) -> Iterator[None]:
        timer = threading.Timer(self.timeout, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _exchange(self, data: bytes) -> bytes:
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        length = self._process.stdout.read(8)
        (n,) = struct.unpack("q", length) if len(length) == 8 else (0,)
        answer = self._process.stdout.read(abs(n))
        if len(length) < 8 or len(answer) < abs(n):
            raise Stopped(f"{self.command[0]} has ended (exit status {self._process.wait()})")
        if n < 0:
            raise Refused(answer.decode())
        return answer

    def attention(
        self,
        how: str,
        q: np.ndarray,
        segments: Sequence[tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]],
        *,
        mask: np.ndarray | None,
        sinks: np.ndarray | None,
        scale: float,
        logit_softcap: float,
        max_bias: float,
        n_rot: tuple[int, int],
        means: np.ndarray | None,
        v_skip: float = 0.0,
        n_threads: int = 1,
    ) -> np.ndarray:
        """llamamix.attention() of arrays as that takes them; segments: types and rows of K and V, cold and hot."""
        n_stream, n_tokens, n_head, n_embd_k = q.shape
        sizes: list[int] = []
        arrays = [q]
        for (type_k, k), (type_v, v) in segments:
            numbers = FORMATS[type_k].type, FORMATS[type_v].type
            sizes += [*numbers, k.shape[1], k.shape[3] * k.itemsize, v.shape[3] * v.itemsize]
            arrays += [k, v]
        _, hot_v = segments[1][1]
        n_embd_v = hot_v.shape[3]  # hot rows are not quantised
        arrays += [x for x in (mask, sinks, means) if x is not None]
        header = struct.pack(
            "22q4d", n_threads, n_embd_k, n_embd_v, n_head, segments[0][0][1].shape[2], n_tokens, n_stream, *sizes,
            0 if mask is None else mask.itemsize, int(sinks is not None), *n_rot,
            0 if means is None else means.shape[1], scale, logit_softcap, max_bias, v_skip,
        )  # fmt: skip
        answer = self.ask(how, ATTN, header, *arrays)
        return np.frombuffer(answer, np.float32).reshape(n_stream, n_tokens, n_head, n_embd_v)

    def quantize(self, how: str, src: ggml.Tensor, kv_type: str, n_rot: int) -> np.ndarray:
        """Rows [n, n_rows], rotated in blocks of n_rot, as the bytes of another type: uint8 [n_rows, row_size]."""
        n, n_rows = src.ne
        header = struct.pack("5q", FORMATS[src.type].type, FORMATS[kv_type].type, n_rows, n, n_rot)
        return np.frombuffer(self.ask(how, QUANTIZE, header, src.data), np.uint8).reshape(n_rows, -1)

    def migrate(self, how: str, src: ggml.Tensor, kv_type: str, n_rot: int, n_page: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Rows [n, n_rows], rotated in blocks of n_rot, as another type.

        n_page  each of 128 rows, which are stored less their mean; 0: they are stored as they are

        Returns their bytes, uint8 [n_rows, row_size], and the means: float16 [n_page, n].
        """
        n, n_rows = src.ne
        header = struct.pack("6q", FORMATS[src.type].type, FORMATS[kv_type].type, n_rows, n, n_rot, n_page)
        answer = np.frombuffer(self.ask(how, MIGRATE, header, src.data), np.uint8)
        n_bytes = n_rows * ggml.row_size(kv_type, n)
        return answer[:n_bytes].reshape(n_rows, -1), answer[n_bytes:].view(np.float16).reshape(n_page, n)

    def join(
        self,
        cold: tuple[str, np.ndarray],
        hot: tuple[str, np.ndarray],
        n_rot: int,
        means: np.ndarray | None,
    ) -> np.ndarray:
        """Cold rows as numbers, then hot ones rotated, of types and rows as llamamix.attention() takes them.

        float16 [n_stream, n_cold + n_hot, n_head_kv, n_embd]
        """
        (type_cold, c), (type_hot, h) = cold, hot
        n_stream, n_hot, n_head_kv, n_embd = h.shape
        header = struct.pack(
            "11q", n_embd, n_head_kv, n_stream, FORMATS[type_cold].type, c.shape[1], c.shape[3] * c.itemsize,
            FORMATS[type_hot].type, n_hot, h.shape[3] * h.itemsize, n_rot, 0 if means is None else means.shape[1],
        )  # fmt: skip
        answer = self.ask("join", JOIN, header, c, h, *([] if means is None else [means]))
        return np.frombuffer(answer, np.float16).reshape(n_stream, -1, n_head_kv, n_embd)

    def close(self) -> int:
        """Ends it; its exit status."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()
