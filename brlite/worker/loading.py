"""Fills a decoder's parameters from a checkpoint, tensor by tensor. Knows no file formats and no requests.

All names and shapes are checked before any data is read; memory is the model plus one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from brlite.checkpoint import Checkpoint
from brlite.config import ModelSpec
from brlite.errors import ConfigError, ModelError
from brlite.models import find_family
from brlite.models.config import ModelConfig, weight_bytes
from brlite.models.decoder import Decoder
from brlite.models.family import Family, Place
from brlite.models.parameters import Parameters, allocate_parameters
from brlite.models.quantize import quantize_linears_

MAX_NAMED = 3  # how many tensors a message lists before it only counts them


def load_model(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> Decoder:
    """The decoder that `checkpoint` holds, in `spec`'s precision, computing in `dtype` on `device`.

    `on_progress` gets the fraction that is loaded. Raises `ModelError` or `ConfigError` before any weight is read if
    checkpoint and spec do not fit together.
    """
    family = find_family(checkpoint.config)
    config = family.read_config(checkpoint.config)
    check_spec(spec, config)
    places = family.weight_places(config)
    ignored = _check_tensors(checkpoint, places, family, config)

    parameters = _allocate(config, dtype, device)
    _fill(parameters, checkpoint, places, ignored, on_progress)
    if spec.precision != "bf16":
        quantize_linears_(parameters)
    return Decoder(config, parameters, max_length=spec.build_seq)


def check_spec(spec: ModelSpec, config: ModelConfig) -> None:
    """Raise `ConfigError` where `spec` promises what the model cannot do."""
    if spec.build_seq > config.max_context:
        raise ConfigError(f"build_seq is {spec.build_seq}; {spec.name} allows at most {config.max_context} positions")
    if spec.vocab_size is not None and spec.vocab_size != config.vocab_size:
        raise ConfigError(f"vocab_size is {spec.vocab_size}; {spec.name} has {config.vocab_size} embedding rows")


def _check_tensors(
    checkpoint: Checkpoint, places: Mapping[str, Place], family: Family, config: ModelConfig
) -> set[str]:
    """The names of the checkpoint's tensors that the decoder has no use for, all else being as it must be."""
    path, shapes = checkpoint.path, checkpoint.shapes()
    missing = [name for name in places if name not in shapes]
    if missing:
        raise ModelError(f"{path}: {_listed(missing)} missing")
    for name, place in places.items():
        if tuple(shapes[name]) != place.shape:
            raise ModelError(f"{path}: {name} has shape {list(shapes[name])}; the config wants {list(place.shape)}")
    extra = {name for name in shapes if name not in places}
    unexpected = sorted(name for name in extra if not _is_ignorable(name, family, config))
    if unexpected:
        raise ModelError(f"{path}: {_listed(unexpected)} not expected in a {family.model_type} model")
    return extra


def _is_ignorable(name: str, family: Family, config: ModelConfig) -> bool:
    is_tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return is_tied_head or name.endswith(family.ignored_suffixes)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Parameters:
    try:
        return allocate_parameters(config, dtype, device)
    except RuntimeError as error:  # torch has no narrower class for memory that a CPU cannot give
        size = weight_bytes(config, dtype.itemsize) / 2**30
        raise ConfigError(f"the weights take {size:.1f} GiB, which is not there") from error


def _fill(
    parameters: Parameters,
    checkpoint: Checkpoint,
    places: Mapping[str, Place],
    ignored: set[str],
    on_progress: Callable[[float], None],
) -> None:
    total = sum(math.prod(place.shape) for place in places.values())
    num_loaded = 0
    for name, tensor in checkpoint.tensors():
        if name in ignored:
            continue
        if not tensor.is_floating_point():
            raise ModelError(f"{checkpoint.path}: {name} holds {tensor.dtype}; floating-point weights are wanted")
        place = places[name]
        _copy(parameters.named[place.parameter], place, tensor)
        num_loaded += tensor.numel()
        on_progress(num_loaded / total)


def _copy(parameter: Tensor, place: Place, tensor: Tensor) -> None:
    # Every precision starts from bfloat16 weights, held in float32 or not; norms keep all their digits.
    rounded = tensor if place.parameter.endswith("norm") else tensor.to(torch.bfloat16)
    parameter[place.start : place.start + place.shape[0]].copy_(rounded)
