"""Loads a model that several ranks compute: assigns their parts, starts or awaits the ranks, and connects them.

Each rank reads its own part of the weights. Weights are rounded before the split: two ranks hold the numbers of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from brlite.backends.distributed.backend import ParallelBackend, RankModel
from brlite.backends.distributed.launcher import await_ranks, find_place
from brlite.backends.distributed.messages import Loaded, Setup
from brlite.backends.distributed.processes import start_local
from brlite.backends.native.step_rows import SharedRows, create_shared_file
from brlite.backends.torch.device import select_device
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.fetch import locate_model
from brlite.checkpoint.load_plan import LoadPlan
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import BackendInfo
from brlite.errors import ConfigError
from brlite.models.config import ModelConfig
from brlite.models.shards import Shard, check_groups
from brlite.process.machine import physical_cores

if TYPE_CHECKING:
    from brlite.backends.native.library import NativeLibrary

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


def load_torch_ranks(plan: LoadPlan) -> ParallelBackend:
    """The backend of `spec.tensor_parallel` ranks. This process is rank 0. Raises the error of any rank."""
    spec, engine = plan.spec, plan.engine
    size, place, model_hash = spec.tensor_parallel, find_place(os.environ), _model_hash(plan.checkpoint)
    if place is not None and place.size != size:
        raise ConfigError(f"tensor_parallel is {size}, but WORLD_SIZE is {place.size}")
    if plan.precision.weights == "int8":
        check_groups(plan.config, size)
    ranks = await_ranks(place) if place else start_local(size)

    def setup(rank: int) -> Setup:
        if place is not None:  # the rank chooses its device and threads itself
            return Setup(rank, spec, engine, model_hash)
        return Setup(rank, *_as_rank_sees(_located(plan), engine, spec.devices[rank], size), model_hash)

    def load() -> RankModel:
        device, num_here = (place.local_rank, place.local_size) if place else (spec.devices[0], size)
        return load_torch_rank(_rank_plan(plan, Shard(0, size), *_as_rank_sees(spec, engine, device, num_here)))

    describe = partial(_describe, plan.config)
    return ParallelBackend.assemble(ranks, setup, load, describe, place.host if place else LOOPBACK)


def load_native_ranks(library: NativeLibrary, plan: LoadPlan) -> ParallelBackend:
    """The same in native code, on this machine's cores. Each rank has its own packed file beside the plan's."""
    size, model_hash, num_cores = plan.spec.tensor_parallel, _model_hash(plan.checkpoint), physical_cores()
    if size > num_cores:
        logger.warning("%d ranks share %d cores: they wait for each other more than they compute", size, num_cores)
    seen = _as_rank_sees(_located(plan), plan.engine, 0, size)
    memory = create_shared_file(library.functions, plan)

    def load() -> RankModel:
        shard = Shard(0, size, sums=False)
        rank_plan = _rank_plan(plan, shard, *seen, _rank_file(plan.packed_file, shard))
        return load_native_rank(library, rank_plan, memory)

    try:
        return ParallelBackend.assemble(
            start_local(size, (memory,)),
            lambda rank: Setup(rank, *seen, model_hash, memory, _rank_file(plan.packed_file, Shard(rank, size))),
            load,
            partial(_describe, plan.config),
            LOOPBACK,
        )
    finally:
        os.close(memory)  # each rank has mapped it


def load_rank(setup: Setup) -> RankModel:
    """The part of the model that a rank other than 0 computes."""
    spec, engine, place = setup.spec, setup.engine, find_place(os.environ)
    if place is not None:
        spec, engine = _as_rank_sees(spec, engine, place.local_rank, place.local_size)
    checkpoint = open_checkpoint(locate_model(spec.name, spec.path), spec.model_file)
    if _model_hash(checkpoint) != setup.model_hash:
        raise ConfigError(f"{checkpoint.path} is another model than rank 0's: its config or its tensors' shapes differ")
    plan = LoadPlan(
        checkpoint=checkpoint,
        model=check_model(checkpoint, spec),
        spec=spec,
        engine=engine,
        num_threads=engine.threads,
        shard=Shard(setup.rank, spec.tensor_parallel, sums=setup.memory is None),
        packed_file=Path(setup.packed_file) if setup.packed_file else None,
    )
    if setup.memory is None:
        return load_torch_rank(plan)
    from brlite.backends.native.library import load_library

    return load_native_rank(load_library(), plan, setup.memory)


def load_torch_rank(plan: LoadPlan) -> RankModel:
    """Read the weights of the plan's shard and allocate its cache, on the first of the spec's devices.

    After `o` and `down` the ranks' products are summed, so the results of one rank and of several differ by rounding.
    """
    from brlite.backends.torch.backend import TorchBackend
    from brlite.backends.torch.group import TorchGroup

    assert plan.shard is not None
    group = TorchGroup(plan.shard, select_device(plan.engine.device, plan.spec.devices[0]))
    return RankModel(TorchBackend.load(plan, group), group)


def load_native_rank(library: NativeLibrary, plan: LoadPlan, file: int) -> RankModel:
    """The same in native code. `file` is a descriptor of the memory that the ranks share.

    No sum is split among ranks, so results have the same bits for any number of ranks.
    """
    from brlite.backends.native.backend import NativeBackend

    with ExitStack() as opened:
        shared = SharedRows(library.functions, plan, file)
        opened.callback(shared.close)
        return RankModel(NativeBackend(library, plan, shared=shared, opened=opened), shared)


def _rank_plan(
    plan: LoadPlan, shard: Shard, spec: ModelSpec, engine: EngineConfig, packed_file: str | None = None
) -> LoadPlan:
    """The plan of rank 0, which sees `spec` and `engine`."""
    return msgspec.structs.replace(
        plan,
        spec=spec,
        engine=engine,
        num_threads=engine.threads,
        shard=shard,
        packed_file=Path(packed_file) if packed_file else None,
    )


def _rank_file(packed_file: Path | None, shard: Shard) -> str | None:
    """The path of a rank's packed weights."""
    return None if packed_file is None else f"{packed_file}.rank-{shard.rank}-of-{shard.size}"


def _located(plan: LoadPlan) -> ModelSpec:
    """The spec with the path of the checkpoint, for other processes of this machine."""
    return msgspec.structs.replace(plan.spec, path=str(plan.checkpoint.path))


def _as_rank_sees(spec: ModelSpec, engine: EngineConfig, device: int, num_here: int) -> tuple[ModelSpec, EngineConfig]:
    """The spec and engine config of a rank: its own device, and its share of its machine's threads."""
    threads = max(1, (engine.threads or physical_cores()) // num_here)
    return msgspec.structs.replace(spec, devices=(device,)), msgspec.structs.replace(engine, threads=threads)


def _model_hash(checkpoint: Checkpoint) -> str:
    """A hash of the model's config and shapes, equal for all copies of a model."""
    content = json.dumps([checkpoint.config, checkpoint.shapes()], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _describe(config: ModelConfig, own: BackendInfo, others: Sequence[Loaded]) -> BackendInfo:
    """The info of all ranks together; sizes are sums."""
    prints = [own.fingerprint, *(loaded.fingerprint for loaded in others)]
    return msgspec.structs.replace(
        own,
        device=f"{own.device}, {len(others) + 1} ranks",
        vocab_size=config.vocab_size,
        weight_bytes=own.weight_bytes + sum(loaded.weight_bytes for loaded in others),
        kv_bytes=own.kv_bytes + sum(loaded.kv_bytes for loaded in others),
        fingerprint=hashlib.blake2b(" ".join(prints).encode(), digest_size=8).hexdigest() if own.fingerprint else "",
    )
