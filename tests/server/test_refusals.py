"""What is refused, with which status and which field, and that nobody else notices."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from brlite.config.options import LimitsConfig
from brlite.dialects.openai import sampling_params
from brlite.dialects.openai_completions import CompletionRequest
from brlite.errors import BrliteError, InvalidRequest
from tests.fakes import ByteTokenizer, reference_tokens
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**6}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"top_n_sigma": -2}, "top_n_sigma"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5] * 1025}, "allowed_token_ids"),
        ({"bad_words": ["x"] * 65}, "bad_words"),
        ({"bad_words": ["x" * 129]}, "bad_words"),
        ({"bad_words": [5]}, "bad_words"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 2**70}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"seed": 2**65}, "seed"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": [1] * 100}, "stop_token_ids"),
        ({"stop_tokens_ids": [1] * 100}, "stop_tokens_ids"),
        ({"logit_bias": dict.fromkeys(map(str, range(2000)), 1)}, "logit_bias"),
        ({"stop": [5]}, "stop"),
        ({"stop_tokens_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 100}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"frob": True}, "stream": True}, "stream_options"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"use_beam_search": True}, "best_of"),
        ({"use_beam_search": True, "best_of": 4, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "best_of": 17, "temperature": 0}, "best_of"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"response_format": {"type": "text", "schma": {}}}, "response_format.schma"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "triggers": ["<"]}}, "response_format.triggers"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "stict": True}}},
            "response_format.json_schema.stict",
        ),
        ({"early_stopping": "never"}, "early_stopping"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"best_of": 2.5}, "best_of"),
        ({"best_of": 10**9}, "best_of"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "messages"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
async def test_a_bad_field_of_a_chat_is_a_400_that_names_it(client: Client, fields: dict[str, Any], param: str) -> None:
    status, answer = await client.post(CHAT, chat_body(**fields))

    assert status == 400, answer
    assert answer["error"]["param"].startswith(param)
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["message"] == answer["error"]["message"]
    assert client.backend.batches == []


@pytest.mark.parametrize(
    ("limits", "fields", "param", "message"),
    [
        (
            {"max_sequences": 4},
            {"n": 5},
            "n",
            "prompts times n must be at most 4 on this server (limits.max_sequences)",
        ),
        (
            {},
            {"logprobs": True, "top_logprobs": 25},
            "top_logprobs",
            "top_logprobs must be at most 20 on this server (limits.max_logprobs)",
        ),
        (
            {},
            {"max_tokens": None, "max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens must be",
        ),
        (
            {},
            {"stop": ["x"] * 17},
            "stop",
            "stop must have at most 16 entries on this server (limits.max_stop_strings), got 17",
        ),
    ],
    ids=["sequences", "top_logprobs", "max_completion_tokens", "stop"],
)
async def test_a_refusal_speaks_of_the_clients_own_field(
    make_client: MakeClient, limits: dict[str, int], fields: dict[str, Any], param: str, message: str
) -> None:
    client = await make_client(limits=limits)

    status, answer = await client.post(CHAT, chat_body(**fields))

    assert status == 400
    assert answer["error"]["param"] == param
    assert answer["error"]["message"].startswith(message)


@pytest.mark.parametrize("field", ["stop", "stop_token_ids", "stop_tokens_ids", "logit_bias"])
def test_a_long_list_is_refused_before_anything_walks_it(field: str) -> None:
    class Endless(dict[int, float]):
        def __len__(self) -> int:
            return 10**6

        def __iter__(self) -> Iterator[int]:
            raise AssertionError("nobody looks at its entries")

    body = CompletionRequest(model="fake", prompt="x", **{field: Endless()})

    with pytest.raises(InvalidRequest) as caught:
        sampling_params(body, LimitsConfig(), {})

    assert caught.value.param == field


async def test_a_chat_found_too_long_at_the_engines_door_is_the_messages_fault(make_client: MakeClient) -> None:
    class Optimist(ByteTokenizer):
        def fewest_tokens(self, text: str) -> int:
            return 0

    client = await make_client(tokenizer=Optimist())

    status, answer = await client.post(CHAT, chat_body("x" * 100))

    assert status == 400
    assert (answer["error"]["param"], answer["error"]["code"]) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 64, "n": 5}, "n"),
        ({"suffix": 5}, "suffix"),
        ({"logprobs": 100}, "logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
async def test_a_bad_field_of_a_completion_is_a_400_that_names_it(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    status, answer = await client.post(COMPLETION, completion_body(**fields))

    assert status == 400, answer
    assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": "fake", "prompt": "\xff"}',
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "a", "temperature": NaN}',
        b'{"model": "fake", "prompt": "a", "temperature": 1e999}',
        b'{"model": "fake", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"model": "fake", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "fake", "prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(11),
)
async def test_a_body_that_is_no_request_is_a_400(client: Client, body: bytes) -> None:
    status, answer = await client.post(COMPLETION, body)

    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


async def test_an_unknown_model_is_a_404_that_names_those_served(client: Client) -> None:
    status, answer = await client.post(CHAT, chat_body(model="other"))

    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert "fake" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/moderations", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_unknown_paths_and_methods_answer_in_the_same_shape(
    client: Client, method: str, path: str, status: int
) -> None:
    async with client.session.request(method, client.url + path) as response:
        answer = await response.json()

    assert response.status == status
    assert answer["code"] == status
    assert answer["error"]["message"]


async def test_a_body_over_the_limit_is_a_413(make_client: MakeClient) -> None:
    client = await make_client(limits={"max_body_bytes": 1000})

    status, answer = await client.post(COMPLETION, completion_body("x" * 1000))

    assert status == 413
    assert "1000" in answer["error"]["message"]


async def test_a_form_is_a_415(client: Client) -> None:
    status, _ = await client.post(CHAT, chat_body(), **{"Content-Type": "application/x-www-form-urlencoded"})

    assert status == 415


async def test_one_refused_prompt_takes_its_whole_request_back(client: Client) -> None:
    status, _ = await client.post(COMPLETION, completion_body([[97, 98], [999]]))
    await client.engine.wait_idle()

    assert status == 400
    assert client.engine.stats.num_used_blocks == 0


async def test_refusals_leave_a_running_stream_alone(client: Client) -> None:
    async def refuse() -> None:
        for fields in ({"n": -1}, {"prompt": ""}, {"top_k": -2}):
            await client.post(COMPLETION, completion_body(**fields))

    body = completion_body("hello", max_tokens=30)
    async with client.session.post(client.url + COMPLETION, json={**body, "stream": True}) as response:
        await refuse()
        events = [json.loads(line[6:]) async for line in response.content if line.startswith(b"data: {")]

    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == bytes(reference_tokens(b"hello", 30)).decode()


@pytest.mark.parametrize(("num_blocks", "setting", "length"), [(64, "build_seq", 64), (8, "num_blocks", 32)])
async def test_a_prompt_that_is_too_long_is_told_which_setting_says_so(
    make_client: MakeClient, num_blocks: int, setting: str, length: int
) -> None:
    client = await make_client(num_blocks=num_blocks)

    status, answer = await client.post(COMPLETION, completion_body("x" * 100))

    assert status == 400
    assert f"maximum context length is {length} tokens" in answer["error"]["message"]
    assert f"by this server's setting {setting}" in answer["error"]["message"]


async def test_min_tokens_beyond_what_max_tokens_is_cut_to_is_refused(client: Client) -> None:
    status, answer = await client.post(COMPLETION, completion_body(max_tokens=1000, min_tokens=33))
    kept, _ = await client.post(COMPLETION, completion_body(max_tokens=1000, min_tokens=32))

    assert (status, kept, answer["error"]["param"]) == (400, 200, "min_tokens")
    assert "min_tokens must be at most 32" in answer["error"]["message"]


async def test_openais_client_is_told_of_too_long_a_prompt(client: Client) -> None:
    async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as openai_client:
        with pytest.raises(openai.BadRequestError, match="build_seq") as caught:
            await openai_client.completions.create(model="fake", prompt="x" * 100)
        with pytest.raises(openai.NotFoundError, match="unknown endpoint"):
            await openai_client.moderations.create(model="fake", input="x")

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 17}, "n", "n must be at most 16 on this server (limits.max_beam_width), got 17"),
        ({"n": 2, "best_of": 1}, "best_of", "best_of must be a whole number from n, which is 2, to 16 on this server"),
        ({"n": 2, "best_of": 17}, "best_of", "best_of must be a whole number from n, which is 2, to 16 on this server"),
    ],
)
async def test_a_number_of_beams_is_refused_by_the_clients_field_and_the_limit_of_beams(
    client: Client, fields: dict[str, Any], param: str, message: str
) -> None:
    status, answer = await client.post(COMPLETION, completion_body(use_beam_search=True, temperature=0, **fields))

    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(message)


def live_errors() -> list[BrliteError]:
    return [each for each in gc.get_objects() if isinstance(each, BrliteError)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETION, completion_body(model="unknown")),
        (COMPLETION, completion_body(temperature=-1)),
        (COMPLETION, completion_body("x" * 100)),
        (COMPLETION, completion_body("x" * 100, stream=True)),
        (COMPLETION, completion_body("x" * 5000)),
        (COMPLETION, completion_body(timeout=0.01)),
        (COMPLETION, completion_body(timeout=0.01, stream=True)),
        ("/v1/embeddings", {"input": "hello", "timeout": 0.01}),
        ("/v1/responses", {"input": "hello", "timeout": 0.01, "background": True, "stream": True}),
    ],
)
async def test_a_failed_request_is_freed_without_the_garbage_collector(
    make_client: MakeClient, path: str, body: dict[str, Any]
) -> None:
    client = await make_client(limits={"max_body_bytes": 4096})
    client.backend.gate = threading.Event()
    gc.collect()
    gc.disable()
    before = live_errors()  # of other tests
    try:
        async with client.session.post(client.url + path, json=body) as response:
            answer = await response.text()
        client.backend.gate.set()
        await client.get("/health")  # the connection's last request is another one
        errors = [each for each in live_errors() if each not in before]
    finally:
        gc.enable()

    assert ("error" in answer, errors) == (True, [])
