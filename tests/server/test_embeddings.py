"""Embeddings as clients see them, on a fake model whose hidden states are known."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
from array import array
from typing import Any

import aiohttp
import openai
import pytest

from brlite.config.options import ServerConfig
from tests.conftest import Eventually
from tests.fakes import HIDDEN_SIZE, hidden_state
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body

PATH = "/v1/embeddings"


def unit(values: list[float]) -> list[float]:
    return [value / math.hypot(*values) for value in values]


def body(input: Any = "hello", **fields: Any) -> dict[str, Any]:  # OpenAI's name
    return {"model": "fake", "input": input, **fields}


async def embed(client: Client, input: Any = "hello", **fields: Any) -> dict[str, Any]:
    status, answer = await client.post(PATH, body(input, **fields))
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize(
    ("input", "token_ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
    ids=["text", "list of texts", "token ids", "list of token ids"],
)
async def test_an_input_has_four_forms(client: Client, input: Any, token_ids: list[list[int]]) -> None:
    answer = await embed(client, input)

    assert (answer["object"], answer["model"]) == ("list", "fake")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", index) for index in range(len(token_ids))
    ]
    for item, ids in zip(answer["data"], token_ids, strict=True):
        assert item["embedding"] == pytest.approx(unit(hidden_state(ids)), rel=1e-6)
    num_tokens = sum(map(len, token_ids))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (num_tokens, num_tokens)


async def test_base64_holds_the_same_numbers_as_little_endian_floats(client: Client) -> None:
    as_numbers, as_text = await embed(client), await embed(client, encoding_format="base64")

    decoded = array("f", base64.b64decode(as_text["data"][0]["embedding"]))
    assert decoded.tolist() == as_numbers["data"][0]["embedding"]


async def test_the_openai_package_decodes_its_default_which_is_base64(client: Client) -> None:
    async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as openai_client:
        answer = await openai_client.embeddings.create(model="fake", input=["hello", "world"], user="me")

    assert [item.embedding for item in answer.data] == [
        pytest.approx(unit(hidden_state(list(text))), rel=1e-6) for text in (b"hello", b"world")
    ]
    assert answer.usage.prompt_tokens == 10


async def test_a_mean_and_raw_numbers_may_be_asked_for(client: Client) -> None:
    last, mean = await embed(client, "ab", normalize=False), await embed(client, "ab", normalize=False, pooling="mean")

    first, second = hidden_state(b"a"), hidden_state(b"ab")
    assert last["data"][0]["embedding"] == second
    assert mean["data"][0]["embedding"] == [(one + other) / 2 for one, other in zip(first, second, strict=True)]


async def test_dimensions_cut_where_the_model_is_made_for_it(client: Client, make_client: MakeClient) -> None:
    status, answer = await client.post(PATH, body(dimensions=2))
    whole = await embed(client, dimensions=float(HIDDEN_SIZE))
    matryoshka = await make_client(matryoshka_dimensions=(0,))
    short = await embed(matryoshka, dimensions=2)

    assert (status, answer["error"]["param"]) == (400, "dimensions")
    assert len(whole["data"][0]["embedding"]) == HIDDEN_SIZE
    assert short["data"][0]["embedding"] == pytest.approx(unit(hidden_state(b"hello")[:2]), rel=1e-6)


async def test_a_longer_text_is_cut_as_told_and_the_answer_says_so(client: Client) -> None:
    right = await embed(client, "x" * 100, truncate_prompt_tokens=5)
    left = await embed(client, ["ab", "abcdef"], truncate_prompt_tokens=3, truncation_side="left")
    most = await embed(client, "y" * 100, truncate_prompt_tokens=-1)
    special = await embed(client, [97, 98, 99, 256], truncate_prompt_tokens=3)
    many = await embed(client, ["abc"] * 20, truncate_prompt_tokens=2)

    assert right["usage"]["prompt_tokens"] == 5
    assert right["warnings"] == ["input of 100 tokens was cut to 5 tokens by truncate_prompt_tokens"]
    assert left["data"][1]["embedding"] == pytest.approx(unit(hidden_state(b"def")), rel=1e-6)
    assert left["warnings"] == ["input[1] of 6 tokens was cut to 3 tokens by truncate_prompt_tokens"]
    assert most["usage"]["prompt_tokens"] == 64
    assert (len(many["warnings"]), many["warnings"][-1]) == (17, "and 4 more were cut")
    assert special["data"][0]["embedding"] == pytest.approx(unit(hidden_state([97, 98, 256])), rel=1e-6)


async def test_a_strict_server_and_a_strict_request_refuse_what_would_be_a_warning_but_no_cut_text(
    client: Client, make_client: MakeClient
) -> None:
    strict = await make_client(config={"server": ServerConfig(strict=True)})

    warned = await embed(client, frob=1)
    refused = [await client.post(PATH, body(frob=1, strict=True)), await strict.post(PATH, body(frob=1))]
    cut = await embed(strict, "hello, you", truncate_prompt_tokens=5, strict=True)

    assert warned["warnings"] == ["the field 'frob' is not known and was ignored"]
    assert [(status, answer["error"]["code"]) for status, answer in refused] == [(400, "strict")] * 2
    assert cut["warnings"] == ["input of 10 tokens was cut to 5 tokens by truncate_prompt_tokens"]


async def test_pooling_answers_in_vllms_shape(client: Client) -> None:
    status, answer = await client.post("/pooling", body(["hello", "world"], task="embed"))

    assert status == 200
    assert answer["id"].startswith("pool-")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("pooling", 0), ("pooling", 1)]
    assert answer["data"][0]["data"] == pytest.approx(unit(hidden_state(b"hello")), rel=1e-6)


@pytest.mark.parametrize("path", ["/embeddings", "//v1/embeddings/", "/v1/pooling"])
async def test_other_spellings_of_the_path_work(client: Client, path: str) -> None:
    status, _ = await client.post(path, {"input": "hello"})

    assert status == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "must not be empty"),
        ({"input": ""}, "input", "at least one token"),
        ({"input": ["a", ""]}, "input[1]", "at least one token"),
        ({"input": [[97], []]}, "input[1]", "at least one token"),
        ({"input": ["a", 97]}, "input", "must be a string"),
        ({"input": {"text": "a"}}, "input", "Expected"),
        ({"input": None}, "input", "Expected"),
        ({"input": "x" * 65}, "input", "at least 65 tokens"),
        ({"input": ["a", "x" * 65]}, "input[1]", "maximum context length is 64 tokens"),
        ({"input": [[97] * 65]}, "input[0]", "the prompt has 65 tokens"),
        ({"input": [[97, 260]]}, "input[0]", "260"),
        ({"input": [97, -1]}, "input", "-1"),
        ({"input": ["a"] * 100_000}, "input", "at most 2048"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64, float"),
        ({"input": "a", "dimensions": 0}, "dimensions", "at least 1"),
        ({"input": "a", "dimensions": 1.5}, "dimensions", "whole number"),
        ({"input": "a", "pooling": "cls"}, "pooling", "last, mean"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"input": "a", "task": "classify"}, "task", "not supported"),
        ({"input": "a", "embed_dtype": "int8"}, "embed_dtype", "not supported"),
        ({}, "input", "Missing required parameter"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_runs(
    client: Client, fields: dict[str, Any], param: str, words: str
) -> None:
    status, answer = await client.post(PATH, {"model": "fake", **fields})

    assert (status, answer["error"]["param"]) == (400, param)
    assert words in answer["error"]["message"]
    assert not client.backend.batches


@pytest.mark.parametrize(
    ("backend", "words"),
    [({"hidden_size": 0}, "this server's engine"), ({"pooling": "none"}, "this model has no embeddings")],
)
async def test_a_model_without_embeddings_says_so(make_client: MakeClient, backend: dict[str, Any], words: str) -> None:
    client = await make_client(**backend)

    status, answer = await client.post(PATH, body())

    assert (status, answer["error"]["code"]) == (400, "embeddings_not_supported")
    assert words in answer["error"]["message"]


async def test_a_stream_beside_embeddings_is_as_it_is_alone(client: Client) -> None:
    alone = await client.stream("/v1/chat/completions", chat_body(max_tokens=12))
    beside, *_ = await asyncio.gather(
        client.stream("/v1/chat/completions", chat_body(max_tokens=12)),
        *(embed(client, [f"{number} {other}" for other in range(20)]) for number in range(3)),
    )

    assert [event["choices"] for event in beside] == [event["choices"] for event in alone]


async def test_a_client_that_leaves_aborts_all_its_texts(client: Client, eventually: Eventually) -> None:
    client.backend.gate = threading.Event()
    timeout = aiohttp.ClientTimeout(total=None)
    asking = asyncio.create_task(
        client.session.post(client.url + PATH, json=body([str(number) for number in range(100)]), timeout=timeout)
    )
    await eventually(client.backend.has_begun.is_set)
    asking.cancel()
    await asyncio.wait([asking], timeout=PATIENCE_SECONDS)
    await eventually(lambda: all(state.is_aborted for state in client.engine._engine._requests.values()))
    client.backend.gate.set()
    await client.engine.wait_idle()

    assert client.engine.stats.finished["abort"] > 0
    assert len(client.backend.batches) == 1
    assert client.engine.stats.num_used_blocks == 0


async def test_metrics_count_prompt_tokens(client: Client) -> None:
    await embed(client, ["hello", "you"])

    async with client.session.get(client.url + "/metrics") as response:
        text = await response.text()

    assert 'vllm:prompt_tokens_total{model_name="fake"} 8.0' in text
    assert 'vllm:generation_tokens_total{model_name="fake"} 0.0' in text


async def test_a_key_is_charged_for_the_texts(make_client: MakeClient) -> None:
    from brlite.config.options import KeyConfig

    client = await make_client(config={"key": (KeyConfig(name="team", key="sk-1", tokens_per_minute=5),)})
    headers = {"Authorization": "Bearer sk-1"}

    refused, _ = await client.post(PATH, body("x" * 65), **headers)
    first, _ = await client.post(PATH, body("hello, you"), **headers)
    second, answer = await client.post(PATH, body("hello"), **headers)

    assert (refused, first, second) == (400, 200, 429)
    assert answer["error"]["code"] == "rate_limit_exceeded"


async def test_2048_texts_are_one_request(client: Client) -> None:
    answer = await embed(client, ["a"] * 2048)

    assert len(answer["data"]) == 2048
    assert len({json.dumps(item["embedding"]) for item in answer["data"]}) == 1
