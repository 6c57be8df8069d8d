"""How long drawing one step's tokens takes, against a sampler that sorts the whole vocabulary.

    python bench/sampling.py            # 32 rows, a vocabulary of 152,064: about a minute
    python bench/sampling.py --short    # small sizes: a few seconds, for CI
    python bench/sampling.py --device cuda    # logits on a card, where only candidates leave it

Both samplers take turns in one run, so that a busy machine slows both; a case is judged by the median of its rounds.
The sorting sampler follows the order of operations of vLLM 0.4 and gets its penalties for free.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from brlite.backends.torch.candidates import TorchSampler
from brlite.engine.backend import SamplingInput
from brlite.sampling_params import SamplingParams

NUM_COUNTED_TOKENS = 512
MANUAL: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 10}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("peaked", {"temperature": 0.0}),
    "the manual's: top_k 10, top_p 0.9": ("peaked", MANUAL),
    "the same with penalties": ("peaked", {**MANUAL, "repetition_penalty": 1.1, "frequency_penalty": 0.2}),
    "the same with 5 logprobs": ("peaked", {**MANUAL, "logprobs": 5}),
    "top_p 0.9": ("peaked", {"top_p": 0.9}),
    "min_p 0.05": ("peaked", {"min_p": 0.05}),
    "temperature 1 alone": ("peaked", {}),
    "flat logits, top_p 0.9": ("flat", {"top_p": 0.9}),
    "flat logits, top_k 1000": ("flat", {"top_k": 1000}),
}


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logits = {name: values.to(args.device) for name, values in make_logits(args.rows, args.vocab).items()}
    sampler = TorchSampler(args.vocab)
    print(f"{args.rows} rows, vocabulary {args.vocab:,}, {torch.get_num_threads()} threads, {args.rounds} rounds; ms")
    print(f"{'':36}{'brlite':>10}{'best':>10}{'full sort':>12}{'best':>10}{'ratio':>8}")
    for name, (shape, params) in CASES.items():
        ours, theirs = measure(sampler, logits[shape], make_inputs(args.rows, args.vocab, params), args.rounds)
        ratio = median(theirs) / median(ours)
        print(f"{name:36}{median(ours):10.2f}{min(ours):10.2f}{median(theirs):12.2f}{min(theirs):10.2f}{ratio:8.1f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="sequences in the step (default 32)")
    parser.add_argument("--vocab", type=int, help="tokens in the vocabulary (default 152064)")
    parser.add_argument("--rounds", type=int, help="turns of each sampler (default 7)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", help="where the logits are (default cpu)")
    parser.add_argument("--short", action="store_true", help="8 rows, a vocabulary of 32,000, 3 rounds")
    args = parser.parse_args()
    defaults = {"rows": 8, "vocab": 32_000, "rounds": 3} if args.short else {"rows": 32, "vocab": 152_064, "rounds": 7}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_logits(num_rows: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Flat noise, and the same with forty likely tokens per row that hold nearly all of the probability."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(num_rows, vocab_size, generator=generator)
    peaked = flat * 2
    likely = torch.rand(num_rows, vocab_size, generator=generator).topk(40).indices
    peaked.scatter_(1, likely, torch.linspace(22, 8, 40).repeat(num_rows, 1))
    return {"flat": flat, "peaked": peaked}


def make_inputs(num_rows: int, vocab_size: int, params: dict[str, Any]) -> list[SamplingInput]:
    rng = np.random.default_rng(0)
    counted = [rng.choice(vocab_size, NUM_COUNTED_TOKENS, replace=False).astype(np.int32) for _ in range(num_rows)]
    counts = np.ones(NUM_COUNTED_TOKENS, dtype=np.int32).tobytes()
    return [
        SamplingInput(
            params=SamplingParams(**params),
            seed=row,
            position=NUM_COUNTED_TOKENS,
            counted_token_ids=token_ids.tobytes(),
            output_counts=counts,
        )
        for row, token_ids in enumerate(counted)
    ]


def measure(
    sampler: TorchSampler, logits: torch.Tensor, inputs: list[SamplingInput], rounds: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each round of brlite's sampler and of the sorting one, after a round that is not counted."""
    ours, theirs = [], []
    for _ in range(rounds + 1):
        ours.append(milliseconds(lambda scratch: sampler.sample(scratch, inputs, ()), logits.clone()))
        theirs.append(milliseconds(lambda scratch: sample_by_sorting(scratch, inputs[0].params).cpu(), logits.clone()))
    return ours[1:], theirs[1:]


def milliseconds(function: Callable[[torch.Tensor], object], logits: torch.Tensor) -> float:
    start = time.perf_counter()
    function(logits)
    return (time.perf_counter() - start) * 1e3


def sample_by_sorting(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The obvious way: sort every row, mask what top-k, top-p and min-p exclude, draw with torch's generator."""
    if params.is_greedy:
        return logits.argmax(dim=1)
    values, token_ids = (logits / params.temperature).sort(dim=1, descending=True)
    if params.top_k != -1:
        values[:, params.top_k :] = -torch.inf
    probabilities = values.softmax(dim=1)
    is_excluded = probabilities.cumsum(dim=1) - probabilities >= params.top_p
    is_excluded |= probabilities < params.min_p * probabilities[:, :1]
    chosen = probabilities.masked_fill_(is_excluded, 0.0).multinomial(1)
    return token_ids.gather(1, chosen)


if __name__ == "__main__":
    main()
