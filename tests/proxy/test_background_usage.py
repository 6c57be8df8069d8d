"""What responses that upstreams compute in the background cost a key: what is reported, once, else an estimate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import msgspec
import openai
import pytest

from brlite.config.options import Config, KeyConfig, UpstreamConfig
from brlite.http.api_key import ApiKey
from brlite.proxy import background_usage
from brlite.proxy.routing.route_table import RouteTable
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import Connect
from tests.proxy.proxies import Proxy, wait_until
from tests.proxy.scripted import Act, Call, ScriptedUpstream, Then
from tests.proxy.stored import behind, json_answer, sse_event

SHORT = {"id": "resp_1", "background": True, "status": "in_progress"}
RUNNING = {**SHORT, "tools": ["x" * 4000], "usage": None}
DONE = {**RUNNING, "status": "completed", "usage": {"input_tokens": 3, "output_tokens": 4000}}
DELTAS = [{"type": "response.output_text.delta", "delta": "Hello, this is text"}] * 20
RULES = KeyConfig(name="a", key="secret-a")
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
REFUSED = b"HTTP/1.1 400 No\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
MISSING = b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"


class Account(NamedTuple):
    """A client that uses the proxy with a key."""

    client: openai.AsyncOpenAI
    key: ApiKey
    proxy: Proxy

    async def create(self, **fields: Any) -> Any:
        return await self.client.responses.create(model="toy", input="hello", background=True, **fields)

    async def leave(self, stream: Any, num_events: int) -> None:
        """Read so many events of a stream and disconnect."""
        for _ in range(num_events):
            await anext(stream)
        await stream.close()
        await wait_until(lambda: self.proxy.forwarder.num_active == 0)

    @property
    def num_charged(self) -> tuple[int, int]:
        return self.key.usage.prompt_tokens, self.key.usage.completion_tokens

    @property
    def num_taken(self) -> int:
        """How many tokens a minute's budget of 60 lacks. It gets one back each second."""
        return 60 - int(self.key.headers(time.monotonic())["x-ratelimit-remaining-tokens"])


OpenAccount = Callable[..., Awaitable[Account]]


