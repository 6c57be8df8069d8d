"""Which device computes, and in which type. The only file that knows device kinds by name.

Biren cards come first: their torch plugin can pass itself off as CUDA, so CUDA is never asked before them.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from brlite.errors import ConfigError

logger = logging.getLogger(__name__)

KINDS = ("cpu", "cuda", "supa")
BIREN_PLUGINS = ("torch_supa", "torch_br")  # second generation cards, first generation cards
FAST_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CPU_INFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def select_device(name: str, index: int = 0) -> torch.device:
    """The device called `name`, card `index` unless the name has a number. Raises `ConfigError` if it is not there.

    "auto" takes a Biren card if there is one, else a CUDA card, else the CPU.
    """
    kind, _, number = (_best_kind() if name == "auto" else name).partition(":")
    is_numbered = kind != "cpu" and number.isdecimal()
    if kind not in KINDS or (":" in name and not is_numbered):
        raise ConfigError(f"engine.device is {name!r}; allowed are auto, {', '.join(KINDS)}, cuda:1, supa:1 and so on")
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, _checked_index(kind, int(number) if is_numbered else index))


def describe_device(device: torch.device) -> str:
    """A line for the log: the device and, where it has one, its product name."""
    if device.type == "cpu":
        return f"{device.type} ({physical_cores()} cores, {_cpu_model()})"
    get_name = getattr(_runtime(device.type), "get_device_name", None)
    return f"{device} ({get_name(device)})" if get_name is not None else str(device)


def compute_dtype(requested: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type to multiply in. "auto" is bfloat16 but for CPUs that only emulate it, which is ten times slower."""
    if requested == "auto":
        is_fast = device.type != "cpu" or bool(_cpu_flags() & FAST_BFLOAT16_FLAGS)
        return torch.bfloat16 if is_fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]


def multiplies_with_onednn(device: torch.device) -> bool:
    """Whether matrices may be packed for oneDNN, which serves CPUs only."""
    return device.type == "cpu"


def physical_cores() -> int:
    """How many cores this process may use: hyper-threads count once, a container's quota is kept."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cpu_quota() or len(cores)))


def _best_kind() -> str:
    for kind in ("supa", "cuda"):
        if _num_devices(kind, may_load_plugin=_has_biren_node()) > 0:
            return kind
    return "cpu"


def _checked_index(kind: str, index: int) -> int:
    count = _num_devices(kind, may_load_plugin=True)
    if index >= count:
        found = f"{count} found" if count else "none found"
        raise ConfigError(f"device {kind}:{index} is not there: {found}{_plugin_hint(kind)}")
    return index


def _num_devices(kind: str, *, may_load_plugin: bool) -> int:
    if kind == "supa" and may_load_plugin and not hasattr(torch, "supa"):
        _load_biren_plugin()
    runtime = _runtime(kind)
    if runtime is None or not runtime.is_available():
        return 0
    return int(runtime.device_count())


def _runtime(kind: str) -> ModuleType | None:
    """`torch.cuda`, or the module of the same shape that a plugin adds to torch."""
    return getattr(torch, kind, None)


def _has_biren_node() -> bool:
    return any(Path("/dev").glob("biren*"))


def _load_biren_plugin() -> None:
    _set_biren_environment()
    for plugin in BIREN_PLUGINS:
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            logger.info("%s cannot be used: %s", plugin, error)
        else:
            return


def _set_biren_environment() -> None:
    """What the driver reads when it is loaded. A value that the user has set stays."""
    os.environ.setdefault("BR_UMD_DEBUG_P2P_ACCESS_CHECK", "0")
    if "BIREN_VISIBLE_DEVICES" in os.environ:
        os.environ.setdefault("SUPA_VISIBLE_DEVICES", os.environ["BIREN_VISIBLE_DEVICES"])


def _plugin_hint(kind: str) -> str:
    if kind != "supa" or hasattr(torch, "supa"):
        return ""
    return f"; neither {' nor '.join(BIREN_PLUGINS)} could be imported"


def _core_of(cpu: int) -> tuple[str, str]:
    """Package and core of a logical CPU; on systems that do not say, each is a core of its own."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return "", str(cpu)


def _cpu_quota() -> int | None:
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None


def _cpu_flags() -> frozenset[str]:
    return frozenset(" ".join(_cpu_info("flags")).split())


def _cpu_model() -> str:
    return next(iter(_cpu_info("model name")), "unknown model")


def _cpu_info(key: str) -> Iterable[str]:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key][:1]
