"""`card.py --check`: whether torch's path is right on a card. Each check is a process of its own, with a time limit.

So one that hangs, dies, or loses the card (a CUDA error ends all that a process can do there) leaves the others alone.
What a check has found is said at once and is kept when its process is ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
from cards.finding import Finding

from brlite.models.precision import PrecisionName

BENCHES = Path(__file__).parents[1]
CORES_PER_CHECK = 2
CHECK_SECONDS = 100.0
DETAILED = ("families",)  # of these what is right makes one line together


class Check(NamedTuple):
    """The module that has it. Those with `precisions` run once for each; those `alone` run beside no other."""

    module: str
    precisions: bool = False
    alone: bool = False
    needs_model: bool = False


CHECKS = {
    "machine": Check("cards.numbers", alone=True),
    "families": Check("cards.numbers", precisions=True),
    "codes": Check("cards.numbers"),
    "model": Check("cards.numbers", precisions=True, needs_model=True),
    "schedules": Check("cards.schedules"),
    "http": Check("cards.service"),
    "verify": Check("cards.service"),
    "memory": Check("cards.service"),
    "second": Check("cards.service", alone=True),
}
NAMES = tuple(CHECKS)


class Outcome(NamedTuple):
    """What one process found, and what it said if it did not end well."""

    name: str
    precision: str | None
    findings: list[Finding]
    seconds: float


def run_checks(args: argparse.Namespace) -> int:
    """Run all of `CHECKS`, or those that are asked for, and print a line for each finding. Returns the exit status."""
    began, outcomes = time.monotonic(), list[Outcome]()
    wanted = [name for name in CHECKS if not args.only or name in args.only]
    jobs = [(name, each) for name in wanted for each in _precisions(name, args)]
    deadline = began + args.time_limit
    cores = len(os.sched_getaffinity(0))
    groups = [["machine"], [name for name in wanted if not CHECKS[name].alone], ["second"]]
    for group in groups:
        with ThreadPoolExecutor(max(1, cores // CORES_PER_CHECK)) as pool:
            running = [pool.submit(_run, name, each, args, deadline) for name, each in jobs if name in group]
            for future in as_completed(running):
                outcomes.append(future.result())
                print("\n".join(_lines(outcomes[-1])), flush=True)
                if args.json is not None:
                    found = {"device": args.device, "model": str(args.model), "seconds": time.monotonic() - began}
                    found["outcomes"] = [_plain(each) for each in outcomes]
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    findings = [finding for outcome in outcomes for finding in outcome.findings]
    num_failed, num_skipped = (sum(each.is_ok is is_ok for each in findings) for is_ok in (False, None))
    seconds = time.monotonic() - began
    print(f"{len(findings)} checks, {num_failed} FAILED, {num_skipped} skipped, {seconds:.0f} s")
    return 1 if num_failed else 0


def _precisions(name: str, args: argparse.Namespace) -> Sequence[str | None]:
    return get_args(PrecisionName) if CHECKS[name].precisions and not args.short else (None,)


def _run(name: str, precision: str | None, args: argparse.Namespace, deadline: float) -> Outcome:
    began = time.monotonic()
    if CHECKS[name].needs_model and (args.model is None or not args.model.exists()):
        where = "no --model" if args.model is None else f"{args.model} is not there"
        return Outcome(name, precision, [Finding(name, None, where)], 0.0)
    command = [sys.executable, "-m", __name__, name, f"--device={args.device}"]
    command += [f"--model={args.model}"] * (args.model is not None and args.model.exists())
    command += [f"--precision={precision}"] * (precision is not None) + ["--short"] * args.short
    limit = min(CHECK_SECONDS if name != "schedules" else args.time_limit, deadline - began)
    command += [f"--schedules={args.schedules}", f"--seconds={0.4 * limit}"] * (name == "schedules")
    if limit <= 0:
        return Outcome(name, precision, [Finding(name, False, "not run: the time was used up")], 0.0)
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHES), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit)
        end = None if process.returncode == 0 else f"ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        end = f"was not done after {limit:.0f} s"
    findings = [msgspec.json.decode(line, type=Finding) for line in output.splitlines() if line.startswith("{")]
    if end is not None:
        last = (errors.strip().splitlines() or ["(no output)"])[-1][:300]
        findings.append(Finding("process", False, f"{end}: {last}", {"stderr": errors[-4000:]}))
    return Outcome(name, precision, findings, time.monotonic() - began)


def _lines(outcome: Outcome) -> Iterator[str]:
    title = outcome.name if outcome.precision is None else f"{outcome.name} {outcome.precision}"
    for finding in outcome.findings:
        if outcome.name not in DETAILED or not finding.is_ok:
            yield f"{_word(finding):8}{title}: {finding.subject}: {finding.text}"
    right = [finding for finding in outcome.findings if finding.is_ok]
    if outcome.name in DETAILED and right:
        worst = max(right, key=lambda finding: float(finding.values.get("error", 0.0)))
        yield (
            f"{'ok':8}{title}: {len(right)} of {len(outcome.findings)} in {outcome.seconds:.0f} s; "
            f"worst {worst.subject}: {worst.text}"
        )


def _word(finding: Finding) -> str:
    return {True: "ok", False: "FAILED", None: "skipped"}[finding.is_ok]


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {**outcome._asdict(), "findings": msgspec.to_builtins(outcome.findings)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one check in this process; each finding is a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--schedules", type=int)
    parser.add_argument("--seconds", type=float)
    args = parser.parse_args(argv)
    check = getattr(importlib.import_module(CHECKS[args.name].module), args.name)
    for finding in check(args):
        print(msgspec.json.encode(finding).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
