"""Checks of health: a few answers alike take an upstream out or bring it back, and nothing else does."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from brlite.config.options import Config, ProxyConfig, UpstreamConfig
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.health import HASTE, HealthCount, delay, is_well
from brlite.proxy.routing.route_table import RouteTable
from brlite.proxy.routing.upstream import Upstream
from tests.conftest import Eventually
from tests.proxy.get_server import GOOD, NEVER, Answer, GetServer, model_list
from tests.proxy.proxies import no_descriptors

Start = Callable[..., Awaitable[Forwarder]]

BAD = Answer(503)
QUICK = ProxyConfig(health_seconds=0.02, health_timeout_seconds=5)
IMPATIENT = ProxyConfig(health_seconds=0.02, health_timeout_seconds=0.1)
SLOW = ProxyConfig(health_seconds=1000, health_timeout_seconds=5)  # of which only the first check is seen

# Says where it listens, and is well as long as it runs.
PROGRAM = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def counted(text: str, is_healthy: bool = True) -> str:
    """What becomes of the checks in `text`, + for a success: the states after each of them."""
    count = HealthCount(is_healthy)
    return "".join("+" if (count.note(check == "+"), count.is_healthy)[1] else "-" for check in text)


@pytest.mark.parametrize(
    ("checks", "states"),
    [
        ("--", "++"),
        ("---", "++-"),
        ("--+--+--", "++++++++"),
        ("---+", "++--"),
        ("---++", "++--+"),
        ("---+-+++", "++----++"),
    ],
)
def test_three_failures_in_a_row_take_out_and_two_successes_bring_back(checks: str, states: str) -> None:
    assert counted(checks) == states


def test_only_what_changes_the_state_is_told() -> None:
    count = HealthCount()

    changes = [count.note(check == "+") for check in "+-----+++"]

    assert changes == [False, False, False, True, False, False, False, True, False]


def test_checks_are_spread_around_their_interval_and_hurry_where_there_is_doubt() -> None:
    delays = [delay(5.0, True, chance) for chance in (0.0, 0.5, 1.0)]

    assert delays == pytest.approx([4.0, 5.0, 6.0])
    assert delay(5.0, False, 0.5) == 5.0 / HASTE


@pytest.mark.parametrize(
    ("status", "is_good"),
    [
        *((status, True) for status in (200, 204, 401, 403, 404, 405, 429, 501)),
        *((status, False) for status in (301, 307, 500, 502, 503)),
    ],
)
def test_a_server_that_refuses_is_well_and_one_that_fails_is_not(status: int, is_good: bool) -> None:
    assert is_well(status) is is_good


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(url, …)` is a forwarder to upstreams at these addresses, with its checks running."""
    forwarders: list[Forwarder] = []

    async def make(*urls: str, proxy: ProxyConfig = QUICK, **options: object) -> Forwarder:
        forwarder = Forwarder(make_config(*urls, proxy=proxy, **options))
        forwarders.append(await forwarder.__aenter__())
        return forwarder

    yield make
    before = {task for task in asyncio.all_tasks() if task.get_name().startswith("brlite-health")}
    for forwarder in forwarders:
        await forwarder.__aexit__()
    assert all(task.done() for task in before)


def make_config(*urls: str, proxy: ProxyConfig = QUICK, **options: object) -> Config:
    upstreams = tuple(UpstreamConfig(url=url, models=("m",), **options) for url in urls)  # type: ignore[arg-type]
    return Config(model=(), upstream=upstreams, proxy=proxy)


def only(forwarder: Forwarder) -> Upstream:
    (upstream,) = forwarder.table.upstreams
    return upstream


async def test_an_upstream_that_fails_its_checks_is_out_until_it_passes_them(
    start: Start, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with GetServer({"/health": BAD}) as server:
        upstream = only(await start(server.url, name="one"))

        await eventually(lambda: not upstream.is_healthy)
        server.answers["/health"] = GOOD
        await eventually(lambda: upstream.is_healthy)

    out, back = (record for record in caplog.records if record.name == "brlite.proxy.routing.health")
    assert (out.levelname, back.levelname) == ("WARNING", "INFO")
    assert out.getMessage() == "upstream one is out: 3 checks in a row failed, the last: answered 503 to GET /health"
    assert back.getMessage() == "upstream one is back: 2 checks in a row succeeded"


async def test_an_upstream_that_is_killed_and_started_again_goes_and_comes(
    start: Start, eventually: Eventually
) -> None:
    server = GetServer()
    await server.start()
    upstream = only(await start(server.url))

    await server.kill()
    await eventually(lambda: not upstream.is_healthy)
    await server.start()
    await eventually(lambda: upstream.is_healthy)

    await server.kill()


async def test_an_upstream_that_is_stopped_is_out_until_it_is_continued(start: Start, eventually: Eventually) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        upstream = only(await start(f"http://127.0.0.1:{port}", proxy=IMPATIENT))

        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: not upstream.is_healthy)
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: upstream.is_healthy)
    finally:
        process.kill()
        await process.wait()


async def test_all_are_asked_at_once_at_the_start(start: Start, eventually: Eventually) -> None:
    async with GetServer({"/health": NEVER}) as silent, GetServer() as other:
        await start(silent.url, other.url, proxy=SLOW)

        await eventually(lambda: silent.paths == ["/health"] and other.paths == ["/health", "/v1/models"])


