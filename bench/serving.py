"""Measures OpenAI servers under closed-loop load: brlite, peers started beside it, or any that runs already.

All servers take turns within every round (A/B/A/B), so that a machine that slows down slows all of them; ratios are
medians over rounds. `README.md` explains what is measured. Run it with brlite's Python: `python bench/serving.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import load
import msgspec
import peers
import report
import servers

from brlite.checkpoint.fetch import locate_model, progress_bar
from brlite.config import DEFAULT_MODEL
from brlite.errors import BrliteError

PROMPTS = Path(__file__).with_name("prompts.txt")
WARM_UP_TOKENS = 8
MIN_REQUESTS = 4
BUSY_LOAD = 0.5  # of a core, before anything is started
SHORT = {"concurrency": [1, 4], "rounds": 1, "requests": 2, "max_tokens": 16, "servers": ["brlite"]}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent: to every server the same."""

    prompts: Sequence[str]
    concurrency: Sequence[int]
    rounds: int
    requests: int
    max_tokens: int
    request_timeout: float
    deadline: float


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a request failed or time ran out, 2 if a server did not start, 130 if interrupted."""
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # so that servers are ended as after Ctrl-C
    machine = _machine()
    _warn_if_busy(machine)
    try:
        with ExitStack() as stack:
            found = _servers(args, stack)
            cells = list(_measure(found, _plan(args)))
    except (servers.ServerError, BrliteError) as error:
        print(f"serving: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _print_report(found, machine, cells, args)
    if args.json is not None:
        args.json.write_text(json.dumps(_as_json(found, machine, cells, args), indent=1) + "\n")
    return 1 if any(cell.num_errors for cell in cells) or len(cells) < _num_cells(found, args) else 0


def _servers(args: argparse.Namespace, stack: ExitStack) -> list[servers.Server]:
    """Those to start, which are ready then, and those that run already."""
    running = [_running(spec, args) for spec in args.url]
    names = args.servers if args.servers is not None else [] if running else ["brlite"]
    if not names:
        return running
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brlite-bench-")))
    settings = _settings(args, folder)
    launches = [peers.LAUNCHERS[name](settings) for name in names]
    started = []
    for launch in launches:
        print(f"starting {launch.name} {launch.version} …", file=sys.stderr)
        server = stack.enter_context(servers.start(launch, folder, args.start_timeout))
        server.pause()
        started.append(server)
    return started + running


def _running(spec: str, args: argparse.Namespace) -> servers.Server:
    name, separator, url = spec.partition("=") if not spec.startswith("http") else (spec, "", spec)
    key = os.environ.get(args.api_key_env)
    target = load.Target(
        url=url.rstrip("/"),
        model=args.model,
        fields=args.fields,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    return servers.Server(name=name if separator else url, version="", target=target, pid=args.pid)


def _settings(args: argparse.Namespace, folder: Path) -> servers.Settings:
    path = Path(args.model).expanduser()
    is_path = path.exists()
    with progress_bar() as show:
        located = path.resolve() if is_path else locate_model(args.model, None, show)
    return servers.Settings(
        model=path.stem if is_path else args.model,
        path=located,
        streams=max(args.concurrency),
        context=args.context,
        threads=args.threads,
        prefix_cache=args.prefix_cache,
        folder=folder,
    )


def _plan(args: argparse.Namespace) -> Plan:
    return Plan(
        prompts=read_prompts(args.prompts),
        concurrency=args.concurrency,
        rounds=args.rounds,
        requests=args.requests,
        max_tokens=args.max_tokens,
        request_timeout=args.request_timeout,
        deadline=time.monotonic() + args.time_limit,
    )


def _measure(found: Sequence[servers.Server], plan: Plan) -> Iterator[report.Cell]:
    """A cell for each round, concurrency and server, in this order of loops. Ends early when time runs out."""
    for server in found:
        _warm_up(server, plan)
    for round_ in range(plan.rounds):
        for concurrency in plan.concurrency:
            prompts = _choose_prompts(plan, concurrency, round_)
            for server in found:
                if time.monotonic() > plan.deadline:
                    print("time is up: the rest is left out (--time-limit)", file=sys.stderr)
                    return
                yield _cell(server, plan, prompts, concurrency, round_)


def _warm_up(server: servers.Server, plan: Plan) -> None:
    concurrency = min(MIN_REQUESTS, max(plan.concurrency))
    answers = _run(server, plan.prompts[:concurrency], concurrency, WARM_UP_TOKENS, plan.request_timeout).answers
    if error := next((answer.error for answer in answers if answer.error), None):
        raise servers.ServerError(f"{server.name} cannot answer: {error}\n{server.log_tail()}")


def _cell(server: servers.Server, plan: Plan, prompts: Sequence[str], concurrency: int, round_: int) -> report.Cell:
    measured = _run(server, prompts, concurrency, plan.max_tokens, plan.request_timeout)
    cell = report.make_cell(server.name, concurrency, round_, measured, plan.max_tokens, server.memory())
    rate = f"{cell.output_tokens_per_second:.1f} tokens/s"
    print(f"round {round_ + 1}, {concurrency} streams, {server.name}: {rate}", file=sys.stderr)
    if cell.num_errors:
        print(f"{cell.num_errors} requests failed: {cell.first_error}\n{server.log_tail()}", file=sys.stderr)
    return cell


def _run(
    server: servers.Server, prompts: Sequence[str], concurrency: int, max_tokens: int, timeout: float
) -> load.Load:
    server.resume()
    try:
        return asyncio.run(
            load.run_load(
                server.target, prompts, concurrency=concurrency, max_tokens=max_tokens, timeout_seconds=timeout
            )
        )
    finally:
        server.pause()


def _choose_prompts(plan: Plan, concurrency: int, round_: int) -> list[str]:
    """As many as the streams ask for, the same for all servers, beginning elsewhere in each round."""
    count = max(plan.requests * concurrency, MIN_REQUESTS)
    return [plan.prompts[(round_ * count + index) % len(plan.prompts)] for index in range(count)]


def read_prompts(path: Path) -> list[str]:
    """Prompts are paragraphs: an empty line ends one, a line break within one is a space."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def _print_report(
    found: Sequence[servers.Server],
    machine: Mapping[str, object],
    cells: Sequence[report.Cell],
    args: argparse.Namespace,
) -> None:
    names = ", ".join(f"{server.name} {server.version}".strip() for server in found)
    print(f"{names}; model {args.model}; {args.max_tokens} tokens an answer, greedy")
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    if cells:
        print(report.render(cells))


