"""The real command on the real model, asked by the official client. One server serves all tests of this file."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

from brlite.config.options import DEFAULT_MODEL
from tests.limits import PATIENCE_SECONDS

pytestmark = pytest.mark.model

START_SECONDS = 100
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """A `brlite serve` process on a free port."""

    def __init__(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("brlite")), "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"})
        self.url = self._read_until(r"listening on (http://\S+);")

    def wait_ready(self) -> None:
        self.announcement = self._read_until(r"brlite is ready\. (.*)")

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_SECONDS)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()

    def _read_until(self, pattern: str) -> str:
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("the server ended:\n" + "".join(lines))


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[Server]:
    server = Server()
    server.wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as client:
        yield client


def test_the_default_model_answers_sensibly(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=DEFAULT_MODEL, messages=CAPITAL, temperature=0, max_tokens=24)

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 16])
def test_the_stream_says_what_the_whole_answer_says(client: openai.OpenAI, max_tokens: int) -> None:
    messages = [{"role": "user", "content": "Repeat: 🙂 né 夏天"}]
    whole = client.chat.completions.create(model=DEFAULT_MODEL, messages=messages, temperature=0, max_tokens=max_tokens)

    with client.chat.completions.create(
        model=DEFAULT_MODEL, messages=messages, temperature=0, max_tokens=max_tokens, stream=True
    ) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert text == whole.choices[0].message.content
    assert "�" not in text


def test_chinese_passes_through_unharmed(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=DEFAULT_MODEL, prompt="描述一下夏天🌞", echo=True, max_tokens=1, temperature=0
    )

    assert answer.choices[0].text.startswith("描述一下夏天🌞")


def test_errors_reach_the_official_client_with_their_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=DEFAULT_MODEL, messages=CAPITAL, top_p=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=CAPITAL)

    assert caught.value.param == "top_p"


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEFAULT_MODEL]
    assert client.models.retrieve(DEFAULT_MODEL).id == DEFAULT_MODEL


def test_logprobs_and_usage_have_the_clients_types(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=DEFAULT_MODEL,
        messages=CAPITAL,
        temperature=0,
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    entries = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content or ()]
    assert len(entries) == 3
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_sigterm_lets_a_running_stream_finish_and_exits_with_0(smollm2_path: Path) -> None:
    server = Server()
    server.wait_ready()

    async def stream_through_the_end() -> str:
        body = {
            "model": DEFAULT_MODEL,
            "prompt": "Once upon a time",
            "max_tokens": 40,
            "stream": True,
            "ignore_eos": True,
        }
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=90)) as session,
            session.post(f"{server.url}/v1/completions", json=body) as response,
        ):
            await response.content.readline()
            server.process.send_signal(signal.SIGTERM)
            return (await response.read()).decode()

    rest = asyncio.run(stream_through_the_end())

    assert rest.count('"finish_reason":"length"') == 1
    assert rest.rstrip().endswith("data: [DONE]")
    assert server.process.wait(timeout=PATIENCE_SECONDS) == 0
    server.stop()


def test_the_port_answers_before_the_model_is_loaded(smollm2_path: Path) -> None:
    server = Server()

    async def probe() -> tuple[int, int]:
        async with aiohttp.ClientSession(server.url) as session:
            health, ready = await session.get("/health"), await session.get("/ready")
            return health.status, ready.status

    statuses = asyncio.run(probe())

    assert statuses == (200, 503)
    assert server.stop() == 0


@pytest.mark.parametrize("arguments", [["--model", "/proc/absent/model"], ["no-such-file.toml"]])
def test_what_cannot_be_served_is_one_line_and_status_2(arguments: list[str], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("brlite")), "serve", *arguments, "--port", "0"]

    result = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, cwd=tmp_path)

    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if " INFO " not in line]
    assert len(errors) == 1
    assert errors[0].startswith("brlite: error: ")
