"""`brlite bench`: sends a short load to a server with the OpenAI API, and prints its speed as clients see it.

Prompts are random words, so that a server's prefix cache has none of them. The figures in the docs come from `bench/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

import aiohttp

from brlite.commands.chat import first_model, given_key, server_address, stream_texts
from brlite.errors import ConfigError

WORDS = ("sea", "sky", "stone", "river", "light", "salt", "cloud", "grain", "iron", "wood", "glass", "fire", "snow")


class LoadShape(NamedTuple):
    """How many requests, how many at once, words in each prompt and tokens in each answer."""

    num_requests: int
    concurrency: int
    prompt_words: int
    max_tokens: int


class TimedAnswer(NamedTuple):
    """One request: when it was sent, when its first and its last text came, in seconds; and its number of tokens."""

    sent: float
    first: float
    last: float
    num_tokens: int


def run(args: argparse.Namespace) -> int:
    """Run the load and print requests, tokens and latencies. Raises `ConfigError` if the server refuses one."""
    load = LoadShape(args.requests, args.concurrency, args.prompt_words, args.max_tokens)
    for name, value in load._asdict().items():
        if not 1 <= value <= 100_000:
            raise ConfigError(f"--{name.removeprefix('num_').replace('_', '-')} {value}: allowed is 1 to 100000")
    answers, seconds = asyncio.run(run_load(args.url, args.model, given_key(args.api_key_env), load))
    report = summarize(answers, seconds)
    print(json.dumps(report, indent=1) if args.json else "\n".join(f"{name:24} {report[name]}" for name in report))
    return 0


def summarize(answers: Sequence[TimedAnswer], seconds: float) -> dict[str, float | int]:
    """The figures of a load that took `seconds`; times in milliseconds."""
    num_tokens = sum(answer.num_tokens for answer in answers)
    firsts = [1000 * (answer.first - answer.sent) for answer in answers]
    steps = [
        1000 * (answer.last - answer.first) / (answer.num_tokens - 1) for answer in answers if answer.num_tokens > 1
    ]
    return {
        "requests": len(answers),
        "seconds": round(seconds, 2),
        "requests/s": round(len(answers) / seconds, 2),
        "tokens": num_tokens,
        "tokens/s": round(num_tokens / seconds, 1),
        "first token ms, median": percentile(firsts, 50),
        "first token ms, 95 %": percentile(firsts, 95),
        "next token ms, median": percentile(steps, 50),
        "next token ms, 95 %": percentile(steps, 95),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that `percent` % of the values do not exceed; 0 if there are none."""
    return round(sorted(values)[max(0, -(-len(values) * percent // 100) - 1)], 2) if values else 0.0


async def run_load(
    url: str, model: str | None, api_key: str | None, load: LoadShape
) -> tuple[list[TimedAnswer], float]:
    """Send all requests. Returns their answers and the seconds that it took. Raises `ConfigError` if one fails."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=load.concurrency)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        server = server_address(url)
        name = model or await first_model(session, server)
        generator = random.Random(0)
        prompts = [" ".join(generator.choices(WORDS, k=load.prompt_words)) for _ in range(load.num_requests)]
        bodies = [{"model": name, "prompt": prompt, "max_tokens": load.max_tokens} for prompt in prompts]
        free = asyncio.Semaphore(load.concurrency)
        await _ask(session, server, bodies[0], free)  # not measured: the server may load parts at its first request
        began = time.monotonic()
        tasks = [asyncio.create_task(_ask(session, server, body, free)) for body in bodies]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return answers, time.monotonic() - began


async def _ask(
    session: aiohttp.ClientSession, server: str, body: dict[str, object], free: asyncio.Semaphore
) -> TimedAnswer:
    """Wait until fewer requests than allowed run, then send one and read its stream. The wait is not in its times."""
    num_tokens = 0
    body = {**body, "temperature": 0}
    async with free:
        sent = first = last = time.monotonic()
        url = f"{server}/v1/completions"
        async with aclosing(stream_texts(session, url, body, lambda choice: choice.get("text"))) as pieces:
            async for piece in pieces:
                num_tokens = piece.num_tokens or num_tokens
                if piece.text:
                    last = time.monotonic()
                    first = last if first == sent else first
    return TimedAnswer(sent, first, last, num_tokens)
