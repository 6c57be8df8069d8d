"""Fills packed weights: from their image if there is one that fits, else from the checkpoint, which then leaves one."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint import Checkpoint
from brlite.config import ModelSpec
from brlite.kernels.image import ImageError, ImageKey, checksums, read_image, write_image
from brlite.kernels.weights import PackedWeights
from brlite.worker.fit import Fit

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 1  # counts up whenever the same weights are packed into other bytes


class LoadedWeights(NamedTuple):
    """Packed weights, and a hash of their content."""

    weights: PackedWeights
    content_hash: str


def load_weights(
    library: ctypes.CDLL,
    checkpoint: Checkpoint,
    fit: Fit,
    spec: ModelSpec,
    image: Path | None,
    num_threads: int,
    on_progress: Callable[[float], None],
) -> LoadedWeights:
    """The weights of `checkpoint` in `spec`'s precision. `image` is where their image is, or shall be."""
    weights = PackedWeights(library, fit.config, is_int8=spec.precision != "bf16")
    key = ImageKey(LAYOUT_VERSION, spec.precision.removesuffix("_kv_int8"), checkpoint.identity, weights.layout.num_bytes)
    try:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="brlite-load") as pool:
            sums = _load(library, checkpoint, fit, weights, key, image, pool, on_progress)
    except BaseException:
        weights.close()
        raise
    return LoadedWeights(weights, hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest())


def _load(
    library: ctypes.CDLL,
    checkpoint: Checkpoint,
    fit: Fit,
    weights: PackedWeights,
    key: ImageKey,
    image: Path | None,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[float], None],
) -> list[int]:
    may_write = image is not None
    if image is not None and image.exists():
        try:
            return read_image(image, key, library, weights.memory, pool, on_progress)
        except ImageError as error:
            may_write = error.is_ours
            logger.warning("%s is not used: %s%s", image, error, "; made anew" if may_write else "")
    _pack(checkpoint, fit, weights, pool, on_progress)
    sums = checksums(library, weights.memory, pool)
    if may_write and image is not None:
        _write(image, key, weights, sums)
    return sums


def _pack(
    checkpoint: Checkpoint,
    fit: Fit,
    weights: PackedWeights,
    pool: ThreadPoolExecutor,
    on_progress: Callable[[float], None],
) -> None:
    total = sum(math.prod(place.shape) for place in fit.places.values())
    num_loaded = 0
    for name, values in checkpoint.tensors():
        if name in fit.ignored:
            continue
        place = fit.places[name]
        weights.put(place.parameter, place.start, values, pool, keeps_digits=place.parameter.endswith("norm"))
        num_loaded += values.size
        on_progress(num_loaded / total)


def _write(image: Path, key: ImageKey, weights: PackedWeights, sums: list[int]) -> None:
    try:
        write_image(image, key, weights.memory, sums)
    except OSError as error:
        logger.warning("%s: the packed weights cannot be kept: %s", image, error.strerror)
    else:
        logger.info("packed weights are kept in %s (%d MB)", image, weights.layout.num_bytes // 10**6)
