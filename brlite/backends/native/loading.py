"""Loads packed weights: from a matching packed file, else from the checkpoint. Then it writes a packed file."""

from __future__ import annotations

import ctypes
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from brlite.backends.native.layout import packed_layout
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packed_file import (
    MappedPackedFile,
    PackedFileError,
    PackedFileKey,
    checksums,
    write_packed_file,
)
from brlite.backends.native.packer import PackedWeights, Packer, PackingThreads
from brlite.checkpoint.placing import LoadPlan, placing
from brlite.files.ownership import why_untrusted
from brlite.files.temporary import sweep

logger = logging.getLogger(__name__)

LAYOUT_VERSION = 2  # raised by every change that packs the same weights into other bytes


class LoadedWeights(NamedTuple):
    """Packed weights, and a hash of their content."""

    weights: PackedWeights
    content_hash: str


def load_weights(library: ctypes.CDLL, plan: LoadPlan) -> LoadedWeights:
    """Load the weights of the plan's checkpoint, or of its shard, in the plan's precision."""
    layout = packed_layout(library, plan.parameters, plan.matrix_parts)
    part = f" {plan.shard.rank} of {plan.shard.size}" if plan.shard else ""
    key = PackedFileKey(LAYOUT_VERSION, plan.precision.weights_name, plan.checkpoint.identity + part, layout.num_bytes)
    file = _trusted(plan.packed_file, plan.checkpoint.path)
    if file is not None:
        sweep(file.parent, f"{file.name}.")
        try:
            with PackingThreads(plan.num_threads) as pool:
                mapped = MappedPackedFile(file, key, library, pool, plan.progress.report)
        except FileNotFoundError:
            logger.debug("%s: there is no packed file yet", file)
        except PackedFileError as error:
            logger.warning("%s is not used: %s%s", file, error, "; it is made anew" if error.is_ours else "")
            file = file if error.is_ours else None
        else:
            return LoadedWeights(PackedWeights(layout, mapped), _content_hash(mapped.checksums))
    memory = NativeMemory(library, layout.num_bytes, "the weights")
    try:
        # Its threads end before the memory that they write to is released.
        with PackingThreads(plan.num_threads) as pool:
            packer = Packer(library, layout, memory, pool)
            for target, tensor in placing(plan):
                packer.put(target, tensor)
            sums = checksums(library, memory.address, memory.num_bytes, pool)
        if file is not None:
            try:
                write_packed_file(file, key, memory, sums)
                logger.info("packed weights are kept in %s (%d MB)", file, memory.num_bytes // 10**6)
            except OSError as error:
                logger.warning("%s: the packed weights cannot be saved: %s", file, error.strerror)
    except BaseException:
        memory.close()
        raise
    return LoadedWeights(PackedWeights(layout, memory), _content_hash(sums))


def _trusted(file: Path | None, model: Path) -> Path | None:
    """`file`, or None if another user could have written it; then it is neither read nor written.

    Packed weights in the model's own folder are trusted like the model.
    """
    if file is None or file.parent == model:
        return file
    try:
        stranger = why_untrusted(file if file.exists() else file.parent) if file.parent.exists() else None
    except OSError:
        return file  # reading or writing it will report the error
    if stranger:
        logger.warning("%s is not used, since another user could have written it: %s", file, stranger)
        return None
    return file


def _content_hash(sums: list[int]) -> str:
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
