"""Which prompts begin alike: those for which one server's prefix cache has something."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brlite.proxy.prompt_start import DIGEST_BYTES, MAX_MESSAGES, MAX_PARTS, prompt_start
from tests.proxy.test_request_model import json_values

LONG = "x" * 12_000


def start(num_bytes: int = 100, **fields: Any) -> bytes:
    return prompt_start(json.dumps(fields).encode(), num_bytes)


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_chats_share_their_beginning_up_to_the_first_user_message() -> None:
    opening = [says("system", "be brief"), says("user", "hi")]

    first = start(messages=opening, model="a")
    second = start(messages=[*opening, says("assistant", "yes?"), says("user", "bye")], temperature=1)

    assert first == second != b""


@pytest.mark.parametrize(
    "other",
    [
        [says("system", "be brief"), says("user", "ho")],
        [says("system", "be long"), says("user", "hi")],
        [says("developer", "be brief"), says("user", "hi")],
        [says("system", "be "), says("user", "briefhi")],
        [says("system", "be brief"), says("assistant", ""), says("user", "hi")],
        [says("user", "hi")],
    ],
)
def test_chats_that_begin_otherwise_differ(other: list[Any]) -> None:
    assert start(messages=other) != start(messages=[says("system", "be brief"), says("user", "hi")])


@pytest.mark.parametrize(
    "fields",
    [
        lambda text: {"messages": [says("system", LONG + text), says("user", "hi")]},
        lambda text: {"messages": [says("system", [{"type": "text", "text": LONG + text}]), says("user", "hi")]},
        lambda text: {"messages": [says("system", "x"), says("assistant", LONG + text), says("user", "hi")]},
        lambda text: {"system": LONG + text, "messages": [says("user", "hi")]},
        lambda text: {"system": [{"type": "text", "text": LONG + text}], "messages": [says("user", "hi")]},
        lambda text: {"instructions": LONG + text, "input": "hi"},
        lambda text: {"instructions": LONG, "input": text},
        lambda text: {"instructions": LONG, "input": [says("user", [{"type": "input_text", "text": text}])]},
        lambda text: {"tools": [{"name": LONG + text}], "messages": [says("user", "hi")]},
    ],
)
def test_all_that_stands_before_the_first_user_message_counts_however_long(fields: Any) -> None:
    starts = [start(**fields(text)) for text in "aab"]

    assert starts[0] == starts[1] != starts[2]


def test_of_a_users_message_and_of_a_prompt_so_many_bytes_count() -> None:
    texts = ["é" * 50 + end for end in ("", "one", "two")]

    assert len({start(21, messages=[says("user", text)]) for text in texts}) == 1
    assert len({start(21, prompt=text) for text in texts}) == 1
    assert len({start(200, prompt=text) for text in texts}) == 3


def test_content_in_parts_counts_as_its_texts() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    parts = [{"type": "text", "text": "what is "}, image, {"type": "text", "text": "this"}]

    assert start(messages=[says("user", parts)]) == start(messages=[says("user", "what is this")])


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        (["once upon", "a time"], "once upon"),
        ([[1, 23], [4]], [1, 23]),
        ([10, 11, 12, 1], [10, 11, 12, 1, 5]),
    ],
)
def test_a_completion_begins_with_its_first_prompt(prompt: Any, same: Any) -> None:
    assert start(11, prompt=prompt) == start(11, prompt=same) != b""


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"messages":null,"prompt":null}',
        b'{"messages":[]}',
        b'{"messages":"hi"}',
        b'{"messages":["hi"]}',
        b'{"messages":{"role":"user"}}',
        b'{"prompt":[]}',
        b'{"prompt":""}',
        b'{"prompt":5}',
        b'{"prompt":{"a":1}}',
        b'{"prompt":[1e999]}',
        b'{"prompt":"\\ud800"}',
    ],
)
def test_where_there_is_no_prompt_there_is_no_beginning(body: bytes) -> None:
    assert prompt_start(body, 100) == b""


@given(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("messages", "prompt", "input", "system", "instructions", "tools"), json_values)
    )
)
@example({"messages": [{"role": {"a": 1}, "content": [{"text": 1}, "x", {"text": "y"}]}]})
def test_the_beginning_of_anything_is_a_digest_or_nothing(fields: dict[str, Any]) -> None:
    assert len(prompt_start(json.dumps(fields).encode(), 7)) in (0, DIGEST_BYTES)


@given(st.binary())
def test_no_bytes_raise_anything(body: bytes) -> None:
    assert prompt_start(body, 7) == b"" or body


def test_a_byte_order_mark_is_no_part_of_a_prompt() -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],"model":"m"}'

    assert prompt_start(b"\xef\xbb\xbf" + body, 100) == prompt_start(body, 100) != b""


def test_of_very_many_parts_the_first_are_compared() -> None:
    parts = [{"type": "text", "text": "x"}] * MAX_PARTS

    assert start(messages=[says("user", [*parts, {"text": "a"}])]) == start(messages=[says("user", parts)])
    assert start(messages=[says("user", parts[1:])], num_bytes=2000) != start(
        messages=[says("user", parts)], num_bytes=2000
    )


def test_of_very_many_messages_the_first_are_compared() -> None:
    opening = [says("system", str(number)) for number in range(MAX_MESSAGES)]

    assert start(messages=[*opening, says("system", "a")]) == start(messages=[*opening, says("system", "b")])
    assert start(messages=[*opening[:-1], says("system", "a")]) != start(messages=opening)
