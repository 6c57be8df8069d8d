"""Responses that run without their client: `background: true` of the Responses API.

The client gets the response in progress as soon as the engine has its prompt, and reads it later from the store. A
refusal before that is the client's own error. Nothing outlives the process: neither the store nor what runs.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from aiohttp import web

from brlite.dialects.dialect import Dialect
from brlite.dialects.generation import Generation
from brlite.dialects.responses_encoder import ResponsesEncoder
from brlite.errors import stopping
from brlite.http.access_log import log_extras
from brlite.server.generate import RUNNING, generate
from brlite.server.idempotency import ANSWERS

logger = logging.getLogger(__name__)


class BackgroundResponses:
    """The running responses by tenant and id. The engine's queue bounds their number."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], tuple[asyncio.Task[Any], ResponsesEncoder]] = {}

    async def start(self, dialect: Dialect, request: web.Request, tenant: str) -> web.StreamResponse:
        """Run the call of a request. Returns its response in progress. Raises as `generate` does for a refusal."""
        begun: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def make_encoder(call: Generation, answer_id: str, model: str, fingerprint: str) -> ResponsesEncoder:
            encoder = dialect.make_encoder(call, answer_id, model, fingerprint)
            assert isinstance(encoder, ResponsesEncoder)
            running = asyncio.current_task()  # with an idempotency key not `task`, which ends if the client leaves
            assert running is not None
            self._running[tenant, answer_id] = running, encoder
            running.add_done_callback(partial(self._end, (tenant, answer_id), request))
            body = encoder.begun()
            request.app[ANSWERS].settle(request, tenant, body)  # a retry gets the same response, not one more
            begun.set_result(body)
            return encoder

        task = asyncio.ensure_future(generate(dialect._replace(make_encoder=make_encoder), request))
        either: list[asyncio.Future[Any]] = [task, begun]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()  # the client left, and knows no id
            raise
        if begun.done():
            return web.Response(body=begun.result(), content_type="application/json")
        return task.result()  # the stored answer of a retry; or it raises the refusal

    async def ended(self, tenant: str, response_id: str) -> None:
        """Wait until the response does not run. A cancelled wait does not end the response."""
        if (running := self._running.get((tenant, response_id))) is not None:
            await asyncio.wait([running[0]])

    def cancel(self, app: web.Application, tenant: str, response_id: str, *, is_kept: bool = True) -> None:
        """End a running response at its next step, with the status "cancelled". Unless `is_kept` it is not stored."""
        if (running := self._running.get((tenant, response_id))) is None:
            return
        running[1].cancel(is_kept=is_kept)
        for delivery in [each for each in app[RUNNING] if each.is_named(response_id, tenant)]:
            delivery.abort()

    async def close(self) -> None:
        """Cancel all that runs."""
        tasks = [task for task, _ in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _end(self, key: tuple[str, str], request: web.Request, task: asyncio.Task[Any]) -> None:
        _, encoder = self._running.pop(key)
        error = stopping() if task.cancelled() else task.exception()
        if error is not None:
            encoder.failing(error)
        # The access log's line was written when the response began.
        used = " ".join(f"{name}={value}" for name, value in log_extras(request).items())
        logger.info("background response %s has ended%s: %s", key[1], "" if error is None else f" ({error})", used)


BACKGROUND = web.AppKey("background", BackgroundResponses)
