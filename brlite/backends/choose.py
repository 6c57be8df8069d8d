"""Which backend computes a model: native kernels where they can be used, else torch, which says why."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from brlite.backends.distributed.launcher import find_place
from brlite.backends.native.abi import MAX_HEAD_DIM
from brlite.backends.torch.device import computes_on_cpu, require_torch
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.bundle import bundle_image
from brlite.checkpoint.checked_model import CheckedModel
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Backend
from brlite.errors import ConfigError, MissingExtra, NativeUnavailable
from brlite.files.cache import default_cache, expand_home
from brlite.machine import find_cpus, find_memory, show_bytes
from brlite.models.config import ModelConfig
from brlite.precision import PRECISIONS

if TYPE_CHECKING:
    from brlite.backends.native.library import NativeLibrary

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]

UNPACKED_NOTE = "serialize_file {path} is not used: torch does not pack weights"
FALLBACK_NOTE = "torch computes, which is several times slower than native kernels: {reason}"


def load_backend(
    checkpoint: Checkpoint, fit: CheckedModel, spec: ModelSpec, engine: EngineConfig, on_progress: OnProgress
) -> Backend:
    """Read the weights into the backend that the config wants, or the fastest that there is.

    Raises `ConfigError` for what it cannot compute, and where `backend = "native"` cannot be had.
    """
    cpus, memory = find_cpus(), find_memory()
    threads = f"{engine.threads}, set by engine.threads" if engine.threads else f"{cpus.num_threads}, {cpus.decided_by}"
    limit = f", limited by {memory.decided_by}" if memory.decided_by else ""
    logger.info("threads: %s; memory: %s free of %s%s", threads, *map(show_bytes, memory[1::-1]), limit)
    if engine.backend == "torch":
        return _load_torch(checkpoint, fit, spec, engine, on_progress)
    obstacle = find_obstacle(fit.config, spec, engine)
    if obstacle is None:
        try:
            library = _load_library(on_progress)
        except NativeUnavailable as error:
            obstacle = str(error)
        else:
            return _load_native(library, checkpoint, fit, spec, engine, on_progress)
    if engine.backend == "native":
        raise ConfigError(f'engine.backend is "native", but {obstacle}')
    try:
        require_torch("computing without native kernels")
    except MissingExtra as missing:
        raise ConfigError(f"{obstacle}; {missing}") from None
    notes = (FALLBACK_NOTE.format(reason=obstacle),) if computes_on_cpu(engine.device) else ()
    return _load_torch(checkpoint, fit, spec, engine, on_progress, notes)


def find_obstacle(config: ModelConfig, spec: ModelSpec, engine: EngineConfig) -> str | None:
    """Why the native kernels cannot compute what is asked for on any machine; None if they can."""
    if not computes_on_cpu(engine.device):
        return f"native kernels compute on CPUs only, and engine.device is {engine.device!r}"
    if engine.dtype == "float32":
        return 'native kernels compute in bfloat16, and engine.dtype is "float32"'
    if spec.tensor_parallel > 1 and find_place(os.environ) is not None:
        return "the ranks of native kernels share memory, which those that a launcher has started may not"
    if config.head_dim > MAX_HEAD_DIM or config.head_dim % 2:
        return f"native kernels want an even head_dim of at most {MAX_HEAD_DIM}, not {config.head_dim}"
    return None


def _load_library(on_progress: OnProgress) -> NativeLibrary:
    from brlite.backends.native.library import load_library

    on_progress("preparing the native kernels", 0.0)
    return load_library()


def _load_native(
    library: NativeLibrary,
    checkpoint: Checkpoint,
    fit: CheckedModel,
    spec: ModelSpec,
    engine: EngineConfig,
    on_progress: OnProgress,
) -> Backend:
    def report(fraction: float) -> None:
        on_progress("reading the weights", fraction)

    if spec.tensor_parallel > 1:
        from brlite.backends.distributed.parallel import load_native_ranks

        return load_native_ranks(library, checkpoint, fit, spec, engine, _kept_image(spec), report)
    from brlite.backends.native.backend import NativeBackend

    with _quiet_torch() as opened:  # what the backend takes over is not closed here
        return NativeBackend.load(
            library,
            checkpoint,
            fit,
            spec,
            engine,
            _image_path(spec, checkpoint),
            report,
            opened=opened,
        )


def _quiet_torch() -> ExitStack:
    """Keep torch, whoever imported it, to 1 thread until this is closed: its threads take the cores from the step's."""
    torch, stack = sys.modules.get("torch"), ExitStack()
    if torch is not None and "brlite.backends.torch.backend" not in sys.modules and torch.get_num_threads() > 1:
        logger.info("torch computes on 1 thread, not %d, while native kernels are in use", torch.get_num_threads())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
    return stack


def _load_torch(
    checkpoint: Checkpoint,
    fit: CheckedModel,
    spec: ModelSpec,
    engine: EngineConfig,
    on_progress: OnProgress,
    notes: tuple[str, ...] = (),
) -> Backend:
    if spec.serialize_file:
        notes = (*notes, UNPACKED_NOTE.format(path=spec.serialize_file))
    on_progress("starting torch", 0.0)

    def report(fraction: float) -> None:
        on_progress("reading the weights", fraction)

    if spec.tensor_parallel > 1:
        from brlite.backends.distributed.parallel import load_torch_ranks

        return load_torch_ranks(checkpoint, fit, spec, engine, report, notes)
    from brlite.backends.torch.backend import TorchBackend

    return TorchBackend.load(checkpoint, spec, engine, report, notes)


def _image_path(spec: ModelSpec, checkpoint: Checkpoint) -> Path | None:
    """Where the packed weights are: where the config says, in the bundle, or in the cache for a fetched model."""
    image = None if spec.serialize_file else bundle_image(checkpoint.path, spec.precision)
    return image or _kept_image(spec)


def _kept_image(spec: ModelSpec) -> Path | None:
    """Where packed weights are kept that no bundle has."""
    if spec.serialize_file:
        return expand_home(spec.serialize_file)
    if spec.path is None:
        precision = PRECISIONS[spec.precision].weights_name
        return default_cache() / "packed" / f"{spec.name.replace('/', '--')}.{precision}.brlite"
    return None
