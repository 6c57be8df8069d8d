"""The torch decoder with its logits in reach: the float32 reference, and the torch backend's numbers.

`TorchBackend` gives tokens and their logprobs; comparing distributions takes all of the logits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from brlite.backends.torch.attention import Span, StepPlanner
from brlite.backends.torch.device import DeviceRules, compute_dtype, rules_for, select_device
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.loading import load_model
from brlite.backends.torch.quantize import store_rows_
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.load_plan import LoadPlan, placed_tensors
from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.config import KVDtype

BLOCK_SIZE = 16


class TorchModel:
    """A model and a cache for one text of `spec.build_seq` tokens at most."""

    def __init__(self, path: Path, spec: ModelSpec, dtype: Literal["auto", "float32"], kv_dtype: KVDtype) -> None:
        device = select_device("cpu")
        packs = dtype == "auto" and rules_for(device).packs_matrices
        checkpoint = open_checkpoint(path)
        plan = LoadPlan(checkpoint=checkpoint, model=check_model(checkpoint, spec), spec=spec, engine=EngineConfig())
        rules = DeviceRules(packs_matrices=packs)
        self._decoder = load_model(plan, compute_dtype(dtype, device), device, rules)
        if dtype == "float32":  # the numbers of the file, which loading rounds to bfloat16
            for target, tensor in placed_tensors(plan):
                rows = torch.from_numpy(tensor.float32())
                store_rows_(self._decoder.parameters, target.parameter, target.start, rows)
        num_blocks = math.ceil(spec.build_seq / BLOCK_SIZE)
        self._cache = KVCache(
            self._decoder.config, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv_dtype, device=device
        )
        self._planner = StepPlanner(self._decoder.config, self._cache, self._decoder.dtype, device)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[tokens, vocabulary] float32: what follows each token."""
        with torch.inference_mode():
            plan = self._planner.plan([Span(0, len(token_ids), range(self._cache.num_blocks))])
            hidden = self._decoder.forward(torch.tensor(token_ids), plan, self._cache)
            logits: np.ndarray = self._decoder.logits(hidden).numpy()
            return logits
