"""Single steps of a backend: what they are, what they must read and multiply, and how long they take.

Batches are made by hand and go through `Backend.execute`, as the engine's do. Knows no limits of machines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from brlite.engine.backend import Backend, BackendInfo, Batch, SamplingInput, ScheduledSeq
from brlite.models.config import ModelConfig
from brlite.models.network import list_parameters
from brlite.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
EMBEDDING_BYTES = {
    "float32": 4
}  # of one number, by `BackendInfo.dtype`; an embedding that is only looked up stays bf16
ROUND_SECONDS = 0.2
FIRST_TOKEN = 100


class Step(Struct, frozen=True):
    """`rows` sequences, each with `num_tokens` new tokens, the last of which sees `context` tokens with itself."""

    rows: int
    num_tokens: int
    context: int

    @property
    def name(self) -> str:
        if self.num_tokens > 1:
            return f"prefill {self.num_tokens}" + (f" @ {self.start}" if self.start else "")
        return f"decode {self.rows} @ {self.context}"

    @property
    def start(self) -> int:
        return self.context - self.num_tokens


class Cost(Struct, frozen=True):
    """What a step cannot do without."""

    bytes_read: float
    multiply_adds: float


def decode_step(rows: int, context: int) -> Step:
    return Step(rows, 1, context)


def prefill_step(num_tokens: int, start: int = 0) -> Step:
    return Step(1, num_tokens, start + num_tokens)


def num_blocks(steps: Sequence[Step], block_size: int) -> int:
    """What the cache needs for any of `steps`: a range of blocks for each row."""
    return max(step.rows for step in steps) * _blocks_per_row(steps, block_size)


def make_batches(steps: Sequence[Step], info: BackendInfo) -> list[Batch]:
    """A batch for each step; row `n` has the same blocks in all of them."""
    per_row = _blocks_per_row(steps, info.block_size)
    return [_batch(step, info, per_row) for step in steps]


def fill_cache(backend: Backend, steps: Sequence[Step]) -> None:
    """Write to every block that the steps will read: memory that nobody has written takes no time to read.

    One token a block does; what it holds makes no difference to the time. (To compute every prompt takes minutes.)
    """
    info = backend.info
    per_row = _blocks_per_row(steps, info.block_size)
    for block in range(per_row):
        for first in range(0, max(step.rows for step in steps), info.max_num_seqs):
            rows = range(first, min(first + info.max_num_seqs, max(step.rows for step in steps)))
            backend.execute(Batch([_seq(row, block * info.block_size, [FIRST_TOKEN], per_row, info) for row in rows]))


def time_step(backend: Backend, batch: Batch, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Seconds of each run of the step, as many as fit into a round. Raises `RuntimeError` if a row failed."""
    seconds: list[float] = []
    while sum(seconds) < ROUND_SECONDS:
        start = clock()
        result = backend.execute(batch)
        seconds.append(clock() - start)
        if error := next((seq.error for seq in result.seqs if seq.error), None):
            raise RuntimeError(f"a step failed: {error}")
    return seconds


def step_cost(step: Step, info: BackendInfo, config: ModelConfig) -> Cost:
    """Weights are read once, and the keys and values of every row; attention multiplies each token's own context."""
    shapes = {name: parameter.shape for name, parameter in list_parameters(config).items()}
    head = math.prod(shapes["embedding"])
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers.") and len(shape) == 2)
    seen = step.num_tokens * step.start + step.num_tokens * (step.num_tokens + 1) // 2
    attention = 2 * config.num_layers * config.q_size * seen
    looked_up = 0 if config.tie_word_embeddings else head * EMBEDDING_BYTES.get(info.dtype, 2)
    kv_bytes = info.kv_bytes / (info.num_blocks * info.block_size)
    return Cost(
        bytes_read=info.weight_bytes - looked_up + kv_bytes * step.rows * step.context,
        multiply_adds=step.rows * (step.num_tokens * layers + head + attention),
    )


def _blocks_per_row(steps: Sequence[Step], block_size: int) -> int:
    return math.ceil(max(step.context for step in steps) / block_size)


def _batch(step: Step, info: BackendInfo, per_row: int) -> Batch:
    token_ids = [FIRST_TOKEN + i % 100 for i in range(step.num_tokens)]
    return Batch([_seq(row, step.start, token_ids, per_row, info) for row in range(step.rows)])


def _seq(row: int, start: int, token_ids: list[int], per_row: int, info: BackendInfo) -> ScheduledSeq:
    end = start + len(token_ids)
    return ScheduledSeq(
        seq_id=row,
        start=start,
        token_ids=token_ids,
        block_table=list(range(row * per_row, row * per_row + math.ceil(end / info.block_size))),
        sampling=SamplingInput(params=GREEDY, seed=0, position=end),
    )
