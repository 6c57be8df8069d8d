"""Logprobs: offsets in the text as sent, a name for each token, nothing told behind the end of the text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from brlite.app import create_app
from brlite.config.options import Config, LimitsConfig, ModelSpec
from brlite.dialects.event import Token, TokenText
from brlite.dialects.openai_completions import completion_logprobs
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from brlite.server.event_builder import OffsetCounter, prompt_offsets
from tests.fakes import ByteTokenizer
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TEXT = "おはよう 😀 then the river runs on"


def joined(events: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """One choice of a stream of completions, put together."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    names = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    return {
        "text": "".join(choice["text"] for choice in choices),
        "logprobs": {name: [value for each in logprobs for value in each[name]] for name in names},
    }


def check_completion(choice: dict[str, Any]) -> None:
    """The offsets lead to the tokens' own text, and the chosen token has one value."""
    text, logprobs = choice["text"], choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith(("bytes:", "<")):
            assert text[offset:].startswith(token), (token, offset)
        assert 0 <= offset <= len(text)
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top is None or top[token] == value


def test_tokens_of_parts_of_characters_begin_where_the_character_does() -> None:
    counter = OffsetCounter()
    parts = [b"a", b"\xf0", b"\x9f\x98", b"\x80", b"b", b"\xf0", b"c", b"\xe3\x81", b"\x82d", b"e"]

    assert [counter.add(part) for part in parts] == [0, 1, 1, 1, 2, 3, 4, 5, 5, 7]


class Pieces(ByteTokenizer):
    """A word's own space, and a BOS, as sentencepiece's vocabularies have them."""

    def token_bytes(self, token_id: int) -> bytes:
        return {256: b"<s>", 1: b" Hello", 2: b" wor", 3: b"ld", 4: b"ld"}[token_id]


def test_what_the_tokenizer_added_takes_no_room() -> None:
    assert prompt_offsets("Hello world", [256, 1, 2, 3], Pieces()) == [0, 0, 5, 9]  # type: ignore[arg-type]


def test_tokens_with_the_same_bytes_have_keys_of_their_own() -> None:
    third, fourth, second = TokenText(3, "ld", b"ld"), TokenText(4, "ld", b"ld"), TokenText(2, " wor", b" wor")

    logprobs = completion_logprobs([Token(third, 0, -1.0, ((fourth, -0.5), (third, -1.0), (second, -2.0)))])

    assert logprobs.top_logprobs == [{"ld": -1.0, r"bytes:\x6c\x64": -0.5, " wor": -2.0}]
    assert logprobs.token_logprobs == [-1.0]


async def test_tokens_go_by_their_ids_if_that_is_asked_for(client: Client) -> None:
    answer = await client.complete("a", logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)

    (token,) = answer["choices"][0]["logprobs"]["tokens"]
    assert token == f"token_id:{ord(answer['choices'][0]['text'])}"


@pytest.mark.parametrize("includes_stop", [False, True])
async def test_no_token_behind_a_stop_string_is_told(make_client: MakeClient, includes_stop: bool) -> None:
    text = b"one two three"
    client = await make_client(next_token=lambda context, seed: text[len(context) % len(text)])
    fields = {"stop": "two", "max_tokens": 12, "logprobs": 1, "include_stop_str_in_output": includes_stop}
    prompt = [97] * len(text)

    whole = (await client.complete(prompt, **fields))["choices"][0]
    streamed = joined(await client.stream(COMPLETION, completion_body(prompt, **fields)))
    chat = await client.chat("x" * 7, **{**fields, "logprobs": True})  # role and all have the text's length

    expected = "one two" if includes_stop else "one "
    assert whole["text"] == "".join(whole["logprobs"]["tokens"]) == expected
    assert streamed == {"text": whole["text"], "logprobs": whole["logprobs"]}
    choice = chat["choices"][0]
    assert (
        "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"] == expected
    )


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Path:
    return smollm2_path


@pytest.fixture
async def model(smollm2: Path) -> AsyncIterator[Client]:
    """A server of the real small model."""
    spec = ModelSpec(name="fake", path=str(smollm2), build_seq=256, build_batch=4)
    engine = await AsyncEngine.load(Config(model=(spec,)))
    async with (
        engine,
        HttpServer(create_app(engine, Config(model=(spec,))), "127.0.0.1", 0, LimitsConfig()) as server,
        aiohttp.ClientSession() as session,
    ):
        yield Client(session, server, engine, None)  # type: ignore[arg-type]


@pytest.mark.model
async def test_the_real_model_tells_its_tokens_in_the_text_as_sent(model: Client) -> None:
    fields = {"echo": True, "logprobs": 5, "max_tokens": 12, "n": 2, "temperature": 0.9, "seed": 3}

    whole = await model.complete(TEXT, **fields)
    events = await model.stream(COMPLETION, completion_body(TEXT, **fields))
    ids = (await model.post("/tokenize", {"prompt": TEXT}))[1]["tokens"]
    by_ids = await model.complete(ids, **fields)

    for index in range(2):
        choice = whole["choices"][index]
        check_completion(choice)
        streamed = joined(events, index)
        assert streamed == {"text": choice["text"], "logprobs": choice["logprobs"]}
        assert choice["text"].startswith(TEXT)
        assert by_ids["choices"][index]["logprobs"] == choice["logprobs"]
        assert any(token.startswith("bytes:") for token in choice["logprobs"]["tokens"])
        assert all(len(top) >= 5 for top in choice["logprobs"]["top_logprobs"][1:])
        assert choice["logprobs"]["text_offset"][len(ids)] == len(TEXT)


@pytest.mark.model
@pytest.mark.parametrize("stop", [None, " the"])
async def test_the_real_model_tells_a_chats_tokens_as_its_text(model: Client, stop: str | None) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 24, "n": 2, "seed": 7, "stop": stop}
    body = chat_body(TEXT, **fields, temperature=0.8)

    status, whole = await model.post(CHAT, body)
    events = await model.stream(CHAT, body)

    assert status == 200
    for index in range(2):
        choice = whole["choices"][index]
        content = choice["logprobs"]["content"]
        streamed = [
            entry
            for event in events
            for each in event["choices"]
            if each["index"] == index and each["logprobs"]
            for entry in each["logprobs"]["content"]
        ]
        assert streamed == content
        told = b"".join(bytes(entry["bytes"]) for entry in content if not entry["token"].startswith("<|"))
        if choice["stop_reason"] is None:
            assert told.startswith(choice["message"]["content"].encode())
        else:
            assert told == choice["message"]["content"].encode()
        for entry in content:
            assert all(
                top["logprob"] == entry["logprob"] for top in entry["top_logprobs"] if top["token"] == entry["token"]
            )
