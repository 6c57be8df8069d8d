"""`card.py --first DIR`: the first quarter of an hour on a card, in one command. Each part is a process with a limit.

The order is that of what is most worth knowing: whether results are right, whether bits are equal in any schedule, how
fast steps are, where their time goes, which tiles are best, and how fast transformers is. A part that fails, hangs or
loses the card leaves the others alone. Each part writes DIR/NAME.json and DIR/NAME.txt as it finds something;
DIR/first.json says how each ended. The last lines compare with the goals of `goals.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from cards import check, goals, models
from measuring import steps
from torch.profiler import ProfilerActivity, profile

from brlite.models.precision import PrecisionName

GRACE_SECONDS = 15.0  # after its time limit a part writes what it has
PROFILED_STEPS = 20
MOST_KERNELS = 25
CONTEXT = 512


class Part(NamedTuple):
    """Arguments of `card.py`, and the share of the time that the part may take."""

    name: str
    arguments: tuple[str, ...]
    share: float


PARTS = (
    Part("check", ("--check", "--only", ",".join(name for name in check.NAMES if name != "schedules")), 0.2),
    Part("schedules", ("--check", "--only", "schedules", "--schedules", "2000"), 0.15),
    Part("speed", ("--shapes", "8b", "--no-peers"), 0.35),
    Part("profile", ("--profile", "--shapes", "8b"), 0.08),
    Part("tiles", ("--tiles", "--shapes", "8b"), 0.12),
    Part("peers", ("--shapes", "1b", "--precisions", "bf16"), 0.1),  # and what the others left over
)


def run(args: argparse.Namespace) -> int:
    """Run all parts in turn, within `args.time_limit` together. Exit status 1 if one did not end well."""
    folder: Path = args.first
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, object]] = []
    left_over = 0.0
    for part in PARTS:
        limit = args.time_limit * part.share + left_over  # what one part does not use goes to the next
        began = time.monotonic()
        status = _run_part(part, limit, args)
        seconds = time.monotonic() - began
        left_over = max(0.0, limit - seconds)
        found.append({"part": part.name, "status": status, "seconds": round(seconds, 1), "limit": round(limit, 1)})
        print(f"{part.name}: {status} in {seconds:.0f} of {limit:.0f} s", flush=True)
        (folder / "first.json").write_text(json.dumps({"device": args.device, "parts": found}, indent=1) + "\n")
    print("\n".join(goals.report(folder)))
    return 0 if all(each["status"] == "ok" for each in found) else 1


def _run_part(part: Part, limit: float, args: argparse.Namespace) -> str:
    command = [sys.executable, str(Path(__file__).parents[1] / "card.py"), *part.arguments, f"--device={args.device}"]
    command += [f"--time-limit={max(1.0, limit - GRACE_SECONDS)}", f"--json={args.first / part.name}.json"]
    command += ["--short"] * args.short + [f"--model={args.model}"] * (args.model is not None)
    if args.short and "--schedules" in part.arguments:
        command += ["--schedules=2"]
    with (args.first / f"{part.name}.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "not done"
        finally:  # also where this command is interrupted: the card must not stay taken
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "ok" if status == 0 else f"status {status}"


def run_profile(args: argparse.Namespace) -> int:
    """Print where the time of decode steps goes, by kernel, of each shape and precision."""
    deadline, found = time.monotonic() + args.time_limit, list[dict[str, object]]()
    is_complete = True
    for shape, precision in [(shape, precision) for shape in args.shapes for precision in args.precisions]:
        try:
            for step in _profiled(shape, precision, args, deadline):
                found.append(step)
                if args.json is not None:
                    args.json.write_text(json.dumps({"steps": found}, indent=1) + "\n")
        except Exception as error:  # of this precision alone
            is_complete = False
            print(f"\n{shape} {precision}: {type(error).__name__}: {error}"[:300])
    return 0 if found and is_complete else 1


def _profiled(
    shape: str, precision: PrecisionName, args: argparse.Namespace, deadline: float
) -> Iterator[dict[str, object]]:
    """Print and give the kernels of decode steps of few and of many rows, until the time is up."""
    is_card = torch.device(args.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_card else [])]
    group = [steps.decode_step(rows, CONTEXT) for rows in ((1, 2) if args.short else (1, 64))]
    blocks = steps.num_blocks(group, models.BLOCK_SIZE)
    kernels = (args.kernels or models.kernels())[0]
    backend = models.make_backend(
        shape, precision, args.device, kernels, rows=group[-1].rows, context=2 * CONTEXT, num_blocks=blocks
    )
    with closing(backend):
        steps.fill_cache(backend, group)
        for step, batch in zip(group, steps.make_batches(group, backend.info), strict=True):
            if time.monotonic() > deadline:
                break
            backend.execute(batch)
            num_steps = 2 if args.short else PROFILED_STEPS
            with profile(activities=activities) as profiled:
                for _ in range(num_steps):
                    backend.execute(batch)
            rows = _kernels(profiled, num_steps, is_card=is_card)
            print(f"\n{shape} {precision} {step.name}: microseconds a step")
            print("\n".join(f"{row['microseconds']:10.1f}  {row['calls']:6.1f} x  {row['kernel']}" for row in rows))
            yield {"shape": shape, "precision": precision, "step": step.name, "kernels": rows}


def _kernels(profiled: profile, num_steps: int, *, is_card: bool) -> list[dict[str, float | str]]:
    """The kernels that take most of a step, the longest first; on the CPU torch's operators."""
    rows: list[dict[str, float | str]] = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if is_card else event.self_cpu_time_total
        if microseconds > 0:
            fields = {"microseconds": microseconds / num_steps, "calls": event.count / num_steps}
            rows.append({"kernel": event.key[:100], **fields})
    return sorted(rows, key=lambda row: -float(row["microseconds"]))[:MOST_KERNELS]
