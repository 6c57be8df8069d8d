"""Do ranks pay? Steps of one process with all threads, and of processes that share the threads, in turns.

    python bench/parallel.py                             # the default model at int8, 1 and 8 sequences, tp 1 and 2
    python bench/parallel.py --backend torch --rounds 3  # ranks that meet by torch.distributed
    python bench/parallel.py --short                     # a few steps: for CI

Every process has what the config gives it: of N threads, a rank of two has N / 2. A round takes each in turn, so that
what else the machine does is in all of them; the rate is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
from measuring import subject
from msgspec import Struct

from brlite.engine.backend import Backend, Batch, SamplingInput, ScheduledSeq
from brlite.errors import BrliteError
from brlite.llm import build_engine
from brlite.sampling_params import SamplingParams

CONTEXT = 256
WARM_UP_STEPS = 3
GOAL = 0.9  # of the rate of one process with all threads
GREEDY = SamplingParams(temperature=0)
SHORT = {"rounds": 1, "steps": 4, "rows": [8]}


class Rate(Struct, frozen=True, kw_only=True):
    """Tokens a second of some sequences on some ranks, a median over rounds, and against one process."""

    ranks: int
    rows: int
    tokens_per_second: float
    share: float


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 if the model could not be had. A missed goal is told of, no more."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            backends = {size: _load(args, size, stack) for size in (1, *args.ranks)}
            seconds = _measure(backends, args)
    except BrliteError as error:
        print(f"parallel: error: {error}", file=sys.stderr)
        return 2
    rates = list(_rates(seconds, args))
    print("\n".join(_render(rates, args)))
    if args.json is not None:
        kept = ("model", "precision", "backend", "threads", "rows", "rounds", "steps")
        settings = {name: getattr(args, name) for name in kept}
        args.json.write_text(json.dumps({"settings": settings, "rates": msgspec.to_builtins(rates)}, indent=1) + "\n")
    return 0


def _load(args: argparse.Namespace, size: int, stack: ExitStack) -> Backend:
    tables = subject.chosen(args)
    fields = {
        "tensor_parallel": size,
        "devices": list(range(size)),
        "build_seq": CONTEXT,
        "build_batch": max(args.rows),
    }
    backend = build_engine(subject.engine_config(subject.find_model(args.model), tables, **fields)).backend
    stack.callback(backend.close)
    print(f"tp {size}: {backend.info.name}, {backend.info.device}", file=sys.stderr)
    return backend


def _measure(backends: dict[int, Backend], args: argparse.Namespace) -> dict[tuple[int, int], list[float]]:
    """Seconds of a step by ranks and rows, one of each round."""
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(args.rounds):
        for rows in args.rows:
            for size, backend in backends.items():
                seconds.setdefault((size, rows), []).append(_time_steps(backend, rows, args.steps))
    return seconds


def _time_steps(backend: Backend, rows: int, steps: int) -> float:
    first = CONTEXT - steps - WARM_UP_STEPS
    for position in range(first, first + WARM_UP_STEPS):
        backend.execute(_batch(backend, rows, position))
    start = time.perf_counter()
    for position in range(first + WARM_UP_STEPS, CONTEXT):
        backend.execute(_batch(backend, rows, position))
    return (time.perf_counter() - start) / steps


def _batch(backend: Backend, rows: int, position: int) -> Batch:
    """One token of each sequence. What stands before it in the cache is whatever is there."""
    num_blocks = -(-CONTEXT // backend.info.block_size)
    sampling = SamplingInput(GREEDY, 0, position)
    tables = [list(range(row * num_blocks, (row + 1) * num_blocks)) for row in range(rows)]
    return Batch([ScheduledSeq(row, position, [3 + row], tables[row], sampling) for row in range(rows)])


def _rates(seconds: dict[tuple[int, int], list[float]], args: argparse.Namespace) -> list[Rate]:
    rates = []
    for (size, rows), found in seconds.items():
        shares = [alone / each for alone, each in zip(seconds[1, rows], found, strict=True)]
        rate = rows / median(found)
        rates.append(Rate(ranks=size, rows=rows, tokens_per_second=rate, share=median(shares)))
    return sorted(rates, key=lambda rate: (rate.rows, rate.ranks))


def _render(rates: Sequence[Rate], args: argparse.Namespace) -> list[str]:
    lines = [f"decode steps, medians over {args.rounds} rounds of {args.steps} steps", ""]
    lines += ["| sequences | ranks | tokens/s | of one process |", "|---|---|---|---|"]
    lines += [f"| {rate.rows} | {rate.ranks} | {rate.tokens_per_second:.1f} | {rate.share:.2f} |" for rate in rates]
    judged = [rate for rate in rates if rate.ranks == 2 and rate.rows == 8]
    lines += [f"\ngoal, tp 2 at 8 sequences ≥ {GOAL}: {'met' if rate.share >= GOAL else 'MISSED'}" for rate in judged]
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.set_defaults(precision="a_bf16_w_int8")
    parser.add_argument("--ranks", type=_numbers, default=[2], metavar="N,…", help="(2)")
    parser.add_argument("--rows", type=_numbers, default=[1, 8], metavar="N,…", help="sequences in a step (1,8)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="(15)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="of a round (30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates to FILE")
    parser.add_argument("--short", action="store_true", help="one round of a few steps")
    return subject.parse(parser, argv, SHORT)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
