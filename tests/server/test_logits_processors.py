"""Logits processors by name over HTTP: a package with entry points, on a real server with the toy engine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from brlite.app import create_app
from brlite.commands.check import inspect_model
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.engine.logits_processors import load_factories
from brlite.errors import ConfigError
from brlite.http.listen import HttpServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODULE = """
import threading
import numpy as np
from asyncio import CancelledError

NUM_MADE = []
GATE = threading.Event()

def spell(tokenizer, text="ab", *, repeat=True):
    if not isinstance(text, str) or not text:
        raise ValueError("text must be a string that is not empty")
    token_ids = tokenizer.encode_continuation(text)
    NUM_MADE.append(text)

    def process(output, logits):
        if not repeat and len(output) >= len(token_ids):
            raise IndexError("the text is over")
        found = np.full_like(logits, -np.inf)
        found[token_ids[len(output) % len(token_ids)]] = 0
        return found

    return process

def slow(tokenizer):
    NUM_MADE.append("slow")
    assert GATE.wait(120)
    return spell(tokenizer)

def long(tokenizer):
    raise ValueError("x" * 1000)

def broken(tokenizer, kind="RuntimeError"):
    errors = {"RuntimeError": RuntimeError, "CancelledError": CancelledError, "SystemExit": SystemExit}
    if kind in errors:
        raise errors[kind]("a secret of the operator")
    return None
