"""brlite on Ray Serve: what it is told, and the tests of `ray_cluster_tests.py` in a network of their own."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from brlite.errors import ConfigError

pytest.importorskip("ray.serve", reason="Ray is not installed: the extra brlite[ray] has it")
ray_serve = importlib.import_module("brlite.ray_serve")
serve_schema = importlib.import_module("ray.serve.schema")
pytestmark = pytest.mark.ray

FOLDER = Path(__file__).parent
SHIPPED = FOLDER.parent / "deploy" / "ray" / "serve.yaml"


def network_of_its_own() -> list[str] | None:
    """The beginning of a command that runs in a network namespace with nothing but loopback; None if none may be made.

    Root makes one as it is, others together with a user namespace, where the system lets them.
    """
    unshare = shutil.which("unshare")
    ways = ([unshare, "--net"], [unshare, "--net", "--map-root-user"]) if unshare else ()
    for way in ways:
        command = [*way, sys.executable, str(FOLDER / "loopback_only.py")]
        if not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return None


@pytest.mark.timeout(1200)
def test_a_cluster_in_a_network_of_loopback_alone_serves() -> None:
    network = network_of_its_own()
    if network is None:
        pytest.skip("Ray is started in a network namespace only, and none may be made here")
    # The markers of other plugins are not this run's: it has one file.
    command = [*network, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / "ray_cluster_tests.py")]

    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=1100)

    assert done.returncode == 0, done.stdout + done.stderr


def test_an_application_needs_no_more_than_a_config() -> None:
    application = ray_serve.build({"config": {"model": [{"name": "m", "path": "/m"}]}})

    assert isinstance(application, ray_serve.serve.Application)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": "2"}, 'replicas = "2": no such field; did you mean min_replicas? allowed are config'),
        ({"max_replicas": "many"}, 'max_replicas = "many": allowed is a whole number'),
        ({"min_replicas": "2"}, "min_replicas = 2: allowed is max_replicas at most"),
        ({"config": "/proc/absent.toml"}, "/proc/absent.toml: cannot be read"),
        ({"config": {"model": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]}}, "serves one model"),
        ({"config": {"upstream": [{"url": "http://a", "models": ["a"]}]}}, "serves one model"),
        ({"config": {"model": [{"load": "on_demand"}]}}, "allowed is start"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ray_serve.build(arguments)


def test_the_shipped_config_of_ray_serve_starts_what_it_says() -> None:
    config = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    (application,) = serve_schema.ServeDeploySchema(**config).applications

    assert application.import_path == f"{ray_serve.__name__}:{ray_serve.build.__name__}"
    assert isinstance(ray_serve.build(application.args), ray_serve.serve.Application)


# What Serve itself answers


async def answer_of(app: Callable[..., Any], path: str = "/v1/x") -> list[dict[str, Any]]:
    """The ASGI messages that come out of the middleware around an application."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    (middleware,) = ray_serve.proxy_middlewares()
    scope = {"type": "http", "method": "GET", "path": path}
    await middleware.cls(app, *middleware.args, **middleware.kwargs)(scope, receive, send)
    return sent


def serving(*messages: dict[str, Any]) -> Callable[..., Any]:
    async def app(scope: object, receive: object, send: Callable[[dict[str, Any]], Any]) -> None:
        for message in messages:
            await send(message)

    return app


def start(status: int, kind: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode()), *headers]}


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


@pytest.mark.parametrize(
    ("status", "text", "type_", "code", "message"),
    [
        (404, "Path '/x' not found. Ping", "not_found_error", "unknown_url", "unknown endpoint: GET /v1/x"),
        (
            408,
            "Request 7 timed out after 3s.",
            "invalid_request_error",
            "request_timeout",
            "Request 7 timed out after 3s.",
        ),
        (429, "Request dropped", "rate_limit_error", "queue_full", "Request dropped"),
        (503, "Request dropped", "server_error", "not_ready", "Request dropped"),
        (500, "Traceback: secret", "server_error", "internal_error", "The server had an error while processing"),
    ],
)
async def test_what_serve_answers_by_itself_has_our_envelope(
    status: int, text: str, type_: str, code: str, message: str
) -> None:
    app = serving(
        start(status, "text/plain", (b"retry-after", b"7")), part(text[:5].encode(), more=True), part(text[5:].encode())
    )

    begin, end = await answer_of(app)

    error = json.loads(end["body"])["error"]
    headers = dict(begin["headers"])
    assert begin["status"] == status
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"content-length"] == str(len(end["body"])).encode()
    assert headers[b"retry-after"] == b"7"
    assert (error["type"], error["code"]) == (type_, code)
    assert error["message"].startswith(message)
    assert not end["more_body"]


async def test_a_request_that_serve_leaves_unanswered_is_a_500_in_our_envelope() -> None:
    begin, end = await answer_of(serving())

    assert begin["status"] == 500
    assert json.loads(end["body"])["error"]["type"] == "server_error"


@pytest.mark.parametrize("half", [b"", b'data: {"choices": [{"te'], ids=["between two events", "within an event"])
async def test_a_stream_that_is_cut_ends_with_an_error_event(half: bytes) -> None:
    event = b'data: {"x": 1}\n\n'
    head = {**start(200, ""), "headers": [(b"Content-Type", b"text/event-stream; charset=utf-8")]}
    app = serving(head, part(event + half, more=True))

    _, *parts = await answer_of(app)

    whole, error, done, rest = b"".join(message["body"] for message in parts).split(b"\n\n")
    assert whole + b"\n\n" == event
    assert json.loads(error.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert (done, rest) == (b"data: [DONE]", b"")
    assert not parts[-1]["more_body"]


@pytest.mark.parametrize(
    "messages",
    [
        [start(404, "application/json"), part(b'{"error": {}}')],
        [start(200, "text/plain"), part(b"success")],
        [start(418, "text/plain"), part(b"of another application")],
        [start(200, "text/event-stream"), part(b"data: a\n\n", more=True), part(b"data: [DONE]\n\n")],
        [start(200, "application/json"), part(b'{"half": ', more=True)],
    ],
    ids=["our error", "health", "another error", "a whole stream", "half an answer"],
)
async def test_all_else_passes_as_it_is(messages: list[dict[str, Any]]) -> None:
    assert await answer_of(serving(*messages)) == messages


async def test_what_is_no_http_passes_as_it_is() -> None:
    seen: list[object] = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(scope)

    (middleware,) = ray_serve.proxy_middlewares()
    await middleware.cls(app)({"type": "lifespan"}, None, None)

    assert seen == [{"type": "lifespan"}]