@pytest.fixture
def open_account(stack: AsyncExitStack, connect: Connect) -> OpenAccount:
    """`await open_account(act, …)`: before upstreams that act so."""

    async def start(*acts: Act, rules: KeyConfig = RULES) -> Account:
        upstreams = [await stack.enter_async_context(ScriptedUpstream(act=act)) for act in acts]
        setting = await behind(stack, connect, *(upstream.url for upstream in upstreams), keys=(rules,))
        key = setting.proxy.keys.find("secret-a")
        assert key is not None
        return Account(setting.clients[0], key, setting.proxy)

    return start


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy looks responses up without a delay."""
    monkeypatch.setattr(background_usage, "FIRST_SECONDS", 0.01)


class Computing:
    """An upstream with one response, which is complete from `ends` on, and whose streams end only then."""

    def __init__(self) -> None:
        self.response: dict[str, Any] = RUNNING
        self.num_looked_up = 0

    async def act(self, call: Call) -> Then:
        if not (call.request.is_stream or b"stream=true" in call.request.path):
            self.num_looked_up += call.request.method == b"GET"
            await call.send(json_answer(self.response))
            return "keep"
        created = [{"type": "response.created", "response": RUNNING}] if call.request.is_stream else []
        await call.send(SSE + b"".join(map(sse_event, [*created, *DELTAS])))
        await call.wait_left()
        return "close"


async def test_usage_is_counted_once_when_it_is_reported(open_account: OpenAccount) -> None:
    async def act(call: Call) -> Then:
        usage = None if call.request.method == b"POST" else {"input_tokens": 3, "output_tokens": 4000}
        await call.send(json_answer({"id": "resp_1", "usage": usage}))
        return "keep"

    account = await open_account(act)

    await account.create()
    for _ in range(2):
        await account.client.responses.retrieve("resp_1")

    assert account.key.usage.completion_tokens == 4000


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(("is_stream", "is_odd"), [(False, False), (True, False), (False, True)])
async def test_a_response_is_charged_though_its_client_never_retrieves_it(
    open_account: OpenAccount, is_stream: bool, is_odd: bool
) -> None:
    upstream = Computing()
    account = await open_account(upstream.act)

    made = await account.create(stream=is_stream)
    if is_stream:
        await account.leave(made, 1)
    if is_odd:
        upstream.response = {"detail": "no response object"}
    await wait_until(lambda: upstream.num_looked_up >= 1)
    upstream.response = DONE

    await wait_until(lambda: account.num_charged == (3, 4000))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_created_as_stream", [False, True])
async def test_streams_that_are_left_cost_what_is_reported_in_the_end(
    open_account: OpenAccount, *, is_created_as_stream: bool
) -> None:
    upstream = Computing()
    account = await open_account(upstream.act, rules=msgspec.structs.replace(RULES, tokens_per_minute=60))

    made = await account.create(stream=is_created_as_stream)
    if is_created_as_stream:
        await account.leave(made, 15)
    for num_events in (20, 10):
        await account.leave(await account.client.responses.retrieve("resp_1", stream=True), num_events)
    before, num_reserved = account.num_charged, account.num_taken
    upstream.response = {**DONE, "usage": {"input_tokens": 3, "output_tokens": 7}}
    await wait_until(lambda: account.num_charged != before)
    await account.leave(await account.client.responses.retrieve("resp_1", stream=True), 20)

    assert before == (0, 0)
    assert num_reserved > 20
    assert account.num_charged == (3, 7)


async def test_a_retry_of_a_running_response_costs_nothing_more(
    open_account: OpenAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_usage, "FIRST_SECONDS", 1.0)
    upstream = Computing()
    account = await open_account(upstream.act)

    for _ in range(2):
        await account.create(extra_headers={"Idempotency-Key": "k"})
    upstream.response = DONE
    await account.client.responses.retrieve("resp_1")

    assert account.num_charged == (3, 4000)


async def test_a_response_that_is_followed_and_deleted_before_its_end_is_charged(open_account: OpenAccount) -> None:
    upstream = Computing()
    upstream.response = SHORT
    account = await open_account(upstream.act)

    await account.create()
    for _ in range(2):
        await account.leave(await account.client.responses.retrieve("resp_1", stream=True), 20)
    await account.client.responses.delete("resp_1")

    assert account.key.usage.completion_tokens == 20


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_response_that_is_deleted_is_charged_what_its_client_has_not_seen(
    open_account: OpenAccount, caplog: pytest.LogCaptureFixture, *, has_ended: bool
) -> None:
    seen = []

    async def act(call: Call) -> Then:
        is_cancel = call.request.path.endswith(b"/cancel")
        seen.append((call.request.method, is_cancel))
        done = json_answer(DONE if is_cancel or call.request.method == b"GET" else RUNNING)
        await call.send(REFUSED if is_cancel and has_ended else done)
        return "keep"

    account = await open_account(act)

    await account.create()
    await account.client.responses.delete("resp_1")

    assert account.num_charged == (3, 4000)
    read = [(b"GET", False)] if has_ended else []
    assert seen == [(b"POST", False), (b"POST", True), *read, (b"DELETE", False)]
    assert "as estimated" not in caplog.text


async def test_a_deletion_that_its_key_may_not_send_cancels_nothing(open_account: OpenAccount) -> None:
    upstream = Computing()
    account = await open_account(upstream.act, rules=msgspec.structs.replace(RULES, requests_per_minute=1))

    await account.create()
    upstream.response = DONE
    with pytest.raises(openai.RateLimitError):
        await account.client.responses.delete("resp_1")

    assert account.num_charged == (0, 0)


async def test_a_deletion_is_not_refused_for_the_tokens_that_it_charges(open_account: OpenAccount) -> None:
    upstream = Computing()
    account = await open_account(upstream.act, rules=msgspec.structs.replace(RULES, tokens_per_minute=60))

    await account.create()
    upstream.response = DONE
    await account.client.responses.delete("resp_1")

    assert account.num_charged == (3, 4000)


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_a_client_that_leaves_or_a_stop_ends_a_deletion_before_it_is_sent(
    open_account: OpenAccount, *, is_stopped: bool
) -> None:
    settles, may_end, methods = asyncio.Event(), asyncio.Event(), []

    async def act(call: Call) -> Then:
        methods.append(call.request.method)
        if call.request.path.endswith(b"/cancel"):
            settles.set()
            await may_end.wait()
        await call.send(json_answer(RUNNING))
        return "keep"

    account = await open_account(act)
    await account.create()
    deleting = asyncio.create_task(account.client.responses.delete("resp_1"))
    await asyncio.wait_for(settles.wait(), PATIENCE_SECONDS)
    num_running = account.key.num_running
    if is_stopped:
        account.proxy.forwarder.stop()
    else:
        deleting.cancel()
    await wait_until(lambda: account.key.num_running == 0)
    may_end.set()
    await asyncio.wait([deleting])

    assert num_running == 1
    assert account.proxy.forwarder.num_active == 0
    assert b"DELETE" not in methods
    assert deleting.cancelled() or isinstance(deleting.exception(), openai.InternalServerError)


async def test_an_upstream_that_hangs_holds_back_no_deletion_at_another_one(
    open_account: OpenAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_usage, "MAX_CONCURRENT", 1)
    monkeypatch.setattr(background_usage, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(background_usage, "ANSWER_SECONDS", 10 * PATIENCE_SECONDS)
    hangs = asyncio.Event()

    async def hang(call: Call) -> Then:
        if call.request.method == b"GET":
            hangs.set()
            await call.wait_left()
        await call.send(json_answer(SHORT))
        return "keep"

    async def act(call: Call) -> Then:
        status = "in_progress" if call.request.path == b"/v1/responses" else "cancelled"
        await call.send(json_answer({"id": "resp_2", "background": True, "status": status}))
        return "keep"

    account = await open_account(hang, act)
    for _ in range(2):
        await account.create()
    await asyncio.wait_for(hangs.wait(), PATIENCE_SECONDS)

    await asyncio.wait_for(account.client.responses.delete("resp_2"), PATIENCE_SECONDS)


async def test_a_deleted_response_whose_usage_is_not_reported_costs_an_estimate(
    open_account: OpenAccount, caplog: pytest.LogCaptureFixture
) -> None:
    async def act(call: Call) -> Then:
        is_cancel = call.request.path.endswith(b"/cancel")
        await call.send(json_answer({**SHORT, "status": "cancelled"} if is_cancel else SHORT))
        return "keep"

    account = await open_account(act)

    await account.create()
    await account.client.responses.delete("resp_1")

    assert estimated(account) in caplog.text
    assert "upstream u0 reports no usage of it" in caplog.text


def estimated(account: Account) -> str:
    """The beginning of the log line about tokens that are charged as estimated."""
    num_prompt, num_generated = account.num_charged
    assert 10 < num_prompt < 20
    numbers = f"(prompt: {num_prompt}, generated: {num_generated})"
    return f"the tokens of resp_1, computed in the background, are charged as estimated {numbers}: "


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_gone", [False, True])
async def test_tokens_that_cannot_be_learnt_are_charged_as_estimated(
    open_account: OpenAccount, is_gone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background_usage, "MAX_FAILURES", 2)

    async def act(call: Call) -> Then:
        await call.send(json_answer(SHORT) if call.request.method == b"POST" else MISSING)
        return "keep"

    account = await open_account(act)
    await account.create()
    if is_gone:
        other = Config(model=(), upstream=(UpstreamConfig(url="http://a", models=("toy",), health_path=""),))
        account.proxy.forwarder.replace(other, RouteTable(other))
    await wait_until(lambda: account.num_charged != (0, 0))

    missing = "upstream u0 answered 404 to GET /v1/responses/resp_1"
    why = "the config has no upstream u0 any more" if is_gone else missing
    assert estimated(account) + why in caplog.text


async def test_more_responses_than_are_looked_up_are_charged_as_estimated(
    open_account: OpenAccount, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background_usage, "MAX_FOLLOWED", 0)
    upstream = Computing()
    account = await open_account(upstream.act)

    await account.create()
    line = estimated(account)
    upstream.response = DONE
    await account.client.responses.retrieve("resp_1")

    assert line + "more than 0 responses run in the background" in caplog.text
    assert account.key.usage.completion_tokens == 4000


async def test_impossible_usage_is_not_charged(open_account: OpenAccount, caplog: pytest.LogCaptureFixture) -> None:
    async def act(call: Call) -> Then:
        usage = None if call.request.method == b"POST" else {"input_tokens": 3, "output_tokens": 10**18}
        await call.send(json_answer({"id": "resp_1", "usage": usage}))
        return "keep"

    account = await open_account(act)

    await account.create()
    for _ in range(2):
        await account.client.responses.retrieve("resp_1")

    assert account.key.usage.completion_tokens < 100
    line = f"upstream u0 reports impossible usage for a stored response: 3 and {10**18} tokens"
    assert [line in text for text in caplog.messages] == [True]