async def test_a_server_without_the_path_is_well_and_the_log_says_so_once(
    start: Start, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with GetServer({"/health": Answer(405)}) as server:
        upstream = only(await start(server.url, name="one"))

        await eventually(lambda: server.paths.count("/health") > 5)

    assert upstream.is_healthy
    (record,) = (record for record in caplog.records if record.name == "brlite.proxy.routing.health")
    assert record.getMessage() == "upstream one has no /health (it answers 405): any answer counts as healthy"


async def test_an_upstream_without_a_health_path_is_never_asked(start: Start, eventually: Eventually) -> None:
    async with GetServer() as server, GetServer() as other:
        forwarder = await start(server.url, health_path="")
        await start(other.url)

        await eventually(lambda: len(other.asked) > 5)

    assert server.asked == []
    assert only(forwarder).is_healthy


def replace(forwarder: Forwarder, config: Config) -> None:
    forwarder.replace(config, RouteTable(config, forwarder.table))


async def test_another_config_ends_old_checks_begins_new_ones_and_leaves_the_rest_alone(
    start: Start, eventually: Eventually
) -> None:
    async with GetServer() as gone, GetServer() as stays, GetServer() as new:
        forwarder = await start(gone.url, stays.url)
        await eventually(lambda: bool(gone.asked and stays.asked))
        kept = forwarder.table.upstreams[1]
        tasks = {task for task in asyncio.all_tasks() if stays.url in task.get_name()}

        replace(forwarder, make_config(stays.url, new.url))
        await eventually(lambda: bool(new.asked))
        num_asked = len(gone.asked)
        await eventually(lambda: len(new.asked) > 5)

        assert len(gone.asked) <= num_asked + 1  # one may have been under way
        assert forwarder.table.upstreams[0] is kept
        assert {task for task in asyncio.all_tasks() if stays.url in task.get_name()} == tasks


async def test_another_interval_holds_at_once(start: Start, eventually: Eventually) -> None:
    async with GetServer() as server:
        forwarder = await start(server.url, proxy=SLOW)
        await eventually(lambda: bool(server.asked))

        replace(forwarder, make_config(server.url, proxy=QUICK))

        await eventually(lambda: server.paths.count("/health") > 5)


async def test_an_upstream_that_is_out_stays_out_over_a_change_of_the_interval(
    start: Start, eventually: Eventually
) -> None:
    async with GetServer({"/health": BAD}) as server:
        forwarder = await start(server.url)
        await eventually(lambda: not only(forwarder).is_healthy)

        replace(forwarder, make_config(server.url, proxy=SLOW))

        assert not only(forwarder).is_healthy


async def test_what_it_lists_of_its_models_is_noted_by_its_own_names(start: Start, eventually: Eventually) -> None:
    listed = model_list({"id": "org/m", "created": 7, "owned_by": "org", "max_model_len": 512}, {"id": "other"})
    async with GetServer({"/v1/models": listed}) as server:
        upstream = only(await start(server.url, rename={"m": "org/m"}))

        await eventually(lambda: bool(upstream.listed))

    assert list(upstream.listed) == ["org/m"]
    assert upstream.listed["org/m"].max_model_len == 512


@pytest.mark.parametrize(
    "answer",
    [Answer(body=b"{"), Answer(body=b'{"data": [{"id": 1}]}'), Answer(body=b'"\xff"'), Answer(body=b"x" * 2**21), BAD],
    ids=["not JSON", "no list", "not UTF-8", "too long", "an error"],
)
async def test_a_list_that_cannot_be_read_harms_nothing(
    start: Start, eventually: Eventually, caplog: pytest.LogCaptureFixture, answer: Answer
) -> None:
    caplog.set_level(logging.DEBUG, "brlite")
    async with GetServer({"/v1/models": answer}) as server:
        upstream = only(await start(server.url))

        await eventually(lambda: "/v1/models" in server.paths and server.paths[-1] == "/health")

    assert upstream.is_healthy
    assert upstream.listed == {}
    assert "its list of models is not read: " in caplog.text


@pytest.mark.parametrize("status", [401, 403])
async def test_an_upstream_that_wants_another_key_is_well_and_the_log_says_so_once(
    start: Start, eventually: Eventually, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    async with GetServer({"/v1/models": Answer(status)}) as server:
        upstream = only(await start(server.url))

        await eventually(lambda: server.paths.count("/v1/models") == 2 and server.paths[-1] == "/health")

    assert upstream.is_healthy
    assert caplog.text.count(f"answered {status} to GET /v1/models: it needs another key; api_key_env in its") == 1


async def test_the_list_is_read_less_often_than_health_is_asked(start: Start, eventually: Eventually) -> None:
    async with GetServer({"/v1/models": model_list()}) as server:
        await start(server.url)

        await eventually(lambda: server.paths.count("/v1/models") == 3)

    assert [index for index, path in enumerate(server.paths) if path == "/v1/models"] == [1, 8, 15]


async def test_checks_that_fail_for_want_of_descriptors_here_take_nobody_out(
    start: Start, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    async with GetServer() as server:
        upstream = only(await start(server.url, name="one"))
        await eventually(lambda: len(server.asked) > 3)
        num_asked = len(server.asked)
        with no_descriptors():
            await eventually(lambda: "cannot be checked" in caplog.text)
            await asyncio.sleep(20 * QUICK.health_seconds)  # for many more
        await eventually(lambda: len(server.asked) > num_asked + 3)

    assert upstream.is_healthy
    assert [message for message in caplog.messages if "is out" in message] == []
    assert [message.split(":")[0] for message in caplog.messages] == ["upstream one cannot be checked"]
