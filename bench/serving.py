"""Measures OpenAI servers under closed-loop load: brlite, peers started beside it, or any that runs already.

All servers take turns within every round (A/B/A/B), so that a machine that slows down slows all of them; ratios are
medians over rounds. `serving.md` explains what is measured. Run it with brlite's Python: `python bench/serving.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import msgspec
from measuring import load, prompts, report, subject, this_machine
from measuring.venvs import ToolError
from peers import launchers, servers

from brlite.errors import BrliteError
from brlite.tokenizer import load_tokenizer

WARM_UP_TOKENS = 8
MIN_REQUESTS = 4
CONTEXT = 512
CONTEXT_STEP = 256
TASKS = ("complete", "rewrite")
NAMES = f"brlite, brlite-WORDS with words of {', '.join(subject.WORDS)}, {', '.join(launchers.LAUNCHERS)}"
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
    probes: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a request failed or time ran out, 2 if a server did not start, 130 if interrupted."""
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # so that servers are ended as after Ctrl-C
    machine = this_machine.describe()
    this_machine.warn_if_busy(machine)
    try:
        with ExitStack() as stack:
            plan = _plan(args)
            found = _servers(args, stack)
            cells = list(_measure(found, plan))
    except (servers.ServerError, ToolError, BrliteError) as error:
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
    settings = servers.read_settings(
        args, stack, streams=max(args.concurrency), context=args.context, prefix_cache=args.prefix_cache
    )
    launches = [launcher(settings) for name in names if (launcher := launchers.find_launcher(name)) is not None]
    return servers.start_paused(launches, settings.folder, args.start_timeout, stack) + running


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


def _plan(args: argparse.Namespace) -> Plan:
    return Plan(
        prompts=_prompts(args),
        concurrency=args.concurrency,
        rounds=args.rounds,
        requests=args.requests,
        max_tokens=args.max_tokens,
        request_timeout=args.request_timeout,
        deadline=time.monotonic() + args.time_limit,
        probes=args.lag,
    )


def _prompts(args: argparse.Namespace) -> Sequence[str]:
    texts = prompts.read_prompts(args.prompts)
    if args.task == "rewrite":
        return prompts.rewrite_prompts(texts)
    if args.prompt_tokens:
        return prompts.long_prompts(texts, args.prompt_tokens, load_tokenizer(subject.find_model(args.model).path))
    return texts


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
    measured = _run(server, prompts, concurrency, plan.max_tokens, plan.request_timeout, plan.probes)
    cell = report.make_cell(server.name, concurrency, round_, measured, plan.max_tokens, server.memory())
    rate = f"{cell.output_tokens_per_second:.1f} tokens/s"
    print(f"round {round_ + 1}, {concurrency} streams, {server.name}: {rate}", file=sys.stderr)
    if cell.num_errors:
        print(f"{cell.num_errors} requests failed: {cell.first_error}\n{server.log_tail()}", file=sys.stderr)
    return cell


def _run(
    server: servers.Server,
    prompts: Sequence[str],
    concurrency: int,
    max_tokens: int,
    timeout: float,
    probes: bool = False,
) -> load.Load:
    server.resume()
    try:
        return asyncio.run(
            load.run_load(
                server.target,
                prompts,
                concurrency=concurrency,
                max_tokens=max_tokens,
                timeout_seconds=timeout,
                probes=probes,
            )
        )
    finally:
        server.pause()


def _choose_prompts(plan: Plan, concurrency: int, round_: int) -> list[str]:
    """As many as the streams ask for, the same for all servers, beginning elsewhere in each round."""
    count = max(plan.requests * concurrency, MIN_REQUESTS)
    return [plan.prompts[(round_ * count + index) % len(plan.prompts)] for index in range(count)]


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
    given = ("model", "precision", "backend", "speculation", "threads", "context", "prefix_cache")
    kept = (*given, "concurrency", "rounds", "requests", "max_tokens", "task", "prompt_tokens")
    return {
        "machine": dict(machine),
        "servers": {server.name: server.version for server in found},
        "settings": {name: getattr(args, name) for name in kept},
        "ratios": msgspec.to_builtins(report.find_ratios(cells)) if cells else [],
        "cells": msgspec.to_builtins(cells),
    }


def _num_cells(found: Sequence[servers.Server], args: argparse.Namespace) -> int:
    return len(found) * len(args.concurrency) * int(args.rounds)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    _add_server_arguments(parser)
    _add_load_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    parser.add_argument("--short", action="store_true", help="a small load on brlite alone, for CI")
    args = subject.parse(parser, argv, SHORT)
    if unknown := [name for name in args.servers or () if launchers.find_launcher(name) is None]:
        parser.error(f"--servers: {', '.join(unknown)} unknown; allowed are {NAMES}")
    if args.prompts is None:
        args.prompts = prompts.QUALITY_TEXT if args.task == "rewrite" or args.prompt_tokens else prompts.PROMPTS
    if not args.context:
        args.context = max(CONTEXT, _rounded_up(args.prompt_tokens + args.max_tokens + 2))
    if args.context < 2 * args.max_tokens:
        parser.error(f"--context {args.context}: needed is twice --max-tokens at least, brlite cuts longer answers")
    return args


def _rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // CONTEXT_STEP) * CONTEXT_STEP


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"servers to start, separated by commas: {NAMES} (default: brlite, unless --url)"
    parser.add_argument("--servers", type=_words, metavar="NAMES", help=names)
    parser.add_argument(
        "--url", action="append", default=[], metavar="[NAME=]URL", help="a server that runs already; repeatable"
    )
    subject.add_arguments(parser)
    parser.add_argument("--fields", type=json.loads, default={"ignore_eos": True}, metavar="JSON", help="for --url")
    parser.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="for --url")
    parser.add_argument("--pid", type=int, metavar="N", help="process whose memory is measured, for --url")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="tokens a sequence may have (512 or more)")
    parser.add_argument("--prefix-cache", action="store_true", help="let servers reuse what prompts share")
    parser.add_argument("--start-timeout", type=float, default=300, metavar="SECONDS", help="(300)")


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--concurrency", type=_counts, default=[1, 4, 16, 32], metavar="LIST", help="(1,4,16,32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="requests of each stream in a round (2)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens of each answer (128)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="paragraphs, one a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="of each prompt (0: as they are)")
    parser.add_argument("--task", choices=TASKS, default="complete", help="rewrite: answers repeat the prompts")
    parser.add_argument("--lag", action="store_true", help="ask for /health all the while: how far does the loop lag")
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
