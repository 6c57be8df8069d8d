"""Which upstream a request reaches, end to end: by its prompt, its session, a pause that was asked for, a fallback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

import pytest

from brlite.config.options import Config, KeyConfig, KeysConfig, ProxyConfig, UpstreamConfig
from brlite.proxy.routing.route_table import RouteTable
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import Proxy, run_proxy, wait_until
from tests.proxy.raw_client import Answer, Client, post
from tests.proxy.scripted import Call, ScriptedUpstream, Step, Then
from tests.proxy.scripts import DONE, GOOD_PLAIN, GOOD_STREAM, PLAIN, TOKENS, answer, chunks, sse

BUSY = answer(b"429 Too Many Requests", b'{"error":{"message":"busy"}}', b"application/json", b"Retry-After: 50")


class Group:
    """A proxy before several upstreams, `a` of the model `a` and so on; all of them have the model `m`."""

    def __init__(self, proxy: Proxy, upstreams: dict[str, ScriptedUpstream]) -> None:
        self.proxy, self.upstreams = proxy, upstreams

    async def ask(self, body: object, *headers: bytes) -> Answer:
        client = await Client.connect(self.proxy.port)
        try:
            client.send(post(body, *headers))
            return await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        finally:
            client.leave()

    def num_asked(self) -> dict[str, int]:
        return {name: len(upstream.requests) for name, upstream in self.upstreams.items()}


Start = Callable[..., Awaitable[Group]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(ProxyConfig(…), a=Step(…), b=Step(…))`."""
    async with AsyncExitStack() as stack:

        async def make(proxy: ProxyConfig, keys: Mapping[str, object] = {}, **plain: Step) -> Group:
            upstreams = {name: ScriptedUpstream(step, Step(GOOD_STREAM)) for name, step in plain.items()}
            for upstream in upstreams.values():
                await stack.enter_async_context(upstream)
            configs = [
                UpstreamConfig(url=upstream.url, name=name, models=("m", name), health_path="")
                for name, upstream in upstreams.items()
            ]
            return Group(await stack.enter_async_context(run_proxy(*configs, proxy=proxy, **keys)), upstreams)

        yield make


GOOD = Step(GOOD_PLAIN)


async def test_prompts_that_begin_alike_go_to_one_upstream_and_others_are_spread(start) -> None:
    group = await start(ProxyConfig(choice="prefix"), a=GOOD, b=GOOD, c=GOOD)
    system = [{"role": "system", "content": "Be brief."}]

    for _ in range(6):
        await group.ask({"model": "m", "messages": [*system, {"role": "user", "content": "Hi"}], "seed": 1})
    alike = group.num_asked()
    for number in range(30):
        await group.ask({"model": "m", "prompt": f"{number} sheep"})

    assert sorted(alike.values()) == [0, 0, 6]
    assert all(group.num_asked().values())


@pytest.mark.parametrize("field", ["system", "instructions", "tools", "message"])
async def test_long_prompts_that_differ_before_the_first_user_message_are_spread(start, field) -> None:
    group = await start(ProxyConfig(choice="prefix"), a=GOOD, b=GOOD, c=GOOD)

    for number in range(18):
        text = "x" * 12_000 + str(number)
        user = {"role": "user", "content": "Hi"}
        if field == "message":
            fields = {"messages": [{"role": "system", "content": text}, user]}
        else:
            fields = {field: [{"name": text}] if field == "tools" else text, "messages": [user]}
        await group.ask({"model": "m", **fields})

    assert all(group.num_asked().values())


@pytest.mark.parametrize("how", ["header", "user"])
async def test_a_session_stays_with_one_upstream(start, how) -> None:
    group = await start(ProxyConfig(choice="sticky", sticky_header="X-My-Session"), a=GOOD, b=GOOD, c=GOOD)
    body = {"model": "m", "user": "session-7"} if how == "user" else {"model": "m"}
    headers = (b"x-my-session: session-7",) if how == "header" else ()

    for number in range(6):
        await group.ask({**body, "prompt": str(number)}, *headers)

    assert sorted(group.num_asked().values()) == [0, 0, 6]


async def test_an_upstream_that_asked_for_a_pause_is_left_alone(start) -> None:
    group = await start(ProxyConfig(choice="round_robin"), a=Step(BUSY, is_work=False), b=GOOD)

    answers = [await group.ask({"model": "m"}) for _ in range(4)]

    assert [answer.body for answer in answers] == [PLAIN] * 4
    assert group.num_asked() == {"a": 1, "b": 4}


