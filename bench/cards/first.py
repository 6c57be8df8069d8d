"""`card.py --first DIR`: the first quarter of an hour on a card, in one command. Each part is a process with a limit.

The order is that of what is most worth knowing: whether results are right, whether bits are equal in any schedule, how
fast steps are, where their time goes, and which tiles are best. A part that fails, hangs or loses the card leaves the
others alone. Each part writes DIR/NAME.json and DIR/NAME.txt; DIR/first.json says how each ended.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from cards import models
from measuring import steps
from torch.profiler import ProfilerActivity, profile

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
    Part("check", ("--check",), 0.2),
    Part("schedules", ("--check", "--only", "schedules", "--schedules", "2000"), 0.15),
    Part("speed", ("--shapes", "8b", "--no-peers"), 0.35),
    Part("profile", ("--profile", "--shapes", "8b"), 0.1),
    Part("tiles", ("--tiles", "--shapes", "8b"), 0.2),
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
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "not done"
    return "ok" if status == 0 else f"status {status}"


def run_profile(args: argparse.Namespace) -> int:
    """Print where the time of decode steps goes, by kernel, of each shape and precision."""
    device = torch.device(args.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    deadline, found = time.monotonic() + args.time_limit, list[dict[str, object]]()
    for shape, precision in [(shape, precision) for shape in args.shapes for precision in args.precisions]:
        group = [steps.decode_step(rows, CONTEXT) for rows in ((1, 2) if args.short else (1, 64))]
        blocks = steps.num_blocks(group, models.BLOCK_SIZE)
        kernels = (args.kernels or models.kernels())[0]
        backend = models.make_backend(
            shape, precision, args.device, kernels, rows=group[-1].rows, context=2 * CONTEXT, num_blocks=blocks
        )
        steps.fill_cache(backend, group)
        for step, batch in zip(group, steps.make_batches(group, backend.info), strict=True):
            if time.monotonic() > deadline:
                break
            backend.execute(batch)
            num_steps = 2 if args.short else PROFILED_STEPS
            with profile(activities=activities) as profiled:
                for _ in range(num_steps):
                    backend.execute(batch)
            rows = _kernels(profiled, num_steps, is_card=device.type == "cuda")
            print(f"\n{shape} {precision} {step.name}: microseconds a step")
            print("\n".join(f"{row['microseconds']:10.1f}  {row['calls']:6.1f} x  {row['kernel']}" for row in rows))
            found.append({"shape": shape, "precision": precision, "step": step.name, "kernels": rows})
            if args.json is not None:
                args.json.write_text(json.dumps({"steps": found}, indent=1) + "\n")
        backend.close()
    return 0 if found else 1


def _kernels(profiled: profile, num_steps: int, *, is_card: bool) -> list[dict[str, float | str]]:
    """The kernels that take most of a step, the longest first; on the CPU torch's operators."""
    rows: list[dict[str, float | str]] = []
    for event in profiled.key_averages():
        microseconds = event.self_device_time_total if is_card else event.self_cpu_time_total
        if microseconds > 0:
            fields = {"microseconds": microseconds / num_steps, "calls": event.count / num_steps}
            rows.append({"kernel": event.key[:100], **fields})
    return sorted(rows, key=lambda row: -float(row["microseconds"]))[:MOST_KERNELS]
