"""The checks of `card.py` that compute in this process: the card's own rates, and logits against float32 on the CPU.

Steps go through `TorchBackend` as they do when it serves. The reference is the same backend in the same precision, in
float32 on the CPU: what differs is the device and its arithmetic.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from cards import limits
from cards.finding import Finding
from measuring import tiny_models

from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.device import compute_dtype
from brlite.backends.torch.probe import ProbedModel, probe_device
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.load_plan import CARD_FORMS, LoadPlan
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.models.precision import PRECISIONS, PrecisionName
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import load_tokenizer

Array = npt.NDArray[np.float32]

# bfloat16 on a CPU comes to 0.9985 and 5.8 %, its worst: the default model in int8 with an int8 cache.
MIN_COSINE = 0.996
MAX_ERROR = 0.09  # of the logits' length
BLOCK_SIZE = 8
TINY_CONTEXT = 64
# Scattered blocks of three sequences, and how far each has come after each step: chunks, one token, both in one step.
TABLES = ((9, 2, 14, 5, 11), (0, 7), (3,))
ENDS = ((20, 7, 1), (33, 8, 2), (34, 9, 3), (35, 10, 4))
SHORT_CONFIGS = ("llama", "mistral-window", "qwen2", "qwen3", "smollm3", "phi3-partial-rope", "baichuan", "chatglm")
PROMPTS = (
    "The sea is",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return",
    "Once there was a ship of three masts, and her captain kept a log of every wind that he met on the way.",
)
MODEL_CONTEXT = 256


class Nearness(NamedTuple):
    """The least cosine of any row of logits, and the greatest error as a part of the row's length. NaN fails."""

    cosine: float
    error: float

    @property
    def is_near(self) -> bool:
        return self.cosine >= MIN_COSINE and self.error <= MAX_ERROR

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}, error {self.error:.3%}"


def machine(args: argparse.Namespace) -> Iterator[Finding]:
    device = torch.device(args.device)
    found = limits.describe(device)
    yield Finding("machine", True, ", ".join(f"{name} {value}" for name, value in found.items()), found)
    copied, multiplied = limits.copy_rate(device), limits.multiply_rate(device)
    rates = {"copy_bytes_per_second": copied, "bf16_flops": multiplied}
    yield Finding("rates", True, f"copy {copied / 1e9:.0f} GB/s, bf16 {multiplied / 1e12:.1f} TFLOP/s", rates)


def families(args: argparse.Namespace) -> Iterator[Finding]:
    """Each tiny model in one precision or in all; with `--short` each in the next one. A device that is lost ends the
    process, and so the rest.
    """
    names = SHORT_CONFIGS if args.short else tuple(tiny_models.TINY_CONFIGS)
    precisions = [args.precision] if args.precision else get_args(PrecisionName)
    pairs = (
        zip(itertools.cycle(precisions), names, strict=False) if args.short else itertools.product(precisions, names)
    )
    for precision, name in pairs:
        with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
            path = tiny_models.write_model(Path(scratch) / "model", tiny_models.TINY_CONFIGS[name])
            yield _guarded(f"{name} {precision}", lambda path=path, p=precision: _compare_tiny(path, p, args))


def codes(args: argparse.Namespace) -> Iterator[Finding]:
    """A tiny model whose matrices have codes of quantized files, in each form, with each kind of kernels."""
    device = torch.device(args.device)
    dtype = compute_dtype("bfloat16", device)
    names = [f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("qkv", "o", "gate_up", "down")]
    for form, kernels in itertools.product(sorted({*CARD_FORMS.values()}), ("auto", "eager")):
        precision = PRECISIONS["bf16"]._replace(weights="stored")
        like = ProbedModel(precision=precision, forms=dict.fromkeys(names, form), kernels=kernels)
        yield _guarded(f"{form} {kernels}", lambda like=like: (True, str(probe_device(device, dtype, like)), {}))


def model(args: argparse.Namespace) -> Iterator[Finding]:
    """Greedy answers of a real model, and how far its logits are while they are those of the same tokens."""
    for precision in [args.precision] if args.precision else get_args(PrecisionName):
        yield _guarded(precision, lambda p=precision: _compare_model(args.model, p, args))


def _guarded(subject: str, compare: Any) -> Finding:
    try:
        is_ok, text, values = compare()
        return Finding(subject, is_ok, text, values)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding(subject, False, reason)


