"""Chat completions as a client sees them."""

from __future__ import annotations

from typing import Any

import pytest

from brlite.dialects.fields import MAX_REPORTED_FIELDS
from tests.fakes import ByteTokenizer, reference_tokens
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

PROMPT = b"user:hello\n"
PATH = "/v1/chat/completions"


def expected(num_tokens: int = 8, prompt: bytes = PROMPT) -> str:
    return bytes(reference_tokens(prompt, num_tokens)).decode()


def streamed_text(events: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def test_many_variables_that_no_template_reads_give_few_warnings(client: Client) -> None:
    answer = await client.chat(chat_template_kwargs={f"v{number}": number for number in range(1000)})

    assert len(answer["warnings"]) == MAX_REPORTED_FIELDS


async def test_a_chat_is_answered_in_openais_shape(client: Client) -> None:
    answer = await client.chat()

    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"content": expected(), "role": "assistant", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 8,
        "total_tokens": len(PROMPT) + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize("max_tokens", range(1, 9))
async def test_the_stream_says_what_the_whole_answer_says(make_client: MakeClient, max_tokens: int) -> None:
    text = "né 🙂 夏天".encode()
    client = await make_client(next_token=lambda context, seed: text[(len(context) - len(PROMPT)) % len(text)])
    whole = await client.chat(max_tokens=max_tokens)

    events = await client.stream(PATH, chat_body(max_tokens=max_tokens))

    assert streamed_text(events) == whole["choices"][0]["message"]["content"]
    assert text.decode().startswith(streamed_text(events))
    assert "�" not in streamed_text(events)


async def test_a_stream_begins_with_the_role_and_ends_with_one_finish_reason(client: Client) -> None:
    events = await client.stream(PATH, chat_body())

    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    finish_reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert finish_reasons == [None] * (len(events) - 1) + ["length"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert all("usage" not in event for event in events)


async def test_usage_comes_last_in_a_stream_if_asked_for(client: Client) -> None:
    events = await client.stream(PATH, chat_body(stream_options={"include_usage": True}, n=2))

    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 16
    assert all(event["usage"] is None for event in events[:-1])


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"stop": "zz"}, {"n": 2}])
async def test_the_last_token_comes_before_the_chunk_with_the_finish_reason(
    client: Client, path: str, fields: dict[str, Any]
) -> None:
    body = chat_body(**fields) if path == PATH else completion_body("hello", **{**fields, "logprobs": 0})

    choices = [choice for event in await client.stream(path, body) for choice in event["choices"]]

    ends = [choice for choice in choices if choice["finish_reason"] is not None]
    assert len(ends) == fields.get("n", 1)
    assert all(not choice.get("text") and not choice.get("delta", {}).get("content") for choice in ends)


async def test_usage_comes_with_every_chunk_if_that_is_asked_for(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}

    events = await client.stream(PATH, chat_body(stream_options=options))

    assert [event["usage"]["completion_tokens"] for event in events[1:]] == [*range(1, 9), 8, 8]
    assert {event["usage"]["prompt_tokens"] for event in events[1:]} == {len(PROMPT)}


async def test_a_second_chat_reports_the_cached_part_of_its_prompt(client: Client) -> None:
    await client.chat()

    answer = await client.chat()

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 8


async def test_n_choices_are_distinct_and_repeat_with_the_seed(client: Client) -> None:
    first = await client.chat(n=3, temperature=1.0, seed=11)
    events = await client.stream(PATH, chat_body(n=3, temperature=1.0, seed=11))

    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 3
    assert [streamed_text(events, index) for index in range(3)] == texts


async def test_logprobs_have_openais_form(client: Client) -> None:
    answer = await client.chat(logprobs=True, top_logprobs=2, max_tokens=2)

    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(expected(2))
    assert content[0]["bytes"] == [ord(expected(1))]
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.5, -1.5]


async def test_logprobs_alone_have_no_alternatives(client: Client) -> None:
    answer = await client.chat(logprobs=True, max_tokens=1)

    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_text_parts_are_joined(client: Client) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]

    answer = await client.chat(parts)

    assert answer["choices"][0]["message"]["content"] == expected()


async def test_a_turn_of_another_servers_answer_may_come_back_as_history(client: Client) -> None:
    turn = {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}

    status, answer = await client.post(PATH, chat_body(messages=[turn]))

    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected(prompt=b"assistant:y\n")


async def test_obfuscation_that_is_not_wanted_is_not_there(client: Client) -> None:
    options = {"include_usage": True, "include_obfuscation": False}

    events = await client.stream(PATH, chat_body(stream_options=options))

    assert events[-1]["usage"]["completion_tokens"] == 8


async def test_max_completion_tokens_is_max_tokens(client: Client) -> None:
    body = chat_body(max_completion_tokens=3)
    del body["max_tokens"]

    _, answer = await client.post(PATH, body)

    assert answer["usage"]["completion_tokens"] == 3


async def test_what_was_cut_or_ignored_is_said(client: Client) -> None:
    answer = await client.chat(max_tokens=1000, frobnicate=1)
    events = await client.stream(PATH, chat_body(max_tokens=1000, frobnicate=1))

    assert answer["warnings"] == [
        "the field 'frobnicate' is not known and was ignored",
        "max_tokens 1000 was cut to 32, half of build_seq 64",
    ]
    assert events[-1]["warnings"] == answer["warnings"]
    assert all("warnings" not in event for event in events[:-1])


async def test_a_stop_string_is_reported(make_client: MakeClient) -> None:
    text = b"one two three"
    client = await make_client(next_token=lambda context, seed: text[len(context) - len(PROMPT)])

    answer = await client.chat(stop="two", max_tokens=12)

    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "two")


async def test_a_model_without_a_template_sends_its_users_to_completions(make_client: MakeClient) -> None:
    client = await make_client(tokenizer=ByteTokenizer(has_chat_template=False))

    status, answer = await client.post(PATH, chat_body())

    assert status == 400
    assert "Error in applying chat template from request" in answer["error"]["message"]
    assert "/v1/completions" in answer["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_error_of_the_engine_reaches_the_client(make_client: MakeClient, is_streamed: bool) -> None:
    client = await make_client(fault=lambda seq: "logits are not finite" if seq.start > len(PROMPT) else None)

    if is_streamed:
        error = (await client.stream(PATH, chat_body()))[-1]["error"]
    else:
        status, answer = await client.post(PATH, chat_body())
        error = answer["error"]
        assert status == 500

    assert error["type"] == "server_error"
    assert client.engine.stats.num_used_blocks == 0
