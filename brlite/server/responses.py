"""The endpoints of the Responses API: create a response; read, delete and cancel stored ones."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import hdrs, web
from msgspec import Raw

from brlite.dialects.dialect import Dialect
from brlite.dialects.json_body import decode_fields
from brlite.dialects.openai_answer import encode_json
from brlite.dialects.openai_tokens import InputTokens
from brlite.dialects.responses import DIALECT, decode, decode_input_tokens, shown_input_items
from brlite.dialects.responses_encoder import ResponsesEncoder
from brlite.dialects.responses_stored import FinishedResponse, check_following
from brlite.errors import InvalidRequest, NotFound
from brlite.http.body import keep_body, read_body
from brlite.http.events import EventStream
from brlite.http.keys import API_KEY
from brlite.server.background import BACKGROUND
from brlite.server.generate import CONFIG, generate, read_call
from brlite.server.response_store import STORE, TenantResponses
from brlite.server.resumable import HEADER as LAST_EVENT_ID
from brlite.server.resumable import MAX_DIGITS, RecordedStream
from brlite.server.tokens import count_prompt_tokens

MAX_LISTED_ITEMS = 100


async def create_response(request: web.Request) -> web.StreamResponse:
    """`POST /v1/responses`."""
    body = await read_body(request, request.app[CONFIG].limits)
    keep_body(request, body)
    dialect = responses_dialect(request)
    # Most requests are not decoded here. A name with escaped letters has \u.
    fields = decode_fields(body) if b'"background"' in body or b"\\u" in body else {}
    if bytes(fields.get("background", Raw(b"null"))) != b"true":
        return await generate(dialect, request)
    is_streamed = bytes(fields.get("stream", Raw(b"null"))) == b"true"
    if is_streamed and LAST_EVENT_ID in request.headers:
        text = f"{LAST_EVENT_ID} is not for background responses: GET /v1/responses/{{id}}?stream=true&starting_after=N"
        raise InvalidRequest(text, param=LAST_EVENT_ID)
    stream = RecordedStream() if is_streamed else None
    response = await request.app[BACKGROUND].start(dialect, request, request[API_KEY].tenant, stream)
    if is_streamed and isinstance(response, web.Response):  # of a retry: the response in progress as it was
        assert isinstance(response.body, bytes)
        return await _send_events(request, _find(request, msgspec.json.decode(response.body)["id"]), 0)
    return response


def responses_dialect(request: web.Request) -> Dialect:
    """The dialect of the Responses API, with access to the stored responses of the request's key."""
    stored = _stored(request)
    return DIALECT._replace(
        decode=partial(decode, stored=stored), make_encoder=partial(ResponsesEncoder, keep=stored.keep)
    )


async def count_input_tokens(request: web.Request) -> web.Response:
    """Count the tokens of a prompt of any length: only the body's size is limited."""
    call = await read_call(request, partial(decode_input_tokens, stored=_stored(request)))
    return await count_prompt_tokens(request, call, InputTokens)


async def get_response(request: web.Request) -> web.StreamResponse:
    """A response as it was sent, or in progress. With `stream`: its events, those after number `starting_after`."""
    stream, after = request.query.get("stream", "false").lower(), request.query.get("starting_after")
    if stream not in ("true", "1", "false", "0"):
        raise InvalidRequest(f"stream must be true or false, got {stream[:64]!r}", param="stream")
    is_streamed = stream in ("true", "1")
    if after is not None and not (after.isascii() and after.isdecimal() and len(after) <= MAX_DIGITS and is_streamed):
        text = f"starting_after must be the number of an event, and needs stream=true, got {after[:64]!r}"
        raise InvalidRequest(text, param="starting_after")
    response = _find(request)
    if not is_streamed:
        return web.Response(body=response.body, content_type="application/json")
    return await _send_events(request, response, 0 if after is None else int(after) + 1)


async def delete_response(request: web.Request) -> web.Response:
    """Forget a stored response. One in progress is ended as well."""
    response = _find(request)
    request.app[BACKGROUND].cancel(request.app, request[API_KEY].tenant, response.id, is_kept=False)
    _stored(request).delete(response.id)
    return web.json_response({"id": response.id, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """End a background response, and return it when it has ended. For one that has ended before it does nothing.

    Other responses are refused as at OpenAI: their clients disconnect, or `DELETE /v1/requests/{id}`.
    """
    response, background, tenant = _find(request), request.app[BACKGROUND], request[API_KEY].tenant
    if not response.is_background:
        raise InvalidRequest("Cannot cancel a response that was not created with background=true.", param="response_id")
    background.cancel(request.app, tenant, response.id)
    await background.ended(tenant, response.id)
    return web.Response(body=_find(request, response.id).body, content_type="application/json")


async def list_input_items(request: web.Request) -> web.Response:
    """The input items of a stored response, newest first. `limit` (1 to 100), `order` and `after` as at OpenAI."""
    items = shown_input_items(_find(request))
    order, after, limit = request.query.get("order", "desc"), request.query.get("after"), request.query.get("limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order must be asc or desc, got {order[:64]!r}", param="order")
    if limit is not None and not (limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= MAX_LISTED_ITEMS):
        raise InvalidRequest(f"limit must be 1 to {MAX_LISTED_ITEMS}, got {limit[:64]!r}", param="limit")
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise InvalidRequest(f"after: there is no item {after[:64]!r} in this list", param="after")
        items = items[ids.index(after) + 1 :]
    listed = items[: int(limit or 20)]
    page = {
        "object": "list",
        "data": listed,
        "first_id": listed[0]["id"] if listed else None,
        "last_id": listed[-1]["id"] if listed else None,
        "has_more": len(listed) < len(items),
    }
    return web.Response(body=encode_json(page), content_type="application/json")


async def _send_events(request: web.Request, response: FinishedResponse, num_seen: int) -> web.StreamResponse:
    """The events of a response after the first `num_seen`. Those of a running one as they come."""
    background, tenant = request.app[BACKGROUND], request[API_KEY].tenant
    if (followed := await background.follow(request, tenant, response.id, num_seen)) is not None:
        return followed
    if response.is_running:  # it was not asked to be streamed: its events are made at its end
        if request.method == hdrs.METH_HEAD:
            async with EventStream(request, request.app[CONFIG].limits.sse_comment_seconds) as stream:
                return await stream.finish()
        await background.ended(tenant, response.id)
        response = _find(request, response.id)
    recorded = RecordedStream()  # events are decompressed as the client reads them
    recorded.keep(check_following(response.kept, num_seen))
    recorded.end()
    return await recorded.follow(request, num_seen, request.app[CONFIG].limits, has_ids=False)


def _stored(request: web.Request) -> TenantResponses:
    return TenantResponses(request.app[STORE], request[API_KEY].tenant, request.app[BACKGROUND].in_progress)


def _find(request: web.Request, response_id: str = "") -> FinishedResponse:
    """The response with this id, or the one in the path. Raises `NotFound`, also for a response of another key."""
    stored, response_id = _stored(request), response_id or request.match_info["response_id"]
    response = stored.get(response_id)
    if response is None:
        reason = "" if stored.is_enabled else ": this server stores no responses (limits.max_stored_bytes is 0)"
        raise NotFound(
            f"Response with id {response_id[:64]!r} not found{reason}.",
            param="response_id",
            code="response_not_found",
        )
    return response
