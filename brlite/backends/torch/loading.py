"""Fills a decoder's parameters from a checkpoint, tensor by tensor. The readers of file formats are in `checkpoint`.

All names and shapes are checked before any data is read (`checked_model.py`). Peak memory: the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import DeviceRules, describe_device, device_memory
from brlite.backends.torch.packing import can_pack, pack_linears
from brlite.backends.torch.parallel import Group, shard_parameters
from brlite.backends.torch.parameters import NO_FORMS, allocate_parameters
from brlite.backends.torch.quantize import ROWS_AT_A_TIME, quantize_linears_, store_codes_, store_rows_
from brlite.checkpoint.load_plan import LoadPlan, num_cache_blocks, placed_tensors
from brlite.errors import ConfigError
from brlite.models.config import cache_dtype, kv_bytes_per_token
from brlite.models.network import weight_bytes
from brlite.models.precision import MatrixForm
from brlite.models.shards import shard_slices
from brlite.process.machine import find_memory, show_bytes

PLAIN = DeviceRules()


class MemoryNeeds(NamedTuple):
    """Bytes of a model's weights and KV cache, and those that its device had before loading: free, and in all."""

    device: str
    weights: int
    cache: int
    free: int
    total: int

    @classmethod
    def of(cls, plan: LoadPlan, dtype: torch.dtype, device: torch.device, rules: DeviceRules) -> MemoryNeeds:
        """The needs of the plan's model, or of its shard; measures what is free now."""
        block_size = plan.engine.block_size
        per_token = kv_bytes_per_token(plan.rank_config, cache_dtype(plan.precision, plan.engine.dtype))
        cache = num_cache_blocks(plan.spec, block_size) * block_size * per_token
        weights = weight_bytes(plan.rank_config, dtype.itemsize, held_forms(plan, rules))
        card, host = device_memory(device), find_memory()
        free, total = (host.available, host.total) if card is None else (card.free, card.total)
        return cls(describe_device(device), weights, cache, free, total)

    @contextmanager
    def explained(self, stage: str, remedy: str) -> Iterator[None]:
        """Raise a `ConfigError` with the breakdown if memory runs out in the block, while `stage` is allocated."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            # A CPU's allocator and plugins of other cards have no class for this.
            is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not is_ours and not any(word in str(error) for word in ("memory", "Storage size")):
                raise
            raise ConfigError(
                f"{self.device} has too little memory for {stage}: the weights take {show_bytes(self.weights)}, the KV "
                f"cache {show_bytes(self.cache)}, and {show_bytes(self.free)} of {show_bytes(self.total)} were free; "
                f"{remedy}"
            ) from error


def held_forms(plan: LoadPlan, rules: DeviceRules) -> Mapping[str, MatrixForm]:
    """The forms in which a device with these rules holds the plan's matrices. It widens those that are not listed."""
    return plan.card_forms if rules.keeps_forms(plan.precision) else NO_FORMS


def load_model(
    plan: LoadPlan, dtype: torch.dtype, device: torch.device, rules: DeviceRules = PLAIN, group: Group | None = None
) -> Decoder:
    """The decoder that the plan's checkpoint holds, in its precision, computing in `dtype` on `device`.

    `rules` choose the form of the matrices. With a shard these are one rank's parameters, and `group` connects the
    ranks.
    """
    config = plan.rank_config
    forms = held_forms(plan, rules)
    parameters = allocate_parameters(config, dtype, device, forms)
    if plan.shard is not None:
        for name, held in shard_slices(plan.config, plan.shard).items():
            if sum(map(len, held.rows)) < len(parameters.named[name]):
                parameters.named[name].zero_()  # padding of a vocabulary, and biases that only rank 0 adds
    for target, tensor in placed_tensors(plan):
        if forms.get(target.parameter, "int8") != "int8":
            for first in range(0, target.shape[0], ROWS_AT_A_TIME):
                rows = range(first, min(first + ROWS_AT_A_TIME, target.shape[0]))
                store_codes_(parameters, target.parameter, target.start + first, tensor.part(rows).coded())
            continue
        values = torch.from_numpy(tensor.float32())
        # Every precision starts from bfloat16 weights, held in float32 or not.
        is_exact = plan.model.parameters[target.parameter].precision == "float32"
        values = values if is_exact else values.to(torch.bfloat16)
        store_rows_(parameters, target.parameter, target.start, values)
        del values  # before the next one is read

    if plan.precision.weights == "int8":
        quantize_linears_(parameters)
    if rules.packs_matrices and can_pack(parameters):
        parameters = pack_linears(parameters)
    if plan.shard is not None and group is not None:
        parameters = shard_parameters(parameters, plan.config, plan.shard, group)
    return Decoder(config, parameters, max_length=plan.spec.build_seq)
