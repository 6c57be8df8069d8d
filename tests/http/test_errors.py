"""Which status and which words each error gets."""

from __future__ import annotations

import inspect
import json

import pytest
from aiohttp import web

from brlite import errors
from brlite.http.errors import STATUSES, error_body, error_bytes, error_response, status_of


def test_every_request_error_has_a_status_of_its_own_or_its_parents() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.RequestError)]

    missing = [kind for kind in kinds if kind not in STATUSES and kind is not errors.InvalidRequest]

    assert missing == []


def test_a_body_has_openai_nested_object_and_the_flat_keys_beside_it() -> None:
    error = errors.InvalidRequest("temperature must be at least 0", param="temperature")

    body = json.loads(error_body(error))

    fields = {"message": "temperature must be at least 0", "type": "invalid_request_error", "param": "temperature"}
    assert body == {"error": {**fields, "code": "invalid_value"}, "object": "error", **fields, "code": 400}


def test_an_errors_own_code_goes_first() -> None:
    error = errors.InvalidRequest("x is missing", code="missing_required_parameter")

    body = json.loads(error_body(error))

    assert body["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.PromptTooLong("too long"), 400, "context_length_exceeded"),
        (errors.Unauthorized("who"), 401, "invalid_api_key"),
        (errors.ModelNotFound("none"), 404, "model_not_found"),
        (errors.BodyTooLarge("big"), 413, "request_too_large"),
        (errors.QueueFull("full"), 429, "queue_full"),
        (errors.QueueTimeout("late"), 503, "queue_timeout"),
        (errors.NotReady("loading"), 503, "not_ready"),
        (web.HTTPExpectationFailed(), 417, None),
    ],
)
def test_status_and_code(error: Exception, status: int, code: str | None) -> None:
    row = status_of(error)

    assert (row.http, row.code) == (status, code)


@pytest.mark.parametrize(
    "error", [errors.EngineError("cuda at 0x7f"), errors.ModelError("/secret"), KeyError("secret")]
)
def test_the_servers_own_faults_tell_nothing(error: Exception) -> None:
    response = error_response(error)

    assert response.status == 500
    assert json.loads(response.body)["error"]["message"] == "The server had an error while processing your request."


def test_headers_that_http_wants() -> None:
    full = error_response(errors.QueueFull("full", retry_after_seconds=3))
    method = error_response(errors.MethodNotAllowed("no", allowed=("GET", "POST")))
    key = error_response(errors.Unauthorized("who"))

    assert full.headers["Retry-After"] == "3"
    assert method.headers["Allow"] == "GET, POST"
    assert key.headers["WWW-Authenticate"] == "Bearer"


def test_half_surrogates_and_endless_text_in_a_message_do_no_harm() -> None:
    body = json.loads(error_body(errors.NotFound("\udcff" + "x" * 10**6)))

    assert body["message"].startswith("\\udcff")
    assert len(body["message"]) < 3000


def test_bytes_are_a_whole_response() -> None:
    head, _, body = error_bytes(errors.RequestTimeout("late")).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert json.loads(body)["code"] == 408
