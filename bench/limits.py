"""What this machine can do at best, and how near a model's steps come to it.

    python bench/limits.py                                      # the default model, at int8: about two minutes
    python bench/limits.py --model FOLDER --rows 1,8,32         # another one
    python bench/limits.py --only-limits                        # memory and multiplications alone
    python bench/limits.py --cpu-time                           # one thread, its processor time: beside other programs
    python bench/limits.py --prefill 128 --positions 0,8064     # 128 tokens of a prompt, the first at these positions
    BRLITE_ISA=avx2 python bench/limits.py                      # the kernels and the limits of a lesser processor
    python bench/limits.py --short                              # a few steps: for CI

A step's bytes are the weights and the keys and values that it must read; its multiply-adds are those of all matrices
and of attention. Both are counted, not measured: a share is of useful work, and a step's time is all that is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import msgspec
from measuring import machine_limits, steps, subject
from measuring.venvs import ToolError
from msgspec import Struct

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.errors import BrliteError
from brlite.llm import build_engine
from brlite.models.config import ModelConfig
from brlite.process.machine import physical_cores

LIMIT_NAMES = {
    "read": "memory read, GB/s",
    "fp32": "float32 multiply-adds, G/s",
    "int16": "int16 multiply-adds, G/s",
    "bf16": "bfloat16 multiply-adds, G/s",
    "int8": "int8 multiply-adds, G/s",
}
# By precision; for all others activations are int16.
MULTIPLIES = {"bf16": "bf16", "a_int8_w_int8": "int8", "a_int8_w_int6": "int8", "a_int8_w_int4": "int8"}
SHORT = {"seconds": 0.1, "rows": [1, 4], "contexts": [64], "prefill": [16], "rounds": 1}

Limits = Mapping[str, Mapping[int, float]]


class Timed(Struct, frozen=True, kw_only=True):
    """One kind of step: seconds are medians over all rounds; shares are of the machine's limits with all threads."""

    name: str
    rows: int
    num_tokens: int
    context: int
    seconds: float
    best_seconds: float
    tokens_per_second: float
    bytes_per_second: float
    memory_share: float
    multiply_adds_per_second: float
    multiply_share: float


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 if the model or a compiler could not be had."""
    args = _arguments(argv)
    try:
        measure = machine_limits.load_measure()
        limits = _measure_limits(measure, args)
        timed = [] if args.only_limits else _measure_steps(args, limits, measure)
    except (BrliteError, ToolError) as error:
        print(f"limits: error: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        result = {"limits": limits, "steps": msgspec.to_builtins(timed), "settings": _settings(args)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _measure_limits(measure: machine_limits.Measure, args: argparse.Namespace) -> dict[str, dict[int, float]]:
    counts = sorted({1, args.threads or physical_cores()})
    limits = {
        kind: {threads: measure(kind, threads, args.seconds) for threads in counts} for kind in machine_limits.KINDS
    }
    print("| limit | " + " | ".join(f"{threads} threads" for threads in counts) + " |")
    print("|---|" + "---:|" * len(counts))
    for kind, rates in limits.items():
        print(f"| {LIMIT_NAMES[kind]} | " + " | ".join(f"{rate / 1e9:.1f}" for rate in rates.values()) + " |")
    return limits


def _measure_steps(args: argparse.Namespace, limits: Limits, measure: machine_limits.Measure) -> list[Timed]:
    model = subject.find_model(args.model)
    wanted = [steps.decode_step(rows, context) for context in args.contexts for rows in args.rows]
    wanted += [steps.prefill_step(num_tokens, start) for start in args.positions for num_tokens in args.prefill]
    config = _engine_config(args, model, wanted)
    with closing(build_engine(config).backend) as backend:
        info = backend.info
        print(f"\n{model.name}, {info.name}, {info.precision}, {info.dtype}, KV {info.kv_dtype}", flush=True)
        steps.fill_cache(backend, wanted)
        batches = steps.make_batches(wanted, info)
        seconds: list[list[float]] = [[] for _ in wanted]
        for batch in batches:
            backend.execute(batch)  # not counted: what is made once for a shape is made here
        for _ in range(args.rounds):
            for taken, batch in zip(seconds, batches, strict=True):
                taken += steps.time_step(backend, batch, time.thread_time if args.cpu_time else time.perf_counter)
    # The best of before and after: a neighbour may have been busy at either time.
    multiply = MULTIPLIES.get(info.precision, "int16")
    peaks = {kind: max(_of_all(limits[kind]), _again(measure, kind, args)) for kind in ("read", multiply)}
    shapes = _model_config(model, config.model[0])
    timed = [
        _timed(step, taken, steps.step_cost(step, info, shapes), peaks["read"], peaks[multiply])
        for step, taken in zip(wanted, seconds, strict=True)
    ]
    print(_render(timed, peaks, multiply))
    return timed


def _engine_config(args: argparse.Namespace, model: subject.Model, wanted: Sequence[steps.Step]) -> Config:
    tables = subject.chosen(args)
    tables["model"].setdefault("precision", "a_bf16_w_int8")
    tables["engine"]["max_num_batched_tokens"] = max(step.rows * step.num_tokens for step in wanted)
    tables["engine"]["speculation"] = "off"
    block_size = EngineConfig().block_size
    return subject.engine_config(
        model,
        tables,
        build_seq=max(step.context for step in wanted),
        build_batch=max(step.rows for step in wanted),
        num_blocks=steps.num_blocks(wanted, block_size),
    )


def _model_config(model: subject.Model, spec: ModelSpec) -> ModelConfig:
    checkpoint = open_checkpoint(model.path)
    return check_model(checkpoint, spec).config


def _of_all(rates: Mapping[int, float]) -> float:
    return rates[max(rates)]


def _again(measure: machine_limits.Measure, kind: str, args: argparse.Namespace) -> float:
    return measure(kind, args.threads or physical_cores(), args.seconds)


def _timed(step: steps.Step, taken: Sequence[float], cost: steps.Cost, read: float, multiply: float) -> Timed:
    seconds = median(taken)
    return Timed(
        name=step.name,
        rows=step.rows,
        num_tokens=step.num_tokens,
        context=step.context,
        seconds=seconds,
        best_seconds=min(taken),
        tokens_per_second=step.rows * step.num_tokens / seconds,
        bytes_per_second=cost.bytes_read / seconds,
        memory_share=cost.bytes_read / seconds / read,
        multiply_adds_per_second=cost.multiply_adds / seconds,
        multiply_share=cost.multiply_adds / seconds / multiply,
    )


def _render(timed: Sequence[Timed], peaks: Mapping[str, float], multiply: str) -> str:
    lines = [
        f"shares of {peaks['read'] / 1e9:.1f} GB/s and of {peaks[multiply] / 1e9:.1f} G {multiply} multiply-adds/s",
        "",
        "| step | ms | best ms | tokens/s | GB/s | of memory | G multiply-adds/s | of multiplying |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {each.name} | {each.seconds * 1e3:.2f} | {each.best_seconds * 1e3:.2f} | {each.tokens_per_second:.1f} "
        f"| {each.bytes_per_second / 1e9:.1f} | {each.memory_share:.0%} "
        f"| {each.multiply_adds_per_second / 1e9:.1f} | {each.multiply_share:.0%} |"
        for each in timed
    ]
    return "\n".join((*lines, *_context_lines(timed)))


def _context_lines(timed: Sequence[Timed]) -> list[str]:
    """What a long context costs, for each number of rows that was timed with several."""
    lines = []
    for rows in dict.fromkeys(each.rows for each in timed if each.num_tokens == 1):
        own = sorted((each for each in timed if (each.rows, each.num_tokens) == (rows, 1)), key=lambda t: t.context)
        short, long = own[0], own[-1]
        if short is not long:
            ratio = long.seconds / short.seconds
            lines.append(f"- {rows} rows: a context of {long.context} takes {ratio:.2f}x a step of {short.context}")
    return ["", *lines] if lines else []


def _settings(args: argparse.Namespace) -> dict[str, object]:
    kept = (
        "model",
        "precision",
        "backend",
        "threads",
        "cpu_time",
        "rows",
        "contexts",
        "prefill",
        "positions",
        "rounds",
        "seconds",
    )
    return {name: getattr(args, name) for name in kept} | {"isa": os.environ.get("BRLITE_ISA", "")}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.add_argument("--rows", type=_counts, default=[1, 4, 8, 16, 32, 64], metavar="LIST", help="of decode steps")
    parser.add_argument("--contexts", type=_counts, default=[64, 512], metavar="LIST", help="of decode steps (64,512)")
    parser.add_argument("--prefill", type=_counts, default=[128, 512], metavar="LIST", help="prompt tokens (128,512)")
    parser.add_argument("--positions", type=_positions, default=[0], metavar="LIST", help="of their first token (0)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each step (5)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each limit (1)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, which others do not share")
    parser.add_argument("--only-limits", action="store_true", help="no model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--short", action="store_true", help="a few steps, for CI")
    args = subject.parse(parser, argv, SHORT)
    if args.cpu_time:
        if args.threads > 1:
            parser.error("--cpu-time is of one thread: leave --threads out")
        args.threads = 1
    return args


def _counts(text: str, smallest: int = 1) -> list[int]:
    counts = [int(word) for word in text.split(",") if word.strip()]
    if not counts or min(counts) < smallest:
        raise argparse.ArgumentTypeError(f"{text!r}; needed are numbers from {smallest}, separated by commas")
    return counts


def _positions(text: str) -> list[int]:
    return _counts(text, smallest=0)


if __name__ == "__main__":
    sys.exit(main())
