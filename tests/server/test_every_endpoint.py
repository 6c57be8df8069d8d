"""Every endpoint of the OpenAPI document, as a client sees it that has no key, a wrong one, or another's."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from array import array
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from brlite.config.options import KeyConfig, ModelSpec, ProxyConfig
from brlite.engine.scoring import ScoringHead
from brlite.server.handlers import DOCS_HEADERS
from tests.conftest import Eventually
from tests.fakes import HIDDEN_SIZE
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

SECRET_MODEL = "secret-model"
OWNER, STRANGER, ELSEWHERE, OPERATOR = (
    KeyConfig(name="owner-team", key="sk-owner"),
    KeyConfig(name="stranger-team", key="sk-stranger"),
    KeyConfig(name="elsewhere-team", key="sk-elsewhere", models=("elsewhere",)),
    KeyConfig(name="operator-team", key="sk-operator", admin=True),
)
# They need no key, and show nothing of this server.
NO_BODY = {"/ping", "/v1/responses/{response_id}/cancel"}  # POST without a body
OPEN = {("get", path) for path in ("/health", "/ready", "/ping", "/openapi.json", "/docs")} | {("post", "/ping")}
FREE = {("get", "/version"), ("get", "/load"), ("get", "/v1/models"), ("get", "/metrics")}  # with any key

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": completion_body(),
    "/v1/completions/render": completion_body(),
    "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/embeddings": {"input": "hello"},
    "/pooling": {"input": "hello"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/v1/reranking": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/infill": {"input_prefix": "a", "input_suffix": "b"},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104]},
    "/models/load": {},
    "/models/unload": {},
}


def shown(key: KeyConfig | str | None) -> dict[str, str]:
    secret = key.key if isinstance(key, KeyConfig) else key
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}


@pytest.fixture
async def client(make_client: MakeClient) -> Client:
    return await make_client(
        config={
            "model": (ModelSpec(name=SECRET_MODEL),),
            "key": (OWNER, STRANGER, ELSEWHERE, OPERATOR),
            "proxy": ProxyConfig(aliases={"nickname": SECRET_MODEL}),
        }
    )


async def endpoints(client: Client) -> list[tuple[str, str]]:
    async with client.session.get(client.url + "/openapi.json") as response:
        paths = (await response.json())["paths"]
    return [(method, path) for path, methods in paths.items() for method in methods]


async def call(
    client: Client, method: str, path: str, key: KeyConfig | str | None, **fields: Any
) -> tuple[int, str, Any]:
    """The status, the text and the headers of an answer. The path's places get the names of things that exist."""
    body = {**BODIES.get(path, {**chat_body()}), **fields}
    body = {name: value for name, value in body.items() if value is not None}
    path = path.format(response_id="resp_1", request_id="request-1", name=SECRET_MODEL)
    data = json.dumps(body).encode() if method == "post" else None
    headers = {**shown(key), "Content-Type": "application/json", "Idempotency-Key": "retry-1"}
    async with client.session.request(method, client.url + path, data=data, headers=headers) as response:
        return response.status, await response.text(), response.headers


def names_of(text: str) -> Iterator[str]:
    yield from (word for word in (SECRET_MODEL, "nickname", "-team", "sk-o", "sk-s", "elsewhere") if word in text)


@pytest.mark.parametrize("key", [None, "", "sk-wrong"])
async def test_without_an_accepted_key_no_endpoint_says_or_does_anything(client: Client, key: str | None) -> None:
    answers = {each: await call(client, *each, key, model=SECRET_MODEL) for each in await endpoints(client)}

    assert answers.keys() >= OPEN
    for each, (status, text, headers) in answers.items():
        assert status == (200 if each in OPEN else 401), (each, text)
        assert not list(names_of(text)), each
        assert "sk-wrong" not in text
        if each == ("get", "/docs"):
            assert headers["Content-Security-Policy"] == DOCS_HEADERS["Content-Security-Policy"]
    assert not client.backend.batches
    assert client.engine.stats.prompt_tokens == 0


@pytest.mark.parametrize("sent", [None, "", "nickname", "unknown", "elsewhere"])
async def test_a_key_for_other_models_learns_no_name_from_any_endpoint(client: Client, sent: str | None) -> None:
    """`sent` is the model in the request. The key may use "elsewhere" only, which is not served here."""
    answers = {
        each: await call(client, *each, ELSEWHERE, model=sent)
        for each in await endpoints(client)
        if each not in OPEN and "{" not in each[1]
    }

    for each, (status, text, _) in answers.items():
        told = set(names_of(text)) - {"elsewhere", sent}
        assert not told, (each, text)
        assert status == 200 if each in FREE else status in (403, 404), (each, status, text)
    assert not client.backend.batches


