"""Ranks as threads of one process: all that they do together, without what it takes to start processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from brlite.backends.distributed.backend import RankModel
from brlite.backends.distributed.messages import RankBatch
from brlite.backends.distributed.parallel import load_native_rank
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.step_rows import create_shared_file
from brlite.checkpoint import Checkpoint
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, StepResult
from brlite.models.precision import PrecisionOption
from brlite.models.shards import Shard
from tests.backends.native_models import MAX_CONTEXT, MAX_ROWS, make_checkpoint
from tests.load_plans import make_plan


class RankThreads:
    """A `Backend`: rank 0 on the caller's thread, the others on threads of their own, each given the batch's bytes."""

    def __init__(self, ranks: list[RankModel]) -> None:
        self.info = ranks[0].backend.info
        self._ranks = ranks
        self._pool = ThreadPoolExecutor(len(ranks))

    def execute(self, batch: Batch) -> StepResult:
        sent = msgspec.msgpack.encode(batch)
        following = [
            self._pool.submit(rank.backend.follow, msgspec.msgpack.decode(sent, type=RankBatch))
            for rank in self._ranks[1:]
        ]
        result = self._ranks[0].backend.execute(batch)
        for done in following:
            done.result()
        return result

    def close(self) -> None:
        self._pool.shutdown()
        for rank in self._ranks:
            rank.close()


def load_native_ranks(
    library: NativeLibrary,
    name: str,
    precision: PrecisionOption,
    size: int,
    *,
    threads: int = 1,
    checkpoint: Checkpoint | None = None,
    **spec_fields: Any,
) -> RankThreads:
    """The ranks of one of `native_models`'s models, or of a checkpoint."""
    spec = ModelSpec(
        name=name, precision=precision, build_seq=MAX_CONTEXT, build_batch=8, num_blocks=160, **spec_fields
    )
    engine = EngineConfig(threads=threads, max_num_batched_tokens=MAX_ROWS)
    checkpoint = checkpoint or make_checkpoint(name)
    plan = make_plan(checkpoint, spec, engine)
    file = create_shared_file(library.functions, plan)
    try:
        return RankThreads(
            [
                load_native_rank(library, msgspec.structs.replace(plan, shard=Shard(rank, size, sums=False)), file)
                for rank in range(size)
            ]
        )
    finally:
        os.close(file)
