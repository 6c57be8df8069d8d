"""Chooses the device and the type to compute in. Only this file names kinds of devices.

Biren cards are looked for first: their torch plugin can appear as CUDA.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from brlite.config.options import STEP_TOKENS
from brlite.engine.backend import CARD_ROWS, CPU_ROWS, RowCosts
from brlite.errors import BackendLost, ConfigError, MissingExtra
from brlite.files.quoting import first_line
from brlite.models.precision import Precision
from brlite.process.machine import describe_cpu, has_fast_bfloat16

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

logger = logging.getLogger(__name__)

TORCH_USE = "computing without native kernels"
KINDS = ("cpu", "cuda", "supa", "xpu", "mps")  # the last two only by name: brlite was never run on such a device
BIREN_PLUGINS = ("torch_supa", "torch_br")  # second generation cards, first generation cards
NODES = Path("/dev")
BIREN_NODES = "biren*"
CUDA_NODES = ("nvidia[0-9]*", "dxg", "kfd")
CARD_NODES = (BIREN_NODES, *CUDA_NODES)  # one exists if there is any card
# Errors of a card after which it computes on: too little memory, a call of a library or a launch that was refused.
RECOVERABLE = re.compile("out of memory|_STATUS_|invalid (configuration )?argument|no kernel image|too many resources")
BIREN_ENVIRONMENT = "BR_UMD_DEBUG_P2P_ACCESS_CHECK"  # the manual sets 0: its cards are connected over PCIe
# Backends of torch.distributed. Each of the vendor's two plugins has its own.
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
BIREN_COLLECTIVES = {"torch_supa": "bccl", "torch_br": "sccl"}
LOOPBACK_INTERFACES = {"linux": "lo", "darwin": "lo0"}


class DeviceRules(NamedTuple):
    """Requirements and abilities of a kind of device.

    * `packs_matrices`: in oneDNN's layout.
    * `keeps_int8`: int8 weights stay int8 and are dequantized in each product, to save memory.
    * `keeps_codes`: so do the 4-bit and 8-bit codes of quantized files.
    * `has_few_shapes`: the shapes of a step are rounded up, since each new one may compile a kernel.
    * `samples`: on the device, rather than on the host.
    * `is_probed`: it is tested before use.
    * `has_triton`: our kernels can be compiled for it.
    * `runs_ahead`: a step is launched while the previous one computes. Copies do not wait, and simple draws are made on
      the device.
    * `step_tokens`: the default number of tokens of a step with prompts.
    * `row_costs`: the costs of a step's rows.
    """

    packs_matrices: bool = False
    keeps_int8: bool = False
    keeps_codes: bool = False
    has_few_shapes: bool = False
    samples: bool = True
    is_probed: bool = False
    has_triton: bool = False
    runs_ahead: bool = False
    step_tokens: int = STEP_TOKENS
    row_costs: RowCosts = CPU_ROWS

    def keeps_forms(self, precision: Precision) -> bool:
        """Whether matrices of this precision are held in their forms rather than widened."""
        return self.keeps_codes if precision.weights == "stored" else self.keeps_int8


# New backends of torch have most errors in sorting, masks and waiting for the device, so these are avoided. mps has no
# float64 either, which draws need.
NEW_BACKEND = DeviceRules(keeps_int8=True, has_few_shapes=True, samples=False, is_probed=True)

RULES = {
    "cpu": DeviceRules(packs_matrices=True),
    "cuda": DeviceRules(
        keeps_int8=True,
        keeps_codes=True,
        has_few_shapes=True,
        is_probed=True,
        has_triton=True,
        runs_ahead=True,
        step_tokens=2048,
        row_costs=CARD_ROWS,
    ),
    "supa": NEW_BACKEND,
    "xpu": NEW_BACKEND,
    "mps": NEW_BACKEND,
}


def has_biren_cards(nodes: Path = NODES) -> bool:
    """Whether the system has Biren cards, usable or not."""
    return any(nodes.glob(BIREN_NODES))


def prepare_environment(environment: MutableMapping[str, str] = os.environ, nodes: Path = NODES) -> None:
    """On a system with Biren cards, set the variables that their driver reads when torch or its plugin loads it.

    Keeps values that the user has set. Needs no torch: call it before torch is imported.
    """
    if not has_biren_cards(nodes):
        return
    wanted = {BIREN_ENVIRONMENT: "0"}
    if "BIREN_VISIBLE_DEVICES" in environment:
        wanted["SUPA_VISIBLE_DEVICES"] = environment["BIREN_VISIBLE_DEVICES"]
    for name, value in wanted.items():
        if name not in environment:
            environment[name] = value
            is_late = "torch" in sys.modules
            logger.info("%s=%s is set for Biren cards%s", name, value, ", but torch was loaded before" * is_late)


def require_torch(needs: str) -> None:
    """Import torch, an optional dependency. Raises `MissingExtra`; `needs` names what needs it."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # a build that does not fit the machine fails to load with either
        raise MissingExtra(needs, "torch", error) from error


