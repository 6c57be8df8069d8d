"""The bytes of request bodies that a server holds at a time, in sum and for each tenant. Knows no connections.

Bytes are counted as they arrive, so a client that only announces a large body takes nothing. They count until the
request ends, because the body is kept for that long. While a body arrives, its request also counts against the limits
of its key.
"""

from __future__ import annotations

from brlite.errors import NotReady, RateLimited, RequestError
from brlite.http.api_key import ApiKey

RETRY_SECONDS = 1


class BodyBudget:
    """At most `max_bytes` in sum. One tenant may hold half of them; requests without a key have no tenant."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._by_tenant: dict[str, int] = {}

    def take(self, tenant: str, num_bytes: int) -> RequestError | None:
        """Hold so many bytes more for the tenant, or return why that is refused. `release` must follow."""
        if self.num_bytes + num_bytes > self.max_bytes:
            return NotReady(
                f"The server holds {self.max_bytes} bytes of request bodies, as many as it may "
                "(limits.max_body_bytes_in_flight); try again when requests have ended",
                retry_after_seconds=RETRY_SECONDS,
            )
        if tenant:
            num_held = self._by_tenant.get(tenant, 0) + num_bytes
            if num_held > self.max_bytes // 2:
                return RateLimited(
                    f"The requests of this API key hold {self.max_bytes // 2} bytes of bodies, as many as one key may "
                    "(half of limits.max_body_bytes_in_flight); try again when some have ended",
                    retry_after_seconds=RETRY_SECONDS,
                )
            self._by_tenant[tenant] = num_held
        self.num_bytes += num_bytes
        return None

    def release(self, tenant: str, num_bytes: int) -> None:
        """Hold so many bytes fewer."""
        self.num_bytes -= num_bytes
        if tenant:
            num_held = self._by_tenant.pop(tenant, 0) - num_bytes
            if num_held:
                self._by_tenant[tenant] = num_held


class HeldBody:
    """What one request takes of the budget. `release` must follow, and may be called twice."""

    __slots__ = ("_budget", "_is_arriving", "key", "num_bytes")

    def __init__(self, budget: BodyBudget, key: ApiKey) -> None:
        self._budget = budget
        self.key = key
        self.num_bytes = 0
        self._is_arriving = False

    def arrive(self, now: float) -> RateLimited | None:
        """The head is here, its body is not: count the request against its key's limits, or return why not."""
        refusal = self.key.arrival_refusal(now)
        if refusal is None and not self._is_arriving:
            self._is_arriving = True
            self.key.num_arriving += 1
        return refusal

    def arrived(self) -> None:
        """The body is complete, or given up."""
        if self._is_arriving:
            self._is_arriving = False
            self.key.num_arriving -= 1

    def take(self, num_bytes: int) -> RequestError | None:
        """Hold so many bytes more, or return why that is refused."""
        refusal = self._budget.take(self.key.tenant, num_bytes)
        if refusal is None:
            self.num_bytes += num_bytes
        return refusal

    def release(self) -> None:
        """The request has ended."""
        self.arrived()
        self._budget.release(self.key.tenant, self.num_bytes)
        self.num_bytes = 0
