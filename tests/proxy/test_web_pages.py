"""A web page of another site is refused before any work, by both paths; a real browser shows that it helps."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from brlite.app import create_app, fast_paths
from brlite.config.options import Config, KeysConfig, ServerConfig, UpstreamConfig
from brlite.http.keys import ApiKeys
from brlite.http.listen import HttpServer
from brlite.server.served_model import ModelTable
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripted import ScriptedUpstream, Step
from tests.proxy.scripts import GOOD_PLAIN, PLAIN

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
FAST, APPLICATION = b"/v1/chat/completions", b"http://127.0.0.1/v1/chat/completions"  # which path of ours answers
CROSS_SITE = [b"Sec-Fetch-Site: cross-site", b"Origin: https://evil.example", b"Origin: null", b"Origin:"]

PAGE = """<!doctype html><script>
const body = JSON.stringify({model: "m", messages: [{role: "user", content: "hi"}]});
const path = "/v1/chat/completions";
async function go() {
  const said = [];
  try { said.push((await fetch("REFUSES" + path, {method: "POST", mode: "no-cors", body: new Blob([body])})).type); }
  catch (error) { said.push("failed"); }
  try { await fetch("REFUSES" + path, {method: "POST", headers: {"content-type": "application/json"}, body}); }
  catch (error) { said.push("failed"); }
  try { said.push(await (await fetch("ALLOWS" + path,
      {method: "POST", headers: {"content-type": "application/json"}, body})).text()); }
  catch (error) { said.push("failed " + error); }
  await fetch("/said", {method: "POST", body: JSON.stringify(said)});
}
go();
</script>"""


def config(upstream: ScriptedUpstream) -> UpstreamConfig:
    return UpstreamConfig(url=upstream.url, models=("m",), name="gpu-1", health_path="")


async def test_a_rebound_name_that_a_key_let_in_is_refused_again_where_no_key_is_needed() -> None:
    head = post({"model": "m"}, b"Host: rebound.example", b"Authorization: Bearer sk", has_host=False)
    listens_on, statuses = "127.0.0.1", []

    async with (
        ScriptedUpstream(Step(GOOD_PLAIN)) as upstream,
        run_proxy(config(upstream), listens_on=listens_on) as proxy,
    ):
        for keys in (ApiKeys(), ApiKeys(("sk",)), ApiKeys(("other",)), ApiKeys()):
            proxy.keys.replace(keys)
            client = await Client.connect(proxy.port)
            client.send(head)
            statuses.append((await client.answer()).status)
            client.leave()

    assert statuses == [403, 200, 401, 403]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("page", CROSS_SITE)
@pytest.mark.parametrize("path", [FAST, APPLICATION])
async def test_a_cross_site_request_is_a_403_before_its_body_is_read(page: bytes, path: bytes) -> None:
    head, _, body = post({"model": "m"}, page, path=path).partition(b"\r\n\r\n")

    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream, run_proxy(config(upstream)) as proxy:
        client = await Client.connect(proxy.port)
        client.send(head + b"\r\n\r\n" + body[:1])
        answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        client.leave()

    assert (answer.status, answer.error["code"]) == (403, "origin_not_allowed")
    assert upstream.requests == []


@pytest.mark.parametrize("path", [FAST, APPLICATION])
async def test_the_servers_own_page_and_programs_are_answered(path: bytes) -> None:
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream, run_proxy(config(upstream)) as proxy:
        answers = []
        for headers in [
            (),
            (b"Origin: http://proxy",),
            (b"Origin: https://chat.example", b"Sec-Fetch-Site: same-origin"),
        ]:
            client = await Client.connect(proxy.port)
            request = post({"model": "m"}, *headers, path=path.replace(b"//127.0.0.1", b"//proxy"))
            client.send(request)
            answers.append(await asyncio.wait_for(client.answer(), PATIENCE_SECONDS))
            client.leave()

    assert [answer.body for answer in answers] == [PLAIN] * 3


@asynccontextmanager
async def served(upstream: ScriptedUpstream, **options: object) -> AsyncIterator[HttpServer]:
    """A proxy as the command runs it, which knows that it listens on loopback."""
    settings = Config(model=(), upstream=(config(upstream),), **options)  # type: ignore[arg-type]  # any field of Config
    app = create_app(ModelTable([]), settings, listens_on="127.0.0.1")
    async with HttpServer(app, "127.0.0.1", 0, settings.limits, 0.1, fast_paths(app)) as server:
        yield server


@pytest.mark.parametrize("path", [FAST, b"http://evil.example:8000/v1/chat/completions"])
@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 403),
        ({"server": ServerConfig(allowed_hosts=("api.example",))}, 403),
        ({"server": ServerConfig(allowed_hosts=("evil.example",))}, 200),
        ({"keys": KeysConfig(keys=("k",))}, 200),
    ],
    ids=["no keys", "another name", "allowed", "keys"],
)
async def test_a_name_that_was_led_to_loopback_is_a_403(path: bytes, options: dict[str, object], status: int) -> None:
    request = post({"model": "m"}, b"X-Api-Key: k", path=path).replace(b"Host: proxy", b"Host: evil.example:8000")

    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream, served(upstream, **options) as server:
        client = await Client.connect(server.port)
        client.send(request)
        answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
        client.leave()

    assert answer.status == status
    assert len(upstream.requests) == (status == 200)
    if status == 403:
        assert answer.error["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("header", "status"),
    [(b"Origin: https://evil.example", 403), (b"Sec-Fetch-Site: cross-site", 403), (b"Origin: http://proxy", 200)],
)
async def test_a_mounted_application_refuses_other_sites_and_takes_any_name(header: bytes, status: int) -> None:
    async with ScriptedUpstream(Step(GOOD_PLAIN)) as upstream:
        outer = web.Application()
        outer.add_subapp("/llm/", create_app(ModelTable([]), Config(model=(), upstream=(config(upstream),))))
        async with HttpServer(outer, "127.0.0.1", 0, Config().limits, 0.1) as server:
            client = await Client.connect(server.port)
            client.send(post({"model": "m"}, header, path=b"/llm/v1/chat/completions"))
            answer = await asyncio.wait_for(client.answer(), PATIENCE_SECONDS)
            client.leave()

    assert answer.status == status


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
async def test_in_a_browser_a_page_of_another_site_reaches_nothing_and_a_listed_one_does(tmp_path: Path) -> None:
    said: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    page = ""

    async def show(request: web.Request) -> web.Response:
        return web.Response(text=page, content_type="text/html")

    async def hear(request: web.Request) -> web.Response:
        said.set_result(await request.json())
        return web.Response()

    site = web.Application()
    site.add_routes([web.get("/", show), web.post("/said", hear)])
    async with contextlib.AsyncExitStack() as stack:
        pages = await stack.enter_async_context(HttpServer(site, "127.0.0.1", 0, Config().limits, 0.1))
        upstreams = [await stack.enter_async_context(ScriptedUpstream(Step(GOOD_PLAIN))) for _ in range(2)]
        refuses = await stack.enter_async_context(served(upstreams[0]))
        url = f"http://localhost:{pages.port}"  # which is another site than http://127.0.0.1
        server = ServerConfig(cors_origins=(url,))
        allows = await stack.enter_async_context(served(upstreams[1], server=server))
        page = PAGE.replace("REFUSES", refuses.url).replace("ALLOWS", allows.url)
        browser = await asyncio.create_subprocess_exec(
            str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}", url,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            heard = await asyncio.wait_for(said, PATIENCE_SECONDS)
        finally:
            browser.terminate()
            await browser.wait()

    assert heard == ["opaque", "failed", PLAIN.decode()]
    assert upstreams[0].requests == []
    assert len(upstreams[1].requests) == 1