@pytest.mark.parametrize("has_scores", [False, True])
async def test_a_field_that_an_endpoint_does_not_know_is_named_in_its_answer(
    make_client: MakeClient, *, has_scores: bool
) -> None:
    head = ScoringHead(array("f", [0.0] * HIDDEN_SIZE)) if has_scores else None
    client = await make_client(scoring_head=head)
    paths = {path for method, path in await endpoints(client) if method == "post"} - NO_BODY
    scoring = {path for path in paths if "rank" in path or "score" in path}

    for path in scoring if has_scores else paths - scoring:
        body = {**BODIES.get(path, chat_body()), "frob": 1}
        async with client.session.post(client.url + path, json=body) as response:
            text = await response.text()
        assert "'frob'" in text or "`frob`" in text, (path, text)


def marked(value: Any) -> Any:
    """The value with a mark in each of its texts."""
    if isinstance(value, str):
        return f"mark-{value}"
    if isinstance(value, list):
        return [marked(each) for each in value]
    return {name: marked(each) for name, each in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("others", [{}, {"stop": {"mark": 1}}, {"guided_regex": "(mark"}, {"user": ["mark"]}])
async def test_no_endpoint_writes_what_a_body_says_into_the_log(
    client: Client, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    said = {name: marked(value) for body in (chat_body(), *BODIES.values()) for name, value in body.items()}

    statuses = set[int]()
    for method, path in await endpoints(client):
        names = BODIES.get(path, chat_body()).keys()
        fields = {name: said[name] for name in names if name not in ("model", "messages")} | others
        if "messages" in names:
            fields["messages"] = [{"role": "user", "content": "mark"}]
        for model in (SECRET_MODEL, "mark"):
            statuses.add((await call(client, method, path, OPERATOR, **fields, model=model))[0])

    assert {200, 404} <= statuses
    assert client.backend.batches
    assert "brlite.access" in {record.name for record in caplog.records}
    assert "mark" not in caplog.text


async def test_another_keys_response_and_its_items_are_not_there(client: Client) -> None:
    _, text, _ = await call(client, "post", "/v1/responses", OWNER)
    made = json.loads(text)
    path, item = f"/v1/responses/{made['id']}", made["output"][0]["id"]

    async def statuses(key: KeyConfig) -> list[int]:
        reads = [await call(client, "get", path + end, key) for end in ("", "?stream=true", "/input_items")]
        return [status for status, _, _ in reads]

    async def write(key: KeyConfig, **fields: Any) -> tuple[int, str]:
        headers = {**shown(key), "Content-Type": "application/json"}
        data = json.dumps({"input": "hello", "max_output_tokens": 4, **fields})
        async with client.session.post(client.url + "/v1/responses", data=data, headers=headers) as response:
            return response.status, await response.text()

    assert await statuses(STRANGER) == [404] * 3
    assert await statuses(OPERATOR) == [404] * 3
    continued, said = await write(STRANGER, previous_response_id=made["id"])
    referred, _ = await write(STRANGER, input=[{"type": "item_reference", "id": item}])
    assert (continued, referred) == (400, 400), said
    for method, end in (("delete", ""), ("post", "/cancel")):
        status, said, _ = await call(client, method, path + end, STRANGER)
        assert (status, "not found" in said) == (404, True)
    assert await statuses(OWNER) == [200] * 3
    status, said = await write(OWNER, previous_response_id=made["id"])
    assert status == 200, said


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_another_keys_retry_key_gives_no_stored_answer(client: Client, is_streamed: bool) -> None:
    path = "/v1/chat/completions"
    first = await call(client, "post", path, OWNER, model=None, stream=is_streamed)

    again = await call(client, "post", path, OWNER, model=None, stream=is_streamed)
    other = await call(client, "post", path, STRANGER, model=None, stream=is_streamed)
    changed = await call(client, "post", path, STRANGER, model=None, stream=is_streamed, max_tokens=3)

    assert [status for status, _, _ in (first, again, other, changed)] == [200, 200, 200, 400]
    assert again[1] == first[1]
    assert "Idempotent-Replayed" in again[2]
    assert "Idempotent-Replayed" not in other[2]


async def test_another_keys_request_is_not_found_by_its_id(client: Client, eventually: Eventually) -> None:
    client.backend.gate = threading.Event()
    body = json.dumps(chat_body(model=None)).encode()
    headers = {**shown(OWNER), "X-Request-Id": "request-1", "Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=None)
    asking = asyncio.create_task(
        client.session.post(client.url + "/v1/chat/completions", data=body, headers=headers, timeout=timeout)
    )
    await eventually(client.backend.has_begun.is_set)

    refused = [(await call(client, "delete", "/v1/requests/{request_id}", key))[0] for key in (STRANGER, OPERATOR)]
    slots = [(await call(client, "get", "/slots", key))[:2] for key in (STRANGER, OPERATOR)]
    client.backend.gate.set()
    async with await asking as response:
        answer = await response.json()

    assert refused == [404, 404]
    assert [status for status, _ in slots] == [403, 200]
    assert "hello" not in slots[1][1]
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "/models/unload"), ("get", "/slots"), ("get", "/metrics?upstream=all")],
)
async def test_what_concerns_all_keys_needs_an_operators_key(client: Client, method: str, path: str) -> None:
    status, text, _ = await call(client, method, path, STRANGER, model="unknown")

    assert (status, "operator's key" in text) == (403, True)
    assert not list(names_of(text))
