"""Fills a decoder's parameters from a checkpoint, tensor by tensor. Knows no file formats and no requests.

All names and shapes are checked before any data is read (`fit.py`); memory is the model plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.packing import can_pack, pack_linears
from brlite.backends.torch.parallel import Group, share_parameters
from brlite.backends.torch.parameters import Parameters, allocate_parameters
from brlite.backends.torch.quantize import quantize_linears_, store_rows_
from brlite.checkpoint import Checkpoint
from brlite.checkpoint.checked_model import CheckedModel, check_fit
from brlite.checkpoint.placing import placed_tensors
from brlite.config.options import ModelSpec
from brlite.errors import ConfigError
from brlite.models.config import ModelConfig
from brlite.models.families.family import WeightTarget
from brlite.models.network import weight_bytes
from brlite.models.shards import Shard, parameter_parts, shared_config
from brlite.precision import PRECISIONS


class TorchRankContext(NamedTuple):
    """One rank's place among those that compute a model together."""

    share: Shard
    group: Group


def load_model(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None],
    *,
    packs: bool = False,
    keeps_int8: bool = False,
    seat: TorchRankContext | None = None,
) -> Decoder:
    """The decoder that `checkpoint` holds, in `spec`'s precision, computing in `dtype` on `device`.

    `packs` allows matrices in oneDNN's layout, `keeps_int8` those that stay int8; `on_progress` gets the fraction that
    is loaded. Raises `ModelError` or `ConfigError` before any weight is read if checkpoint and spec do not fit.
    With a `seat` it is one rank's part of the decoder.
    """
    fit = check_fit(checkpoint, spec)
    config = shared_config(fit.config, seat.share) if seat else fit.config
    is_int8 = PRECISIONS[spec.precision].has_int8_weights
    parameters = _allocate(config, dtype, device, keeps_int8=keeps_int8 and is_int8)
    _fill(parameters, checkpoint, fit, on_progress, seat)
    if is_int8:
        quantize_linears_(parameters)
    if packs and can_pack(parameters):
        parameters = pack_linears(parameters)
    if seat is not None:
        parameters = share_parameters(parameters, fit.config, seat.share, seat.group)
    return Decoder(config, parameters, max_length=spec.build_seq)


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device, *, keeps_int8: bool) -> Parameters:
    try:
        return allocate_parameters(config, dtype, device, keeps_int8=keeps_int8)
    except RuntimeError as error:  # torch has no narrower class for memory that a CPU cannot give
        size = weight_bytes(config, dtype.itemsize, keeps_int8=keeps_int8) / 2**30
        raise ConfigError(f"the weights take {size:.1f} GiB, which is not there") from error


def _fill(
    parameters: Parameters,
    checkpoint: Checkpoint,
    fit: CheckedModel,
    on_progress: Callable[[float], None],
    seat: TorchRankContext | None,
) -> None:
    parts = parameter_parts(fit.config, seat.share) if seat else None
    for name, part in (parts or {}).items():
        if sum(map(len, part.rows)) < len(parameters.named[name]):
            parameters.named[name].zero_()  # what pads a vocabulary, and biases that rank 0 adds
    for place, values in placed_tensors(checkpoint, fit, on_progress, parts):
        _copy(parameters, place, torch.from_numpy(values))
        del values  # before the next one is read


def _copy(parameters: Parameters, place: WeightTarget, tensor: Tensor) -> None:
    # Every precision starts from bfloat16 weights, held in float32 or not.
    rounded = tensor if place.dtype == "float32" else tensor.to(torch.bfloat16)
    store_rows_(parameters, place.parameter, place.start, rounded)
