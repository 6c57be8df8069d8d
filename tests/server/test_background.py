"""Responses that run in the background: read, cancelled, deleted and continued by their ids, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading

import openai
import pytest

from brlite.config.options import KeysConfig
from brlite.errors import InvalidRequest
from brlite.server import generate
from tests.conftest import Eventually
from tests.fakes import ByteTokenizer
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient


class GatedTokenizer(ByteTokenizer):
    def __init__(self) -> None:
        super().__init__()
        self.has_begun, self.gate = threading.Event(), threading.Event()

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        self.has_begun.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        return super().encode(text)


async def test_a_background_response_is_read_when_it_has_ended(
    client: Client, api: openai.AsyncOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brlite.server.background")
    body = {"model": "fake", "input": "hello", "max_output_tokens": 4, "temperature": 0}
    plain = asyncio.create_task(api.responses.create(**body))

    begun = await api.responses.create(**body, background=True)
    read = await api.responses.retrieve(begun.id)
    items = await api.responses.input_items.list(begun.id)
    client.backend.gate.set()
    events = [event async for event in await api.responses.retrieve(begun.id, stream=True)]  # when it has ended
    done = await api.responses.retrieve(begun.id)
    then = await api.responses.create(model="fake", input="and?", previous_response_id=begun.id, max_output_tokens=4)

    assert (begun.status, begun.background, begun.output, begun.usage) == ("in_progress", True, [], None)
    assert (read.status, len(items.data)) == ("in_progress", 1)
    assert (done.status, done.background, done.output_text) == ("incomplete", True, (await plain).output_text)
    assert done.usage is not None
    assert done.usage.output_tokens == 4
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert then.previous_response_id == begun.id
    assert f"background response {begun.id} has ended: model=fake prompt_tokens=" in caplog.text


async def test_a_background_response_is_cancelled(client: Client, api: openai.AsyncOpenAI) -> None:
    begun = await api.responses.create(model="fake", input="hello", background=True)
    cancelling = asyncio.create_task(api.responses.cancel(begun.id))
    client.backend.gate.set()

    cancelled = await asyncio.wait_for(cancelling, PATIENCE_SECONDS)
    again = await api.responses.cancel(begun.id)
    read = await api.responses.retrieve(begun.id)

    assert cancelled.status == again.status == read.status == "cancelled"
    assert client.engine.stats.finished["abort"] == 1
    assert client.engine.stats.num_used_blocks == 0


async def test_a_deleted_response_stops_and_does_not_come_back(
    client: Client, api: openai.AsyncOpenAI, eventually: Eventually
) -> None:
    begun = await api.responses.create(model="fake", input="hello", background=True)
    await api.responses.delete(begun.id)
    client.backend.gate.set()

    await eventually(lambda: client.engine.stats.finished["abort"] == 1)
    await client.engine.wait_idle()
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(begun.id)


async def test_a_response_in_progress_cannot_be_continued(api: openai.AsyncOpenAI) -> None:
    begun = await api.responses.create(model="fake", input="hello", background=True)

    with pytest.raises(openai.BadRequestError, match="is in progress") as refusal:
        await api.responses.create(model="fake", input="and?", previous_response_id=begun.id)

    assert refusal.value.param == "previous_response_id"


async def test_a_refusal_is_the_answer_and_nothing_is_stored(client: Client, api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        await api.responses.create(model="fake", input="x" * 1000, background=True)

    assert refusal.value.param == "input"
    assert not client.backend.batches


async def test_a_failed_step_is_a_failed_response_and_its_log_line_has_no_text_of_the_error(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brlite.server.background")
    client = await make_client(fault=lambda seq: "broken\nby the prompt")
    _, begun = await client.post("/v1/responses", {"input": "hi", "background": True})
    await client.engine.wait_idle()

    _, done = await client.get(f"/v1/responses/{begun['id']}")

    (line,) = (record.getMessage() for record in caplog.records if record.name == "brlite.server.background")
    assert (done["status"], done["error"]["code"], done["background"]) == ("failed", "server_error", True)
    assert line.startswith(f"background response {begun['id']} has ended (EngineError): model=fake ")
    assert "broken" not in line


async def test_another_key_neither_reads_nor_cancels_it(make_client: MakeClient) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("sk-1", "sk-2"))})
    client.backend.gate = threading.Event()
    mine, others = ({"Authorization": f"Bearer sk-{number}"} for number in (1, 2))
    _, begun = await client.post("/v1/responses", {"input": "hi", "background": True}, **mine)

    status, _ = await client.post(f"/v1/responses/{begun['id']}/cancel", {}, **others)
    client.backend.gate.set()

    assert (begun["status"], status) == ("in_progress", 404)


async def test_a_server_that_stops_ends_what_runs(client: Client) -> None:
    client.backend.gate = threading.Event()
    _, begun = await client.post("/v1/responses", {"input": "hi", "background": True})

    await asyncio.wait_for(client.server.close(), PATIENCE_SECONDS)
    client.backend.gate.set()
    await client.engine.wait_idle()

    assert begun["status"] == "in_progress"
    assert client.engine.stats.num_used_blocks == 0


async def test_a_retry_gets_the_response_that_runs_and_does_not_run_a_cancelled_one_again(client: Client) -> None:
    client.backend.gate = threading.Event()
    body, key = {"input": "hi", "background": True}, {"Idempotency-Key": "k"}
    _, begun = await client.post("/v1/responses", body, **key)

    _, while_running = await asyncio.wait_for(client.post("/v1/responses", body, **key), PATIENCE_SECONDS)
    cancelling = asyncio.create_task(client.post(f"/v1/responses/{begun['id']}/cancel", {}))
    client.backend.gate.set()
    _, cancelled = await cancelling
    _, again = await client.post("/v1/responses", body, **key)
    status, other = await client.post("/v1/responses", {**body, "input": "ho"}, **key)

    assert begun == while_running == again
    assert (begun["status"], cancelled["status"]) == ("in_progress", "cancelled")
    assert (status, other["error"]["code"]) == (400, "idempotency_key_reused")


async def test_a_response_with_a_key_goes_on_if_its_client_leaves_before_it_begins(
    make_client: MakeClient, eventually: Eventually
) -> None:
    tokenizer = GatedTokenizer()
    client = await make_client(tokenizer=tokenizer)
    body, key = {"input": "hi", "background": True, "max_output_tokens": 2}, {"Idempotency-Key": "k"}
    leaving = asyncio.create_task(client.post("/v1/responses", body, **key))
    await eventually(tokenizer.has_begun.is_set)

    leaving.cancel()
    await eventually(lambda: not client.server.num_connections)
    tokenizer.gate.set()
    _, begun = await client.post("/v1/responses", body, **key)
    await client.engine.wait_idle()
    _, done = await client.get(f"/v1/responses/{begun['id']}")

    assert (begun["status"], done["status"]) == ("in_progress", "incomplete")


async def test_a_client_that_leaves_as_its_response_is_refused_is_no_error(
    client: Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
            raise InvalidRequest("no")

    begun, ended = asyncio.Event(), asyncio.Event()
    monkeypatch.setattr(generate, "make_requests", refuse)
    leaving = asyncio.create_task(client.post("/v1/responses", {"input": "hello", "background": True}))
    await asyncio.wait_for(begun.wait(), PATIENCE_SECONDS)
    leaving.cancel()
    await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)
    await eventually(lambda: not client.server._app[generate.RUNNING])
    await asyncio.sleep(0.01)
    gc.collect()

    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
