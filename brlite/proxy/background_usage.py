"""The usage of responses that upstreams store: read from them, and charged to the API keys.

A client need not retrieve a response that is computed in the background: it may continue it, or leave its stream before
the last event. So the proxy retrieves it, too, until it is complete, and before its client deletes it. Until then the
key's budget lacks an estimate, which is charged only if the upstream never reports the usage. Nothing is charged twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from brlite.errors import UpstreamError
from brlite.http.api_key import ApiKey
from brlite.proxy.response_owners import RESPONSES_PATH, ResponseOwners, stored_response
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.usage import (
    NO_USAGE,
    ForwardedUsage,
    Seen,
    estimate_completion,
    is_possible,
    reported_usage,
)

logger = logging.getLogger(__name__)

MAX_FOLLOWED = 1000
MAX_CONCURRENT = 8  # requests, and as many before deletions; each may hold `MAX_BYTES`
MAX_BYTES = 4 * 1024 * 1024
FIRST_SECONDS = 2.0  # until the first request; then half as long again each time, up to `MAX_SECONDS`
MAX_SECONDS = 60.0
MAX_REQUESTS = 1450  # for one response: a day
MAX_FAILURES = 10  # in a row: four minutes
ANSWER_SECONDS = 10.0
ESTIMATED = "the tokens of %s, computed in the background, are charged as estimated (prompt: %d, generated: %d): %s"


@dataclass(eq=False)
class Followed:
    """A response whose usage is not known yet. `estimate`: the tokens that are reserved for it."""

    key: ApiKey
    response_id: str
    estimate: ForwardedUsage = NO_USAGE

    def raise_estimate(self, estimate: ForwardedUsage, num_reserved: int = 0) -> None:
        """Reserve an estimate, if it is above the one before. `num_reserved` tokens of it are reserved already."""
        before, self.estimate = self.estimate, ForwardedUsage(*map(max, self.estimate, estimate))
        self.key.reserve(time.monotonic(), sum(self.estimate) - sum(before) - num_reserved)

    def charge(self, usage: ForwardedUsage) -> None:
        """Charge these tokens in place of the estimate."""
        num_reserved, self.estimate = sum(self.estimate), NO_USAGE
        self.key.spend(time.monotonic(), *usage, num_reserved=num_reserved)


class BackgroundUsage:
    """Follows responses by `follow` until each is complete, deleted or forgotten, or `close` is called."""

    def __init__(self, owners: ResponseOwners, find_upstream: Callable[[str], Upstream | None]) -> None:
        self._owners = owners
        self._find_upstream = find_upstream
        self._followed: dict[tuple[str, str], Followed] = {}  # by tenant and id
        self._tasks: set[asyncio.Task[None]] = set()  # one for each
        self._turns = asyncio.Semaphore(MAX_CONCURRENT)
        self._deletions = asyncio.Semaphore(MAX_CONCURRENT)  # their clients wait: not behind an upstream that hangs

    def follow(self, key: ApiKey, response_id: str, estimate: ForwardedUsage, num_reserved: int) -> None:
        """Charge the key for this response when its usage is reported. `owners` has its upstream.

        Until then its `estimate` is reserved; `num_reserved` tokens of it are already.
        """
        place = key.tenant, response_id
        followed = self._followed.get(place) or Followed(key, response_id)  # a retry gets one that is followed already
        followed.raise_estimate(estimate, num_reserved)
        if place in self._followed:
            return
        if len(self._followed) >= MAX_FOLLOWED:
            self._charge_estimate(followed, f"more than {MAX_FOLLOWED} responses run in the background")
            return
        self._followed[place] = followed
        task = asyncio.get_running_loop().create_task(self._follow(followed), name="brlite-background-usage")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def charge(self, key: ApiKey, response_id: str, seen: Seen) -> None:
        """Charge the key what `seen` of a stored response reports, less what was charged before.

        A stream of its events that is left before the end reports nothing: what it showed is estimated.
        """
        owner, usage = self._owners.store.get(key.tenant, response_id), reported_usage(seen.parts)
        if owner is None or (usage is None and (owner.is_reported or not seen.num_events)):
            return
        followed = self._followed.get((key.tenant, response_id))
        num_prompt = 0 if followed is None else followed.estimate.prompt_tokens
        used = ForwardedUsage(num_prompt, estimate_completion(RESPONSES_PATH, seen))
        if usage is None and followed is not None:
            followed.raise_estimate(used)
            return
        if usage is not None and is_possible(usage, owner.num_body_bytes, seen.num_text_bytes):
            used = usage
        elif usage is not None and not owner.is_reported:
            text = "upstream %s reports impossible usage for a stored response: %d and %d tokens; estimated instead"
            logger.warning(text, owner.upstream, *usage)
        elif usage is not None:
            return  # it was estimated before
        late = self._owners.note_charge(key.tenant, response_id, used, is_reported=usage is not None)
        (followed or Followed(key, response_id)).charge(late)

    async def settle(self, key: ApiKey, response_id: str) -> None:
        """Charge the key for a followed response that its client is about to delete: then it can no longer be read.

        A running one is cancelled, as its deletion would do: the answer to that has its usage. Some upstreams refuse to
        cancel a complete one; it is read.
        """
        followed, owner = self._followed.get((key.tenant, response_id)), self._owners.store.get(key.tenant, response_id)
        upstream = None if owner is None else self._find_upstream(owner.upstream)
        if followed is None or upstream is None:
            return
        why = "it is deleted while it runs"
        for method, end in (("POST", "/cancel"), ("GET", "")):
            try:
                async with self._deletions:
                    is_complete = await self._look_up(followed, upstream, method, end)
                if is_complete:
                    why = f"upstream {upstream.name} reports no usage of it"
                    break
            except UpstreamError as error:
                why = f"it is deleted, and upstream {upstream.name} {error}"
        self._charge_estimate(followed, why)

    async def close(self) -> None:
        """Cancel all requests, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _follow(self, followed: Followed) -> None:
        why = "it is looked up no more"
        try:
            why = await self._poll(followed)
        finally:
            del self._followed[followed.key.tenant, followed.response_id]
            self._charge_estimate(followed, why)

    async def _poll(self, followed: Followed) -> str:
        """Look the response up until its usage is charged, or cannot be known. Returns why, for the second case."""
        seconds, num_failures = FIRST_SECONDS, 0
        for _ in range(MAX_REQUESTS):
            await asyncio.sleep(seconds)
            seconds = min(seconds * 1.5, MAX_SECONDS)
            owner = self._owners.store.get(followed.key.tenant, followed.response_id)
            if owner is None:
                return "it is deleted, or forgotten (limits.max_owner_bytes)"
            if (upstream := self._find_upstream(owner.upstream)) is None:
                return f"the config has no upstream {owner.upstream} any more"
            try:
                async with self._turns:
                    is_complete = await self._look_up(followed, upstream)
                if is_complete:
                    return f"upstream {upstream.name} reports no usage of it"
                num_failures = 0
            except UpstreamError as error:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    return f"upstream {upstream.name} {error}"
        return "it is not complete after a day"

    async def _look_up(self, followed: Followed, upstream: Upstream, method: str = "GET", end: str = "") -> bool:
        """Charge what the answer about a response reports. False while it runs. Raises `UpstreamError`."""
        path = f"{RESPONSES_PATH.decode()}/{quote(followed.response_id, safe='')}{end}"
        async with UpstreamClient(upstream, ANSWER_SECONDS) as client:
            body = await client.read(path, MAX_BYTES, method)
        if (response := stored_response((body,))) is None:
            raise UpstreamError(f"answered {method} {path} with no response object")
        self.charge(followed.key, followed.response_id, Seen((body,), num_text_bytes=len(body)))
        return not response.is_running

    def _charge_estimate(self, followed: Followed, why: str) -> None:
        """Charge what is reserved, if anything is: the usage will not be known. The log says why."""
        if followed.estimate != NO_USAGE:
            logger.warning(ESTIMATED, followed.response_id, *followed.estimate, why)
            place = followed.key.tenant, followed.response_id
            late = self._owners.note_charge(*place, followed.estimate, is_reported=False)
            followed.charge(followed.estimate if self._owners.store.get(*place) is None else late)
