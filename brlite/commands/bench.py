"""`brlite bench`: a short load on a server with the OpenAI API, and its speed as clients see it."""

from __future__ import annotations

import argparse
import json
import os

from brlite.errors import ConfigError


def add_bench(parser: argparse.ArgumentParser) -> None:
    where = "address of the server (default localhost:8000)"
    parser.add_argument("--url", default="http://127.0.0.1:8000", help=where)
    parser.add_argument("--model", metavar="NAME", help="the model (default: the first that the server lists)")
    key = "environment variable with the server's API key"
    parser.add_argument("--api-key-env", default="BRLITE_API_KEY", metavar="NAME", help=key)
    for flag, default, about in (
        ("--requests", 32, "number of requests"),
        ("--concurrency", 8, "requests at the same time"),
        ("--prompt-words", 64, "words per prompt"),
        ("--max-tokens", 64, "tokens per answer"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default {default})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(logs_from="warning")


def bench(args: argparse.Namespace) -> int:
    """Run the load and print requests, tokens and latencies. Raises `ConfigError` for what the server refuses."""
    import asyncio

    from brlite.commands.load import LoadShape, run_load, summarize

    load = LoadShape(args.requests, args.concurrency, args.prompt_words, args.max_tokens)
    for name, value in load._asdict().items():
        if not 1 <= value <= 100_000:
            raise ConfigError(f"--{name.removeprefix('num_').replace('_', '-')} {value}: allowed is 1 to 100000")
    answers, seconds = asyncio.run(run_load(args.url, args.model, os.environ.get(args.api_key_env), load))
    report = summarize(answers, seconds)
    print(json.dumps(report, indent=1) if args.json else "\n".join(f"{name:24} {report[name]}" for name in report))
    return 0
