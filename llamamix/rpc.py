"""Layers on other machines: ggml-rpc servers, as the devices of a model.

The protocol has neither authentication nor encryption: servers belong on the loopback interface or in a network that
everybody in it may be trusted.
"""

from __future__ import annotations

import socket
import struct
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ._ffi import error_lines, ffi, lib
from ._handle import Handle
from .errors import LlamamixError, ModelError, ParamsError, ProgramError
from .programs import find_program

DEFAULT_PORT = 50052  # ggml-rpc-server's
N_SERVERS_MAX = 16  # GGML_RPC_MAX_SERVERS

_TIMEOUT = 10.0  # seconds for an answer to a HELLO, which a server gives at once unless it has another client

# RPC_CMD_HELLO: the command, the size of what follows, 24 bytes of transports that the client has (none but TCP)
_HELLO = struct.pack("<BQ24x", 14, 24)
_N_HELLO_ANSWER = 8 + 28  # its size, then version, padding, transports

_DEVICE_GPU = 1


def parse_endpoints(servers: str | Sequence[str]) -> tuple[str, ...]:
    """Servers as ``HOST:PORT`` each, without a port: ggml-rpc-server's.

    Args:
        servers: Their names, or one text with commas between them.

    Raises:
        ParamsError: For what is no such name, one that comes twice, and more than there can be.
    """
    names = servers.split(",") if isinstance(servers, str) else servers
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ParamsError(f"rpc must be HOST:PORT, or several of them, not {servers!r}.")
    res = tuple(_endpoint(name.strip()) for name in names)
    if len(set(res)) < len(res):
        raise ParamsError(f"rpc names a server twice: {', '.join(res)}.")
    if len(res) > N_SERVERS_MAX:
        raise ParamsError(f"rpc must not name more than {N_SERVERS_MAX} servers, not {len(res)}.")
    return res


def _endpoint(name: str) -> str:
    host, colon, port = name.partition(":")
    if not colon:
        port = str(DEFAULT_PORT)
    if not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ParamsError(f"rpc must name servers as HOST:PORT (a name or an IPv4 address), not {name!r}.")
    return f"{host}:{int(port)}"


def find_rpc_server() -> Path:
    """The ggml-rpc-server of this install.

    Raises:
        ProgramError: When there is none.
    """
    try:
        return find_program("ggml-rpc-server")
    except ProgramError:
        raise ProgramError(
            "There is no ggml-rpc-server: this install was built without programs, or without RPC (GGML_RPC=ON)."
        ) from None


def check_answers(endpoints: Sequence[str]) -> None:
    """Raise ModelError, with the reason, for a server that does not answer.

    Args:
        endpoints: As parse_endpoints() gives them.
    """
    for endpoint in endpoints:
        _greet(endpoint)


class Servers:
    """The servers of a model.

    Args:
        endpoints: As parse_endpoints() gives them.

    Attributes:
        devices (list): ``ggml_backend_dev_t`` of the servers, then of this machine's GPUs.

    Raises:
        ModelError: For a server that does not answer, and when libllama was built without RPC.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._add = _function("ggml_backend_rpc_add_server", "ggml_backend_reg_t(*)(const char *)")
        self._n_lost = _function("llama_kv_mixed_rpc_n_lost", "uint32_t(*)(const char *)")
        self._lost: dict[str, int] = {}
        self.devices: list[Any] = []
        for endpoint in endpoints:
            if not _in_use(endpoint):
                _greet(endpoint)
            self._lost[endpoint] = self._n_lost(endpoint.encode())
            with error_lines() as errors:
                reg = self._add(endpoint.encode())
            if reg == ffi.NULL:
                raise ModelError(f"The RPC server at {endpoint} can not be used: {errors.reason()}.")
            self.devices += [lib.ggml_backend_reg_dev_get(reg, i) for i in range(lib.ggml_backend_reg_dev_count(reg))]
        local = (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
        self.devices += [d for d in local if lib.ggml_backend_dev_type(d) == _DEVICE_GPU and d not in self.devices]

    def c_devices(self) -> Any:
        """The devices as ``llama_model_params`` want them; to be kept while the model is loaded."""
        return ffi.new("void *[]", [ffi.cast("void *", device) for device in self.devices] + [ffi.NULL])

    def belong_to(self, handle: Handle) -> None:
        """Note whose servers they are: as long as it lives, they have no time for another client."""
        with _lock:
            for endpoint in self._lost:
                _users.setdefault(endpoint, weakref.WeakKeyDictionary())[handle] = self

    def is_lost(self, endpoint: str) -> bool:
        """Whether that one is gone since."""
        return bool(self._n_lost(endpoint.encode()) != self._lost[endpoint])

    def check(self, error: type[LlamamixError]) -> None:
        """Raise ``error`` when one of them is gone."""
        for endpoint in self._lost:
            if self.is_lost(endpoint):
                raise error(
                    f"The RPC server at {endpoint} is gone, and with it the layers that it had: start it again, and"
                    " load the model anew."
                )


_lock = threading.Lock()
_users: dict[str, weakref.WeakKeyDictionary[Handle, Servers]] = {}  # models that are in a server's memory


def _in_use(endpoint: str) -> bool:
    """Whether this process is the client that a server has."""
    with _lock:
        users = list(_users.get(endpoint, weakref.WeakKeyDictionary()).items())
    return any(not handle.closed and not servers.is_lost(endpoint) for handle, servers in users)


def _greet(endpoint: str) -> None:
    """Raise ModelError, with the reason, for a server that does not answer: libllama would wait for it."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _TIMEOUT) as connection:
            connection.sendall(_HELLO)
            n_read = 0
            while n_read < _N_HELLO_ANSWER:
                data = connection.recv(_N_HELLO_ANSWER - n_read)
                if not data:
                    raise ModelError(f"What answers at {endpoint} is no RPC server of this version.")
                n_read += len(data)
    except TimeoutError:
        raise ModelError(
            f"The RPC server at {endpoint} does not answer: it may have another client, and has time for one alone."
        ) from None
    except OSError as error:
        raise ModelError(f"There is no RPC server at {endpoint}: {error.strerror or error}.") from None


def _function(name: str, c_type: str) -> Any:
    reg = lib.ggml_backend_reg_by_name(b"RPC")
    pointer = lib.ggml_backend_reg_get_proc_address(reg, name.encode()) if reg != ffi.NULL else ffi.NULL
    if pointer == ffi.NULL:
        raise ModelError("This libllama was built without RPC (GGML_RPC=ON), or with one of another build.")
    return ffi.cast(c_type, pointer)
