"""Checks that a device computes correctly: compares a tiny model on it with the same model in float32 on the CPU.

The tiny model has the structure of the served one (its heads, biases, rotary positions, windows) and seeded weights.
Operators that ran on the CPU instead are found by their warnings. torch's plugins warn once for each operator and
process: an operator without a warning, or with an earlier one, is not found.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.sampling.reference import sample, token_logprobs
from brlite.backends.torch.candidates import TorchRows
from brlite.backends.torch.choose_steps import choose_steps
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import describe_device, rules_for
from brlite.backends.torch.draws import draw
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import NO_FORMS, allocate_parameters
from brlite.backends.torch.quantize import quantize_linears_, random_codes, store_codes_, store_rows_
from brlite.backends.torch.steps import LastDraws, StepLimits
from brlite.config.options import TorchKernels
from brlite.engine.backend import SamplingInput, ScheduledSeq, Undrawn
from brlite.errors import BrliteError, ConfigError
from brlite.models.config import KVDtype, ModelConfig, RopeConfig
from brlite.models.network import list_parameters
from brlite.models.precision import PRECISIONS, MatrixForm, Precision
from brlite.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MIN_COSINE = 0.999
MAX_ERROR = 0.05  # relative to the logits' norm: a cosine does not show that all of them are too large
VOCAB_SIZE = 512  # more than a shortlist holds, so that the sampler's path for whole rows is tested too
HIDDEN_SIZE = 64
MAX_LENGTH = 32
BLOCK_SIZE = 4
# The tokens of two sequences in each step: a prompt in two chunks beside another one; a short run as of drafts beside
# one token, which is replayed from a graph on a card; one token of both.
STEPS = (((0, 9), (0, 5)), ((9, 13), (5, 6)), ((13, 15), (6, 7)), ((15, 16), (7, 8)))
DRAWS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_k=300),
    SamplingParams(temperature=1.0),
)
NUM_EXACT_DRAWS = 2  # the other draws sum numbers, in an order that depends on the device

PLAIN_CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=2 * HIDDEN_SIZE,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=MAX_LENGTH,
    rope=RopeConfig(rotary_dim=64),
)


class ProbedModel(NamedTuple):
    """What a tiny model has of the model that will be served: its structure and its types.

    `forms` are those of its matrices on a card; `kernels` is `engine.torch_kernels`.
    """

    config: ModelConfig = PLAIN_CONFIG
    precision: Precision = PRECISIONS["bf16"]
    kv_dtype: KVDtype = "bfloat16"
    forms: Mapping[str, MatrixForm] = NO_FORMS
    kernels: TorchKernels = "auto"


PLAIN_MODEL = ProbedModel()

FALLBACK = re.compile(r"fall\w*[ -]?back.*\bCPU\b", re.IGNORECASE | re.DOTALL)
OPERATOR = re.compile(r"operator\W+([\w:.]+)", re.IGNORECASE)


class ProbeReport(NamedTuple):
    """The worst row's cosine and error of the device's logits, and the operators that ran on the CPU instead."""

    cosine: float
    error: float
    on_host: tuple[str, ...]

    def __str__(self) -> str:
        on_host = f"; on the CPU instead: {', '.join(self.on_host)}" if self.on_host else ""
        return f"cosine {self.cosine:.6f}, error {self.error:.2%} against float32 on the CPU{on_host}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the operator."""
        return (f"slow: torch runs {', '.join(self.on_host)} on the CPU, not on the device",) if self.on_host else ()


def probe_device(device: torch.device, dtype: torch.dtype, model: ProbedModel = PLAIN_MODEL) -> ProbeReport:
    """Compute a tiny model like `model` on `device`. Raises `ConfigError` if the results are wrong."""
    began = time.monotonic()
    model = model._replace(config=shrunk(model.config))
    expected = _compute(model._replace(kernels="eager"), torch.device("cpu"), torch.float32)
    with _fallbacks() as on_host:
        try:
            found = _compute(model, device, dtype)
            is_drawn_right = not rules_for(device).samples or draws_right(found, ahead=rules_for(device).runs_ahead)
            found = found.cpu()
        except BrliteError:
            raise
        except Exception as error:  # operators, drivers, memory and Triton have classes of their own
            reason = " ".join(f"{describe_device(device)} cannot compute a tiny model: {error}".split())[:300]
            if rules_for(device).has_triton and model.kernels != "eager":
                reason += '; engine.torch_kernels = "eager" computes without our kernels'
            raise ConfigError(reason) from error
    # The least cosine of any row and the greatest error relative to the row's norm. NaN if there is one.
    cosines = functional.cosine_similarity(found, expected, dim=1)
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    report = ProbeReport(float(cosines.amin()), float(errors.amax()), tuple(on_host))
    wrong = ""
    if not (report.cosine >= MIN_COSINE and report.error <= MAX_ERROR):  # false for NaN
        wrong = f"a tiny model has {report}; allowed are a cosine from {MIN_COSINE} and an error up to {MAX_ERROR:.0%}"
    elif not is_drawn_right:
        wrong = "from the same logits it draws other tokens than the CPU does"
    if wrong:
        raise ConfigError(f"{describe_device(device)} computes nonsense; engine.device = cpu does without it: {wrong}")
    logger.info("%s was probed in %.2f s: %s", describe_device(device), time.monotonic() - began, report)
    return report


