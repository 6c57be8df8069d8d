"""The usage of responses that upstreams compute in the background: read from them, and charged to the API keys.

A client need not retrieve such a response: it may continue it, or leave its stream before the last event. So the proxy
retrieves it, too, until it is complete. Usage that a client retrieved first is not charged twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from urllib.parse import quote

from brlite.errors import UpstreamError
from brlite.http.api_key import ApiKey
from brlite.proxy.response_owners import RESPONSES_PATH, ResponseOwners, stored_response
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.usage import Seen

logger = logging.getLogger(__name__)

MAX_FOLLOWED = 1000
MAX_CONCURRENT = 8  # requests; each may hold `MAX_BYTES`
MAX_BYTES = 4 * 1024 * 1024
FIRST_SECONDS = 2.0  # until the first request; then half as long again each time, up to `MAX_SECONDS`
MAX_SECONDS = 60.0
MAX_REQUESTS = 1450  # for one response: a day
MAX_FAILURES = 10  # in a row: four minutes
ANSWER_SECONDS = 10.0


class BackgroundUsage:
    """Follows responses by `follow` until each is complete, deleted or forgotten, or `close` is called."""

    def __init__(self, owners: ResponseOwners, find_upstream: Callable[[str], Upstream | None]) -> None:
        self._owners = owners
        self._find_upstream = find_upstream
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(MAX_CONCURRENT)

    def follow(self, key: ApiKey, response_id: str) -> None:
        """Charge the key for this response when it is complete. `owners` has its upstream."""
        if len(self._tasks) >= MAX_FOLLOWED:
            text = "more than %d responses run in the background: the key %s is charged for %s only if it retrieves it"
            logger.warning(text, MAX_FOLLOWED, key.name, response_id)
            return
        task = asyncio.get_running_loop().create_task(self._follow(key, response_id), name="brlite-background-usage")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all requests, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _follow(self, key: ApiKey, response_id: str) -> None:
        path = f"{RESPONSES_PATH.decode()}/{quote(response_id, safe='')}"
        seconds, num_failures, why = FIRST_SECONDS, 0, "it is not complete after a day"
        for _ in range(MAX_REQUESTS):
            await asyncio.sleep(seconds)
            seconds = min(seconds * 1.5, MAX_SECONDS)
            if (owner := self._owners.store.get(key.tenant, response_id)) is None:
                return
            if (upstream := self._find_upstream(owner.upstream)) is None:
                why = f"the config has no upstream {owner.upstream} any more"
                break
            try:
                async with self._turns, UpstreamClient(upstream, ANSWER_SECONDS) as client:
                    body = await client.read(path, MAX_BYTES)
                if (response := stored_response((body,))) is None:
                    raise UpstreamError(f"answered GET {path} with no response object")
            except UpstreamError as error:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    why = f"upstream {upstream.name} {error}"
                    break
                continue
            num_failures = 0
            usage = self._owners.late_usage(key.tenant, response_id, Seen((body,), num_text_bytes=len(body)))
            key.spend(time.monotonic(), usage.prompt_tokens, usage.completion_tokens)
            if not response.is_running:
                return
        logger.warning("the tokens of %s, computed in the background, are not charged: %s", response_id, why)
