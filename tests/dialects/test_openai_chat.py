"""Golden pairs of the chat dialect: a body and what it asks for, events and their bytes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from brlite.config.options import LimitsConfig
from brlite.dialects import openai_completions
from brlite.dialects.event import Event, Token, TokenText, TokenUsage
from brlite.dialects.generation import Chat, Generation, Truncation, in_client_words
from brlite.dialects.openai_answer import OpenAIEncoder
from brlite.dialects.openai_chat import DIALECT, ChatEncoder, decode
from brlite.errors import EngineError, InvalidRequest, PromptTooLong
from brlite.sampling_params import MODEL_DEFAULTS, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]
FIELD_NAMES = {"prompt": "messages", "logprobs": "top_logprobs"}
PLAIN = Generation(
    model=None,
    prompts=(Chat(MESSAGES),),
    params=SamplingParams(max_tokens=None),
    field_names=FIELD_NAMES,
    unset=MODEL_DEFAULTS,
)


def decoded(**fields: Any) -> Generation:
    return decode(json.dumps({"messages": MESSAGES, **fields}).encode(), LimitsConfig())


def encoder(call: Generation = PLAIN, fingerprint: str = "") -> ChatEncoder:
    made = DIALECT.make_encoder(call, "chatcmpl-1", "m", fingerprint)
    assert isinstance(made, ChatEncoder)
    made._common["created"] = 7
    return made


def told(frames: bytes) -> list[Any]:
    """The events of a stream."""
    parts = frames.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [json.loads(part[6:]) if part != "data: [DONE]" else "[DONE]" for part in parts]


@pytest.mark.parametrize("model", ["m", 'a "content":"" b', "モデル"])
@pytest.mark.parametrize("text", ["", " hello", '"quoted"\n\\', "\x00", "größer", "a\u2028b\x85c", "\U0001f600"])
def test_a_chunk_of_text_alone_has_the_same_bytes_as_one_that_is_encoded_whole(text: str, model: str) -> None:
    for dialect in (DIALECT, openai_completions.DIALECT):
        made = dialect.make_encoder(PLAIN, "id-1", model, "abc")
        assert isinstance(made, OpenAIEncoder)

        for choice in (1, 0, 1):
            event = Event(choice=choice, text=text)
            assert made.encode(event) == made._chunk_of(event)


def test_messages_alone_ask_for_the_defaults() -> None:
    assert decoded() == PLAIN


def test_what_a_body_asks_for_stands_in_the_generation() -> None:
    call = decoded(
        model="m",
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
        stop=["x"],
        truncate_prompt_tokens=-1,
        truncation_side="right",
        cache_salt="s",
        return_tokens_as_token_ids=True,
        continue_final_message=True,
        frob=1,
    )

    assert call == Generation(
        model="m",
        prompts=(Chat(MESSAGES, add_generation_prompt=False, continue_final_message=True),),
        params=SamplingParams(max_tokens=9, logprobs=2, stop=("x",)),
        unset=MODEL_DEFAULTS,
        is_streamed=True,
        include_usage=True,
        continuous_usage=True,
        names_are_ids=True,
        truncation=Truncation(None, keeps_start=True),
        cache_salt="s",
        field_names={**FIELD_NAMES, "max_tokens": "max_completion_tokens"},
        warnings=("the field 'frob' is not known and was ignored",),
    )


def test_a_generation_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        PLAIN.model = "other"  # type: ignore[misc]


def test_the_engines_refusals_come_in_the_clients_words() -> None:
    error = in_client_words(PromptTooLong("prompt is too long", param="prompt"), FIELD_NAMES)
    unchanged = InvalidRequest("n must be 1", param="n")

    assert (type(error), str(error), error.param) == (PromptTooLong, "messages is too long", "messages")
    assert in_client_words(unchanged, FIELD_NAMES) is unchanged


def test_a_stream_opens_with_a_role_for_each_choice_and_ends_with_done() -> None:
    call = decoded(n=2)

    opening = told(encoder(call).opening(TokenUsage(1, 0, 0)))

    delta = {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["choices"] for chunk in opening] == [
        [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}] for index in range(2)
    ]
    assert told(encoder(call).closing(TokenUsage(1, 2, 0))) == ["[DONE]"]


def test_an_event_is_one_chunk_byte_for_byte() -> None:
    chunk = encoder(fingerprint="f").encode(Event(choice=1, text="a\u2028b"))

    assert chunk == (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":1,'
        b'"delta":{"content":"a\\u2028b"},"logprobs":null,"finish_reason":null}],"system_fingerprint":"fp_f"}\n\n'
    )


def test_the_last_event_says_why_it_ends_and_what_was_ignored() -> None:
    event = Event(choice=0, text="", finish_reason="stop", stop_reason="x", warnings=("w",))

    (chunk,) = told(encoder().encode(event))

    assert chunk["choices"][0] == {
        "index": 0,
        "delta": {"content": ""},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "x",
    }
    assert chunk["warnings"] == ["w"]


def test_usage_is_null_until_it_is_known_where_it_was_asked_for() -> None:
    made = encoder(decoded(stream=True, stream_options={"include_usage": True}))

    (chunk,) = told(made.encode(Event(choice=0, text="a")))
    usage, done = told(made.closing(TokenUsage(prompt=3, completion=2, cached=1, reasoning=2)))

    assert chunk["usage"] is None
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


def test_logprobs_are_objects_with_the_bytes_of_each_token() -> None:
    half = TokenText(7, "\ufffd", b"\xf0\x9f")
    event = Event(choice=0, text="", tokens=[Token(half, 0, -1.0, ((half, -1.0), (TokenText(8, "b", b"b"), -2.0)))])

    (chunk,) = told(encoder().encode(event))
    (by_id,) = told(encoder(decoded(return_tokens_as_token_ids=True)).encode(event))

    (token,) = chunk["choices"][0]["logprobs"]["content"]
    assert token == {
        "token": r"bytes:\xf0\x9f",
        "logprob": -1.0,
        "bytes": [0xF0, 0x9F],
        "top_logprobs": [
            {"token": r"bytes:\xf0\x9f", "logprob": -1.0, "bytes": [0xF0, 0x9F]},
            {"token": "b", "logprob": -2.0, "bytes": [98]},
        ],
    }
    assert by_id["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:7"


@pytest.mark.parametrize("field", [name for name in Event.__struct_fields__ if name not in ("choice", "text")])
def test_an_event_with_any_field_beside_its_text_is_encoded_whole(field: str) -> None:
    whole = list[Event]()

    class Recorder(ChatEncoder):
        def _chunk_of(self, event: Event) -> bytes:
            whole.append(event)
            return b'"content":""'

    event = msgspec.structs.replace(Event(choice=1, text=""), **{field: ("set",)})
    Recorder(PLAIN, "chatcmpl-1", "m", "").encode(event)

    assert whole == [event]


def test_a_whole_answer_byte_for_byte() -> None:
    body = encoder().whole([Event(choice=0, text="a", finish_reason="length")], TokenUsage(1, 1, 0), ())

    assert body == (
        b'{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,"message":'
        b'{"content":"a","role":"assistant","refusal":null},"logprobs":null,"finish_reason":"length","stop_reason":null}],'
        b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2,"prompt_tokens_details":{"cached_tokens":0},'
        b'"completion_tokens_details":{"reasoning_tokens":0}}}'
    )


def test_a_stream_that_fails_ends_with_the_error_and_done() -> None:
    error, done = told(DIALECT.encode_error(EngineError("secret detail")))

    assert (error["error"]["type"], done) == ("server_error", "[DONE]")
    assert "secret" not in json.dumps(error)
