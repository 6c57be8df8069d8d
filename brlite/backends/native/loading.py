"""Fills packed weights: from their image if there is one that fits, else from the checkpoint, which then leaves one."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from brlite.backends.native.layout import packed_layout
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packed_file import MappedPackedFile, PackedFileError, PackedFileKey, checksums, write_image
from brlite.backends.native.packer import PackedWeights, Packer
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.checked_model import CheckedModel
from brlite.checkpoint.placing import placed_tensors
from brlite.config.options import ModelSpec
from brlite.files.ownership import why_untrusted
from brlite.files.temporary import sweep
from brlite.models.shards import Shard, parameter_parts
from brlite.precision import PRECISIONS

logger = logging.getLogger(__name__)

T = TypeVar("T")

LAYOUT_VERSION = 1  # counts up whenever the same weights are packed into other bytes


class PackingThreads(ThreadPoolExecutor):
    """A pool whose work has ended when the `with` block is left, whatever was raised in it. What waits is dropped.

    The work writes to memory that is given back after the block. `Thread.join` cannot be relied on for that: in Python
    before 3.13 a join that Ctrl-C interrupts takes the thread for ended (github.com/python/cpython/issues/90882).
    """

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads, thread_name_prefix="brlite-pack")
        self._running: set[threading.Lock] = set()  # each is held as long as its piece of work runs
        self._is_ending = False

    def submit(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(self._run, work, *args, **kwargs)

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Return when nothing runs any more. What a signal's handler raises meanwhile is raised after that."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._is_ending = True
                for is_running in list(self._running):
                    with is_running:
                        pass
                self.shutdown(wait=True, cancel_futures=True)
            except BaseException as error:
                interrupt = error
            else:
                break
        if interrupt is not None:
            raise interrupt

    def _run(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        is_running = threading.Lock()
        with is_running:
            self._running.add(is_running)  # before the look at `_is_ending`: `end` waits for it, or it ends here
            try:
                if self._is_ending:
                    raise CancelledError
                return work(*args, **kwargs)
            finally:
                self._running.discard(is_running)


class LoadedWeights(NamedTuple):
    """Packed weights, and a hash of their content."""

    weights: PackedWeights
    content_hash: str


def load_weights(
    library: ctypes.CDLL,
    checkpoint: Checkpoint,
    fit: CheckedModel,
    spec: ModelSpec,
    image: Path | None,
    num_threads: int,
    on_progress: Callable[[float], None],
    share: Shard | None = None,
) -> LoadedWeights:
    """The weights of `checkpoint` in `spec`'s precision. `image` is where their image is, or shall be.

    With a `share` they are those of one rank.
    """
    precision = PRECISIONS[spec.precision]
    layout = packed_layout(library, fit.config, precision=precision, share=share)
    part = f" {share.rank} of {share.size}" if share else ""
    key = PackedFileKey(LAYOUT_VERSION, precision.weights_name, checkpoint.identity + part, layout.num_bytes)
    image = _trusted(image, checkpoint.path)
    if image is not None:
        sweep(image.parent, f"{image.name}.")
        try:
            with PackingThreads(num_threads) as pool:
                mapped = MappedPackedFile(image, key, library, pool, on_progress)
        except FileNotFoundError:
            logger.debug("%s: there is no image yet", image)
        except PackedFileError as error:
            logger.warning("%s is not used: %s%s", image, error, "; it is made anew" if error.is_ours else "")
            image = image if error.is_ours else None
        else:
            return LoadedWeights(PackedWeights(layout, mapped), _content_hash(mapped.checksums))
    memory = NativeMemory(library, layout.num_bytes, "the weights")
    try:
        with PackingThreads(num_threads) as pool:  # they have ended before the memory they write to is given back
            _pack(checkpoint, fit, Packer(library, layout, memory, pool), on_progress, share)
            sums = checksums(library, memory.address, memory.num_bytes, pool, on_progress=lambda fraction: None)
        if image is not None:
            _write(image, key, memory, sums)
    except BaseException:
        memory.close()
        raise
    return LoadedWeights(PackedWeights(layout, memory), _content_hash(sums))


def _trusted(image: Path | None, model: Path) -> Path | None:
    """`image`, unless another user could have written it: then it is neither read nor written.

    Packed weights in the model's own folder are trusted as the model is.
    """
    if image is None or image.parent == model:
        return image
    try:
        stranger = why_untrusted(image if image.exists() else image.parent) if image.parent.exists() else None
    except OSError:
        return image  # what reads or writes it says why that fails
    if stranger:
        logger.warning("%s is not used, since another user could have written it: %s", image, stranger)
        return None
    return image


def _pack(
    checkpoint: Checkpoint, fit: CheckedModel, packer: Packer, on_progress: Callable[[float], None], share: Shard | None
) -> None:
    parts = parameter_parts(fit.config, share) if share else None
    for place, values in placed_tensors(checkpoint, fit, on_progress, parts):
        packer.put(place, values)
        del values  # before the next one is read


def _write(image: Path, key: PackedFileKey, memory: NativeMemory, sums: list[int]) -> None:
    try:
        write_image(image, key, memory, sums)
    except OSError as error:
        logger.warning("%s: the packed weights cannot be kept: %s", image, error.strerror)
    else:
        logger.info("packed weights are kept in %s (%d MB)", image, memory.num_bytes // 10**6)


def _content_hash(sums: list[int]) -> str:
    return hashlib.blake2b(repr(sums).encode(), digest_size=8).hexdigest()
