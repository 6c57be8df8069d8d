"""Embeddings a second over HTTP, so many requests of one text each in flight: of brlite and, if asked for, llama.cpp.

    python bench/embeddings.py                                  # brlite, 16 in flight
    python bench/embeddings.py --servers brlite llama.cpp --model model.gguf
    python bench/embeddings.py --short                          # for CI

The servers are measured in turns, and the one that is not is stopped meanwhile. Texts are all different, so that no
cache of prompts helps.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

import aiohttp
from measuring import prompts, subject
from measuring.venvs import ToolError
from peers import launchers, servers

from brlite.errors import BrliteError

CONTEXT = 512
SERVERS = ("brlite", "llama.cpp", "llama.cpp-q8")
PATH = "/v1/embeddings"
SHORT = {"streams": 4, "rounds": 1, "requests": 4, "servers": ["brlite"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a request failed, or 2 if the model or a server could not be had."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            started = _start(args, stack)
            rates: dict[str, list[float]] = {server.name: [] for server in started}
            for number in range(args.rounds):
                for server in started:
                    rates[server.name].append(_rate(server, args, number))
                    print(f"round {number + 1}: {server.name} {rates[server.name][-1]:.1f}/s", file=sys.stderr)
    except (BrliteError, servers.ServerError, ToolError) as error:
        print(f"embeddings: error: {error}", file=sys.stderr)
        return 2
    except aiohttp.ClientError as error:
        print(f"embeddings: error: a request failed: {error}", file=sys.stderr)
        return 1
    print(f"{args.streams} in flight, one text each, medians over the rounds ({args.rounds})\n")
    for server in started:
        print(f"{server.name} {server.version}: {median(rates[server.name]):.1f} embeddings/s")
    return 0


def _start(args: argparse.Namespace, stack: ExitStack) -> list[servers.Server]:
    settings = servers.read_settings(args, stack, streams=args.streams, context=CONTEXT)
    launches = []
    for name in args.servers:
        launcher = launchers.find_launcher(name)
        assert launcher is not None  # the choices are such names
        launch = launcher(settings)
        launches.append(launch if name == "brlite" else launchers.with_embeddings(launch))
    return servers.start_paused(launches, settings.folder, args.start_timeout, stack)


def _rate(server: servers.Server, args: argparse.Namespace, number: int) -> float:
    texts = prompts.read_prompts(prompts.PROMPTS)
    asked = [f"{number}.{index} {texts[index % len(texts)]}" for index in range(args.streams * (args.requests + 1))]
    server.resume()
    try:
        asyncio.run(_ask_all(server, asked[: args.streams], args.streams))  # warm-up
        start = time.perf_counter()
        asyncio.run(_ask_all(server, asked[args.streams :], args.streams))
        return args.streams * args.requests / (time.perf_counter() - start)
    finally:
        server.pause()


async def _ask_all(server: servers.Server, texts: Sequence[str], streams: int) -> None:
    waiting = iter(texts)
    timeout = aiohttp.ClientTimeout(total=600)

    async def ask(session: aiohttp.ClientSession) -> None:
        for text in waiting:
            body = {"model": server.target.model, "input": text, "encoding_format": "base64"}
            async with session.post(server.target.url + PATH, json=body, headers=dict(server.target.headers)) as answer:
                answer.raise_for_status()
                assert (await answer.json())["data"][0]["embedding"]

    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.gather(*(ask(session) for _ in range(streams)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    subject.add_turns(parser, short="4 in flight, one round, brlite alone")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=["brlite"], help="(brlite)")
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="requests in flight (16)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="of each stream in a round (16)")
    return subject.parse(parser, argv, SHORT)


if __name__ == "__main__":
    sys.exit(main())