async def test_a_pause_may_be_asked_for_as_a_date(start) -> None:
    date = b"Retry-After: Thu, 01 Jan 2099 00:00:00 GMT"
    busy = answer(b"503 Service Unavailable", b'{"error":{"message":"busy"}}', b"application/json", date)
    group = await start(ProxyConfig(), a=Step(busy, is_work=False), b=GOOD)
    loop = asyncio.get_running_loop()

    for _ in range(3):
        await group.ask({"model": "m"})

    pauses = [upstream.refuses_until - loop.time() for upstream in group.proxy.forwarder.table.upstreams]
    assert sorted(round(pause, -1) for pause in pauses if pause > 0) in ([60], [])
    assert group.num_asked()["a"] <= 1


async def test_an_answer_that_is_no_json_goes_out_as_it_comes(start) -> None:
    group = await start(ProxyConfig(), a=GOOD)
    has_come = asyncio.Event()

    async def speak(call: Call) -> Then:
        await call.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"
        )
        await has_come.wait()
        await call.send(b"3\r\ntwo\r\n0\r\n\r\n")
        return "keep"

    group.upstreams["a"].act = speak
    client = await Client.connect(group.proxy.port)
    client.send(post({"model": "m", "input": "Hi"}, path=b"/v1/audio/speech"))

    await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)
    body = b""
    while body != b"one":  # which may come in several chunks
        body += await asyncio.wait_for(client.chunk(), PATIENCE_SECONDS)
    has_come.set()
    while part := await asyncio.wait_for(client.chunk(), PATIENCE_SECONDS):
        body += part
    client.leave()

    assert body == b"onetwo"


async def test_a_stream_without_an_end_of_its_own_is_whole_only_if_it_says_so(start) -> None:
    group = await start(ProxyConfig(), a=GOOD)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    delta = b'data: {"type": "response.output_text.delta"}\n\n'

    async def break_off(call: Call) -> Then:
        await call.send(head + delta)
        return "close"

    group.upstreams["a"].act = break_off
    client = await Client.connect(group.proxy.port)
    client.send(post({"model": "m", "stream": True}, path=b"/v1/responses"))
    broken = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    client.leave()

    assert broken.body.startswith(delta + b'event: error\ndata: {"type":"error",')


async def test_a_refusal_that_nobody_can_make_good_arrives_as_it_was(start) -> None:
    group = await start(ProxyConfig(), a=Step(BUSY, is_work=False))

    refused = await group.ask({"model": "m"})

    assert (refused.status, refused.fields[b"retry-after"]) == (429, b"50")
    assert group.num_asked() == {"a": 1}


async def test_a_fallback_answers_under_its_own_name_where_a_model_cannot_be_reached(start, caplog) -> None:
    group = await start(ProxyConfig(fallbacks={"a": ("b",)}), a=GOOD, b=GOOD)
    await group.upstreams["a"].kill()

    with caplog.at_level("INFO", logger="brlite.access"):
        answered = await group.ask({"model": "a", "prompt": "Hi"})

    assert answered.body == PLAIN
    assert "model=a fallback=b upstream=b" in caplog.text
    assert [request.body for request in group.upstreams["b"].requests] == [{"model": "b", "prompt": "Hi"}]


async def test_no_fallback_answers_for_a_key_that_may_not_use_it(start) -> None:
    keys = {"key": (KeyConfig(name="k", key="sk-1", models=("a",)),)}
    group = await start(ProxyConfig(fallbacks={"a": ("b",)}), keys, a=GOOD, b=GOOD)
    await group.upstreams["a"].kill()

    refused = await group.ask({"model": "a"}, b"Authorization: Bearer sk-1")

    assert (refused.status, refused.error["code"]) == (503, "upstream_unavailable")
    assert refused.fields[b"retry-after"] == b"1"
    assert group.num_asked() == {"a": 0, "b": 0}


async def test_who_waits_too_long_for_a_place_is_told_when_to_come_back(start) -> None:
    group = await start(ProxyConfig(max_in_flight=1, max_queued=1, max_queue_seconds=2), a=GOOD)
    may_answer = asyncio.Event()

    async def wait(call: Call) -> Then:
        await may_answer.wait()
        await call.send(GOOD_PLAIN)
        return "keep"

    group.upstreams["a"].act = wait
    first = asyncio.create_task(group.ask({"model": "m"}))
    await wait_until(lambda: group.num_asked()["a"] == 1)

    waited = asyncio.create_task(group.ask({"model": "m"}))
    await wait_until(lambda: group.proxy.forwarder.num_active == 2)
    turned_away = await group.ask({"model": "m"})

    assert (turned_away.status, turned_away.error["code"]) == (429, "queue_full")
    assert ((await waited).status, (await waited).error["code"]) == (503, "queue_timeout")
    assert b"retry-after" in turned_away.fields
    assert b"retry-after" in (await waited).fields
    may_answer.set()
    assert (await first).body == PLAIN


