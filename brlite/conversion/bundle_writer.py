"""Writes a bundle, tensor by tensor: each one is written to its shard and to the packed file, and then freed.

Files that an interrupted run has finished are kept. The manifest is written last: without it a folder is no bundle.
Knows no commands and no source format.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from brlite.backends.native.abi import INT8, LANES
from brlite.backends.native.layout import packed_layout
from brlite.backends.native.packed_file import PackedFileError, PackedFileKey, read_packed_file_key
from brlite.backends.native.packed_file_writer import PackedFileWriter, Packing
from brlite.backends.native.packer import LAYOUT_VERSION, PackingThreads
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.bundle import (
    IDENTITY_CHARACTERS,
    MANIFEST_FILE,
    PACKED_SUFFIX,
    PROGRESS_FILE,
    Manifest,
    bundle_identity,
    packed_name,
    read_manifest,
    read_progress,
)
from brlite.checkpoint.checked_model import CheckedModel
from brlite.checkpoint.folder import INDEX_FILE
from brlite.checkpoint.load_plan import LoadPlan, matrix_parts, placed_tensors
from brlite.checkpoint.stored_tensor import F32, StoredTensor, tensor_in_memory
from brlite.config.options import EngineConfig, ModelSpec
from brlite.conversion.rounding import Rounding, sample_rounding
from brlite.conversion.safetensors_writer import (
    OnBytes,
    PlannedShard,
    PlannedTensor,
    ShardWriter,
    plan_shards,
    shard_header,
    shard_index,
)
from brlite.errors import ModelError
from brlite.files.new_file import FileRecord, read_record, record_of, sync_folder, write_whole
from brlite.files.temporary import PART_SUFFIX, sweep
from brlite.models.precision import PRECISIONS, WEIGHTS_NAMES, Precision
from brlite.process.machine import physical_cores

SHARD_BYTES = 2 * 10**9
NO_IDENTITY = "0" * IDENTITY_CHARACTERS


class BundlePlan(NamedTuple):
    """A bundle before its weights are read. `draft` is its manifest, still without files.

    `side_files` are its small files, with their content.
    """

    folder: Path
    checkpoint: Checkpoint
    model: CheckedModel
    draft: Manifest
    side_files: Mapping[str, bytes]
    shards: list[PlannedShard]
    packing: Packing | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in the shards and in the packed file together."""
        packed = 0 if self.packing is None else self.packing.layout.num_bytes
        return sum(shard.num_bytes for shard in self.shards) + packed


def plan_packing(library: ctypes.CDLL, model: CheckedModel, precision: Precision) -> Packing:
    layout = packed_layout(library, model.parameters, matrix_parts(model._replace(precision=precision)))
    key = PackedFileKey(LAYOUT_VERSION, WEIGHTS_NAMES[precision.weights], NO_IDENTITY, layout.num_bytes)
    return Packing(library, layout, key)


def plan_weights(checkpoint: Checkpoint, model: CheckedModel, shard_bytes: int = SHARD_BYTES) -> list[PlannedShard]:
    """The shards: matrices in bfloat16, from which every precision is made, and vectors in float32.

    A matrix whose rows are scaled when it is loaded is float32, too, so that scaling gives the same numbers.
    """
    planned = []
    for name in checkpoint.shapes():
        if name not in model.ignored:
            target = model.targets[name]
            keeps_digits = len(target.shape) == 1 or target.has_unit_rows
            planned.append(PlannedTensor(name, "F32" if keeps_digits else "BF16", target.shape))
    return plan_shards(planned, shard_bytes)


