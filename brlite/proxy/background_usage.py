"""The usage of responses that upstreams compute in the background: read from them, and charged to the API keys.

A client need not retrieve such a response: it may continue it, or leave its stream before the last event. So the proxy
retrieves it, too, until it is complete, and before its client deletes it. Nothing is charged twice.
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
from brlite.proxy.usage import Seen, reported_usage

logger = logging.getLogger(__name__)

MAX_FOLLOWED = 1000
MAX_CONCURRENT = 8  # requests, and as many before deletions; each may hold `MAX_BYTES`
MAX_BYTES = 4 * 1024 * 1024
FIRST_SECONDS = 2.0  # until the first request; then half as long again each time, up to `MAX_SECONDS`
MAX_SECONDS = 60.0
MAX_REQUESTS = 1450  # for one response: a day
MAX_FAILURES = 10  # in a row: four minutes
ANSWER_SECONDS = 10.0
NOT_CHARGED = "the tokens of %s, computed in the background, are not charged: %s"


class BackgroundUsage:
    """Follows responses by `follow` until each is complete, deleted or forgotten, or `close` is called."""

    def __init__(self, owners: ResponseOwners, find_upstream: Callable[[str], Upstream | None]) -> None:
        self._owners = owners
        self._find_upstream = find_upstream
        self._tasks: dict[asyncio.Task[None], tuple[str, str]] = {}  # with the tenant and the id
        self._turns = asyncio.Semaphore(MAX_CONCURRENT)
        self._deletions = asyncio.Semaphore(MAX_CONCURRENT)  # their clients wait: not behind an upstream that hangs

    def follow(self, key: ApiKey, response_id: str) -> None:
        """Charge the key for this response when it is complete. `owners` has its upstream."""
        if len(self._tasks) >= MAX_FOLLOWED:
            text = "more than %d responses run in the background: the key %s is charged for %s only if it retrieves it"
            logger.warning(text, MAX_FOLLOWED, key.name, response_id)
            return
        task = asyncio.get_running_loop().create_task(self._follow(key, response_id), name="brlite-background-usage")
        self._tasks[task] = key.tenant, response_id
        task.add_done_callback(self._tasks.pop)

    async def settle(self, key: ApiKey, response_id: str) -> None:
        """Charge the key for a followed response that its client is about to delete: then it can no longer be read.

        A running one is cancelled, as its deletion would do: the answer to that has its usage. Some upstreams refuse to
        cancel a complete one; it is read.
        """
        if (key.tenant, response_id) not in self._tasks.values():
            return
        owner = self._owners.store.get(key.tenant, response_id)
        upstream = None if owner is None else self._find_upstream(owner.upstream)
        if upstream is None:
            return
        why = "it is deleted while it runs"
        for method, end in (("POST", "/cancel"), ("GET", "")):
            try:
                async with self._deletions:
                    is_complete = await self._charge(key, response_id, upstream, method, end)
                if is_complete:
                    return
            except UpstreamError as error:
                why = f"it is deleted, and upstream {upstream.name} {error}"
        logger.warning(NOT_CHARGED, response_id, why)

    async def close(self) -> None:
        """Cancel all requests, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _follow(self, key: ApiKey, response_id: str) -> None:
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
                async with self._turns:
                    is_complete = await self._charge(key, response_id, upstream)
                if is_complete:
                    return
                num_failures = 0
            except UpstreamError as error:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    why = f"upstream {upstream.name} {error}"
                    break
        logger.warning(NOT_CHARGED, response_id, why)

    async def _charge(
        self, key: ApiKey, response_id: str, upstream: Upstream, method: str = "GET", end: str = ""
    ) -> bool:
        """Charge what the answer about a response reports. False while it runs. Raises `UpstreamError`."""
        path = f"{RESPONSES_PATH.decode()}/{quote(response_id, safe='')}{end}"
        async with UpstreamClient(upstream, ANSWER_SECONDS) as client:
            body = await client.read(path, MAX_BYTES, method)
        if (response := stored_response((body,))) is None:
            raise UpstreamError(f"answered {method} {path} with no response object")
        usage = self._owners.late_usage(key.tenant, response_id, Seen((body,), num_text_bytes=len(body)))
        key.spend(time.monotonic(), usage.prompt_tokens, usage.completion_tokens)
        if response.is_running:
            return False
        if reported_usage((body,)) is None:
            logger.warning(NOT_CHARGED, response_id, f"upstream {upstream.name} reports no usage of it")
        return True
