"""Which device computes, and in which type. The only file that knows device kinds by name.

Biren cards come first: their torch plugin can pass itself off as CUDA, so CUDA is never asked before them.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from brlite.errors import ConfigError
from brlite.worker.cpu import describe_cpu, has_fast_bfloat16

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

KINDS = ("cpu", "cuda", "supa")
BIREN_PLUGINS = ("torch_supa", "torch_br")  # second generation cards, first generation cards
CARD_NODES = ("biren*", "nvidia[0-9]*", "dxg", "kfd")  # in /dev, where there is any card


def computes_on_cpu(name: str) -> bool:
    """Whether `select_device` would take the CPU. Where no card can be, torch is not imported to find out."""
    if name == "cpu":
        return True
    if name == "auto" and not any(any(Path("/dev").glob(node)) for node in CARD_NODES):
        return True
    return select_device(name).type == "cpu"


def select_device(name: str, index: int = 0) -> torch.device:
    """The device called `name`, card `index` unless the name has a number. Raises `ConfigError` if it is not there.

    "auto" takes a Biren card if there is one, else a CUDA card, else the CPU.
    """
    kind, _, number = (_best_kind() if name == "auto" else name).partition(":")
    is_numbered = kind != "cpu" and number.isdecimal()
    if kind not in KINDS or (":" in name and not is_numbered):
        raise ConfigError(f"engine.device is {name!r}; allowed are auto, {', '.join(KINDS)}, cuda:1, supa:1 and so on")
    import torch

    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, _checked_index(kind, int(number) if is_numbered else index))


def describe_device(device: torch.device) -> str:
    """A line for the log: the device and, where it has one, its product name."""
    if device.type == "cpu":
        return f"{device.type} ({describe_cpu()})"
    get_name = getattr(_runtime(device.type), "get_device_name", None)
    return f"{device} ({get_name(device)})" if get_name is not None else str(device)


def compute_dtype(requested: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type to multiply in. "auto" is bfloat16 but for CPUs that only emulate it, which is ten times slower."""
    import torch

    if requested == "auto":
        is_fast = device.type != "cpu" or has_fast_bfloat16()
        return torch.bfloat16 if is_fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]


def multiplies_with_onednn(device: torch.device) -> bool:
    """Whether matrices may be packed for oneDNN, which serves CPUs only."""
    return device.type == "cpu"


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
    if kind == "supa" and may_load_plugin and _runtime(kind) is None:
        _load_biren_plugin()
    runtime = _runtime(kind)
    if runtime is None or not runtime.is_available():
        return 0
    return int(runtime.device_count())


def _runtime(kind: str) -> ModuleType | None:
    """`torch.cuda`, or the module of the same shape that a plugin adds to torch."""
    import torch

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
    if kind != "supa" or _runtime(kind) is not None:
        return ""
    return f"; neither {' nor '.join(BIREN_PLUGINS)} could be imported"
