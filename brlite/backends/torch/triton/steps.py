"""Steps by the kernels of this folder. Steps of single tokens replay CUDA graphs that are captured at the start.

A graph has a fixed number of rows. A step of fewer rows is padded with rows that write to a scratch block, which is
never read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brlite.backends.torch.device import make_current, send
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import Parameters
from brlite.backends.torch.steps import ComputedStep, LastDraws, Run
from brlite.backends.torch.triton.attention import tile_tokens
from brlite.backends.torch.triton.inputs import Filler, StepInputs, lay_out, transfer
from brlite.backends.torch.triton.plan import TritonDecoder
from brlite.backends.torch.triton.rows import take_draws
from brlite.models.config import ModelConfig

logger = logging.getLogger(__name__)

MAX_GRAPH_ROWS = 128
GRAPH_NOTE = "steps are not replayed from graphs, which costs time between kernels: {reason}"


@dataclass(frozen=True)
class StepGraph:
    """A captured step: it reads `array`, which `inputs` view, and writes `hidden` [B, H] and `logits` [B, V]."""

    graph: torch.cuda.CUDAGraph
    array: Tensor
    inputs: StepInputs
    hidden: Tensor
    logits: Tensor


class TritonSteps:
    """`Steps` for CUDA cards. Call `capture` before the first step; without it steps are correct but slower."""

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
        graph = self._graphs.get(1 << (len(runs) - 1).bit_length())
        if graph is None or any(len(run.token_ids) > 1 for run in runs):
            layout = lay_out(runs, self.cache.block_size, self._tile_tokens, sources=sources)
            inputs = transfer(layout, self.device)
        else:
            filled = [*runs, *[self._filler] * (graph.inputs.num_rows - len(runs))]
            layout = lay_out(filled, self.cache.block_size, 1, sources=sources, table_width=self._table_width)
            graph.array.copy_(send(layout.array, self.device))
            inputs = graph.inputs
        if last is not None:
            take_draws(inputs.token_ids, inputs.sources, last.drawn)
        if graph is None or inputs is not graph.inputs:
            return ComputedStep(layout.rows, self._decoder.forward(inputs))
        graph.graph.replay()
        return ComputedStep(layout.rows[: len(runs)], graph.hidden, graph.logits)

    def logits(self, step: ComputedStep, rows: list[int]) -> Tensor:
        if step.logits is not None:
            return step.logits[: len(rows)] if rows == list(range(len(rows))) else step.logits[self._indices(rows)]
        return self._decoder.logits(step.hidden.index_select(0, self._indices(rows)))

    def normed(self, step: ComputedStep, rows: list[int]) -> Tensor:
        return self._decoder.normed(step.hidden.index_select(0, self._indices(rows)))

    def capture(self, max_rows: int) -> str | None:
        """Capture a graph for 1, 2, 4, … rows, up to `max_rows`. Returns why there are none, if that fails."""
        make_current(self.device)
        began = time.monotonic()
        sizes = [1 << power for power in range((min(max_rows, MAX_GRAPH_ROWS) - 1).bit_length() + 1)]
        pool = torch.cuda.graph_pool_handle()
        try:
            for size in reversed(sizes):  # the largest first: the others reuse its memory from the pool
                layout = lay_out([self._filler] * size, self.cache.block_size, 1, table_width=self._table_width)
                array = torch.from_numpy(layout.array).to(self.device)
                # A graph has the splits of the longest context; programs skip those beyond a row's context.
                inputs = layout.on(array)._replace(max_context=self._max_length)
                self._decoder.logits(self._decoder.forward(inputs))  # kernels are compiled outside of the capture
                torch.cuda.synchronize(self.device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    hidden = self._decoder.forward(inputs)
                    logits = self._decoder.logits(hidden)
                self._graphs[size] = StepGraph(graph, array, inputs, hidden, logits)
        except RuntimeError as error:  # torch's class for errors of drivers and memory
            self._graphs.clear()
            return " ".join(str(error).split())[:300]
        logger.info("steps of up to %d rows were captured in %.1f s", sizes[-1], time.monotonic() - began)
        return None

    @property
    def _filler(self) -> Filler:
        return Filler(0, [0], [self.cache.scratch_block])

    def _indices(self, values: list[int]) -> Tensor:
        return send(np.array(values, np.int64), self.device)