def computes_on_cpu(name: str) -> bool:
    """Whether `select_device` would take the CPU. On a machine without card nodes torch is not imported for this."""
    if name == "cpu":
        return True
    if name == "auto":
        if not any(any(NODES.glob(node)) for node in CARD_NODES):
            return True
        try:
            require_torch("a card")
        except MissingExtra as missing:
            _warn_once(f"the CPU computes, although there may be a card: {missing}")
            return True
    return select_device(name).type == "cpu"


def select_device(name: str, index: int = 0) -> torch.device:
    """The device called `name`, card `index` unless the name has a number. Raises `ConfigError` if it is not there.

    "auto" takes a Biren card if there is one, else a CUDA card, else the CPU, and warns of cards that cannot be used.
    """
    prepare_environment()
    if name == "auto":
        require_torch(TORCH_USE)
        if has_biren_cards() and not _num_devices("supa"):
            _warn_once(f"Biren cards cannot be used: {_obstacles('supa') or 'their plugin finds none'}")
        name = next((kind for kind in ("supa", "cuda") if _num_devices(kind)), "cpu")
        if name == "cpu" and any(any(NODES.glob(node)) for node in CUDA_NODES):
            _warn_once(f"the CPU computes, although there may be a card: {_obstacles('cuda') or 'torch finds none'}")
    kind, _, number = name.partition(":")
    is_numbered = kind != "cpu" and number.isdecimal()
    if kind not in KINDS or (":" in name and not is_numbered):
        raise ConfigError(f"engine.device is {name!r}; allowed are auto, {', '.join(KINDS)}, cuda:1, supa:1 and so on")
    require_torch(f"device {name}" if kind != "cpu" else TORCH_USE)
    import torch

    if kind == "cpu":
        return torch.device(kind)
    index = int(number) if is_numbered else index
    count = _num_devices(kind, is_wanted=True)
    if index >= count:
        found, obstacles = f"{count} found" if count else "none found", _obstacles(kind)
        raise ConfigError(f"device {kind}:{index} is not there: {found}{'; ' * bool(obstacles)}{obstacles}")
    return torch.device(kind, index)


def describe_device(device: torch.device) -> str:
    """A line for the log: the device and, where known, its product name and the version of torch's plugin for it."""
    if device.type == "cpu":
        return f"{device.type} ({describe_cpu()})"
    get_name = getattr(_runtime(device.type), "get_device_name", None)
    facts = [str(get_name(device))] if get_name is not None else []
    if device.type == "supa":
        facts += [f"{name} {_version(name)}" for name in BIREN_PLUGINS if name in sys.modules]
    return f"{device} ({', '.join(facts)})" if facts else str(device)


