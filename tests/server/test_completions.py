"""Text completions as a client sees them."""

from __future__ import annotations

import math
from typing import Any

import aiohttp
import pytest

from brlite.dialects.event import Token, TokenText
from brlite.dialects.openai_chat import chat_logprobs
from brlite.dialects.openai_completions import completion_logprobs
from tests.fakes import reference_tokens
from tests.server.conftest import Client, MakeClient, completion_body

PATH = "/v1/completions"


def expected(prompt: bytes, num_tokens: int = 8) -> str:
    return bytes(reference_tokens(prompt, num_tokens)).decode()


def streamed_text(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"] if choice["index"] == index)


@pytest.mark.parametrize(
    "prompt", ["ab", ["ab"], [97, 98], [[97, 98]]], ids=["text", "list of texts", "token ids", "list of token ids"]
)
async def test_a_prompt_may_have_four_forms(client: Client, prompt: Any) -> None:
    answer = await client.complete(prompt)

    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == expected(b"ab")


async def test_several_prompts_times_n_are_numbered_prompt_by_prompt(client: Client) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3}

    answer = await client.complete(["ab", "cd"], **fields)
    events = await client.stream(PATH, completion_body(["ab", "cd"], **fields))

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [streamed_text(events, index) for index in range(4)] == [choice["text"] for choice in answer["choices"]]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 32


async def test_sixteen_tokens_are_the_default(client: Client) -> None:
    body = completion_body()
    del body["max_tokens"]

    _, answer = await client.post(PATH, body)

    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
async def test_echo_puts_the_prompt_first_whole_and_streamed(client: Client, prompt: Any) -> None:
    answer = await client.complete(prompt, echo=True, n=2)
    events = await client.stream(PATH, completion_body(prompt, echo=True, n=2))

    for index in range(2):
        assert answer["choices"][index]["text"] == "ab" + expected(b"ab")
        assert streamed_text(events, index) == "ab" + expected(b"ab")


async def test_echo_with_logprobs_scores_the_prompt(client: Client) -> None:
    answer = await client.complete("abc", echo=True, logprobs=1, max_tokens=2)

    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", *expected(b"abc", 2)]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][:2] == [None, {"b": -0.5}]


async def test_echo_alone_generates_nothing_that_is_seen_or_counted(client: Client) -> None:
    answer = await client.complete("abc", echo=True, logprobs=0, max_tokens=0)
    events = await client.stream(PATH, completion_body("abc", echo=True, logprobs=0, max_tokens=0))

    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0
    assert streamed_text(events) == "abc"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_failed_echo_counts_no_tokens(
    make_client: MakeClient, is_streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "brlite.access")
    client = await make_client(fault=lambda seq: "logits are not finite")
    body = completion_body("abc", echo=True, max_tokens=0)

    await (client.stream(PATH, body) if is_streamed else client.post(PATH, body))

    assert "completion_tokens=0" in caplog.text


def test_an_impossible_token_has_a_logprob_that_json_can_hold() -> None:
    tokens = [Token(TokenText(97, "a", b"a"), 0, -math.inf, ((TokenText(98, "b", b"b"), -math.inf),))]

    chat, completion = chat_logprobs(tokens), completion_logprobs(tokens)

    assert (chat.content[0].logprob, chat.content[0].top_logprobs[0].logprob) == (-9999.0, -9999.0)
    assert (completion.token_logprobs, completion.top_logprobs) == ([-9999.0], [{"a": -9999.0, "b": -9999.0}])


@pytest.mark.parametrize("ending", [{"logit_bias": {"256": 100}}, {"stop_token_ids": [97]}])
async def test_echo_alone_does_not_tell_how_the_hidden_token_ended(
    make_client: MakeClient, ending: dict[str, Any]
) -> None:
    client = await make_client(next_token=lambda context, seed: 256 if "logit_bias" in ending else 97)

    choice = (await client.complete("abc", echo=True, max_tokens=0, **ending))["choices"][0]

    assert choice == {"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}


async def test_offsets_go_on_through_a_stream(client: Client) -> None:
    events = await client.stream(PATH, completion_body("abc", echo=True, logprobs=0, max_tokens=3))

    offsets = [
        offset for event in events for choice in event["choices"] for offset in choice["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 1, 2, 3, 4, 5]


async def test_chinese_passes_unharmed(make_client: MakeClient) -> None:
    text = "描述一下夏天".encode()
    client = await make_client(next_token=lambda context, seed: text[(len(context) - len(text)) % len(text)])

    answer = await client.complete("描述一下夏天", echo=True, max_tokens=len(text))

    assert answer["choices"][0]["text"] == "描述一下夏天描述一下夏天"


async def test_nothing_follows_the_end_of_a_stream_that_one_prompt_failed(make_client: MakeClient) -> None:
    client = await make_client(fault=lambda seq: "not finite" if seq.start == 3 and seq.token_ids[0] == 120 else None)
    client.backend.next_token = lambda context, seed: 120 if context[0] == ord("X") else 97
    one_connection = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1))

    async with one_connection as session:
        for _ in range(3):
            body = completion_body(["XYZ", "abc"], max_tokens=30, stream=True)
            async with session.post(client.url + PATH, json=body) as response:
                events = (await response.text()).split("\n\n")
            async with session.get(client.url + "/version") as response:
                assert (await response.json()).keys() == {"version"}

    assert events[-2] == "data: [DONE]"
    assert '"error"' in events[-3]


async def test_a_suffix_asks_for_what_stands_before_it(client: Client) -> None:
    prompts = [[257, *before, 258, *b"cd", 259] for before in (b"ab", b"b")]

    answer = await client.complete(["ab", "b"], suffix="cd", max_tokens=4, return_token_ids=True)
    plain = await client.complete("ab", suffix="")

    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == prompts
    texts = [bytes(reference_tokens(prompt, 4)).decode() for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == [text.split("x")[0] for text in texts]
    assert plain["choices"] == (await client.complete("ab"))["choices"]


async def test_explain_and_render_show_the_prompt_of_an_infill(client: Client) -> None:
    body = completion_body("ab", suffix="cd")

    _, explained = await client.post("/explain", body)
    _, (rendered,) = await client.post("/v1/completions/render", body)

    assert explained["prompts"][0]["text"] == rendered["prompt"] == "<257>ab<258>cd<259>"


async def test_an_infill_ends_where_the_vocabulary_has_a_token_for_it(make_client: MakeClient) -> None:
    client = await make_client(next_token=lambda context, seed: b"abx"[len(context) % 3])

    infill, completion = await client.complete("ab", suffix="cd"), await client.complete("abcdefg")

    assert "x" not in infill["choices"][0]["text"]
    assert (infill["choices"][0]["finish_reason"], completion["choices"][0]["finish_reason"]) == ("stop", "length")


@pytest.mark.parametrize(
    "fields", [{"echo": True}, {"truncate_prompt_tokens": 4}, {"prompt": [97, 98]}, {"prompt": [[97], [98]]}]
)
async def test_a_suffix_that_cannot_be_obeyed_is_refused(client: Client, fields: dict[str, Any]) -> None:
    status, answer = await client.post("/v1/completions", {**completion_body("ab"), "suffix": "cd", **fields})

    assert (status, answer["error"]["param"]) == (400, "suffix")
