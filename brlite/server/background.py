"""Responses that run without their client: `background: true` of the Responses API.

The client gets the response in progress as soon as the engine has its prompt, or its events, and reads it later by its
id. A refusal before that is the client's own error. Nothing outlives the process: neither the store nor what runs.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from brlite.dialects.dialect import Dialect
from brlite.dialects.generation import Generation
from brlite.dialects.kept_events import STATE_BYTES
from brlite.dialects.responses_encoder import ResponsesEncoder
from brlite.dialects.responses_stored import FinishedResponse, check_following
from brlite.errors import BrliteError, stopping
from brlite.http.access_log import log_extras
from brlite.http.body import HELD
from brlite.server.generate import CONFIG, RUNNING, generate
from brlite.server.idempotency import ANSWERS, log_bug
from brlite.server.response_store import STORE
from brlite.server.resumable import RECORDED, RecordedStream

logger = logging.getLogger(__name__)


@dataclass
class RunningResponse:
    """`response` is the response in progress; `stream` is None unless the client asked for one."""

    task: asyncio.Task[Any]
    encoder: ResponsesEncoder
    response: FinishedResponse
    stream: RecordedStream | None


class BackgroundResponses:
    """The running responses by tenant and id. The engine's queue bounds their number.

    `in_progress` has those that are not deleted. They are found here, since a full store may forget them.
    """

    def __init__(self) -> None:
        self._running: dict[tuple[str, str], RunningResponse] = {}
        self.in_progress: dict[tuple[str, str], FinishedResponse] = {}

    async def start(
        self, dialect: Dialect, request: web.Request, tenant: str, stream: RecordedStream | None
    ) -> web.StreamResponse:
        """Run the call of a request. Returns its response in progress, or, with a `stream`, when that has ended.

        Raises as `generate` does for a refusal. A retry gets the response in progress in both cases.
        """
        begun: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def make_encoder(call: Generation, answer_id: str, model: str, fingerprint: str) -> ResponsesEncoder:
            encoder = dialect.make_encoder(call, answer_id, model, fingerprint)
            assert isinstance(encoder, ResponsesEncoder)
            running = asyncio.current_task()  # with an idempotency key not `task`, which ends if the client leaves
            assert running is not None
            self._add((tenant, answer_id), RunningResponse(running, encoder, encoder.begun(), stream), request)
            begun.set_result(self.in_progress[tenant, answer_id].body)
            return encoder

        def end(task: asyncio.Task[web.StreamResponse]) -> None:
            if stream is not None and not begun.done():
                stream.end()

        if stream is not None:
            request[RECORDED] = stream
        task = asyncio.ensure_future(generate(dialect._replace(make_encoder=make_encoder), request))
        task.add_done_callback(end)
        try:
            if stream is None:
                either: list[asyncio.Future[Any]] = [task, begun]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            elif await stream.begun():
                return await stream.follow(request, 0, request.app[CONFIG].limits, has_ids=False)
        except asyncio.CancelledError:
            if not begun.done():
                task.cancel()  # the client left, and knows no id
                task.add_done_callback(log_bug)
            raise
        if begun.done():
            return web.Response(body=begun.result(), content_type="application/json")
        return task.result()  # the stored answer of a retry; or it raises the refusal

    async def follow(
        self, request: web.Request, tenant: str, response_id: str, num_seen: int
    ) -> web.StreamResponse | None:
        """Send the events of a running response. None if it does not run, or has no stream.

        Raises `InvalidRequest` if it has fewer than `num_seen` events so far, or if they were dropped.
        """
        running = self._running.get((tenant, response_id))
        if running is None or running.stream is None or running.encoder.kept is None:
            return None
        check_following(running.encoder.kept, num_seen)
        return await running.stream.follow(request, num_seen, request.app[CONFIG].limits, has_ids=False)

    async def ended(self, tenant: str, response_id: str) -> None:
        """Wait until the response does not run. A cancelled wait does not end the response."""
        if (running := self._running.get((tenant, response_id))) is not None:
            await asyncio.wait([running.task])

    def cancel(self, app: web.Application, tenant: str, response_id: str, *, is_kept: bool = True) -> None:
        """End a running response at its next step, with the status "cancelled". Unless `is_kept` it is not stored."""
        if (running := self._running.get((tenant, response_id))) is None:
            return
        running.encoder.cancel(is_kept=is_kept)
        if not is_kept:
            del self.in_progress[tenant, response_id]
        for delivery in [each for each in app[RUNNING] if each.is_named(response_id, tenant)]:
            delivery.abort()

    async def close(self) -> None:
        """Cancel all that runs."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _add(self, key: tuple[str, str], running: RunningResponse, request: web.Request) -> None:
        tenant, response_id = key
        store, kept, held = request.app[STORE], running.encoder.kept, request[HELD].hand_over()
        self._running[key], self.in_progress[key] = running, running.response
        store.put(tenant, response_id, running.response, STATE_BYTES)
        assert kept is not None  # a background response is stored
        kept.count_with(lambda num: key not in self.in_progress or store.grow(tenant, response_id, num))
        if running.stream is not None:
            running.stream.keep(kept)
        running.task.add_done_callback(partial(self._end, key, request))
        running.task.add_done_callback(lambda _: held.release())
        request.app[ANSWERS].settle(request, tenant, running.response.body)  # a retry gets the same one

    def _end(self, key: tuple[str, str], request: web.Request, task: asyncio.Task[Any]) -> None:
        running = self._running.pop(key)
        self.in_progress.pop(key, None)
        error = stopping() if task.cancelled() else task.exception()
        if error is not None:
            running.encoder.failing(error)
        if running.stream is not None:
            running.stream.end()
        # The access log's line was written when the response began. An error's text may quote the client's.
        used = " ".join(f"{name}={value}" for name, value in log_extras(request).items())
        ended = "has ended" if error is None else f"has ended ({type(error).__name__})"
        is_bug = error is not None and not isinstance(error, BrliteError)
        level, shown = (logging.ERROR, error) if is_bug else (logging.INFO, None)
        logger.log(level, "background response %s %s: %s", key[1], ended, used, exc_info=shown)


BACKGROUND = web.AppKey("background", BackgroundResponses)
