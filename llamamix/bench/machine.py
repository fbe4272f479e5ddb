"""What computes, and how much memory it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._ffi import ffi, lib

if TYPE_CHECKING:
    from ..model import Model

_CPU, _GPU, _IGPU, _ACCEL = 0, 1, 2, 3


def describe(model: Model) -> dict[str, Any]:
    """What computes a model, by llama-bench's names of fields."""
    return {
        "backends": backends(with_servers=bool(model.params.rpc)),
        "cpu_info": cpu_info(),
        "gpu_info": gpu_info(),
        "n_gpu_layers": model.params.n_gpu_layers,
    }


def backends(with_servers: bool = False) -> str:
    """Names of the backends as llama-bench gives them: CPU, or all others with commas between them.

    with_servers  a model has layers on RPC servers, which are no devices of this machine
    """
    names = ["RPC"] if with_servers else []
    for i in range(lib.ggml_backend_reg_count()):
        backend = lib.ggml_backend_reg_get(i)
        name = _text(lib.ggml_backend_reg_name(backend))
        if name.startswith("RPC"):
            names += ["RPC"] if lib.ggml_backend_reg_dev_count(backend) > 0 and "RPC" not in names else []
        elif name != "CPU":
            names.append(name)
    return ",".join(names) or "CPU"


def cpu_info() -> str:
    """Descriptions of the CPU and what accelerates it."""
    return _devices(_CPU, _ACCEL)


def gpu_info() -> str:
    """Descriptions of the GPUs, "" when there is none."""
    return _devices(_GPU, _IGPU)


def memory_available() -> int | None:
    """Bytes that can be allocated without swapping, None: not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":", 1) for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _devices(*kinds: int) -> str:
    devices = (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
    found = [device for device in devices if lib.ggml_backend_dev_type(device) in kinds]
    return ", ".join(_text(lib.ggml_backend_dev_description(device)).strip() for device in found)


def _text(c_string: Any) -> str:
    return str(ffi.string(c_string).decode("utf-8", "replace"))
