"""Which fields of other APIs are obeyed, taken or refused, as clients send them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable
from typing import Any

import openai
import pytest
from msgspec import Raw
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as OpenAIChat
from openai.types.completion_create_params import CompletionCreateParamsBase as OpenAICompletion

from brlite.config.options import LimitsConfig, ServerConfig
from brlite.dialects.anthropic import MessagesRequest
from brlite.dialects.anthropic import decode as decode_message
from brlite.dialects.fields import (
    ANTHROPIC,
    BOTH,
    NOT_DECODED,
    OBEYED,
    OF_GENERATION,
    OF_ONE_ENDPOINT,
    OPENAI,
    OTHER_NAMES,
    UNUSUAL,
    check_undecoded,
)
from brlite.dialects.openai_chat import ChatCompletionRequest
from brlite.dialects.openai_chat import decode as decode_chat
from brlite.dialects.openai_completions import CompletionRequest
from brlite.dialects.openai_completions import decode as decode_completion
from brlite.dialects.responses import ResponsesRequest
from brlite.dialects.responses import decode as decode_response
from brlite.errors import InvalidRequest
from tests.rows import all_rows
from tests.server.conftest import MODEL, Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


IN_TABLE = {name: field for field in (*NOT_DECODED, *OF_ONE_ENDPOINT, *OF_GENERATION) for name in field.names.split()}


def test_each_field_of_openais_client_is_decoded_or_in_the_table() -> None:
    decoded = {*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__}

    sent = {*OpenAIChat.__annotations__, *OpenAICompletion.__annotations__}

    assert sent - decoded - IN_TABLE.keys() == set()


def test_no_field_stands_there_twice() -> None:
    names = [name for field in (*NOT_DECODED, *OF_ONE_ENDPOINT, *OF_GENERATION) for name in field.names.split()]
    decoded_by_both = {*ChatCompletionRequest.__struct_fields__} & {*CompletionRequest.__struct_fields__}

    assert len(names) == len(set(names))
    assert not decoded_by_both.intersection(name for field in NOT_DECODED for name in field.names.split())


def test_null_and_neutral_values_are_taken_without_a_warning() -> None:
    with all_rows() as row:
        for name, field in IN_TABLE.items():
            any_value = (True, "x", [1], {"a": 1}) if {OPENAI, ANTHROPIC} & {*field.known_to} else ()
            for value in (None, *(any_value if field.neutral is None else field.neutral)):
                with row(name, value):
                    assert check_undecoded({name: Raw(json.dumps(value).encode())}, ()) == ()


def test_what_asks_for_something_that_does_not_happen_is_warned_of_unless_the_api_is_served() -> None:
    with all_rows() as row:
        for name in (name for name, field in IN_TABLE.items() if field.neutral is None):
            with row(name):
                warnings = check_undecoded({name: Raw(b"1")}, ())

                expected = (
                    ()
                    if {OPENAI, ANTHROPIC} & {*IN_TABLE[name].known_to}
                    else (f"the field {name!r} has no effect on this server",)
                )
                assert warnings == expected


@pytest.mark.parametrize(
    ("decode", "body", "instead"),
    [
        (decode_message, {"messages": [], "logprobs": True}, ""),
        (decode_message, {"messages": [], "top_logprobs": 2}, ""),
        (decode_message, {"messages": [], "stop": "x"}, "; use stop_sequences"),
        (decode_message, {"messages": [], "truncation": "auto"}, ""),
        (decode_response, {"input": "a", "logprobs": True}, "; use top_logprobs"),
        (decode_response, {"input": "a", "max_tokens": 5}, "; use max_output_tokens"),
        (decode_response, {"input": "a", "response_format": {"type": "json_object"}}, "; use text.format"),
        (decode_completion, {"prompt": "a", "max_completion_tokens": 5}, "; use max_tokens"),
        (decode_completion, {"prompt": "a", "tools": [1]}, "; use /v1/chat/completions"),
        (decode_chat, {"messages": [], "custom_logit_processor": "x"}, "; use logits_processors"),
    ],
)
def test_what_to_use_instead_is_a_field_that_the_endpoint_has(
    decode: Callable[[bytes, LimitsConfig], object], body: dict[str, Any], instead: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(json.dumps({"max_tokens": 5, **body} if "messages" in body else body).encode(), LimitsConfig())

    name = caught.value.param
    assert name in body
    assert str(caught.value) == f"{name} is not supported by this version of brlite{instead}"


async def test_a_field_of_another_endpoint_is_known(client: Client) -> None:
    answer = await client.chat(stop_sequences=["x"], query=None, frob=1)

    assert answer["warnings"] == [
        "the field 'stop_sequences' has no effect at this endpoint",
        "the field 'frob' is not known and was ignored",
    ]


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("n_cmpl", 2, 2),
        ("n_predict", 5, 5),
        ("repeat_penalty", 1.25, 1.25),
        ("stop_words", ["e"], ["e"]),
        ("max_new_tokens", 5, 5),
        ("min_new_tokens", 8, 8),
        ("no_stop_trim", True, True),
    ],
)
def test_another_apis_name_is_read_as_the_parameter(name: str, value: Any, other: Any) -> None:
    parameter = next(each.parameter for each in OTHER_NAMES if each.name == name)
    body = chat_body(max_tokens=20 if parameter != "max_tokens" else None)
    body = {key: each for key, each in body.items() if each is not None and key != parameter}

    by_name = decode_chat(json.dumps({**body, name: value}).encode(), LimitsConfig())
    by_parameter = decode_chat(json.dumps({**body, parameter: other}).encode(), LimitsConfig())

    assert by_name.params == by_parameter.params
    assert "repetition_penalty" not in by_name.unset or name != "repeat_penalty"


RESPONSE: dict[str, Any] = {"model": "m", "input": "q"}
MESSAGE: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(("body", "decode"), [(RESPONSE, decode_response), (MESSAGE, decode_message)])
def test_responses_and_messages_obey_the_sampling_parameters_of_completions(
    body: dict[str, Any], decode: Callable[..., Any]
) -> None:
    given = {
        "typical_p": 0.5,
        "xtc_probability": 1,
        "dynatemp_range": 0.5,
        "repeat_last_n": 64,
        "top_n_sigma": 1.5,
        "logit_bias": {"7": 1.5},
        "min_tokens": 2,
        "bad_words": ["x"],
        "stop_token_ids": [3],
        "allowed_token_ids": [1, 7],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }

    params = decode(json.dumps({**body, **given}).encode(), LimitsConfig()).params
    by_another_name = decode(json.dumps({**body, "repeat_penalty": 1.5, "min_new_tokens": 2}).encode(), LimitsConfig())

    read = {name: getattr(params, name) for name in given}
    assert read == {
        **given,
        "logit_bias": {7: 1.5},
        **{name: tuple(given[name]) for name in ("bad_words", "stop_token_ids", "allowed_token_ids")},  # type: ignore[arg-type]  # lists
    }
    assert (by_another_name.params.repetition_penalty, by_another_name.params.min_tokens) == (1.5, 2)


@pytest.mark.parametrize(("body", "decode"), [(RESPONSE, decode_response), (MESSAGE, decode_message)])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"logit_bias": {str(key): 1 for key in range(2000)}}, "logit_bias"),
        ({"bad_words": ["x"] * 2000}, "bad_words"),
        ({"repeat_penalty": 1.5, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"n": 2}, "n"),
        ({"n_predict": 5}, "n_predict"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_responses_and_messages_cannot_obey_is_refused_by_name(
    body: dict[str, Any], decode: Callable[..., Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest, match=param) as caught:
        decode(json.dumps({**body, **fields}).encode(), LimitsConfig())

    assert caught.value.param == param


# Fields of prompts and Anthropic's own are left out; `input` is the place of another endpoint's prompt.
NAMES_OF_GENERATION = [
    row.names for row in (*OBEYED, *UNUSUAL) if {*BOTH, "responses"} & {*row.endpoints} and row.names != "input"
]


# Obeyed wherever text is generated, or fields of OpenAI that change no answer, which its clients send everywhere.
SILENT = {
    *("bad_words", "dry_sequence_breakers"),
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "store", "stream_options", "user"),
}


@pytest.mark.parametrize(
    ("body", "decode", "request_type"),
    [
        (RESPONSE, decode_response, ResponsesRequest),
        (MESSAGE, decode_message, MessagesRequest),
        (chat_body(), decode_chat, ChatCompletionRequest),
        (completion_body(), decode_completion, CompletionRequest),
    ],
    ids=["responses", "messages", "chat", "completions"],
)
def test_a_field_of_one_endpoint_is_refused_by_name_at_another_or_changes_no_answer(
    body: dict[str, Any], decode: Callable[..., Any], request_type: Any
) -> None:
    with all_rows() as row:
        for name in {name for names in NAMES_OF_GENERATION for name in names.split()}:
            with row(name):
                if name in request_type.__struct_fields__:
                    continue
                try:
                    told = decode(json.dumps({**body, name: "x"}).encode(), LimitsConfig()).warnings
                except InvalidRequest as refusal:
                    told = refusal.param

                places = ("on this server", "at this endpoint")
                said = [(f"the field {name!r} has no effect {place}",) for place in places]
                assert told in (name, *said) or (told == () and name in SILENT)


def test_every_other_name_is_tried_above() -> None:
    tried = {"n_cmpl", "n_predict", "repeat_penalty", "stop_words", "max_new_tokens", "min_new_tokens", "no_stop_trim"}
    tried.add("n_probs")  # below

    assert {other.name for other in OTHER_NAMES} == tried


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n_predict": 5, "max_tokens": 6}, "n_predict"),
        ({"n_predict": 5, "max_new_tokens": 5}, "max_new_tokens"),
        ({"n_predict": "x"}, "n_predict"),
        ({"n_cmpl": "x"}, "n_cmpl"),
        ({"n_cmpl": [1]}, "n_cmpl"),
        ({"n_predict": -2}, "n_predict"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"stop_words": 5}, "stop_words"),
        ({"stop_words": ["x"] * 17}, "stop_words"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"typical_p": 0}, "typical_p"),
        ({"xtc_probability": 2}, "xtc_probability"),
        ({"xtc_threshold": -1}, "xtc_threshold"),
        ({"dynatemp_range": -1}, "dynatemp_range"),
        ({"dynatemp_exponent": "x"}, "dynatemp_exponent"),
    ],
)
async def test_an_error_has_the_name_that_the_client_used(client: Client, fields: dict[str, Any], param: str) -> None:
    body = {name: value for name, value in completion_body().items() if name != "max_tokens"}

    status, answer = await client.post(COMPLETION, {**body, **fields})

    assert (status, answer["error"]["param"]) == (400, param)


def test_what_few_requests_have_is_a_sampling_parameter() -> None:
    fields = {"typical_p": 0.5, "xtc_probability": 1, "xtc_threshold": 0.2, "dynatemp_range": 0.5}

    for body, decode in ((chat_body(), decode_chat), (completion_body(), decode_completion)):
        params = decode(json.dumps({**body, **fields}).encode(), LimitsConfig()).params
        assert {name: getattr(params, name) for name in fields} == fields


async def test_n_probs_is_the_number_of_logprobs(client: Client) -> None:
    chat, chat_by_own_name = await client.chat(n_probs=2), await client.chat(logprobs=True, top_logprobs=2)
    text, text_by_own_name = await client.complete(n_probs=2), await client.complete(logprobs=2)

    assert chat["choices"] == chat_by_own_name["choices"]
    assert text["choices"] == text_by_own_name["choices"]
    assert (await client.chat(n_probs=0))["choices"][0]["logprobs"] is None
    for fields in ({"n_probs": "x"}, {"n_probs": -1}, {"n_probs": 2, "logprobs": False}, {"n_probs": 99}):
        status, answer = await client.post(CHAT, chat_body(**fields))
        assert (status, answer["error"]["param"]) == (400, "n_probs"), fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frob": 1}, "the field 'frob' is not known"),
        ({"cache_prompt": True}, "the field 'cache_prompt' has no effect"),
        ({"max_tokens": 1000}, "max_tokens must be at most 32"),
        ({"chat_template_kwargs": {"frob": 1}}, "does not read 'frob'"),
    ],
)
async def test_a_strict_server_and_a_strict_request_refuse_what_would_be_a_warning(
    make_client: MakeClient, fields: dict[str, Any], said: str
) -> None:
    lenient, strict = await make_client(), await make_client(config={"server": ServerConfig(strict=True)})

    warned, refused, refused_by_server = [
        await client.post(CHAT, chat_body(**fields, **more))
        for client, more in ((lenient, {}), (lenient, {"strict": True}), (strict, {}))
    ]

    assert (warned[0], len(warned[1]["warnings"])) == (200, 1)
    assert (refused[0], refused_by_server[0]) == (400, 400)
    assert said in refused[1]["error"]["message"]
    assert refused[1]["error"]["message"] == refused_by_server[1]["error"]["message"]


@pytest.mark.parametrize("value", [{"anything": "else"}, 17, "something"])
def test_a_value_that_would_change_the_answer_is_refused_by_name(value: object) -> None:
    with all_rows() as row:
        for name in (name for name, field in IN_TABLE.items() if field.neutral is not None):
            with row(name):
                with pytest.raises(InvalidRequest, match=name) as caught:
                    check_undecoded({name: Raw(json.dumps(value).encode())}, ())

                assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k"},
        {"safety_identifier": "s", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "required"},
        {"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tool_choice": "none"},
        {"tool_choice": "auto", "tools": None},
        {"top_k": 0},
        {"top_k": -1},
        {"logprobs": False, "top_logprobs": 0},
        {"top_logprobs": 0},
        {"seed": -1},
        {"max_tokens": 8.0, "n": 1.0, "top_k": 40.0, "seed": 5.0},
        {"stop": ""},
        {"stop": [""]},
        {"max_tokens": 8, "max_completion_tokens": 8},
        {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "best_of": 1},
        {"reasoning_effort": "medium", "verbosity": "medium", "chat_template_kwargs": {}},
        {
            "mirostat": 0,
            "typical_p": 1.0,
            "repeat_penalty": 1,
            "dry_multiplier": 0.0,
            "min_keep": 0,
            "xtc_probability": 0,
        },
        {"stream_options": None},
        {"stream_options": {"include_usage": False}},
    ],
    ids=lambda fields: " ".join(fields)[:40],
)
async def test_what_asks_for_nothing_is_taken_silently(client: Client, fields: dict[str, Any]) -> None:
    plain = await client.chat(temperature=0)

    answer = await client.chat(**{"temperature": 0, **fields})

    assert answer["choices"][0]["message"] == plain["choices"][0]["message"]
    assert "warnings" not in answer


@pytest.mark.parametrize(
    ("switch", "name", "off"),
    [("mirostat", "mirostat_tau", 0), ("mirostat", "mirostat_eta", 0.0), ("adaptive_target", "adaptive_decay", -1)],
)
async def test_what_belongs_to_another_sampler_is_accepted_only_where_that_is_said_to_be_off(
    client: Client, switch: str, name: str, off: float
) -> None:
    status, answer = await client.post(COMPLETION, completion_body("ab", **{switch: off, name: 0.5}))
    assert (status, answer["warnings"]) == (200, [f"the field {name!r} has no effect on this server"])

    for fields in ({name: 0.5}, {name: 0.5, switch: None}):
        status, answer = await client.post(COMPLETION, completion_body("ab", **fields))
        assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, name, "unsupported_parameter")
        assert f"beside {switch}: 0" in answer["error"]["message"]
    status, answer = await client.post(COMPLETION, completion_body("ab", **{name: 0.5, switch: 1}))
    assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert (await client.post(COMPLETION, completion_body("ab", **{name: None})))[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "required"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}]}, ChatCompletionRequest),
        (COMPLETION, {"prompt": "hello"}, CompletionRequest),
    ],
    ids=["chat", "completion"],
)
async def test_null_is_the_default_of_every_optional_field(
    client: Client, path: str, body: dict[str, Any], required: Any
) -> None:
    nulls = dict.fromkeys([*required.__struct_fields__, *IN_TABLE], None)

    status, answer = await client.post(path, {**nulls, **body})

    assert status == 200, answer
    assert answer["model"] == MODEL
    assert "warnings" not in answer


@pytest.mark.parametrize(("key", "bias"), [("x", 1), ("7", 101), ("7", None), ("1.5", 1), ("7", "1")])
async def test_an_error_about_logit_bias_says_which_entry_is_wrong(client: Client, key: str, bias: Any) -> None:
    _, answer = await client.post(COMPLETION, completion_body(logit_bias={"3": 1, "4": -100, key: bias, "5": 2}))

    assert answer["error"]["param"] == "logit_bias"
    assert answer["error"]["message"].split("got ")[1] == reprlib.repr({key: bias})


async def test_max_tokens_minus_1_is_as_many_as_there_is_room_for(client: Client) -> None:
    answer = await client.complete("hello", max_tokens=-1)

    assert answer["usage"]["completion_tokens"] == 32


async def test_seed_minus_1_is_a_seed_by_chance(client: Client) -> None:
    texts = {(await client.complete("x", temperature=1, seed=-1))["choices"][0]["text"] for _ in range(5)}

    assert len(texts) > 1


async def test_openais_client_sends_what_it_likes(client: Client) -> None:
    async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as openai_client:
        answer = await openai_client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=8,
            max_completion_tokens=8,
            store=True,
            metadata={"a": "b"},
            user="me",
            service_tier="auto",
            safety_identifier="s",
            tools=[],
            tool_choice="auto",
            parallel_tool_calls=True,
            seed=-1,
            stop="",
            extra_body={"top_k": 0, "cache_prompt": True},
        )
        with pytest.raises(openai.BadRequestError) as caught:
            await openai_client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "hello"}],
                extra_body={"mirostat": 1},
            )

    assert answer.choices[0].message.content
    assert answer.choices[0].message.refusal is None
    assert (caught.value.param, caught.value.code) == ("mirostat", "unsupported_parameter")


@pytest.mark.parametrize("bad_words", [["yz"], "yz"])
async def test_bad_words_are_not_in_the_answer(make_client: MakeClient, bad_words: list[str] | str) -> None:
    client = await make_client(next_token=lambda context, seed: b"xyz"[len(context) % 3])

    _, answer = await client.post(COMPLETION, completion_body("xyz", bad_words=bad_words, n=2))

    assert [choice["text"] for choice in answer["choices"]] == ["xyaxyaxy"] * 2


@pytest.mark.parametrize("name", ["n_probs", "mirostat"])
async def test_a_number_that_no_float_holds_is_refused_by_its_name(client: Client, name: str) -> None:
    status, answer = await client.post("/v1/completions", b'{"prompt": "hi", "%b": 1e400}' % name.encode())

    assert (status, answer["error"]["param"]) == (400, name)
