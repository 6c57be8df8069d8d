"""Chooses the code that computes steps in torch: our kernels if possible, else torch's operators, with the reason."""

from __future__ import annotations

import torch

from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import compute_capability, make_current, rules_for
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parallel import SharedParameters
from brlite.backends.torch.steps import EagerSteps, StepLimits, Steps
from brlite.config.options import TorchKernels
from brlite.errors import ConfigError
from brlite.files.quoting import first_line

MIN_CAPABILITY = (8, 0)  # the first with matrix units for bfloat16
MAX_HEAD_DIM = 256
EAGER_NOTE = "slower than this card can be: torch's own operators compute, not our kernels: {reason}"


def choose_steps(
    decoder: Decoder, cache: KVCache, kernels: TorchKernels, limits: StepLimits
) -> tuple[Steps, list[str]]:
    """The steps of a model, and notes for the operator. Kernels are compiled and graphs captured.

    Raises `ConfigError` if `kernels` is "triton" and our kernels cannot be used.
    """
    rules = rules_for(decoder.device)
    obstacle = find_obstacle(decoder, cache) if rules.has_triton else "they are for CUDA cards"
    if kernels == "triton" and obstacle is not None:
        raise ConfigError(f'engine.torch_kernels is "triton", but our kernels cannot be used: {obstacle}')
    if kernels == "eager" or obstacle is not None:
        notes = [EAGER_NOTE.format(reason=obstacle)] if rules.has_triton and kernels == "auto" else []
        return EagerSteps(decoder, cache, has_few_shapes=rules.has_few_shapes), notes
    from brlite.backends.torch.triton.steps import GRAPH_NOTE, TritonSteps

    with torch.inference_mode():
        steps = TritonSteps(decoder.config, decoder.parameters, cache, max_length=limits.length)
        if isinstance(decoder.parameters, SharedParameters):  # the ranks cannot communicate yet
            failure: str | None = "tensor_parallel is above 1"
        else:
            failure = steps.capture(limits.rows)
            steps.warm_up(limits)
    return steps, [GRAPH_NOTE.format(reason=failure)] if failure else []


def find_obstacle(decoder: Decoder, cache: KVCache) -> str | None:
    """Why our kernels cannot compute this model on its card; None if they can."""
    capability = compute_capability(decoder.device)
    if capability < MIN_CAPABILITY:
        return f"the card's compute capability is {'.'.join(map(str, capability))}, below 8.0"
    if decoder.dtype != torch.bfloat16 or cache.dtype == "float32":
        return "they compute in bfloat16, and engine.dtype is another"
    if decoder.config.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {decoder.config.head_dim}, above {MAX_HEAD_DIM}"
    try:
        from brlite.backends.torch.triton.rows import try_kernel

        make_current(decoder.device)
        try_kernel(decoder.device)
    except Exception as error:  # no build for this machine, no compiler, no driver: each raises other types
        return f"Triton cannot be used ({first_line(error)})"
    return None
