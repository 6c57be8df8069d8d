"""Chooses the backend of a model: native kernels where possible, else torch, with the reason in its notes."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from brlite.backends.distributed.launcher import find_place
from brlite.backends.native.abi import MAX_HEAD_DIM, MAX_SIZE
from brlite.backends.torch.device import TORCH_USE, computes_on_cpu, require_torch, rules_for, select_device
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.bundle import BundleCheckpoint, packed_name
from brlite.checkpoint.checked_model import CheckedModel
from brlite.checkpoint.load_plan import LoadPlan, describe_precision
from brlite.checkpoint.progress import OnProgress
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Backend
from brlite.errors import ConfigError, MissingExtra, NativeUnavailable
from brlite.files.cache import default_cache, expand_home
from brlite.models.config import ModelConfig
from brlite.models.precision import NATIVE_ONLY, WEIGHTS_NAMES
from brlite.process.machine import find_cpus, find_memory, show_bytes

if TYPE_CHECKING:
    from brlite.backends.native.library import NativeLibrary

logger = logging.getLogger(__name__)

UNPACKED_NOTE = "serialize_file {path} is not used: torch does not pack weights"
FALLBACK_NOTE = "torch computes, which is several times slower than native kernels: {reason}"
_TORCH_THREADS: list[int] = []  # their number before each native backend in use; torch has one number for the process


def load_backend(
    checkpoint: Checkpoint,
    model: CheckedModel,
    spec: ModelSpec,
    engine: EngineConfig,
    on_progress: OnProgress | None = None,
) -> Backend:
    """Read the weights into the backend of `engine.backend`; with `auto` into native kernels, or torch without them.

    Raises `ConfigError` for a model that the backend cannot compute, and where no kernels for `native` can be loaded.
    """
    cpus, memory = find_cpus(), find_memory()
    threads = f"{engine.threads}, set by engine.threads" if engine.threads else f"{cpus.num_threads}, {cpus.decided_by}"
    limit = f", limited by {memory.decided_by}" if memory.decided_by else ""
    free, total = show_bytes(memory.available), show_bytes(memory.total)
    logger.info("threads: %s; memory: %s free of %s%s", threads, free, total, limit)
    plan = LoadPlan(
        checkpoint=checkpoint,
        model=model,
        spec=spec,
        engine=engine,
        num_threads=engine.threads or cpus.num_threads,
        on_progress=on_progress,
        packed_file=expand_serialize_file(spec.serialize_file) if spec.serialize_file else None,
    )
    obstacle = find_obstacle(model.config, spec, engine)
    if obstacle is None:
        from brlite.backends.native.library import load_library

        plan.report(0.0, "preparing the native kernels")
        try:
            library = load_library()
        except NativeUnavailable as error:
            obstacle = str(error)
        else:
            return _load_native(library, plan)
    if engine.backend == "native":
        raise ConfigError(f'engine.backend is "native", but {obstacle}')
    check_native_only(spec, obstacle)
    if engine.backend == "torch":
        require_torch(TORCH_USE)
        return _load_torch(plan)
    try:
        require_torch(TORCH_USE)
    except MissingExtra as missing:
        raise ConfigError(f"{obstacle}; {missing}") from None
    is_slow = computes_on_cpu(engine.device)
    return _load_torch(plan, *([FALLBACK_NOTE.format(reason=obstacle)] if is_slow else []))


def expand_serialize_file(path: str) -> Path:
    """The path of a `serialize_file`. Raises `ConfigError` if its home folder is not known."""
    try:
        return expand_home(path)
    except OSError as error:
        raise ConfigError(f"serialize_file {path}: {error.strerror}") from None


def check_native_only(spec: ModelSpec, obstacle: str) -> None:
    """Raise `ConfigError` for a precision that only native kernels have. `obstacle` is why they cannot be used."""
    if spec.precision in NATIVE_ONLY:
        raise ConfigError(f"precision {spec.precision} needs native kernels, but {obstacle}")


def find_obstacle(config: ModelConfig, spec: ModelSpec, engine: EngineConfig) -> str | None:
    """Why native kernels may not or cannot compute this model on any machine; None if they can."""
    if engine.backend == "torch":
        return 'engine.backend is "torch"'
    if not computes_on_cpu(engine.device):
        return f"native kernels compute on CPUs only, and engine.device is {engine.device!r}"
    if engine.dtype == "float32":
        return 'native kernels compute in bfloat16, and engine.dtype is "float32"'
    if spec.tensor_parallel > 1 and find_place(os.environ) is not None:
        return "the ranks of native kernels share memory, which those that a launcher has started may not"
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    largest = max(config.vocab_size, config.hidden_size, qkv_rows, 2 * config.intermediate_size)
    if largest > MAX_SIZE:
        return f"native kernels want at most {MAX_SIZE} rows and columns in a matrix, not {largest}"
    if config.head_dim > MAX_HEAD_DIM or config.head_dim % 2:
        return f"native kernels want an even head_dim of at most {MAX_HEAD_DIM}, not {config.head_dim}"
    return None


def _load_native(library: NativeLibrary, plan: LoadPlan) -> Backend:
    """The packed file's path comes from the config, else from the bundle, else from the cache for a fetched model."""
    spec, packed_file = plan.spec, plan.packed_file
    logger.info("model %s: precision %s", spec.name, describe_precision(plan.model, spec, is_native=True))
    if packed_file is None and (spec.path is None or not os.path.exists(os.path.expanduser(spec.path))):
        # The path is a name on a hub.
        name = f"{spec.name.replace('/', '--')}.{WEIGHTS_NAMES[plan.precision.weights]}.brlite"
        packed_file = default_cache() / "packed" / name
    if spec.tensor_parallel > 1:
        from brlite.backends.distributed.parallel import load_native_ranks

        return load_native_ranks(library, msgspec.structs.replace(plan, packed_file=packed_file))
    if plan.packed_file is None and isinstance(plan.checkpoint, BundleCheckpoint):
        bundled = plan.checkpoint.path / packed_name(plan.precision)
        packed_file = bundled if bundled.is_file() else packed_file
    from brlite.backends.native.backend import NativeBackend

    with ExitStack() as opened:  # the backend closes it
        use_one_torch_thread(opened)
        plan, measure = msgspec.structs.replace(plan, packed_file=packed_file), None
        if plan.model.precision.weights == "int4":
            from brlite.backends.native.calibration import measure_importance

            measure = partial(measure_importance, library, plan)
        return NativeBackend(library, plan, opened=opened, measure=measure)


