"""Everything around completions: probes, models, tokens, keys, queues, clients that leave, the application embedded."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

import brlite
from brlite.app import create_app
from brlite.config.options import Config, KeysConfig, LimitsConfig, ModelSpec, ProxyConfig, ServerConfig
from brlite.http.listen import HttpServer
from brlite.http.middlewares import has_left
from brlite.server.handlers import NOT_BUILT
from brlite.server.model_list import ModelCard
from brlite.server.served_model import ModelTable, ServedModel
from tests.fakes import ByteTokenizer
from tests.limits import PATIENCE_SECONDS
from tests.server.conftest import Client, MakeClient, chat_body, completion_body

CHAT = "/v1/chat/completions"


async def test_models_are_listed_and_shown_one_by_one(client: Client) -> None:
    _, listed = await client.get("/v1/models")
    _, one = await client.get("/v1/models/fake")
    status, _ = await client.get("/v1/models/other")

    assert listed["data"] == [one]
    assert (one["id"], one["max_model_len"], one["status"]) == ("fake", 64, "ready")
    assert status == 404


@pytest.mark.parametrize(("fingerprint", "expected"), [("0a1b", "fp_0a1b"), ("", None)])
async def test_every_answer_and_chunk_tells_the_fingerprint_of_a_backend_that_has_one(
    make_client: MakeClient, fingerprint: str, expected: str | None
) -> None:
    client = await make_client(fingerprint=fingerprint)
    usage = {"stream_options": {"include_usage": True}}

    answers = [await client.chat(), await client.complete()]
    answers += await client.stream(CHAT, chat_body(**usage))
    answers += await client.stream("/v1/completions", completion_body(**usage))

    assert {answer.get("system_fingerprint") for answer in answers} == {expected}
    assert all(("system_fingerprint" in answer) == bool(fingerprint) for answer in answers)


async def test_text_becomes_tokens_and_text_again(client: Client) -> None:
    _, tokens = await client.post("/tokenize", {"prompt": "né"})
    _, text = await client.post("/detokenize", {"tokens": tokens["tokens"]})
    _, chat = await client.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})

    assert tokens == {"count": 3, "max_model_len": 64, "tokens": [110, 195, 169]}
    assert text == {"prompt": "né", "content": "né"}
    assert bytes(chat["tokens"]) == b"user:x\n"


async def test_what_tokenizing_ignored_is_said(client: Client) -> None:
    _, tokens = await client.post("/tokenize", {"prompt": "né", "frobnicate": 1})
    _, text = await client.post("/detokenize", {"tokens": [97], "frobnicate": 1})

    assert tokens["warnings"] == text["warnings"] == ["the field 'frobnicate' is not known and was ignored"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": []}, "prompt"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
async def test_an_option_that_tokenizing_would_ignore_is_refused(
    client: Client, fields: dict[str, Any], param: str
) -> None:
    status, answer = await client.post("/tokenize", fields)

    assert (status, answer["error"]["param"]) == (400, param)


async def test_a_text_of_any_length_is_counted_and_put_together_again(client: Client) -> None:
    text = "0123456789" * 20_000

    _, counted = await client.post("/tokenize", {"prompt": text})
    status, whole = await client.post("/detokenize", {"tokens": counted["tokens"]})
    _, chat = await client.post("/tokenize", {"messages": [{"role": "user", "content": text}]})

    assert (counted["count"], counted["max_model_len"], chat["count"]) == (200_000, 64, 200_006)
    assert (status, whole["prompt"]) == (200, text)


async def test_tokens_are_shown_by_name(client: Client) -> None:
    _, answer = await client.post("/tokenize", {"prompt": "né", "return_token_strs": True})

    assert answer["token_strs"] == ["n", r"bytes:\xc3", r"bytes:\xa9"]


async def test_the_tokenizer_says_what_lm_eval_asks_for(client: Client) -> None:
    status, info = await client.get("/tokenizer_info")

    assert status == 200
    assert (info["eos_token"], info["bos_token"], info["model_max_length"]) == ("<256>", None, 64)
    assert info["chat_template"]


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/",
        "/v1/v1/chat/completions",
    ],
)
async def test_a_path_is_found_as_clients_spell_it(client: Client, path: str) -> None:
    status, answer = await client.post(path, chat_body())

    assert (status, answer["object"]) == (200, "chat.completion")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/",
        "/models",
        "//v1//models",
        "/models/fake",
        "/v1/models/fake/",
        "//v1//models//fake",
        "/version/",
        "/v1/tokenizer_info",
        "/health/",
    ],
)
async def test_a_path_to_read_is_found_as_clients_spell_it(client: Client, path: str) -> None:
    status, _ = await client.get(path)

    assert status == 200


@pytest.mark.parametrize(("path", "body"), [("/v1/tokenize", {"prompt": "x"}), ("/v1/detokenize/", {"tokens": [97]})])
async def test_tokens_may_be_asked_for_below_v1(client: Client, path: str, body: dict[str, Any]) -> None:
    status, _ = await client.post(path, body)

    assert status == 200


def test_the_docs_list_the_endpoints_that_are_not_built() -> None:
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (?:OpenAI|Anthropic) \|.*\| (.*) \|$", page, re.MULTILINE)

    listed = {f"/v1/{path}" for cell in cells for path in re.findall("`(.+?)`", cell)}

    assert len(cells) == 2
    assert listed == {path for path in NOT_BUILT if path.startswith("/v1/")} - {"/v1/classify"}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/moderations", "/moderations", "/v1/responses/compact", "/api/chat", "/v1/messages/batches"),
        *("/v1/conversations/conv_1/items", "/v1/evals", "/v1/videos/video_1", "/v1/chat/completions/chatcmpl-1"),
    ],
)
async def test_an_endpoint_that_is_not_built_says_so(client: Client, path: str) -> None:
    status, answer = await client.post(path, {"model": "fake", "input": "x"})

    assert status == 404
    assert answer["error"].get("code", "unsupported_endpoint") == "unsupported_endpoint"
    assert answer["error"]["message"].startswith(
        f"unknown endpoint: {path} is not in this version of brlite; GET /docs"
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/messages", 400),
        ("//messages/", 400),
        ("/v1/messages/count_tokens?beta=true", 400),
        ("/v1/messages/batches", 404),
    ],
)
async def test_an_error_below_messages_has_anthropics_shape(client: Client, path: str, status: int) -> None:
    async with client.session.post(client.url + path, json={}) as response:
        answer = await response.json()

    kind = {400: "invalid_request_error", 404: "not_found_error"}[status]
    assert (response.status, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert response.headers["Request-Id"] == response.headers["X-Request-Id"]


async def test_agents_see_that_a_server_is_there_without_a_key(make_client: Callable[..., Awaitable[Client]]) -> None:
    client = await make_client(config={"keys": KeysConfig(keys=("secret",))})

    async with client.session.head(client.url + "/") as head, client.session.get(client.url + "/") as get:
        assert (head.status, get.status) == (200, 404)


async def test_no_model_is_needed_where_one_is_served(client: Client) -> None:
    body = chat_body()
    del body["model"]

    for fields in ({}, {"model": None}, {"model": ""}):
        status, answer = await client.post(CHAT, {**body, **fields})
        assert (status, answer["model"]) == (200, "fake")


async def test_a_token_outside_the_vocabulary_is_refused(client: Client) -> None:
    status, answer = await client.post("/detokenize", {"tokens": [260]})

    assert (status, answer["error"]["param"]) == (400, "tokens")


async def test_the_version_is_told(client: Client) -> None:
    assert await client.get("/version") == (200, {"version": brlite.__version__})


async def test_a_server_is_alive_but_not_ready_while_it_loads() -> None:
    model = ServedModel(ModelSpec(name="slow"))
    model.loading.report("reading the weights", 0.25)
    config = Config(model=(ModelSpec(name="slow"),))
    app = create_app(ModelTable([model]), config)

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        alive = await session.get("/health")
        ready = await session.get("/ready")
        refused = await session.post(CHAT, json=chat_body(model="slow"))
        progress, error = await ready.json(), (await refused.json())["error"]

    assert (alive.status, ready.status, refused.status) == (200, 503, 503)
    assert progress["models"][0]["progress"] == 0.25
    assert "reading the weights, 25%" in error["message"]
    assert int(refused.headers["Retry-After"]) > 0


async def test_progress_is_that_of_a_load(client: Client) -> None:
    _, ready = await client.get("/ready")

    assert ready["models"] == [{"model": "fake", "status": "ready"}]


async def test_the_root_leads_to_the_documentation(client: Client) -> None:
    status, answer = await client.get("/")

    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert "GET /docs" in answer["error"]["message"]


async def test_a_draining_server_takes_no_new_work(client: Client) -> None:
    model = ServedModel(ModelSpec(name="fake"), client.engine)
    models = ModelTable([model])
    models.is_draining = True
    app = create_app(models)

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        ready, refused = await session.get("/ready"), await session.post(CHAT, json=chat_body())

    assert (ready.status, refused.status) == (503, 503)


async def test_health_fails_when_the_engine_has_died(client: Client) -> None:
    await client.engine.close()

    status, answer = await client.get("/health")

    assert (status, answer) == (500, {"status": "failed"})


async def test_a_model_of_another_server_is_a_404_that_says_so_without_its_address(client: Client) -> None:
    elsewhere = ProxyConfig(all_models={"http://10.0.0.9:8000": "far"})
    app = create_app(ModelTable([ServedModel(ModelSpec(name="fake"), client.engine)], elsewhere))

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        refused = await session.post(CHAT, json=chat_body(model="far"))
        message = (await refused.json())["error"]["message"]

    assert refused.status == 404
    assert "runs on another server, whose address is not known here" in message
    assert "10.0.0.9" not in message


async def test_an_alias_is_another_name_of_a_model_here(client: Client) -> None:
    names = ProxyConfig(aliases={"gpt-4o": "fake"})
    app = create_app(ModelTable([ServedModel(ModelSpec(name="fake"), client.engine)], names))

    async with HttpServer(app, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession(server.url) as session:
        answer = await (await session.post(CHAT, json=chat_body(model="gpt-4o"))).json()
        listed = await (await session.get("/v1/models")).json()

    assert answer["model"] == "gpt-4o"
    assert [(card["id"], card["root"]) for card in listed["data"]] == [("fake", "fake"), ("gpt-4o", "fake")]


@pytest.mark.parametrize(("options", "metrics_status"), [({"metrics_need_key": False}, 200), ({}, 401)])
async def test_everything_but_the_probes_needs_a_key(
    make_client: MakeClient, options: dict[str, Any], metrics_status: int
) -> None:
    server = ServerConfig(**options)
    client = await make_client(config={"keys": KeysConfig(keys=("secret", "other")), "server": server})

    async def status(path: str, **headers: str) -> int:
        async with client.session.get(client.url + path, headers=headers) as response:
            return response.status

    assert [await status(path) for path in ("/health", "/ready", "/metrics")] == [200, 200, metrics_status]
    assert [await status(path) for path in ("/health/", "/ready/", "/metrics/")] == [200, 200, metrics_status]
    assert [await status(path) for path in ("/v1/models", "/version", "/nowhere")] == [401, 401, 401]
    assert await status("/v1/models", Authorization="Bearer other") == 200
    assert await status("/v1/models", Authorization="Bearer wrong") == 401


async def test_a_full_queue_answers_429_at_once(make_client: MakeClient) -> None:
    client = await make_client(limits={"max_waiting": 1}, max_num_seqs=1)
    client.backend.gate = threading.Event()
    running = asyncio.create_task(client.chat())
    await asyncio.to_thread(client.backend.has_begun.wait, 10)

    both = [asyncio.create_task(client.post(CHAT, chat_body(text))) for text in ("second", "third")]
    done, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    client.backend.gate.set()
    await asyncio.gather(running, *waiting)

    (refused,) = done
    status, answer = refused.result()
    assert status == 429
    assert answer["error"]["code"] == "queue_full"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_client_that_leaves_frees_its_work(client: Client, is_streamed: bool) -> None:
    client.backend.gate = threading.Event()
    body = chat_body(max_tokens=30, n=3, stream=is_streamed)
    request = asyncio.create_task(client.post(CHAT, body))
    await asyncio.to_thread(client.backend.has_begun.wait, 10)

    request.cancel()
    await asyncio.wait([request])
    client.backend.gate.set()
    await asyncio.wait_for(client.engine.wait_idle(), PATIENCE_SECONDS)

    assert client.engine.stats.num_used_blocks == 0
    assert client.engine.stats.finished["abort"] == 1


async def test_a_stream_ends_at_the_first_write_to_a_client_that_left(
    make_client: MakeClient, eventually: Callable[[Callable[[], bool]], Awaitable[None]]
) -> None:
    client = await make_client(max_model_len=512, num_blocks=256)
    client.backend.gate = threading.Event()
    requests: list[web.BaseRequest] = []

    async def keep(request: web.BaseRequest, response: web.StreamResponse) -> None:
        requests.append(request)

    app = create_app(client.engine, Config(model=(ModelSpec(name="fake"),)))
    app.on_response_prepare.append(keep)
    runner = web.AppRunner(app)  # which cancels no handlers
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]

    body = chat_body(max_tokens=200, stream=True)
    async with client.session.post(f"http://{host}:{port}{CHAT}", json=body) as response:
        response.close()
    await eventually(lambda: has_left(requests[0]))
    client.backend.gate.set()
    await asyncio.wait_for(client.engine.wait_idle(), PATIENCE_SECONDS)
    await runner.cleanup()

    assert client.engine.stats.finished["abort"] == 1
    assert len(client.backend.batches) < 10


async def test_a_delta_that_cannot_be_told_ends_its_stream_with_an_error(make_client: MakeClient) -> None:
    class Mute(ByteTokenizer):
        def token_text(self, token_id: int) -> str:
            raise ZeroDivisionError

    client = await make_client(tokenizer=Mute())
    client.backend.gate = threading.Event()

    body = chat_body(logprobs=True, stream=True)
    async with client.session.post(client.url + CHAT, json=body) as response:
        await response.content.readuntil(b"\n\n")
        client.backend.gate.set()
        rest = await asyncio.wait_for(response.text(), PATIENCE_SECONDS)

    assert '"type":"server_error"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert client.engine.is_running


async def test_many_clients_leaving_at_all_moments_leave_nothing_behind(client: Client) -> None:
    async def leave_after(number: int) -> None:
        body = completion_body(f"prompt {number}", max_tokens=24, stream=bool(number % 2))
        request = asyncio.create_task(client.post("/v1/completions", body))
        await asyncio.sleep(number * 0.001)
        request.cancel()
        await asyncio.wait([request])

    await asyncio.gather(*(leave_after(number) for number in range(60)))
    await asyncio.wait_for(client.engine.wait_idle(), PATIENCE_SECONDS)

    assert client.engine.stats.num_used_blocks == 0
    assert client.engine.is_running


async def test_the_application_can_be_mounted_in_another(client: Client) -> None:
    config = Config(model=(ModelSpec(name="fake"),))
    outer = web.Application()
    outer.add_subapp("/llm/", create_app(client.engine, config))

    async with HttpServer(outer, "127.0.0.1", 0, LimitsConfig()) as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/llm{CHAT}", json=chat_body()) as response:
            answer = await response.json()
        async with session.get(f"{server.url}/llm/ready") as response:
            ready = response.status

    assert answer["usage"]["completion_tokens"] == 8
    assert ready == 200


@pytest.mark.parametrize("path", ["stream", "whole"])
async def test_an_application_in_somebody_elses_server_ends_its_answers_with_an_error(
    client: Client, path: str
) -> None:
    client.backend.gate = threading.Event()
    outer = web.Application()
    outer.add_subapp("/ai", create_app(client.engine, Config(model=(ModelSpec(name="fake"),))))
    runner = web.AppRunner(outer, handler_cancellation=True, shutdown_timeout=5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/ai{CHAT}"

    async with aiohttp.ClientSession() as session:
        asked = asyncio.create_task(session.post(url, json=chat_body(stream=path == "stream")))
        assert await asyncio.to_thread(client.backend.has_begun.wait, PATIENCE_SECONDS)
        closing = asyncio.create_task(runner.cleanup())
        answer = await asked
        text = await answer.text()
        client.backend.gate.set()
        await closing

    assert answer.status == (200 if path == "stream" else 503)
    assert "the server is stopping" in text


@pytest.mark.parametrize("created", [-(2**63), 0, 2**63 - 1])
def test_the_date_of_another_servers_model_may_be_any_number(created: int) -> None:
    card = ModelCard(id="m", created=created, root="m", status="ready")

    assert card.created_at in ("1970-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00")
