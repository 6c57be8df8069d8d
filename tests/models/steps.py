"""Runs a decoder over token ids in whatever pieces a test wants, on one paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brlite.backends.torch.attention import Span, StepPlanner
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.loading import load_model
from brlite.config.options import ModelSpec
from brlite.models.config import KVDtype
from brlite.models.precision import PrecisionName
from tests.load_plans import make_plan
from tests.tiny_models import VOCAB_SIZE, TensorCheckpoint

BLOCK_SIZE = 4
LENGTH = 40
DEVICE = torch.device("cpu")


def load_tiny(name: str, precision: PrecisionName = "bf16", dtype: torch.dtype = torch.float32) -> Decoder:
    spec = ModelSpec(name=name, build_seq=LENGTH, precision=precision)
    return load_model(make_plan(TensorCheckpoint.tiny(name), spec), dtype, DEVICE)


def random_ids(length: int = LENGTH, *, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Runner:
    """A decoder with its cache; a sequence's blocks are the caller's choice."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int = 48,
        kv_dtype: KVDtype = "float32",
        has_few_shapes: bool = False,
    ) -> None:
        self.cache = KVCache(
            decoder.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv_dtype, device=DEVICE
        )
        self._decoder = decoder
        self._planner = StepPlanner(decoder.config, self.cache, decoder.dtype, DEVICE, has_few_shapes=has_few_shapes)

    @torch.inference_mode()
    def step(self, pieces: Sequence[tuple[int, list[int], Sequence[int]]]) -> list[Tensor]:
        """Compute (start, token ids, block table) of several sequences in one step: logits of each piece's tokens."""
        plan = self._planner.plan([Span(start, len(ids), table) for start, ids, table in pieces])
        token_ids = torch.tensor(plan.in_rows([ids for _, ids, _ in pieces]))
        logits = self._decoder.logits(self._decoder.forward(token_ids, plan, self.cache))
        return [logits[first : first + len(ids)] for first, (_, ids, _) in zip(plan.first_rows, pieces, strict=True)]

    def whole(self, token_ids: list[int], table: Sequence[int]) -> Tensor:
        """Logits of every token, computed in one chunk."""
        return self.step([(0, token_ids, table)])[0]

    def chunked(self, token_ids: list[int], table: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Logits of every token, computed in chunks of `sizes`."""
        logits, start = [], 0
        for size in sizes:
            logits += self.step([(start, token_ids[start : start + size], table)])
            start += size
        assert start == len(token_ids)
        return torch.cat(logits)
