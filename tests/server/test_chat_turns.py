"""What the turns of a chat may hold, and how the prompt ends: continued, echoed, cut."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import ByteTokenizer, reference_tokens
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def choices_of(chunks: list[dict[str, Any]], index: int) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


@pytest.mark.parametrize("content", ["Once", [{"type": "text", "text": "On"}, {"type": "text", "text": "ce"}]])
async def test_a_chat_echoes_the_message_that_it_continues(client: Client, content: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    body = chat_body(messages=messages, continue_final_message=True, n=2, logprobs=True)

    _, plain = await client.post(CHAT, body)
    _, echoed = await client.post(CHAT, {**body, "echo": True})
    chunks = await client.stream(CHAT, {**body, "echo": True})
    _, question = await client.post(CHAT, chat_body(echo=True))

    expected = ["Once" + choice["message"]["content"] for choice in plain["choices"]]
    assert [choice["message"]["content"] for choice in echoed["choices"]] == expected
    told = ["".join(each["delta"].get("content", "") for each in choices_of(chunks, index)) for index in range(2)]
    assert told == expected
    assert [choice["logprobs"] for choice in echoed["choices"]] == [choice["logprobs"] for choice in plain["choices"]]
    assert question["choices"] == (await client.chat())["choices"]


async def test_a_strict_request_may_have_its_prompt_cut_as_it_says(client: Client) -> None:
    answer = await client.complete("0123456789", truncate_prompt_tokens=4, strict=True)

    assert answer["warnings"] == ["a prompt of 10 tokens was cut to 4 by truncate_prompt_tokens"]


@pytest.mark.parametrize(
    ("given", "begins"), [({}, ""), ({"add_special_tokens": False}, ""), ({"add_special_tokens": True}, "<s>")]
)
async def test_a_chat_has_the_tokenizers_own_tokens_where_it_asks_for_them(
    make_client: MakeClient, given: dict[str, Any], begins: str
) -> None:
    class Marking(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
            return [*b"<s>" * add_special_tokens, *text.encode()]

    client = await make_client(tokenizer=Marking())
    prompt = f"{begins}user:hello\n".encode()

    answer = await client.chat(**given)

    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == bytes(reference_tokens(prompt, 8)).decode()


async def test_what_came_with_another_servers_answer_may_come_back(client: Client) -> None:
    turn = {
        "role": "assistant",
        "content": [{"type": "text", "text": "y", "cache_control": {"type": "ephemeral"}}],
        "id": "msg_1",
        "annotations": [{"type": "url_citation"}],
        "reasoning_content": "hm",
        "frobnicate": 1,
    }

    status, answer = await client.post(CHAT, chat_body(messages=[turn]))

    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == bytes(reference_tokens(b"assistant:y\n", 8)).decode()


@pytest.mark.parametrize("turn", [{"content": None}, {}])
@pytest.mark.parametrize("role", ["assistant", "tool"])
async def test_a_turn_that_says_nothing_is_empty_text(client: Client, turn: dict[str, Any], role: str) -> None:
    answers = [
        (await client.post(CHAT, chat_body(messages=[{"role": role, **each}])))[1] for each in (turn, {"content": ""})
    ]

    assert answers[0]["choices"] == answers[1]["choices"]
    assert "warnings" not in answers[0]


async def test_a_refusal_in_the_history_is_what_was_said(client: Client) -> None:
    turn = {"role": "assistant", "content": None, "refusal": "y"}
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "y"}]}

    texts = [
        (await client.post(CHAT, chat_body(messages=[each])))[1]["choices"][0]["message"]["content"]
        for each in (turn, part)
    ]

    assert texts == [bytes(reference_tokens(b"assistant:y\n", 8)).decode()] * 2


async def test_the_prompt_is_cut_where_it_was_asked_for_and_the_answer_says_so(client: Client) -> None:
    cut = await client.complete("0123456789", truncate_prompt_tokens=4)
    right = await client.complete("0123456789", truncate_prompt_tokens=4, truncation_side="right", echo=True)
    far_too_long = await client.complete("x" * 1000, truncate_prompt_tokens=-1, max_tokens=8)
    chat = await client.chat("x" * 1000, truncate_prompt_tokens=-1, max_tokens=None, max_completion_tokens=None)

    assert cut["usage"]["prompt_tokens"] == 4
    assert cut["choices"][0]["text"] == bytes(reference_tokens(b"6789", 8)).decode()
    assert cut["warnings"] == ["a prompt of 10 tokens was cut to 4 by truncate_prompt_tokens"]
    assert right["choices"][0]["text"].startswith("0123")
    assert far_too_long["usage"]["prompt_tokens"] == 64 - 8
    assert (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]) == (32, 32)


@pytest.mark.parametrize("value", [0, -2, 1.5])
async def test_a_cut_to_nothing_is_refused(client: Client, value: float) -> None:
    status, answer = await client.post(COMPLETION, completion_body(truncate_prompt_tokens=value))

    assert (status, answer["error"]["param"]) == (400, "truncate_prompt_tokens")


async def test_the_last_message_is_continued(client: Client) -> None:
    messages = [{"role": "assistant", "content": "Once"}]

    _, answer = await client.post(CHAT, chat_body(messages=messages, continue_final_message=True))
    status, refused = await client.post(
        CHAT, chat_body(messages=messages, continue_final_message=True, add_generation_prompt=True)
    )

    assert answer["choices"][0]["message"]["content"] == bytes(reference_tokens(b"assistant:Once", 8)).decode()
    assert (status, refused["error"]["param"]) == (400, "continue_final_message")


async def test_an_image_is_refused_as_an_image(client: Client) -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]

    status, answer = await client.post(CHAT, chat_body(parts))

    assert (status, answer["error"]["param"]) == (400, "messages[0].content[1]")
    assert "its type is 'image_url', and this server takes text only" in answer["error"]["message"]
