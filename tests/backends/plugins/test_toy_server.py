"""`brlite serve --engine toy`, the fake server for other people's tests: the command, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.limits import PATIENCE_SECONDS

MODEL = "any-name"
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


class Server:
    """A toy's process on a free port, ready to be asked."""

    def __init__(self, *options: str) -> None:
        arguments = [word for option in options for word in ("--engine-option", option)]
        command = [str(Path(sys.executable).with_name("brlite")), "serve", "--engine", "toy", "--model", MODEL]
        self.process = subprocess.Popen([*command, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True)
        self.url = self._read_until(r"listening on (http://\S+);")
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until its model is loaded, once more if it was before."""
        self._read_until(r"model \S+ is (ready) on cpu")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_SECONDS)
        finally:
            self.process.kill()
            assert self.process.stderr is not None
            self.process.stderr.close()

    def _read_until(self, pattern: str) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("the server ended")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_it_answers_a_chat_with_the_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION)

    assert answer.choices[0].message.content == "Why is the sky blue?"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == "fp_toy1"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Why is the sky blue?") + 1


def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert "".join(pieces) == "Why is the sky blue?"
    assert len(pieces) > 10


def test_echo_logprobs_and_alternatives_are_there(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=2, max_tokens=2)

    choice = answer.choices[0]
    assert choice.text == "abcab"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:] if logprob is not None)


def test_stop_strings_lengths_and_several_choices_work(client: openai.OpenAI) -> None:
    stopped = client.completions.create(model=MODEL, prompt="one two three", stop=" three", max_tokens=50)
    cut = client.completions.create(model=MODEL, prompt="one two three", n=3, max_tokens=7)

    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("one two", "stop")
    assert [(choice.text, choice.finish_reason) for choice in cut.choices] == [("one two", "length")] * 3


def test_a_seed_makes_wild_texts_repeatable(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(model=MODEL, prompt="x" * 30, temperature=6, seed=seed, max_tokens=30)
        return answer.choices[0].text

    texts = [ask(1), ask(1), ask(2)]

    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != "x" * 30


async def test_many_at_once_each_get_their_own(server: Server) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS
    ) as client:
        questions = [f"question number {number}" for number in range(40)]
        answers = await asyncio.gather(
            *(client.completions.create(model=MODEL, prompt=question, max_tokens=40) for question in questions)
        )

    assert [answer.choices[0].text for answer in answers] == questions


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not show what a process has loaded")
def test_it_runs_without_torch(server: Server) -> None:
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()

    assert "_multiarray_umath" in loaded
    assert "libtorch" not in loaded


def test_faults_come_as_they_were_asked_for() -> None:
    server = Server("fail_every=4", "tokens_per_second=500", "start_seconds=0.01")
    try:
        with server.client() as client:
            with pytest.raises(openai.InternalServerError, match="The server had an error"):
                client.completions.create(model=MODEL, prompt="a long question")
            answer = client.completions.create(model=MODEL, prompt="ok", max_tokens=2)
            with (
                pytest.raises(openai.APIError, match="The server had an error"),
                client.completions.create(model=MODEL, prompt="a long question", stream=True) as stream,
            ):
                list(stream)
    finally:
        assert server.stop() == 0

    assert answer.choices[0].text == "ok"


def test_a_lost_engine_is_opened_again() -> None:
    server = Server("lost_at=12")
    try:
        with server.client() as client:
            with pytest.raises(openai.InternalServerError, match="The server had an error"):
                client.completions.create(model=MODEL, prompt="more than twelve steps", max_tokens=30)
            server.wait_ready()
            answer = client.completions.create(model=MODEL, prompt="again")
    finally:
        assert server.stop() == 0

    assert answer.choices[0].text == "again"