def use_one_torch_thread(opened: ExitStack) -> None:
    """Let torch compute on one thread, since others would take cores from the step's.

    When `opened` is closed, and each other one that was given before, torch has its threads again.
    """
    torch = sys.modules.get("torch")
    if torch is None or "brlite.backends.torch.backend" in sys.modules:
        return
    num_threads = torch.get_num_threads()
    if num_threads > 1:
        logger.info("torch computes on 1 thread, not %d, while native kernels are in use", num_threads)
        torch.set_num_threads(1)
    _TORCH_THREADS.append(num_threads)

    def restore() -> None:
        before = _TORCH_THREADS.pop()
        if before > 1 and not _TORCH_THREADS:
            torch.set_num_threads(before)

    opened.callback(restore)


def _load_torch(plan: LoadPlan, *notes: str) -> Backend:
    if plan.spec.serialize_file:
        notes = (*notes, UNPACKED_NOTE.format(path=plan.spec.serialize_file))
    plan = msgspec.structs.replace(plan, notes=notes)
    keeps_forms = rules_for(select_device(plan.engine.device)).keeps_forms(plan.precision)
    described = describe_precision(plan.model, plan.spec, is_native=False, keeps_forms=keeps_forms)
    logger.info("model %s: precision %s", plan.spec.name, described)
    plan.report(0.0, "starting torch")
    if plan.spec.tensor_parallel > 1:
        from brlite.backends.distributed.parallel import load_torch_ranks

        return load_torch_ranks(plan)
    from brlite.backends.torch.backend import TorchBackend

    return TorchBackend.load(plan)