async def test_after_a_reload_queued_requests_go_to_the_new_upstream_and_old_streams_still_count(
    start,
) -> None:
    proxy = ProxyConfig(max_in_flight=1)
    group = await start(proxy, a=GOOD, b=GOOD)
    may_end = asyncio.Event()

    async def stream(call: Call) -> Then:
        await call.send(sse(chunks(TOKENS[0], end=b"")))
        await may_end.wait()
        await call.send(chunks(*TOKENS[1:], DONE))
        return "keep"

    group.upstreams["a"].act = stream
    running = asyncio.create_task(group.ask({"model": "a", "stream": True}))
    await wait_until(lambda: group.num_asked()["a"] == 1)
    queued = asyncio.create_task(group.ask({"model": "a"}))
    await wait_until(lambda: group.proxy.forwarder.num_active == 2)
    replacing = UpstreamConfig(url=group.upstreams["b"].url, name="a", models=("a",), health_path="")
    config = Config(model=(), upstream=(replacing,), proxy=proxy)

    group.proxy.forwarder.replace(config, RouteTable(config, group.proxy.forwarder.table))
    may_end.set()

    assert [(await running).body, (await queued).body] == [b"".join(TOKENS) + DONE, PLAIN]
    assert group.num_asked() == {"a": 1, "b": 1}
    counts = group.proxy.forwarder.table.upstreams[0].counts
    assert (counts.outcomes["answered"], counts.num_events) == (2, len(TOKENS))


@pytest.mark.parametrize("kind", ["named", "plain"])
async def test_a_key_that_fills_the_queue_does_not_shut_another_key_out(start, kind) -> None:
    named = tuple(KeyConfig(name=name, key=f"sk-{name}") for name in ("many", "few"))
    keys = {"key": named} if kind == "named" else {"keys": KeysConfig(keys=("sk-many", "sk-few"))}
    group = await start(ProxyConfig(max_in_flight=2, max_queued=3), keys, a=GOOD)
    may_answer = asyncio.Semaphore(0)

    async def wait(call: Call) -> Then:
        await may_answer.acquire()
        await call.send(GOOD_PLAIN)
        return "keep"

    group.upstreams["a"].act = wait
    many = []
    for number in range(5):
        many.append(asyncio.create_task(group.ask({"model": "m"}, b"Authorization: Bearer sk-many")))
        await wait_until(lambda number=number: group.proxy.forwarder.num_active == number + 1)

    few = asyncio.create_task(group.ask({"model": "m", "user": "few"}, b"Authorization: Bearer sk-few"))
    turned_away, _ = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_SECONDS)
    may_answer.release()
    await wait_until(lambda: group.num_asked()["a"] == 3)

    assert [(await task).error["code"] for task in turned_away] == ["queue_full"]
    assert group.upstreams["a"].requests[-1].body["user"] == "few"
    for _ in range(4):
        may_answer.release()
    assert (await few).status == 200
    assert sorted([(await task).status for task in many]) == [200] * 4 + [429]


async def test_a_request_that_was_read_is_never_sent_twice_though_its_connection_is_lost_at_once(start) -> None:
    async def answer_once(call: Call) -> Then:
        call.is_done()
        if call.request.id == "lost":
            return "close"
        await call.send(GOOD_PLAIN)
        return "keep"

    group = await start(ProxyConfig(), a=GOOD)
    group.upstreams["a"].act = answer_once
    await group.ask({"model": "m"})

    answered = await group.ask({"model": "m"}, b"X-Request-Id: lost")

    assert answered.status == 502
    assert group.upstreams["a"].done["lost"] == 1


@pytest.mark.parametrize(
    "path",
    [b"/chat/completions", b"//v1/chat//completions/", b"/v1/chat/completions/?a=b", b"/v%31/chat/completions"],
)
async def test_a_path_that_is_spelt_in_another_way_reaches_the_upstream_in_the_usual_one(start, path) -> None:
    group = await start(ProxyConfig(), a=GOOD)
    client = await Client.connect(group.proxy.port)

    client.send(post({"model": "a"}, path=path))
    answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
    client.leave()

    assert answer.status == 200
    (request,) = group.upstreams["a"].requests
    assert request.path.partition(b"?")[0] == b"/v1/chat/completions"