"""
PAGE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text(encoding="utf-8").split("## Logits processors")[1]
PAGE_MODULE, PAGE_BODY = (PAGE.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "json"))
ENTRY_POINTS = """
[brlite.logits_processors]
ban_text = processors_of_the_page:ban_text
spell = spelling_processors:spell
broken = spelling_processors:broken
slow = spelling_processors:slow
long = spelling_processors:long
forbidden = never_imported:anything
missing = no_such_module:anything
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package as pip installs it: a module, and a folder with its entry points."""
    (tmp_path / "spelling_processors.py").write_text(MODULE)
    (tmp_path / "processors_of_the_page.py").write_text(PAGE_MODULE)
    (tmp_path / "never_imported.py").write_text("raise SystemExit('it was imported')")
    info = tmp_path / "spelling_processors-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spelling-processors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("spelling_processors", "processors_of_the_page"):
        sys.modules.pop(name, None)


def toy_config(*names: str) -> Config:
    engine = EngineConfig(name="toy", logits_processors=names)
    return Config(model=(ModelSpec(name="toy", build_seq=128, build_batch=8),), engine=engine)


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def post(self, path: str, **fields: Any) -> tuple[int, Any]:
        async with self._session.post(self._url + path, json={"model": "toy", **fields}) as response:
            return response.status, await response.json()

    async def complete(self, prompt: str = "hello", **fields: Any) -> Any:
        status, answer = await self.post(COMPLETIONS, prompt=prompt, temperature=0, **{"max_tokens": 6, **fields})
        assert status == 200, answer
        return answer["choices"]

    async def stream(self, **fields: Any) -> list[dict[str, Any]]:
        body = {"model": "toy", "stream": True, "temperature": 0, "max_tokens": 6, **fields}
        async with self._session.post(self._url + CHAT, json=body) as response:
            assert response.status == 200
            lines = [line.decode().strip() async for line in response.content]
        return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]

    async def metrics(self) -> str:
        async with self._session.get(self._url + "/metrics") as response:
            return await response.text()


@pytest.fixture
async def client(package: None) -> AsyncIterator[Client]:
    config = toy_config("spell", "broken", "ban_text", "slow", "long")
    async with (
        HttpServer(create_app(config), "127.0.0.1", 0, config.limits, grace_seconds=0.2) as server,
        aiohttp.ClientSession() as session,
    ):
        yield Client(session, server.url)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("spell", "ababab"),
        ({"qualname": "spell"}, "ababab"),
        ({"qualname": "spell", "args": ["xyz"]}, "xyzxyz"),
        ({"qualname": "spell", "args": None, "kwargs": {"text": "no"}}, "nonono"),
    ],
)
async def test_a_request_names_a_processor_as_it_does_with_vllm(client: Client, item: Any, text: str):
    (choice,) = await client.complete(logits_processors=[item])

    assert (choice["text"], choice["finish_reason"]) == (text, "length")


async def test_the_example_of_the_page_bans_its_text(client: Client):
    status, answer = await client.post(CHAT, **json.loads(PAGE_BODY), temperature=0, max_tokens=5)
    refused, error = await client.post(COMPLETIONS, prompt="x", logits_processors=["ban_text"])

    assert status == 200
    assert answer["choices"][0]["message"]["content"][0] == "H"
    assert "e" not in answer["choices"][0]["message"]["content"]
    assert (refused, "required positional argument: 'text'" in error["error"]["message"]) == (400, True)


async def test_every_dialect_takes_it(client: Client):
    fields = {"logits_processors": ["spell"], "temperature": 0}

    _, chat = await client.post(CHAT, messages=[{"role": "user", "content": "hi"}], max_tokens=4, **fields)
    _, response = await client.post("/v1/responses", input="hi", max_output_tokens=4, **fields)
    _, message = await client.post("/v1/messages", messages=[{"role": "user", "content": "hi"}], max_tokens=4, **fields)

    assert chat["choices"][0]["message"]["content"] == "abab"
    assert response["output"][0]["content"][0]["text"] == "abab"
    assert message["content"][0]["text"] == "abab"


async def test_others_are_answered_as_without_it_and_each_answer_has_its_own(client: Client):
    alone = await client.complete()

    edited, *others = await asyncio.gather(
        client.complete(["one", "two"], n=2, logits_processors=["spell"]), *(client.complete() for _ in range(4))
    )

    assert others == [alone] * 4
    assert [choice["text"] for choice in edited] == ["ababab"] * 4
    assert sys.modules["spelling_processors"].NUM_MADE == ["ab"] * 4
    metrics = await client.metrics()
    assert 'brlite:logits_processor_calls_total{model_name="toy"} 24.0' in metrics
    assert "brlite:logits_processor_seconds_total" in metrics


async def test_a_processor_that_fails_ends_its_own_stream_with_a_reason(client: Client):
    fails = [{"qualname": "spell", "args": ["abc"], "kwargs": {"repeat": False}}]
    chat = {"messages": [{"role": "user", "content": "hello"}]}

    failed, whole = await asyncio.gather(client.stream(**chat, logits_processors=fails), client.stream(**chat))

    assert "".join(choice["delta"].get("content") or "" for choice in failed) == "abc"
    assert failed[-1]["finish_reason"] == "error"
    assert failed[-1]["stop_reason"] == "the logits processor spell failed: IndexError"
    assert whole[-1]["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("forbidden", "'forbidden' is not allowed on this server; allowed are ban_text, broken, long, slow, spell"),
        ("os.system", "'os.system' is not allowed"),
        ({"qualname": "spelling_processors.spell"}, "is not allowed"),
        ({"qualname": "spell", "kwargs": {"text": ""}}, "spell: text must be a string that is not empty"),
        ({"qualname": "spell", "kwargs": {"colour": 1}}, "unexpected keyword argument 'colour'"),
        ({"qualname": "spell", "args": [1, 2, 3]}, "positional argument"),
        ("long", "long: " + "x" * 300 + "… (the first 300 of 1000 characters)"),
        ({"qualname": "spell", "code": "x"}, "logits_processors must be a list"),
        (7, "logits_processors must be a list"),
    ],
)
async def test_what_is_wrong_is_a_400_before_the_200(client: Client, item: Any, text: str, is_streamed: bool):
    status, answer = await client.post(COMPLETIONS, prompt="x", stream=is_streamed, logits_processors=[item])

    assert (status, answer["error"]["param"]) == (400, "logits_processors")
    assert text in answer["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((kind, "a secret of the operator") for kind in ("RuntimeError", "CancelledError", "SystemExit")),
        ("none", "the factory returned NoneType, which cannot be called"),
    ],
)
async def test_a_factory_that_breaks_is_no_fault_of_the_client(
    client: Client, caplog: pytest.LogCaptureFixture, kind: str, text: str
):
    item = {"qualname": "broken", "args": [kind]}

    status, answer = await client.post(COMPLETIONS, prompt="x", logits_processors=[item])

    assert status == 500
    assert "secret" not in answer["error"]["message"]
    assert text in caplog.text


async def test_a_slow_factory_delays_no_grammar_and_ends_at_its_requests_timeout(client: Client):
    slow = asyncio.create_task(client.complete(logits_processors=["slow"]))
    late, refusal = await client.post(COMPLETIONS, prompt="x", logits_processors=["slow"], timeout=0.05)
    (choice,) = await client.complete(guided_choice=["yes"])
    assert not slow.done()
    sys.modules["spelling_processors"].GATE.set()

    (made,) = await slow

    assert (choice["text"], made["text"]) == ("yes", "ababab")
    assert (late, refusal["error"]["code"]) == (408, "request_timeout")


async def test_a_server_that_allows_none_says_so(package: None):
    config = toy_config()
    async with (
        HttpServer(create_app(config), "127.0.0.1", 0, config.limits, grace_seconds=0.2) as server,
        aiohttp.ClientSession() as session,
    ):
        _, answer = await Client(session, server.url).post(COMPLETIONS, prompt="x", logits_processors=["spell"])

    assert "'spell' is not allowed on this server; it allows no logits processors" in answer["error"]["message"]


async def test_explain_shows_the_names_and_calls_no_processor(client: Client):
    item = {"qualname": "spell", "args": None, "kwargs": {"text": "x"}}

    status, answer = await client.post("/explain", prompt="hello", logits_processors=[item])

    assert status == 200
    assert answer["parameters"]["logits_processors"] == {"value": [item], "from": "request"}


async def test_a_beam_search_refuses_it(client: Client):
    status, answer = await client.post(
        COMPLETIONS, prompt="x", use_beam_search=True, temperature=0, n=2, logits_processors=["spell"]
    )

    assert (status, answer["error"]["param"]) == (400, "logits_processors")


async def test_code_of_a_client_is_refused_and_the_other_way_is_named(client: Client):
    status, answer = await client.post(COMPLETIONS, prompt="x", custom_logit_processor="80049567")

    assert (status, answer["error"]["param"]) == (400, "custom_logit_processor")
    assert "logits_processors" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such", "there is no entry point 'no_such' in brlite.logits_processors; there are .*spell"),
        ("missing", "cannot be imported: ModuleNotFoundError"),
        ("forbidden", "cannot be imported: SystemExit: it was imported"),
    ],
)
def test_a_name_of_the_config_that_is_not_installed_is_an_error_at_the_start(package: None, name: str, text: str):
    with pytest.raises(ConfigError, match=text):
        load_factories([name])
    with pytest.raises(ConfigError, match=text):
        inspect_model(ModelSpec(name="toy"), EngineConfig(name="toy", logits_processors=(name,)))