def _as_json(
    found: Sequence[servers.Server],
    machine: Mapping[str, object],
    cells: Sequence[report.Cell],
    args: argparse.Namespace,
) -> dict[str, object]:
    kept = ("model", "concurrency", "rounds", "requests", "max_tokens", "context", "threads", "prefix_cache")
    return {
        "machine": dict(machine),
        "servers": {server.name: server.version for server in found},
        "settings": {name: getattr(args, name) for name in kept},
        "ratios": msgspec.to_builtins(report.find_ratios(cells)) if cells else [],
        "cells": msgspec.to_builtins(cells),
    }


def _num_cells(found: Sequence[servers.Server], args: argparse.Namespace) -> int:
    return len(found) * len(args.concurrency) * int(args.rounds)


def _machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load before": round(os.getloadavg()[0], 2),
        "Python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _warn_if_busy(machine: Mapping[str, object]) -> None:
    if float(str(machine["load before"])) > BUSY_LOAD:
        print("this machine is busy: ratios may hold, absolute numbers do not", file=sys.stderr)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    _add_server_arguments(parser)
    _add_load_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--short", action="store_true", help="a small load on brlite alone, for CI")
    args = parser.parse_args(argv)
    if args.short:
        vars(args).update(SHORT)
    if unknown := set(args.servers or ()) - set(peers.LAUNCHERS):
        parser.error(f"--servers: {', '.join(sorted(unknown))} unknown; allowed are {', '.join(peers.LAUNCHERS)}")
    if args.context < 2 * args.max_tokens:
        parser.error(f"--context {args.context}: needed is twice --max-tokens at least, brlite cuts longer answers")
    return args


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"servers to start, separated by commas: {', '.join(peers.LAUNCHERS)} (default: brlite, unless --url)"
    parser.add_argument("--servers", type=_words, metavar="NAMES", help=names)
    parser.add_argument(
        "--url", action="append", default=[], metavar="[NAME=]URL", help="a server that runs already; repeatable"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME|PATH", help="peers need a .gguf model")
    parser.add_argument("--fields", type=json.loads, default={"ignore_eos": True}, metavar="JSON", help="for --url")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="for --url")
    parser.add_argument("--pid", type=int, metavar="N", help="process whose memory is measured, for --url")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens a sequence may have (512)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: each server's own default")
    parser.add_argument("--prefix-cache", action="store_true", help="let servers reuse what prompts share")
    parser.add_argument("--start-timeout", type=float, default=300, metavar="SECONDS", help="(300)")


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=_counts, default=[1, 4, 16, 32], metavar="LIST", help="(1,4,16,32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="requests of each stream in a round (2)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens of each answer (128)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, metavar="FILE", help="paragraphs, one a prompt")
    parser.add_argument("--request-timeout", type=float, default=600, metavar="SECONDS", help="(600)")
    parser.add_argument("--time-limit", type=float, default=3600, metavar="SECONDS", help="no load begins later (3600)")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _counts(text: str) -> list[int]:
    counts = [int(word) for word in _words(text)]
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; needed are numbers from 1, separated by commas")
    return counts


if __name__ == "__main__":
    sys.exit(main())
