"""`brlite chat`: a conversation in the terminal, with a model of our own or with any OpenAI server."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from functools import partial

import aiohttp
import msgspec

from brlite.config.options import Config
from brlite.engine.async_engine import EngineLoop
from brlite.errors import BrliteError, ConfigError
from brlite.files.quoting import one_line, shown
from brlite.process.waiting import on_daemon_thread
from brlite.sampling_params import SamplingParams

Messages = list[dict[str, str]]
Ask = Callable[[Messages], AsyncGenerator[str, None]]

PROMPT = "> "
MAX_ERROR_BYTES = 64 * 1024  # of a server's error, and of its list of models


def run(
    target: Config | str, *, model: str | None, api_key: str | None, system: str | None, params: SamplingParams
) -> int:
    """Chat with the config's model, or with the server at a URL, until end of input. Returns the exit status."""
    if isinstance(target, str):
        asyncio.run(_chat_with_server(target, model, api_key, system, params))
    else:
        asyncio.run(_chat_with_model(target, system, params))
    return 0


async def _chat_with_model(config: Config, system: str | None, params: SamplingParams) -> None:
    from brlite.checkpoint.fetch import progress_bar
    from brlite.llm import AsyncEngine

    with ExitStack() as bar:
        show = bar.enter_context(progress_bar())
        async with AsyncEngine.from_config(config, on_progress=show) as engine:
            bar.close()
            await converse(lambda messages: _ask_engine(engine, messages, params), system)


async def _chat_with_server(
    url: str, model: str | None, api_key: str | None, system: str | None, params: SamplingParams
) -> None:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        server = url.rstrip("/").removesuffix("/v1")
        name = model or await _first_model(session, server)
        await converse(lambda messages: _ask_server(session, server, name, messages, params), system)


async def converse(ask: Ask, system: str | None) -> None:
    """Ask each line of standard input with what was said before it; a question that failed is forgotten."""
    messages: Messages = [{"role": "system", "content": system}] if system else []
    while (line := await _read_line()) is not None:
        question = {"role": "user", "content": line}
        answer = ""
        try:
            async with aclosing(ask([*messages, question])) as pieces:
                async for piece in pieces:
                    print(shown(piece), end="", flush=True)
                    answer += piece
        except BrliteError as error:
            print(f"brlite: error: {shown(str(error))}", file=sys.stderr)
        else:
            messages += question, {"role": "assistant", "content": answer}
        print()


async def _read_line() -> str | None:
    """The next line of standard input; None at its end.

    On a daemon thread: one of asyncio's would be waited for at Ctrl-C, until somebody presses Enter. It reads the
    descriptor, since `sys.stdin` has a lock that must not be held at the end of the process.
    """
    stdin = sys.stdin
    if not isinstance(stdin, io.TextIOWrapper):
        line = stdin.readline()
        return line.removesuffix("\n") if line else None
    if stdin.isatty():
        print(PROMPT, end="", flush=True)
    encoding = stdin.encoding if stdin.isatty() else "utf-8"
    data = await on_daemon_thread(partial(_next_line, stdin.fileno()), "brlite-input")
    return data.decode(encoding, "replace").removeprefix("\ufeff").rstrip("\r\n") if data else None


def _next_line(descriptor: int) -> bytes:
    """Bytes up to and with the next LF, one at a time: what comes after them is the next call's."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return bytes(line)


async def _ask_engine(engine: EngineLoop, messages: Messages, params: SamplingParams) -> AsyncGenerator[str, None]:
    token_ids = await engine.encode_chat(messages)
    async for output in engine.generate(token_ids, params):
        yield output.outputs[0].text


async def _ask_server(
    session: aiohttp.ClientSession, server: str, model: str, messages: Messages, params: SamplingParams
) -> AsyncGenerator[str, None]:
    body = {"model": model, "messages": messages, "stream": True, "temperature": params.temperature}
    if params.max_tokens is not None:
        body["max_tokens"] = params.max_tokens
    try:
        async with session.post(f"{server}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise ConfigError(_error_message(await response.content.read(MAX_ERROR_BYTES)))
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield _piece(line.removeprefix(b"data: "))
    except (aiohttp.ClientError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{server}: {one_line(error)}") from None


def _piece(event: bytes) -> str:
    chunk = msgspec.json.decode(event)
    if "error" in chunk:
        raise ConfigError(_error_message(event))
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


async def _first_model(session: aiohttp.ClientSession, server: str) -> str:
    try:
        async with session.get(f"{server}/v1/models") as response:
            if response.status != 200:
                raise ConfigError(_error_message(await response.content.read(MAX_ERROR_BYTES)))
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{server}: no model could be found there: {one_line(error)}") from None


def _error_message(body: bytes) -> str:
    try:
        return one_line(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return "the server answered with an error"
