"""Exceptions become answers once, and only once."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from aiohttp import web

from brlite.errors import EngineError, QueueFull
from brlite.http.middlewares import drop_tracebacks
from tests.limits import PATIENCE_SECONDS


def raising(error: Exception):
    async def handler(request: web.Request) -> web.StreamResponse:
        raise error

    return handler


async def ask(client, line: str) -> tuple[bytes, dict]:
    client.send(f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, body = await client.answer()
    return head, json.loads(body)


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("GET /", 404, "unknown_url"),
        ("GET /unknown", 404, "unknown_url"),
        ("GET /v1/", 404, "unknown_url"),
        ("POST //v1/chat", 404, "unknown_url"),
        ("GET /%ff%fe", 404, "unknown_url"),
        ("GET /v1/chat", 405, "method_not_allowed"),
        ("BREW /v1/chat", 400, "bad_request"),
    ],
)
async def test_unknown_paths_and_methods_get_the_envelope(line, status, code, http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello})

    head, body = await ask(await connect(server), line)

    assert int(head[9:12]) == body["code"] == status
    assert body["error"]["code"] == code


async def test_405_lists_the_methods_that_exist(http_server, connect, hello) -> None:
    server = await http_server({"POST /v1/chat": hello, "PUT /v1/chat": hello})

    head, body = await ask(await connect(server), "GET /v1/chat")

    assert b"Allow: POST, PUT\r\n" in head
    assert body["message"] == "GET is not allowed at /v1/chat; allowed: POST, PUT"


async def test_a_full_queue_is_429_with_retry_after(http_server, connect) -> None:
    server = await http_server({"GET /x": raising(QueueFull("256 requests wait already", retry_after_seconds=2))})

    head, body = await ask(await connect(server), "GET /x")

    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"Retry-After: 2\r\n" in head
    assert body["error"]["type"] == "rate_limit_error"


async def test_an_unforeseen_error_is_logged_with_traceback_and_tells_nothing(http_server, connect, caplog) -> None:
    server = await http_server({"GET /x": raising(KeyError("inside"))})
    client = await connect(server)

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\n\r\n")
    head, body = await client.answer()

    assert head.startswith(b"HTTP/1.1 500 ")
    assert b"inside" not in body
    assert "(abc) failed: KeyError" in caplog.text
    assert "Traceback" in caplog.text


async def test_an_engine_error_is_logged_in_one_line(http_server, connect, caplog) -> None:
    server = await http_server({"GET /x": raising(EngineError("step 7 failed"))})

    _, body = await ask(await connect(server), "GET /x")

    assert "step 7" not in body["message"]
    assert "failed: EngineError: step 7 failed" in caplog.text
    assert "Traceback" not in caplog.text


async def test_after_the_answer_has_begun_nothing_is_sent_twice(http_server, connect, caplog) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise ValueError

    server = await http_server({"GET /x": half})
    client = await connect(server)

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await client.rest()

    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"4\r\nhalf\r\n")  # no end of chunks: the client sees that it was cut
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("leave", ["close", "write_eof"])  # the second is told apart only by an answer that fails
async def test_a_client_that_leaves_cancels_its_handler_and_is_no_error(
    http_server, connect, caplog, leave: str
) -> None:
    caplog.set_level(logging.INFO, "brlite.access")
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    server = await http_server({"GET /x": wait})
    client = await connect(server)
    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
    await began.wait()
    getattr(client.writer, leave)()
    await asyncio.wait_for(cancelled.wait(), PATIENCE_SECONDS)
    await server.close()

    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "GET /x 499" in caplog.text


async def test_redirects_of_an_application_still_work(http_server, connect) -> None:
    server = await http_server({"GET /x": raising(web.HTTPFound("/y"))})
    client = await connect(server)

    client.send(b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 302 ")
    assert b"Location: /y" in answer


def test_tracebacks_are_dropped_of_all_errors_that_led_to_one_also_in_a_circle() -> None:
    first, second, third = errors = [raised(ValueError()) for _ in range(3)]
    first.__cause__, first.__context__ = second, third
    second.__cause__ = first

    drop_tracebacks(first)

    assert [error.__traceback__ for error in errors] == [None] * 3


def raised(error: Exception) -> Exception:
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value