def find_finished(plan: BundlePlan) -> Manifest | None:
    """The manifest, if the folder holds a finished bundle of the same source and precision; else None."""
    if not (plan.folder / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(plan.folder)
    records = {name: record_of(content) for name, content in _side_files(plan).items()}
    is_same = _essence(manifest) == _essence(plan.draft) and records.items() <= manifest.files.items()
    packed = set() if plan.packing is None else {packed_name(PRECISIONS[plan.draft.precision])}
    has_all = packed | {shard.file_name for shard in plan.shards} <= manifest.files.keys()
    try:
        are_whole = all((plan.folder / name).stat().st_size == each.num_bytes for name, each in manifest.files.items())
    except OSError:
        return None
    return manifest if is_same and has_all and are_whole else None


def check_folder(plan: BundlePlan) -> None:
    """Raise `ModelError` if the bundle's folder holds something else."""
    names = [] if not plan.folder.exists() else [file.name for file in plan.folder.iterdir()]
    previous = read_progress(plan.folder)
    if previous is None and not all(name.endswith(PART_SUFFIX) for name in names):
        raise ModelError(f"{plan.folder}: is there already and no bundle; name another output_dir")
    if previous is not None and previous.model != plan.draft.model:
        raise ModelError(f"{plan.folder}: holds a bundle of {previous.model}, not of {plan.draft.model}")


def write_bundle(plan: BundlePlan, on_bytes: OnBytes) -> tuple[Manifest, Rounding | None]:
    """Write the files that are missing. Returns the manifest, and the rounding of the weights if they were packed now.

    `on_bytes` is called from several threads. Raises `ModelError` if the source or the disk fails: then finished files
    are kept for the next run, and all others are removed.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with _locked(plan.folder):
            return _Bundling(plan, on_bytes).run()
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise ModelError(
            f"{plan.folder}: cannot be written: {what}{error.strerror}; what is finished is kept"
        ) from error


class _Bundling:
    """One run of `write_bundle`. `_files` are the finished files of the bundle."""

    def __init__(self, plan: BundlePlan, on_bytes: OnBytes) -> None:
        self._plan = plan
        self._folder = plan.folder
        self._on_bytes = on_bytes
        self._files: dict[str, FileRecord] = {}

    def run(self) -> tuple[Manifest, Rounding | None]:
        sweep(self._folder)
        previous = read_progress(self._folder)
        old_names = set[str]() if previous is None else previous.files.keys()
        if previous is None or previous.source != self._plan.draft.source:
            # The folder becomes an unfinished bundle without files; the files of an older one are removed.
            self._write(PROGRESS_FILE, self._manifest())
            for name in (MANIFEST_FILE, *old_names):
                (self._folder / name).unlink(missing_ok=True)
        else:
            self._keep_finished(previous)
        rounding = self._write_weights()
        for name, content in _side_files(self._plan).items():
            self._files[name] = write_whole(self._folder / name, content)
        manifest = self._manifest()
        self._write(MANIFEST_FILE, manifest)
        (self._folder / PROGRESS_FILE).unlink(missing_ok=True)
        for name in old_names - self._files.keys():
            (self._folder / name).unlink(missing_ok=True)
        sync_folder(self._folder)
        return manifest, rounding

    def _write(self, name: str, manifest: Manifest) -> None:
        write_whole(self._folder / name, msgspec.json.format(msgspec.json.encode(manifest), indent=1))

    def _manifest(self) -> Manifest:
        return msgspec.structs.replace(self._plan.draft, files=dict(sorted(self._files.items())))

    def _note_finished(self, name: str, record: FileRecord) -> None:
        self._files[name] = record
        self._write(PROGRESS_FILE, self._manifest())

    def _keep_finished(self, previous: Manifest) -> None:
        """Keep the files that an earlier run wrote from the same source, if their size and hash are still the same."""
        for shard in self._plan.shards:
            record, file = previous.files.get(shard.file_name), self._folder / shard.file_name
            header = shard_header(shard.tensors)
            try:
                with file.open("rb") as stream:
                    has_header = stream.read(len(header)) == header
            except OSError:
                continue
            if record is not None and has_header and _is_same(file, record):
                self._files[shard.file_name] = record
        if len(self._files) < len(self._plan.shards):
            return
        for name, record in previous.files.items():
            if name.endswith(PACKED_SUFFIX):
                try:
                    key = read_packed_file_key(self._folder / name)
                except (PackedFileError, OSError):
                    continue
                is_own = (key.layout_version, key.identity) == (LAYOUT_VERSION, self._identity())
                if is_own and _is_same(self._folder / name, record):
                    self._files[name] = record

    def _identity(self) -> str:
        shards = {shard.file_name: self._files[shard.file_name] for shard in self._plan.shards}
        return bundle_identity(self._plan.checkpoint.config, shards)

    def _write_weights(self) -> Rounding | None:
        """Write the missing shards and, in the same pass, the packed file if it is wanted and missing."""
        packing, name = self._plan.packing, packed_name(PRECISIONS[self._plan.draft.precision])
        needs_packed_file = packing is not None and name not in self._files
        if not needs_packed_file and all(shard.file_name in self._files for shard in self._plan.shards):
            return None
        rounding = None
        with ExitStack() as opened:
            copying = opened.enter_context(
                _CopyingCheckpoint(self._plan, self._files, self._note_finished, self._on_bytes)
            )
            if packing is None or not needs_packed_file:
                for _ in copying.tensors():
                    pass
                return None
            pool = opened.enter_context(PackingThreads(physical_cores()))
            packed_file = opened.enter_context(PackedFileWriter(self._folder / name, packing, pool, self._on_bytes))
            opened.callback(pool.end)  # before the file they write to is closed
            plan = LoadPlan(checkpoint=copying, model=self._plan.model, spec=ModelSpec(), engine=EngineConfig())
            for target, tensor in placed_tensors(plan):
                if packing.layout.tensors[target.parameter][0].format == INT8:
                    rows = tensor.part(range(min(LANES, target.shape[0]))).float32()
                    rounding = sample_rounding(packing.library, rows, rounding)
                packed_file.put(target, tensor)
                del tensor  # before the next one is read
            record = packed_file.finish(self._identity())
        self._note_finished(name, record)
        return rounding


class _CopyingCheckpoint:
    """Implements `Checkpoint`. Writes each tensor to its shard before it yields it; skips finished shards."""

    def __init__(
        self,
        plan: BundlePlan,
        finished: Mapping[str, FileRecord],
        on_finished: Callable[[str, FileRecord], None],
        on_bytes: OnBytes,
    ) -> None:
        self._plan = plan
        self._finished = set(finished)
        self._on_finished = on_finished
        self._on_bytes = on_bytes
        self._open = ExitStack()
        self.path = plan.checkpoint.path
        self.config: dict[str, Any] = plan.checkpoint.config
        self.num_bytes = plan.checkpoint.num_bytes
        self.identity = plan.checkpoint.identity

    def __enter__(self) -> _CopyingCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._plan.checkpoint.shapes()

    def formats(self) -> dict[str, str]:
        return dict.fromkeys(self.shapes(), F32.name)  # of the tensors that `tensors` yields

    def tensors(self) -> Iterator[StoredTensor]:
        tensors = (tensor for tensor in self._plan.checkpoint.tensors() if tensor.name not in self._plan.model.ignored)
        for shard in self._plan.shards:
            writer = None
            if shard.file_name not in self._finished:
                writer = self._open.enter_context(ShardWriter(self._plan.folder, shard, self._on_bytes))
            for planned in shard.tensors:
                tensor = next(tensors, None)
                if tensor is None or (tensor.name, tensor.shape) != (planned.name, planned.shape):
                    raise ModelError(f"{self.path}: has changed while it was read: {planned.name} did not come")
                if writer is None:
                    yield tensor
                    continue
                values = tensor.float32()  # once for both files
                if not math.isfinite(values.min()) or not math.isfinite(values.max()):
                    raise ModelError(f"{self.path}: {planned.name} has a number that is not finite")
                writer.put(planned, values)
                yield tensor_in_memory(planned.name, F32, planned.shape, values.reshape(-1).view(np.uint8))
                writer.wait()
                del values  # before the next one is read
            if writer is not None:
                record = writer.finish()
                self._open.close()
                self._on_finished(shard.file_name, record)


def _side_files(plan: BundlePlan) -> dict[str, bytes]:
    index = msgspec.json.format(msgspec.json.encode(shard_index(plan.shards)), indent=1)
    return {**plan.side_files, INDEX_FILE: index}


def _essence(manifest: Manifest) -> Manifest:
    """The manifest without the fields that may differ between two runs: files, and the version of brlite."""
    return msgspec.structs.replace(manifest, files={}, brlite="")


def _is_same(file: Path, record: FileRecord) -> bool:
    try:
        return read_record(file) == record
    except OSError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other conversions. The system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows, which cannot open a folder either
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"{folder}: another conversion is writing there") from None
        yield
    finally:
        os.close(handle)