def shrunk(config: ModelConfig) -> ModelConfig:
    """A model of two layers with the features of `config`: a layer of each kind, heads of the same size."""
    num_kv_heads = min(2, config.num_kv_heads)
    is_mixed = 0 < len(config.sliding_layers) < config.num_layers
    return msgspec.structs.replace(
        config,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_layers=2,
        num_heads=num_kv_heads * config.group_size,
        num_kv_heads=num_kv_heads,
        sliding_window=min(config.sliding_window, BLOCK_SIZE + 1) if config.sliding_window else None,
        sliding_layers=(0,) if is_mixed else (0, 1)[: 2 * len(config.sliding_layers)],
        nope_layers=(1,) if config.nope_layers else (),
    )


def _compute(model: ProbedModel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The logits [R, V] of all rows of all steps, on the device that computed them."""
    num_blocks = MAX_LENGTH // BLOCK_SIZE
    cache = KVCache(model.config, num_blocks=2 * num_blocks, block_size=BLOCK_SIZE, dtype=model.kv_dtype, device=device)
    decoder = _decoder(model, device, dtype)
    steps, _ = choose_steps(decoder, cache, model.kernels, StepLimits(4, BLOCK_SIZE, MAX_LENGTH))
    tables = (range(num_blocks), range(num_blocks, 2 * num_blocks))
    logits: list[Tensor] = []
    with torch.inference_mode():
        for step in STEPS:
            runs = [
                ScheduledSeq(seq_id, start, list(range(3 + start, 3 + end)), list(table))
                for seq_id, ((start, end), table) in enumerate(zip(step, tables, strict=True))
            ]
            last = None
            if step == STEPS[-1] and rules_for(device).runs_ahead:  # it takes its tokens from the previous step's draws
                last = LastDraws(torch.tensor([run.token_ids[0] for run in reversed(runs)], device=device), (1, 0))
                runs = [msgspec.structs.replace(run, token_ids=[0]) for run in runs]
            computed = steps.forward(runs, last)
            rows = [
                first + row
                for first, run in zip(computed.first_rows, runs, strict=True)
                for row in range(len(run.token_ids))
            ]
            logits.append(steps.logits(computed, rows).clone())
        return torch.cat(logits)


def _decoder(model: ProbedModel, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The tiny model. A device that does not keep int8 holds it dequantized; codes are kept on each, the host too."""
    config, is_int8 = model.config, model.precision.weights == "int8"
    is_dequantized = is_int8 and not rules_for(device).keeps_int8
    forms = {name: form for name, form in model.forms.items() if name in list_parameters(config) and not is_dequantized}
    parameters = allocate_parameters(config, dtype, device, forms)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list_parameters(config).items():
        if forms.get(name, "int8") != "int8":
            store_codes_(parameters, name, 0, random_codes(forms[name], parameter.shape, generator))
            continue
        values = torch.randn(parameter.shape, generator=generator)
        scaled = 1 + values / 10 if parameter.precision == "float32" else values / parameter.shape[-1] ** 0.5
        store_rows_(parameters, name, 0, scaled.bfloat16())
    if is_int8:
        quantize_linears_(parameters)
    return Decoder(config, parameters, max_length=MAX_LENGTH)


def draws_right(logits: Tensor, *, ahead: bool) -> bool:
    """Whether draws from `logits` on their device give the same tokens as on the host.

    Tests the sampler, and with `ahead` also the draws that do not wait for the device. Draws of the sampler that use
    sums must only give a token: a device may add in another order.
    """
    found: list[list[list[int]]] = []
    with torch.inference_mode():
        for rows in (logits, logits.cpu()):
            token_logprobs(TorchRows(rows), [0] * len(rows), 1)
            draws, exact = list[list[int]](), list[list[int]]()
            for params in DRAWS:
                inputs = [SamplingInput(params, seed, 0) for seed in range(len(rows))]
                drawn = sample(TorchRows(rows.clone()), inputs)
                draws.append([-1 if isinstance(token, Undrawn) else token.token_id for token in drawn])
                exact.append(draw(rows, inputs).tolist() if ahead else [])
            found.append([*exact, *draws[:NUM_EXACT_DRAWS], [min(map(min, draws)) >= 0]])
    return found[0] == found[1] and found[0][-1] == [True]


@contextmanager
def _fallbacks() -> Iterator[list[str]]:
    """Yields a list that is filled at exit with the operators that torch warned of. Other warnings are issued again."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        if not FALLBACK.search(str(warning.message)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            continue
        named = OPERATOR.search(str(warning.message))
        operator = named.group(1) if named else "an operator"
        if operator not in found:
            found.append(operator)
