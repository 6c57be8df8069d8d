"""`brlite chat`: a conversation in the terminal, with a model that is loaded here or with any server with OpenAI's API.

At a terminal prompt_toolkit reads the lines: editing, history, pasted text, wide characters. From a pipe each line is
a question; commands with a slash work at a terminal only.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import io
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import aiohttp
import msgspec

from brlite.commands.conversation import Conversation, Message
from brlite.commands.given_config import given_config, given_sampling
from brlite.config.options import DEFAULT_MODEL_SAMPLING, Config, KeysConfig
from brlite.engine.async_engine import EngineLoop
from brlite.errors import BrliteError, ConfigError
from brlite.files.quoting import one_line, shown
from brlite.process.children import read_secret
from brlite.process.signals import add_signal_call, remove_signal_call
from brlite.process.waiting import on_daemon_thread
from brlite.sampling_params import SamplingParams


class Piece(NamedTuple):
    """A part of an answer: the text that is new, and its number of tokens."""

    text: str
    num_tokens: int


Ask = Callable[[list[Message], SamplingParams], AsyncGenerator[Piece, None]]
ReadLine = Callable[[], Awaitable[str | None]]  # None at the end of input

PROMPT = "> "
HINT = "/help shows the commands, Ctrl-C leaves"
MAX_BODY_BYTES = 16 * 1024 * 1024  # of a server's error, and of its list of models
# What aiohttp and the decoding of an answer raise where another program answers.
NOT_AN_ANSWER = (
    *(aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, RecursionError),
    *(LookupError, TypeError, ValueError, AttributeError),
)


def run(args: argparse.Namespace) -> int:
    """Chat with the config's model, or with the server at `--url`, until end of input. Returns the exit status.

    Raises `ConfigError` for an argument that has no effect with `--url`, or without it.
    """
    unused = ("config", "draft", "context", "device", "threads", "engine", "engine_option")
    if args.url and (named := next((name for name in unused if getattr(args, name) not in (None, [])), None)):
        argument = "CONFIG" if named == "config" else f"--{named.replace('_', '-')}"
        raise ConfigError(f"{argument} is for a model that is loaded here; with --url the server has its own")
    if args.api_key_env and not args.url:
        raise ConfigError("--api-key-env is for the server at --url, which is not given")
    if args.url:
        key, given = given_key(args.api_key_env), given_sampling(args)
        asyncio.run(chat_with_server(args.url, args.model, key, args.system, given))
    else:
        asyncio.run(chat_with_model(given_config(args), args.system, given_sampling(args)))
    return 0


async def chat_with_model(config: Config, system: str | None, given: Mapping[str, Any]) -> None:
    """Load the config's model and chat with it. Parameters that are not `given` have the model's defaults."""
    from brlite.checkpoint.progress import progress_bar
    from brlite.llm import AsyncEngine

    with ExitStack() as bar:
        show = bar.enter_context(progress_bar())
        async with AsyncEngine.from_config(config, on_progress=show) as engine:
            bar.close()
            params = SamplingParams(**{**DEFAULT_MODEL_SAMPLING, **engine.sampling_defaults, **given})
            await converse(partial(_ask_engine, engine), Conversation(system, params, given))


async def chat_with_server(
    url: str, model: str | None, api_key: str | None, system: str | None, given: Mapping[str, Any]
) -> None:
    """Chat with a model of a server, its first one unless `model` names another."""
    conversation = Conversation(system, SamplingParams(**given), given)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers) as session:
        server = server_address(url)
        name = model or await first_model(session, server)
        await converse(partial(_ask_server, session, server, name, conversation.named), conversation)


def given_key(variable: str | None) -> str:
    """The API key in an environment variable, by default the server's own; "" if that one is not set.

    Raises `ConfigError` if `variable` is given but not set.
    """
    key = read_secret(variable or KeysConfig().env)
    if variable is not None and not key:
        raise ConfigError(f"--api-key-env: the environment variable {one_line(variable)} is not set, or empty")
    return key


def server_address(url: str) -> str:
    """The server's URL without a path. A user may leave out the scheme, and may add a slash or /v1 at the end."""
    return (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")


async def converse(ask: Ask, conversation: Conversation) -> None:
    """Ask each question with the conversation before it, until the end of input. At a terminal obey commands, too.

    A question that failed is not kept. A closed terminal is the end of input. Raises `KeyboardInterrupt` for Ctrl-C at
    the prompt.
    """
    try:
        read_typed = _terminal_reader()
        read = read_typed or _read_line
        while not conversation.is_over and (line := await read()) is not None:
            question = conversation.asked_by(line) if read_typed else line if line.strip() else None
            try:
                if question is not None:
                    await _answer(ask, conversation, question, is_interactive=read_typed is not None)
                elif line.strip():
                    text = await on_daemon_thread(partial(conversation.obey, line), "brlite-chat")
                    print(shown(text), file=sys.stderr)
            except BrliteError as error:
                print(f"brlite: error: {shown(str(error))}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


async def _answer(ask: Ask, conversation: Conversation, question: str, *, is_interactive: bool) -> None:
    """Print an answer as it comes, then add it to the conversation. Ctrl-C at a terminal ends it; its text is kept."""
    pieces: list[Piece] = []
    times = [time.monotonic()]

    async def show() -> None:
        messages = [*conversation.messages, Message("user", question)]
        async with aclosing(ask(messages, conversation.params)) as answer:
            async for piece in answer:
                print(shown(piece.text), end="", flush=True)
                pieces.append(piece)
                times.append(time.monotonic())

    showing = asyncio.ensure_future(show())
    try:
        with _ctrl_c_stops(showing) if is_interactive else nullcontext():
            await showing
    finally:
        print(flush=True)
    if pieces:
        conversation.add(question, "".join(piece.text for piece in pieces))
    if is_interactive:
        speed, num_tokens = "[no tokens were counted]", sum(piece.num_tokens for piece in pieces)
        if num_tokens and pieces:
            first, rest = times[1] - times[0], times[-1] - times[1]
            rate = f", then {(num_tokens - 1) / rest:.1f} tokens/s" if rest > 0 and num_tokens > 1 else ""
            speed = f"[{num_tokens} tokens: the first after {first:.2f} s{rate}]"
        print(speed, file=sys.stderr)


@contextmanager
def _ctrl_c_stops(showing: asyncio.Future[None]) -> Iterator[None]:
    """Inside the `with` block, Ctrl-C cancels the future; the block then ends without an error."""
    loop, is_stopped = asyncio.get_running_loop(), False

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True
        showing.cancel()

    add_signal_call(loop, signal.SIGINT, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not is_stopped:
            raise
        print("\n[stopped]", end="", file=sys.stderr, flush=True)
    finally:
        remove_signal_call(loop, signal.SIGINT)


def _terminal_reader() -> ReadLine | None:
    """A function that reads lines at the terminal. None if standard input is no terminal, or no output goes to one.

    The prompt is written to the terminal even if standard output is redirected: it must not mix with the answers.
    """
    if not (sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())):
        return None
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession(PROMPT, output=create_output(always_prefer_tty=True))
    print(HINT, file=sys.stderr)

    async def read() -> str | None:
        try:
            return await session.prompt_async()
        except EOFError:
            return None

    return read


async def _read_line() -> str | None:
    """The next line of standard input; None at its end.

    A daemon thread reads it: at Ctrl-C Python would wait for one of asyncio's threads, until the user presses Enter. It
    reads the descriptor, since `sys.stdin` has a lock that must be free when the process ends.
    """
    stdin = sys.stdin
    if not isinstance(stdin, io.TextIOWrapper):
        line = stdin.readline()
        return line.removesuffix("\n") if line else None
    encoding = stdin.encoding if stdin.isatty() else "utf-8"
    descriptor = stdin.fileno()

    def read_bytes() -> bytes:
        line = bytearray()
        # One byte at a time: bytes after the LF belong to the next call.
        while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
            line += byte
        return bytes(line)

    data = await on_daemon_thread(read_bytes, "brlite-input")
    return data.decode(encoding, "replace").removeprefix("\ufeff").rstrip("\r\n") if data else None


async def _ask_engine(
    engine: EngineLoop, messages: list[Message], params: SamplingParams
) -> AsyncGenerator[Piece, None]:
    async for output in engine.chat([msgspec.structs.asdict(message) for message in messages], params):
        yield Piece(output.outputs[0].text, len(output.outputs[0].token_ids))


async def _ask_server(
    session: aiohttp.ClientSession,
    server: str,
    model: str,
    named: Collection[str],
    messages: list[Message],
    params: SamplingParams,
) -> AsyncGenerator[Piece, None]:
    """Send the parameters in `named`. For the others the server has its own defaults."""
    chosen = {name: value for name, value in msgspec.to_builtins(params).items() if name in named and value is not None}
    body = {"model": model, "messages": msgspec.to_builtins(messages), **chosen}
    num_tokens = 0
    url = f"{server}/v1/chat/completions"
    texts = stream_texts(session, url, body, lambda choice: choice.get("delta", {}).get("content"))
    async with aclosing(texts) as pieces:
        async for piece in pieces:
            num_tokens = piece.num_tokens or num_tokens
            if piece.text:
                yield Piece(piece.text, 0)
    yield Piece("", num_tokens)


async def stream_texts(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, object], text_of: Callable[[Any], str | None]
) -> AsyncGenerator[Piece, None]:
    """Send a request for a stream. Yields each chunk's text, by `text_of` its choices, and the tokens of its usage.

    Raises `ConfigError` for an error of the server, and where another program answers.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    has_choices = False
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                raise ConfigError(error_message(await read_body(response)))
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                data = line.removeprefix(b"data: ")
                chunk: dict[str, Any] = msgspec.json.decode(data)
                if "error" in chunk:
                    raise ConfigError(error_message(data))
                choices = chunk.get("choices") or []
                has_choices |= bool(choices)
                text = "".join(text_of(choice) or "" for choice in choices)
                yield Piece(text, int((chunk.get("usage") or {}).get("completion_tokens") or 0))
        if not has_choices:
            raise ValueError("it has no choices")
    except NOT_AN_ANSWER as error:
        raise ConfigError(f"{url}: no answer could be read: {one_line(error)}") from None


async def first_model(session: aiohttp.ClientSession, server: str) -> str:
    """The first model that the server lists. Raises `ConfigError` if there is none, or no server of models."""
    try:
        async with session.get(f"{server}/v1/models") as response:
            body = await read_body(response)
        if response.status == 200:
            return str(msgspec.json.decode(body)["data"][0]["id"])
        reason = f"status {response.status}, {error_message(body)}"
    except aiohttp.ClientConnectorError as error:
        reason = f"no server answers: {one_line(error.os_error)}"
    except aiohttp.ClientConnectionError as error:
        reason = one_line(error)
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError):
        reason = "a URL is needed such as http://127.0.0.1:8000"
    except IndexError:
        reason = "the server has none"
    except NOT_AN_ANSWER:
        reason = "what answers is no server of models"
    raise ConfigError(f"{one_line(server)}: no model could be found there: {reason}")


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The body, or its beginning if it is longer than MAX_BODY_BYTES."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > MAX_BODY_BYTES:
            break
    return bytes(body)


def error_message(body: bytes) -> str:
    """The message in a server's error, whose shape is OpenAI's."""
    try:
        return one_line(msgspec.json.decode(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return "the server answered with an error"
