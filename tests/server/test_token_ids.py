"""vLLM's `return_token_ids` and `prompt_logprobs`: the tokens of prompt and answer, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import reference_tokens
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


async def test_each_choice_of_a_completion_has_the_tokens_of_its_prompt_and_its_own(client: Client) -> None:
    answer = await client.complete(["ab", "xyz"], n=2, return_token_ids=True)

    found = [(choice["prompt_token_ids"], choice["token_ids"]) for choice in answer["choices"]]
    expected = [([*prompt], reference_tokens(prompt, 8)) for prompt in (b"ab", b"ab", b"xyz", b"xyz")]
    assert found == expected


async def test_a_chat_has_them_too(client: Client) -> None:
    answer = await client.chat(return_token_ids=True)

    prompt = bytes(answer["prompt_token_ids"])
    assert b"hello" in prompt
    assert answer["choices"][0]["token_ids"] == reference_tokens(prompt, 8)
    assert "prompt_token_ids" not in await client.chat()


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat_body(n=2)), (COMPLETION, completion_body("hello", n=2))])
async def test_a_stream_tells_each_token_once_and_the_prompt_at_first(
    client: Client, path: str, body: dict[str, Any]
) -> None:
    chunks = await client.stream(path, {**body, "return_token_ids": True})

    prompts = [
        found
        for chunk in chunks
        for found in (chunk.get("prompt_token_ids"), *map(prompt_of, chunk["choices"]))
        if found
    ]
    told: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            told[choice["index"]] += choice.get("token_ids", [])
    assert len(prompts) == 2
    assert told == dict.fromkeys((0, 1), reference_tokens(bytes(prompts[0]), 8))


async def test_tokens_of_a_held_back_text_come_with_the_next_chunk(make_client: MakeClient) -> None:
    client = await make_client(next_token=lambda context, seed: "é€".encode()[(len(context) - 1) % 5])

    chunks = await client.stream(COMPLETION, completion_body("x", max_tokens=5, return_token_ids=True))

    told = [choice["token_ids"] for chunk in chunks for choice in chunk["choices"]]
    assert [token_id for each in told for token_id in each] == list("é€".encode())
    assert told[0] == list("é".encode())
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [120]


async def test_prompt_logprobs_have_vllms_shape(client: Client) -> None:
    chat = await client.chat(prompt_logprobs=2)
    completion = await client.complete("abc", prompt_logprobs=2, n=2)
    echoed = await client.complete("abc", echo=True, logprobs=2)

    first, second, third = completion["choices"][1]["prompt_logprobs"]
    logprobs = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    assert second["98"]["decoded_token"] == "b"
    assert (second["98"]["logprob"], third["99"]["logprob"]) == (logprobs[1], logprobs[2])
    assert {1, 2} <= {each["rank"] for each in second.values()}
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 1, "stream": True},
        {"prompt_logprobs": -1},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": 1, "echo": True, "logprobs": 2},
    ],
)
async def test_prompt_logprobs_that_cannot_be_told_are_refused(client: Client, fields: dict[str, Any]) -> None:
    status, answer = await client.post(COMPLETION, completion_body("abc", **fields))

    assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")


def prompt_of(choice: dict[str, Any]) -> Any:
    return choice.get("prompt_token_ids")
