"""Services as processes, each with a tiny model of its own, and servers of other makes that the tests hold in hand."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
from aiohttp import web

from tests.limits import PATIENCE_SECONDS
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

CONTEXT = 8192  # long enough that an answer takes seconds: it does not end by itself before a test has looked
LONG: dict[str, Any] = {
    "prompt": "Hi",
    "max_tokens": CONTEXT // 2,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
GATED = [f"{index} " for index in range(8)]  # what a `Gated` says
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


class Service:
    """A command of brlite's, waited for until its model is loaded. What it says goes to the file `log`."""

    def __init__(self, url: str, log: Path, *command: str) -> None:
        self.url = url
        self._log = log
        program = Path(sys.executable).with_name(command[0])
        with log.open("wb") as file:
            self.process = subprocess.Popen([program, *command[1:]], stderr=file, env={**os.environ, "COLUMNS": "80"})

    def wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "brlite is ready" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        """All that it has said so far."""
        return self._log.read_text()

    def requests(self, *notes: str) -> list[str]:
        """Its access lines that have all of these notes, such as `model=a`."""
        return [line for line in self.log.splitlines() if " brlite.access: " in line and set(notes) <= {*line.split()}]

    def metric(self, name: str) -> float:
        """The number of a metric, over all labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE_SECONDS) as answer:
            text = answer.read().decode()
        return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))

    def kill(self) -> None:
        """End it without a word, as a crash does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM; it must leave in good order."""
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(timeout=PATIENCE_SECONDS) == 0, self.log


@contextmanager
def served(folder: Path, name: str, toml: str, **values: object) -> Iterator[Service]:
    """`brlite serve` with a config that has these values in it and the `{port}`, while inside."""
    port, config = free_port(), folder / f"{name}.toml"
    config.write_text(toml.format(port=port, **values))
    service = Service(f"http://127.0.0.1:{port}", folder / f"{name}.log", "brlite", "serve", str(config))
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_model(path: Path, seed: int) -> Path:
    """A tiny model that no other seed speaks like, with a chat template and a long context."""
    write_tiny_model(path, seed=seed)
    write_byte_tokenizer(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path


def start_as_in_the_manual(folder: Path, name: str, port: int, all_models: Mapping[str, str]) -> Service:
    """A service of the manual's: its 13 fields as JSON, and its command."""
    folder.mkdir(exist_ok=True)
    fields = {
        "model": name,
        "cached_dir": str(write_model(folder / name, seed=ord(name[-1]))),
        "input_name": "input_ids.1",
        "output_name": "9",
        "vocab_size": 300,
        "model_file": "",
        "serialize_file": "",
        "model_precision": "bf16",
        "build_seq": CONTEXT,
        "build_batch": 4,
        "distribute_param": [1, 1, 1],
        "devices": [0],
        "all_models": all_models,
    }
    config = folder / f"{name}.json"
    config.write_text(json.dumps(fields, ensure_ascii=False))
    options = ("--config", str(config), "--host", "127.0.0.1", "--port", str(port))
    return Service(f"http://127.0.0.1:{port}", folder / f"{name}.log", "br_api_server", *options)


async def ask(client: openai.AsyncOpenAI, model: str, *, is_chat: bool = False, is_stream: bool = False) -> str:
    """What the model says, greedily."""
    options: dict[str, Any] = {"model": model, "max_tokens": 12, "temperature": 0, "stream": is_stream}
    if is_chat:
        answer: Any = await client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **options)
    else:
        answer = await client.completions.create(prompt="Hi", **options)
    choices = [event.choices[0] async for event in answer] if is_stream else answer.choices
    return "".join(map(_text, choices))


def _text(choice: Any) -> str:
    """What a choice says, of a chat or a completion, whole or a part of it."""
    for field in ("message", "delta"):
        if hasattr(choice, field):
            return getattr(choice, field).content or ""
    text: str = choice.text
    return text


class Gated:
    """A server of another make. Each event of a stream waits until the test says that it has the one before.

    `gate.release()` says so; one that `is_open` waits for nobody. `requests` are those that it got.
    """

    def __init__(self, model: str, *, is_open: bool = False) -> None:
        self._model = model
        self.gate = asyncio.Semaphore(len(GATED) if is_open else 1)
        self.requests: list[web.Request] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in GATED:
            await self.gate.acquire()
            await response.write(b"data: %b\n\n" % self._event(text))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _event(self, text: str) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop" if text == GATED[-1] else None}
        event = {"id": "1", "object": "text_completion", "created": 1, "model": self._model, "choices": [choice]}
        return json.dumps(event).encode()

    @asynccontextmanager
    async def listening(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Its address, while inside."""
        app = web.Application()
        app.add_routes([web.post("/v1/completions", self.answer)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()
