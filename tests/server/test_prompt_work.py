"""What ends requests that run without a stream (embeddings, scores, background responses), and what refuses them."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator
from typing import Any

import pytest

from brlite.engine.scoring import ScoringHead
from brlite.http.body import BODIES
from brlite.server.generate import MODELS
from brlite.server.response_store import STORE
from tests.conftest import Eventually
from tests.fakes import HIDDEN_SIZE
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient
from tests.server.test_background import GatedTokenizer

OF_PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": ["hi"] * 9}),
    ("/pooling", {"input": "hi"}),
    ("/v1/score", {"text_1": "hi", "text_2": ["a", "b"]}),
    ("/v1/rerank", {"query": "hi", "documents": ["a"] * 9}),
    ("/rerank", {"query": "hi", "texts": ["a"] * 9}),
]
IN_BACKGROUND: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"input": "hi", "background": True}),
    ("/v1/responses", {"input": "hi", "background": True, "stream": True}),
]


@pytest.fixture
async def stuck(make_client: MakeClient) -> AsyncIterator[Client]:
    """A server of all these endpoints that runs one request and lets one wait; its model computes nothing."""
    head = ScoringHead(array("f", [1.0] * HIDDEN_SIZE))
    client = await make_client(scoring_head=head, limits={"max_waiting": 1}, max_num_seqs=1)
    client.backend.gate = threading.Event()
    yield client
    client.backend.gate.set()


@pytest.mark.parametrize(("path", "body"), OF_PROMPTS)
async def test_a_request_is_ended_by_its_name(
    stuck: Client, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    request = asyncio.create_task(stuck.post(path, body, **{"X-Request-Id": "mine"}))
    await eventually(lambda: stuck.engine.stats.num_running > 0)

    async with stuck.session.delete(stuck.url + "/v1/requests/mine") as response:
        aborted = response.status
    status, answer = await asyncio.wait_for(request, PATIENCE_SECONDS)
    stuck.backend.gate.set()
    await stuck.engine.wait_idle()

    assert (aborted, status, answer["error"]["code"]) == (200, 400, "request_aborted")
    assert stuck.engine.stats.num_used_blocks == 0


@pytest.mark.parametrize(("path", "body"), OF_PROMPTS)
async def test_a_server_that_stops_answers_what_runs(
    stuck: Client, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    request = asyncio.create_task(stuck.post(path, body))
    await eventually(lambda: stuck.engine.stats.num_running > 0)

    closing = asyncio.create_task(stuck.server.close())
    status, answer = await asyncio.wait_for(request, PATIENCE_SECONDS)
    await asyncio.wait_for(closing, PATIENCE_SECONDS)

    assert (status, answer["error"]["message"]) == (503, "the server is stopping")


@pytest.mark.parametrize(("path", "body"), [*OF_PROMPTS, *IN_BACKGROUND])
async def test_a_full_queue_refuses_the_next_one_at_once(
    stuck: Client, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    running = asyncio.create_task(stuck.post("/v1/embeddings", {"input": "x"}))
    await eventually(lambda: stuck.engine.stats.num_running == 1)
    waiting = asyncio.create_task(stuck.post("/v1/embeddings", {"input": "y"}))
    await eventually(lambda: len(stuck.engine._engine._requests) == 2)

    async with stuck.session.post(stuck.url + path, json=body) as response:
        answer = await response.json()
    stuck.backend.gate.set()
    await asyncio.gather(running, waiting)

    assert (response.status, answer["error"]["code"]) == (429, "queue_full")
    assert int(response.headers["Retry-After"]) > 0
    assert stuck.server._app[STORE].num_bytes == 0


@pytest.mark.parametrize(("path", "body"), [*OF_PROMPTS, *IN_BACKGROUND])
async def test_a_draining_server_takes_none(stuck: Client, path: str, body: dict[str, Any]) -> None:
    stuck.server._app[MODELS].is_draining = True

    status, answer = await stuck.post(path, body)

    assert (status, answer["error"]["message"]) == (503, "the server is stopping")


@pytest.mark.parametrize(("path", "body"), IN_BACKGROUND)
async def test_a_background_response_fails_at_its_timeout(
    stuck: Client, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    store = stuck.server._app[STORE]
    for timeout in (0.05, 1, PATIENCE_SECONDS / 2):  # on a busy machine it may be over before the response has begun
        async with stuck.session.post(stuck.url + path, json={**body, "timeout": timeout}) as response:
            await response.read()
        if store._tenants:
            break
    await eventually(lambda: any(not each.value.is_running for each in store._tenants[""].values()))
    ((response_id, _),) = store._tenants[""].items()

    _, done = await stuck.get(f"{path}/{response_id}")

    assert (done["status"], done["error"]["code"]) == ("failed", "server_error")
    assert f"its timeout of {timeout:g} s" in done["error"]["message"]


@pytest.mark.parametrize(("path", "body"), IN_BACKGROUND)
async def test_a_client_that_leaves_before_it_has_an_id_leaves_nothing(
    make_client: MakeClient, eventually: Eventually, path: str, body: dict[str, Any]
) -> None:
    tokenizer = GatedTokenizer()
    client = await make_client(tokenizer=tokenizer)
    leaving = asyncio.create_task(client.post(path, body))
    await eventually(tokenizer.has_begun.is_set)

    leaving.cancel()
    await eventually(lambda: not client.server.num_connections)
    tokenizer.gate.set()
    await client.engine.wait_idle()

    assert not client.backend.batches
    assert client.server._app[STORE].num_bytes == client.server._app[BODIES].num_bytes == 0
