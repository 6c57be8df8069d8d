"""Steps by the kernels of this folder. Steps of short runs replay CUDA graphs that are captured at the start.

A graph computes a fixed number of rows, each as a single token. A short run (drafts to verify, the end of a prompt) is
replayed as single tokens of consecutive positions with the same block table: a layer stores the keys and values of all
rows before any row attends, so each row reads those before it. A step of fewer rows is padded with rows that write to a
scratch block, which is never read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brlite.backends.torch.device import device_errors, make_current, send
from brlite.backends.torch.graph_memory import graph_rows
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import Parameters
from brlite.backends.torch.steps import ComputedStep, LastDraws, Run, StepLimits
from brlite.backends.torch.triton.attention import tile_tokens
from brlite.backends.torch.triton.inputs import StepInputs, TableRows, TokenRun, lay_out, lay_out_singles, transfer
from brlite.backends.torch.triton.plan import TritonDecoder
from brlite.backends.torch.triton.rows import take_draws
from brlite.engine.backend import MAX_DRAFT_TOKENS
from brlite.models.config import ModelConfig
from brlite.process.machine import show_bytes

logger = logging.getLogger(__name__)

MAX_SHORT_RUN = 1 + MAX_DRAFT_TOKENS  # tokens; as single tokens, longer runs would read too much of the cache
WARM_UP_TOKENS = (17, 33, 65, 129)  # each in another row of `TILES`
GRAPH_NOTE = "steps are not replayed from graphs, which costs time between kernels: {reason}"

_CAPTURING = threading.Lock()  # torch can capture one graph at a time in a process


@dataclass(frozen=True)
class StepGraph:
    """A captured step: it reads `array`, which `inputs` view, and writes `hidden` [B, H] and `logits` [B, V].

    `tables` are those of its last replay, on the host.
    """

    graph: torch.cuda.CUDAGraph
    tables: TableRows
    array: Tensor
    inputs: StepInputs
    hidden: Tensor
    logits: Tensor


class TritonSteps:
    """`Steps` for CUDA cards. They are slow, and the first ones by seconds, without `capture` and `warm_up`."""

    is_batch_invariant = True

    def __init__(self, config: ModelConfig, parameters: Parameters, cache: KVCache, *, max_length: int) -> None:
        self.config, self.parameters, self.cache = config, parameters, cache
        self._decoder = TritonDecoder(config, parameters, cache, max_length=max_length)
        self.device, self.dtype = self._decoder.device, torch.bfloat16
        self._tile_tokens = tile_tokens(config.group_size)
        self._table_width = -(-max_length // cache.block_size)
        self._max_length = max_length
        self._graphs: dict[int, StepGraph] = {}

    def forward(self, runs: Sequence[Run], last: LastDraws | None = None) -> ComputedStep:
        make_current(self.device)
        sources = () if last is None else last.sources
        num_rows = sum(len(run.token_ids) for run in runs)
        graph = self._graphs.get(1 << (num_rows - 1).bit_length())
        if graph is None or any(len(run.token_ids) > MAX_SHORT_RUN for run in runs):
            layout = lay_out(runs, self.cache.block_size, self._tile_tokens, sources=sources)
            inputs = transfer(layout, self.device)
            if last is not None:
                take_draws(inputs.token_ids, inputs.sources, last.drawn)
            return ComputedStep(layout.rows, self._decoder.forward(inputs))
        first_rows: Sequence[int] = range(num_rows)
        if num_rows > len(runs):
            runs, sources, first_rows = _as_single_tokens(runs, sources)
        filled = [*runs, *[self._filler] * (graph.inputs.num_rows - num_rows)]
        layout = lay_out_singles(filled, self.cache.block_size, graph.tables, sources=sources)
        graph.array.copy_(send(layout.array, self.device))
        if last is not None:
            take_draws(graph.inputs.token_ids, graph.inputs.sources, last.drawn)
        graph.graph.replay()
        return ComputedStep(first_rows, graph.hidden, graph.logits)

    def logits(self, step: ComputedStep, rows: list[int]) -> Tensor:
        if step.logits is not None:
            return step.logits[: len(rows)] if rows == list(range(len(rows))) else step.logits[self._indices(rows)]
        return self._decoder.logits(step.hidden.index_select(0, self._indices(rows)))

    def normed(self, step: ComputedStep, rows: list[int]) -> Tensor:
        return self._decoder.normed(step.hidden.index_select(0, self._indices(rows)))

    def capture(self, max_rows: int) -> str | None:
        """Capture a graph for 1, 2, 4, … rows, up to `max_rows`. Returns why there are none, if that fails."""
        make_current(self.device)
        began, num_reserved = time.monotonic(), torch.cuda.memory_reserved(self.device)
        sizes = graph_rows(max_rows)
        try:
            with _CAPTURING, device_errors():
                pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                # On a stream of this card: torch's own stream for captures is of the first card that captured.
                for size in reversed(sizes):  # the largest first: the others reuse its memory from the pool
                    tables = TableRows(size, self._table_width)
                    layout = lay_out_singles([self._filler] * size, self.cache.block_size, tables)
                    array = torch.from_numpy(layout.array).to(self.device)
                    # A graph has the splits of the longest context; programs skip those beyond a row's context.
                    inputs = layout.on(array)._replace(max_context=self._max_length)
                    self._decoder.logits(self._decoder.forward(inputs))  # kernels are compiled outside of the capture
                    torch.cuda.synchronize(self.device)
                    graph = torch.cuda.CUDAGraph()
                    # thread_local: other models may compute and allocate memory meanwhile, on this card too.
                    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                        hidden = self._decoder.forward(inputs)
                        logits = self._decoder.logits(hidden)
                    self._graphs[size] = StepGraph(graph, tables, array, inputs, hidden, logits)
        except RuntimeError as error:  # torch's class for errors of drivers and memory
            self._graphs.clear()
            return " ".join(str(error).split())[:300]
        num_bytes = torch.cuda.memory_reserved(self.device) - num_reserved
        seconds = time.monotonic() - began
        logger.info("steps of up to %d rows were captured in %.1f s, in %s", sizes[-1], seconds, show_bytes(num_bytes))
        return None

    def warm_up(self, limits: StepLimits) -> None:
        """Compile the kernels of steps that no graph has, up to the longest, and reserve the memory that they take.

        The tokens are written to the scratch block. Raises torch's error if memory is too small for such a step.
        """
        make_current(self.device)
        table = [self.cache.scratch_block] * self._table_width
        for num_tokens in sorted({min(number, limits.tokens) for number in (*WARM_UP_TOKENS, limits.tokens)}):
            starts = range(0, num_tokens, limits.length)
            runs = [TokenRun(0, [0] * min(limits.length, num_tokens - start), table) for start in starts]
            layout = lay_out(runs, self.cache.block_size, self._tile_tokens)
            hidden = self._decoder.forward(transfer(layout, self.device))
            self._decoder.logits(hidden[: limits.rows])

    @property
    def _filler(self) -> TokenRun:
        return TokenRun(0, [0], [self.cache.scratch_block])

    def _indices(self, values: list[int]) -> Tensor:
        return send(np.array(values, np.int64), self.device)


def _as_single_tokens(runs: Sequence[Run], sources: Sequence[int]) -> tuple[list[Run], list[int], list[int]]:
    """The tokens of runs as runs of one token, the source of each, and the row of each run's first token."""
    singles, source_of_single, first_rows = list[Run](), list[int](), list[int]()
    for index, run in enumerate(runs):
        first_rows.append(len(singles))
        for offset, token_id in enumerate(run.token_ids):
            singles.append(TokenRun(run.start + offset, [token_id], run.block_table))
            source_of_single.append(sources[index] if sources and not offset else -1)
    return singles, source_of_single, first_rows