def compute_dtype(requested: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The type to multiply in. "auto" is bfloat16, but float32 on CPUs that emulate bfloat16 (ten times slower)."""
    import torch

    if requested == "auto":
        is_fast = device.type != "cpu" or has_fast_bfloat16()
        return torch.bfloat16 if is_fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]


class CardMemory(NamedTuple):
    """Bytes of a card: in total, and free now."""

    total: int
    free: int


def device_memory(device: torch.device) -> CardMemory | None:
    """The memory of a card; what torch keeps unused is free. None for the CPU and for a runtime that reports none.

    Without a report of free memory all counts as free.
    """
    runtime = _runtime(device.type) if device.type != "cpu" else None
    get_info = getattr(runtime, "mem_get_info", None)
    if get_info is not None:
        free, total = get_info(device)
        # torch keeps what models that were unloaded had, for later tensors.
        kept = [getattr(runtime, f"memory_{state}", None) for state in ("reserved", "allocated")]
        reserved, allocated = (0 if count is None else int(count(device)) for count in kept)
        return CardMemory(int(total), int(free) + reserved - allocated)
    get_properties = getattr(runtime, "get_device_properties", None)
    total = None if get_properties is None else getattr(get_properties(device), "total_memory", None)
    return None if total is None else CardMemory(total, total)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA card, such as (9, 0)."""
    import torch

    return torch.cuda.get_device_capability(device)


def shared_memory(device: torch.device) -> int:
    """The bytes of shared memory that a program on a card may have; 0 if that is not known."""
    import torch

    if device.type == "cpu":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return max(0, getattr(properties, "shared_memory_per_multiprocessor", 0) - 1024)  # a block's own 1 KiB


def rules_for(device: torch.device) -> DeviceRules:
    """The rules of this kind of device."""
    return RULES[device.type]


def send(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """`values` on the device; on the CPU they share memory. For a card that runs ahead the copy is only queued.

    It reads a pinned copy, whose memory torch reuses only after the card has read it.
    """
    import torch

    tensor = torch.from_numpy(values)
    if rules_for(device).runs_ahead:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def begin_fetch(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue the copy of a tensor to the host. Returns a function that waits for the copy and returns it."""
    import torch

    if not rules_for(tensor.device).runs_ahead:
        found = tensor.cpu()
        return lambda: found
    runtime = _runtime(tensor.device.type)
    assert runtime is not None, "a device that was selected has its module"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = runtime.Event()
    event.record(runtime.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        event.synchronize()
        return copy

    return wait


@contextmanager
def device_errors() -> Iterator[None]:
    """Raise `BackendLost` in place of an error after which this process can compute nothing more on the card.

    torch < 2.8 has no class for a card's errors, but their text begins in the same way.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        is_of_card = isinstance(error, getattr(torch, "AcceleratorError", ())) or text.startswith(
            ("CUDA error", "HIP error")
        )
        if not is_of_card or RECOVERABLE.search(text):
            raise
        raise BackendLost(f"the device failed: {text}") from error


def _num_devices(kind: str, *, is_wanted: bool = False) -> int:
    """The number of devices of a kind. Loads the plugin of Biren cards if `is_wanted` or if a card is found."""
    if kind == "supa" and _runtime(kind) is None and (is_wanted or has_biren_cards()):
        _load_biren_plugin()
    runtime = _runtime(kind)
    if runtime is None or not getattr(runtime, "is_available", lambda: True)():  # torch.mps had none at first
        return 0
    return int(runtime.device_count())


def _runtime(kind: str) -> ModuleType | None:
    """`torch.cuda`, or the module with the same interface that a plugin adds to torch."""
    import torch

    return getattr(torch, kind, None)


def _obstacles(kind: str) -> str:
    """Why torch cannot use this kind of device: no plugin adds it, or its driver is missing or too old. Else empty."""
    runtime = _runtime(kind)
    if kind == "supa":
        return "; ".join(_load_biren_plugin()) if runtime is None else ""
    try:
        getattr(runtime, "init", lambda: None)()
    except (RuntimeError, AssertionError) as error:  # of the driver, and of a build of torch without CUDA
        return first_line(error)
    return ""


@functools.cache  # a plugin that failed during import is not tried again
def _load_biren_plugin() -> tuple[str, ...]:
    """Import the first plugin that loads. Returns the reasons if none does."""
    obstacles: list[str] = []
    for plugin in BIREN_PLUGINS:
        try:
            importlib.import_module(plugin)
        except (ImportError, OSError, RuntimeError) as error:  # a missing or wrong driver raises any of them
            obstacles.append(f"{plugin} cannot be imported ({first_line(error)})")
        else:
            return ()
    return tuple(obstacles)


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def collectives_of(device: torch.device) -> str:
    """The backend of torch.distributed for a device."""
    if device.type in COLLECTIVES:
        return COLLECTIVES[device.type]
    return next((name for plugin, name in BIREN_COLLECTIVES.items() if plugin in sys.modules), "bccl")


def make_current(device: torch.device) -> None:
    """Make this the thread's default card, which for example collectives use."""
    set_device = getattr(_runtime(device.type), "set_device", None)  # torch.mps has one device and no such function
    if device.type != "cpu" and set_device is not None:
        set_device(device)


@contextmanager
def loopback_only(host: str) -> Iterator[None]:
    """While ranks connect on a loopback address, gloo listens on no other one, unless GLOO_SOCKET_IFNAME is set."""
    name, interface = "GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACES.get(sys.platform)
    is_told = name in os.environ or interface is None or not host.startswith("127.")
    if not is_told:
        os.environ[name] = str(interface)
    try:
        yield
    finally:
        if not is_told:
            del os.environ[name]
