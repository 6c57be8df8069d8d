"""The closed-loop client: so many streams, each of which asks for its next completion when it has its last one.

Speaks the OpenAI API's streamed `/v1/completions` to one server and notes when text came. Starts no servers and
computes no statistics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence

import aiohttp
import msgspec
from msgspec import Struct

EVENT = b"data:"
DONE = b"[DONE]"
MAX_MESSAGE = 200
HEALTH = "/health"
PROBE_SECONDS = 0.02


class Target(Struct, frozen=True, kw_only=True):
    """Where requests go. `fields` are this server's own additions to their body."""

    url: str
    model: str
    fields: Mapping[str, object] = {}
    headers: Mapping[str, str] = {}


class Answer(Struct, kw_only=True):
    """One request and what came back. `text_times` has one entry for each chunk with text in it."""

    sent_at: float
    text_times: list[float] = []
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    is_finished: bool = False
    error: str | None = None


class Load(Struct, frozen=True, kw_only=True):
    """All answers of one load and the seconds it took. `lags` are the seconds that each probe's answer took."""

    answers: Sequence[Answer]
    seconds: float
    lags: Sequence[float] = ()


class _Choice(Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Chunk).decode


async def run_load(
    target: Target,
    prompts: Sequence[str],
    *,
    concurrency: int,
    max_tokens: int,
    timeout_seconds: float,
    probes: bool = False,
    answers: list[Answer] | None = None,
) -> Load:
    """Complete every prompt once, greedily, with `concurrency` requests open at a time. Failures are in the answers.

    With `probes` the server is asked for `/health` all the while: how long that takes is how far its loop lags behind.
    The answers are put into `answers` when they begin, for callers that look at them while they come.
    """
    answers = [] if answers is None else answers
    lags: list[float] = []
    waiting = iter(prompts)
    # A connection for each request: llama.cpp's server closes those it keeps without a word.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=target.headers) as session:
        prober = asyncio.create_task(_probe(session, target.url + HEALTH, lags)) if probes else None
        start = time.perf_counter()
        await asyncio.gather(*(_stream(session, target, waiting, max_tokens, answers) for _ in range(concurrency)))
        seconds = time.perf_counter() - start
        if prober is not None:
            prober.cancel()
            await asyncio.wait([prober])
        return Load(answers=answers, seconds=seconds, lags=lags)


async def _probe(session: aiohttp.ClientSession, url: str, lags: list[float]) -> None:
    while True:
        start = time.perf_counter()
        async with session.get(url) as response:
            await response.read()
        lags.append(time.perf_counter() - start)
        await asyncio.sleep(PROBE_SECONDS)


async def _stream(
    session: aiohttp.ClientSession, target: Target, waiting: Iterator[str], max_tokens: int, answers: list[Answer]
) -> None:
    for prompt in waiting:
        answer = Answer(sent_at=time.perf_counter())
        answers.append(answer)
        try:
            await _complete(session, target, prompt, max_tokens, answer)
        except asyncio.TimeoutError:
            answer.error = "timed out"
        except (aiohttp.ClientError, msgspec.MsgspecError, ValueError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]


async def _complete(
    session: aiohttp.ClientSession, target: Target, prompt: str, max_tokens: int, answer: Answer
) -> None:
    body = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.fields,
    }
    async with session.post(f"{target.url}/v1/completions", json=body) as response:
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {await response.text()}"[:MAX_MESSAGE]
            return
        async for line in response.content:
            if line.startswith(EVENT):
                _take(line[len(EVENT) :].strip(), answer)
    if answer.error is None and not answer.is_finished:
        answer.error = "the stream ended without a finish_reason"


def _take(data: bytes, answer: Answer) -> None:
    if data == DONE:
        return
    now = time.perf_counter()
    chunk = _decode(data)
    if bytes(chunk.error) not in (b"", b"null"):
        answer.error = bytes(chunk.error).decode("utf-8", "replace")[:MAX_MESSAGE]
    if any(choice.text for choice in chunk.choices):
        answer.text_times.append(now)
    if any(choice.finish_reason for choice in chunk.choices):
        answer.is_finished = True
    if chunk.usage is not None:
        answer.prompt_tokens = chunk.usage.prompt_tokens
        answer.completion_tokens = chunk.usage.completion_tokens
