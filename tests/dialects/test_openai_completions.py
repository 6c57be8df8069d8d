"""Golden pairs of the completions dialect: a body and what it asks for, events and their bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from brlite.config.options import LimitsConfig
from brlite.dialects.event import Event, Token, TokenText, TokenUsage
from brlite.dialects.generation import Generation, Text, TokenIds
from brlite.dialects.openai_completions import DIALECT, CompletionEncoder, decode
from brlite.sampling_params import SamplingParams


def decoded(prompt: object = "ab", **fields: Any) -> Generation:
    return decode(json.dumps({"prompt": prompt, **fields}).encode(), LimitsConfig())


def encoder(call: Generation) -> CompletionEncoder:
    made = DIALECT.make_encoder(call, "cmpl-1", "m", "")
    assert isinstance(made, CompletionEncoder)
    made._common["created"] = 7
    return made


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", (Text("ab"),)),
        (["ab", "c"], (Text("ab"), Text("c"))),
        ([1, 2], (TokenIds([1, 2]),)),
        ([[1], [2, 3]], (TokenIds([1]), TokenIds([2, 3]))),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, prompts: tuple[object, ...]) -> None:
    assert decoded(prompt).prompts == prompts


def test_special_tokens_can_be_left_off() -> None:
    assert decoded(add_special_tokens=False).prompts == (Text("ab", add_special_tokens=False),)


def test_sixteen_tokens_are_the_default_and_logprobs_may_be_false() -> None:
    assert decoded(logprobs=False).params == SamplingParams(max_tokens=16)


def test_an_echo_has_the_prompts_logprobs_and_may_be_all() -> None:
    call = decoded(echo=True, max_tokens=0, logprobs=2)

    assert (call.echo, call.is_echo_only) == (True, True)
    assert call.params == SamplingParams(max_tokens=1, logprobs=2, prompt_logprobs=2)


def test_a_chunk_byte_for_byte() -> None:
    chunk = encoder(decoded()).encode(Event(choice=3, text="a", finish_reason="stop", stop_reason=5))

    assert chunk == (
        b'data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":[{"index":3,"text":"a",'
        b'"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
        b'data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"m","choices":[{"index":3,"text":"",'
        b'"logprobs":null,"finish_reason":"stop","stop_reason":5}]}\n\n'
    )


def test_a_stream_opens_with_nothing_and_ends_with_done() -> None:
    made = encoder(decoded())

    assert made.opening(TokenUsage(1, 0, 0)) == b""
    assert made.closing(TokenUsage(1, 1, 0)) == b"data: [DONE]\n\n"


def test_logprobs_are_parallel_lists() -> None:
    a, b = TokenText(1, "a", b"a"), TokenText(2, "b", b"b")
    tokens = [Token(a, 0, None), Token(b, 1, -1.0, ((a, -0.5), (b, -1.0)))]

    body = encoder(decoded()).whole([Event(choice=0, text="ab", tokens=tokens)], TokenUsage(1, 1, 0), ("w",))

    answer = json.loads(body)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "token_logprobs": [None, -1.0],
        "tokens": ["a", "b"],
        "top_logprobs": [None, {"b": -1.0, "a": -0.5}],
    }
    assert answer["warnings"] == ["w"]
