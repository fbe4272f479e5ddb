"""Servers of ggml-rpc as processes, and its protocol spoken by hand."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from .processes import find_program

_TIMEOUT = 300.0  # of a machine that has much else to do
_N_HELLO = 8 + 28  # bytes of the answer to it

#
# servers
#

# any libggml's server: its folder, endpoint, threads
_DRIVER = """
import ctypes, os, pathlib, sys
folder, endpoint, n_threads = sys.argv[1:]
for name in ("ggml-base", "ggml"):
    ggml = ctypes.CDLL(str(next(pathlib.Path(folder).glob(f"lib{name}.*"))), mode=ctypes.RTLD_GLOBAL)
for name in ("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address", "ggml_backend_dev_by_type"):
    getattr(ggml, name).restype = ctypes.c_void_p
if ggml.ggml_backend_reg_count() == 0:
    ggml.ggml_backend_load_all_from_path(folder.encode())
reg = ctypes.c_void_p(ggml.ggml_backend_reg_by_name(b"RPC"))
start = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p)(
    ggml.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_start_server"))
devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
start(endpoint.encode(), None, int(n_threads), 1, devices)
"""


def find_upstream() -> Path:
    """The folder of an unpatched libggml that has RPC; the test is skipped where there is none."""
    folder = os.environ.get("LLAMAMIX_UPSTREAM_LIB_PATH")
    if folder and list(Path(folder).glob("libggml-rpc.*")):
        return Path(folder)
    pytest.skip("LLAMAMIX_UPSTREAM_LIB_PATH names no folder with an unpatched libggml-rpc")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RpcServer:
    """A server on the loopback interface, with the CPU as its device.

    folder     whose libggml serves; None: the program ggml-rpc-server
    n_threads  that compute
    """

    def __init__(self, log: Path, folder: Path | None = None, n_threads: int = 1, port: int | None = None) -> None:
        self.port = port or free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.log = log
        if folder is None:
            command = [str(find_program("ggml-rpc-server")), "-H", "127.0.0.1", "-p", str(self.port)]
            command += ["-t", str(n_threads), "-d", "CPU"]
        else:
            command = [sys.executable, "-c", _DRIVER, str(folder), self.endpoint, str(n_threads)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        end = time.monotonic() + _TIMEOUT
        while True:
            with contextlib.suppress(OSError), Connection(self.endpoint):
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no server: {self.text()}")
            time.sleep(0.02)

    def text(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> RpcServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()


class Relay:
    """Stands before a server and passes on what is said, counting the bytes.

    hide   takes away the mark by which a server of ours is known
    """

    def __init__(self, endpoint: str, hide: bool = False) -> None:
        self._target = endpoint.split(":")
        self._hide = hide
        self.n_sent = 0  # by clients
        self.n_received = 0  # from the server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection((self._target[0], int(self._target[1])))
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with contextlib.suppress(OSError):
            if self._hide and not is_client:  # the answer to HELLO: its size, the version, the byte with the mark
                answer = source.recv(_N_HELLO, socket.MSG_WAITALL)
                target.sendall(answer[:11] + b"\0" + answer[12:])
            while data := source.recv(1 << 16):
                if is_client:
                    self.n_sent += len(data)
                else:
                    self.n_received += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()


#
# protocol
#

ALLOC_BUFFER, BUFFER_GET_BASE, SET_TENSOR, GET_TENSOR, GRAPH_COMPUTE, HELLO = 0, 3, 6, 8, 10, 14
GRAPH_RECOMPUTE = 16
REASON = 31  # of ours alone

MARK = 0x4D

N_SRC, N_PARAMS = 10, 16
FLAGS = 16  # GGML_TENSOR_FLAG_COMPUTE

# rpc_tensor, which is packed
_TENSOR = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
assert _TENSOR.size == 296


@dataclass
class Tensor:
    """A tensor as it crosses the wire; the fields are ggml_tensor's."""

    id: int
    type: int
    ne: tuple[int, ...]
    nb: tuple[int, ...]
    buffer: int = 0
    data: int = 0
    op: int = 0
    params: tuple[int, ...] = (0,) * N_PARAMS
    src: tuple[int, ...] = (0,) * N_SRC

    def pack(self) -> bytes:
        return _TENSOR.pack(
            self.id, self.type, self.buffer, *self.ne, *self.nb, self.op, *self.params, FLAGS, *self.src, 0, 0, self.data,
            b"", 1,
        )  # fmt: skip

    def with_(self, **changes: object) -> Tensor:
        return replace(self, **changes)  # type: ignore[arg-type]


class Connection:
    """A client. What a server refuses ends the connection, and with it the buffers: ConnectionError."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.split(":")
        self._socket = socket.create_connection((host, int(port)), _TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answer = self.ask(HELLO, bytes(24), 28)
        self.version, self.mark = tuple(answer[:3]), answer[3]

    def send(self, command: int, data: bytes) -> None:
        self._socket.sendall(struct.pack("<BQ", command, len(data)) + data)

    def ask(self, command: int, data: bytes, n: int) -> bytes:
        self.send(command, data)
        (size,) = struct.unpack("<Q", self._receive(8))
        assert size == n
        return self._receive(n)

    def _receive(self, n: int) -> bytes:
        res = b""
        while len(res) < n:
            data = self._socket.recv(n - len(res))
            if not data:
                raise ConnectionError("the server has ended the connection")
            res += data
        return res

    def allocate(self, n_bytes: int) -> tuple[int, int]:
        """A buffer of so many bytes, and its address."""
        buffer, size = struct.unpack("<QQ", self.ask(ALLOC_BUFFER, struct.pack("<IQ", 0, n_bytes), 16))
        assert buffer != 0 and size == n_bytes
        (base,) = struct.unpack("<Q", self.ask(BUFFER_GET_BASE, struct.pack("<Q", buffer), 8))
        return buffer, base

    def set(self, tensor: Tensor, data: bytes) -> None:
        self.send(SET_TENSOR, tensor.pack() + struct.pack("<BQ", 0, 0) + data)

    def get(self, tensor: Tensor, n_bytes: int) -> bytes:
        return self.ask(GET_TENSOR, tensor.pack() + struct.pack("<QQ", 0, n_bytes), n_bytes)

    def compute(self, nodes: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Nothing comes back: the next answer tells whether the connection still lives."""
        head = struct.pack("<II", 0, len(nodes)) + struct.pack(f"<{len(nodes)}Q", *nodes)
        self.send(GRAPH_COMPUTE, head + struct.pack("<I", len(tensors)) + b"".join(t.pack() for t in tensors))

    def recompute(self) -> None:
        self.send(GRAPH_RECOMPUTE, struct.pack("<I", 0))

    def reason(self, node: Tensor, sources: dict[int, Tensor]) -> str:
        """Why the server does not compute a node, "": it does."""
        empty = bytes(_TENSOR.size)
        parts = [sources[i].pack() if i else empty for i in node.src]
        answer = self.ask(REASON, struct.pack("<I", 0) + node.pack() + b"".join(parts), 256)
        return answer.split(b"\0")[0].decode()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
