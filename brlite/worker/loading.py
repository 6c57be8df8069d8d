"""Fills a decoder's parameters from a checkpoint, tensor by tensor. Knows no file formats and no requests.

All names and shapes are checked before any data is read (`fit.py`); memory is the model plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from brlite.checkpoint import Checkpoint
from brlite.config import ModelSpec
from brlite.errors import ConfigError
from brlite.models.config import ModelConfig, weight_bytes
from brlite.models.decoder import Decoder
from brlite.models.family import Place
from brlite.models.packing import can_pack, pack_linears
from brlite.models.parameters import Parameters, allocate_parameters
from brlite.models.quantize import quantize_linears_
from brlite.worker.fit import Fit, check_fit
from brlite.worker.placing import placed_tensors


def load_model(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None],
    *,
    packs: bool = False,
) -> Decoder:
    """The decoder that `checkpoint` holds, in `spec`'s precision, computing in `dtype` on `device`.

    `packs` allows matrices in oneDNN's layout; `on_progress` gets the fraction that is loaded. Raises `ModelError` or
    `ConfigError` before any weight is read if checkpoint and spec do not fit together.
    """
    fit = check_fit(checkpoint, spec)
    parameters = _allocate(fit.config, dtype, device)
    _fill(parameters, checkpoint, fit, on_progress)
    if spec.precision != "bf16":
        quantize_linears_(parameters)
    if packs and can_pack(parameters):
        parameters = pack_linears(parameters)
    return Decoder(fit.config, parameters, max_length=spec.build_seq)


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Parameters:
    try:
        return allocate_parameters(config, dtype, device)
    except RuntimeError as error:  # torch has no narrower class for memory that a CPU cannot give
        size = weight_bytes(config, dtype.itemsize) / 2**30
        raise ConfigError(f"the weights take {size:.1f} GiB, which is not there") from error


def _fill(parameters: Parameters, checkpoint: Checkpoint, fit: Fit, on_progress: Callable[[float], None]) -> None:
    for place, values in placed_tensors(checkpoint, fit, on_progress):
        _copy(parameters.named[place.parameter], place, torch.from_numpy(values))
        del values  # before the next one is read


def _copy(parameter: Tensor, place: Place, tensor: Tensor) -> None:
    # Every precision starts from bfloat16 weights, held in float32 or not; norms keep all their digits.
    rounded = tensor if place.parameter.endswith("norm") else tensor.to(torch.bfloat16)
    parameter[place.start : place.start + place.shape[0]].copy_(rounded)