def _compare_tiny(path: Path, precision: PrecisionName, args: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    spec = ModelSpec(name="tiny", path=str(path), precision=precision, build_seq=TINY_CONTEXT, build_batch=4)
    with (
        closing(_load(path, spec, "cpu", "float32")) as reference,
        closing(_load(path, spec, args.device, "auto")) as tested,
    ):
        nearness = _nearness(_tiny_logits(tested), _tiny_logits(reference))
        greedy, seeded = SamplingParams(temperature=0), SamplingParams(temperature=1.0)
        likeliest = _last_step_logits(tested).argmax(axis=1).tolist()
        is_greedy = _draws(tested, greedy) == likeliest
        draws = zip(_draws(tested, seeded), _draws(reference, seeded), strict=True)
        num_same = sum(ours == theirs for ours, theirs in draws)
    text = f"{nearness}{'' if is_greedy else '; a greedy draw is not the likeliest token'}"
    values = {**nearness._asdict(), "is_greedy": is_greedy, "same_seeded_draws": f"{num_same} of {len(TABLES)}"}
    return nearness.is_near and is_greedy, text, values


def _tiny_logits(backend: TorchBackend) -> Array:
    rows = []
    for begins, ends in zip(((0, 0, 0), *ENDS), ENDS, strict=False):
        rows.append(backend.last_logits(_tiny_seqs(begins, ends)))
    return np.concatenate(rows)


def _last_step_logits(backend: TorchBackend) -> Array:
    return backend.last_logits(_tiny_seqs(*ENDS[-2:]))


def _draws(backend: TorchBackend, params: SamplingParams) -> list[int | None]:
    results = backend.execute(Batch(_tiny_seqs(*ENDS[-2:], params))).seqs
    return [result.tokens[0].token_id if result.tokens else None for result in results]


def _tiny_seqs(begins: Sequence[int], ends: Sequence[int], params: SamplingParams | None = None) -> list[ScheduledSeq]:
    return [
        ScheduledSeq(
            seq_id=number,
            start=begin,
            token_ids=[
                3 + (7 * position + 31 * number) % (tiny_models.VOCAB_SIZE - 3) for position in range(begin, end)
            ],
            block_table=list(table),
            sampling=None if params is None else SamplingInput(params, number, end),
        )
        for number, (begin, end, table) in enumerate(zip(begins, ends, TABLES, strict=True))
    ]


def _compare_model(path: Path, precision: PrecisionName, args: argparse.Namespace) -> tuple[bool, str, dict[str, Any]]:
    spec = ModelSpec(name="model", path=str(path), precision=precision, build_seq=MODEL_CONTEXT, build_batch=4)
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    num_tokens = 8 if args.short else 48
    with closing(_load(path, spec, "cpu", "float32")) as reference:
        expected, expected_logits = _greedy(reference, prompts, num_tokens)
    with closing(_load(path, spec, args.device, "auto")) as tested:
        found, logits = _greedy(tested, prompts, num_tokens)
    same = [_num_same(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    # The logits after an answer's first difference are those of other tokens.
    pairs = [(row, step) for row, number in enumerate(same) for step in range(min(number + 1, num_tokens))]
    nearness = _nearness(
        np.stack([logits[step][row] for row, step in pairs]),
        np.stack([expected_logits[step][row] for row, step in pairs]),
    )
    text = f"{nearness}; greedy tokens equal to float32's: {', '.join(map(str, same))} of {num_tokens}"
    return nearness.is_near, text, {**nearness._asdict(), "same_tokens": same, "num_tokens": num_tokens}


def _greedy(backend: TorchBackend, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], list[Array]]:
    """Each prompt's likeliest tokens, and the logits [prompts, V] that each step gave."""
    per_row = math.ceil(MODEL_CONTEXT / BLOCK_SIZE)
    tables = [list(range(row * per_row, (row + 1) * per_row)) for row in range(len(prompts))]
    starts, inputs = [0] * len(prompts), prompts
    answers: list[list[int]] = [[] for _ in prompts]
    steps = []
    for _ in range(num_tokens):
        seqs = [ScheduledSeq(row, starts[row], inputs[row], tables[row]) for row in range(len(prompts))]
        logits = backend.last_logits(seqs)
        steps.append(logits)
        starts = [start + len(ids) for start, ids in zip(starts, inputs, strict=True)]
        inputs = [[int(token_id)] for token_id in logits.argmax(axis=1)]
        for answer, ids in zip(answers, inputs, strict=True):
            answer += ids
    return answers, steps


def _num_same(ours: list[int], theirs: list[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(ours))


def _nearness(found: Array, expected: Array) -> Nearness:
    ours, theirs = (torch.from_numpy(np.ascontiguousarray(each)).double() for each in (found, expected))
    cosines = torch.nn.functional.cosine_similarity(ours, theirs, dim=1)
    errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    return Nearness(float(cosines.amin()), float(errors.amax()))


def _load(path: Path, spec: ModelSpec, device: str, dtype: Literal["auto", "float32"]) -> TorchBackend:
    engine = EngineConfig(backend="torch", device=device, dtype=dtype, block_size=BLOCK_SIZE)
    threads = max(1, len(os.sched_getaffinity(0)) // 8)
    checkpoint = open_checkpoint(path)
    checked = check_model(checkpoint, spec)
    plan = LoadPlan(checkpoint=checkpoint, model=checked, spec=spec, engine=engine, num_threads=threads)
    return TorchBackend.load(plan)
