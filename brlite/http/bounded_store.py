"""Stores values in memory by tenant and key. Nothing is written to disk.

The total bytes are bounded. Beyond the bound, the oldest value of the tenant with the most bytes is dropped, so that no
tenant can displace the values of others.
"""

from __future__ import annotations

import logging
import time
from typing import Generic, TypeVar

from msgspec import Struct

logger = logging.getLogger(__name__)

OBJECT_BYTES = 256  # Python's overhead for a value, or for a part of one
SECONDS_BETWEEN_LINES = 60.0  # between two log lines about a full store

V = TypeVar("V")


class StoredValue(Struct, Generic[V], frozen=True):
    value: V
    num_bytes: int


class BoundedStore(Generic[V]):
    """Holds at most `max_bytes`; 0 stores nothing. `name` is the option `limits.NAME`; the log calls values `what`."""

    def __init__(self, max_bytes: int, *, name: str, what: str) -> None:
        self.num_bytes = 0
        self.num_forgotten = 0
        self._max_bytes = max_bytes
        self._name = name
        self._what = what
        self._tenants: dict[str, dict[str, StoredValue[V]]] = {}  # each oldest first
        self._tenant_bytes: dict[str, int] = {}
        self._num_unlogged = 0
        self._next_line = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    @property
    def is_enabled(self) -> bool:
        return self._max_bytes > 0

    def get(self, tenant: str, key: str) -> V | None:
        """The tenant's value under this key. None if it is not or no longer stored."""
        stored = self._tenants.get(tenant, {}).get(key)
        return None if stored is None else stored.value

    def put(self, tenant: str, key: str, value: V, num_bytes: int) -> None:
        """Store a value, then drop values until the bound holds. A value larger than the store is dropped too."""
        self.pop(tenant, key)
        self._tenants.setdefault(tenant, {})[key] = StoredValue(value, num_bytes)
        self._change(tenant, num_bytes)
        self._drop_oldest()

    def grow(self, tenant: str, key: str, num_bytes: int) -> bool:
        """Count `num_bytes` more for a stored value, then drop values as `put` does. False if it is not stored then."""
        values = self._tenants.get(tenant, {})
        if (stored := values.get(key)) is None:
            return False
        values[key] = StoredValue(stored.value, stored.num_bytes + num_bytes)  # it stays as old as it was
        self._change(tenant, num_bytes)
        self._drop_oldest()
        return key in values

    def pop(self, tenant: str, key: str) -> V | None:
        """Remove a value and return it. None if it is not stored."""
        stored = self._tenants.get(tenant, {}).pop(key, None)
        if stored is None:
            return None
        self._change(tenant, -stored.num_bytes)
        if not self._tenants[tenant]:
            del self._tenants[tenant], self._tenant_bytes[tenant]
        return stored.value

    def _drop_oldest(self) -> None:
        while self.num_bytes > self._max_bytes:
            largest = max(self._tenant_bytes, key=self._tenant_bytes.__getitem__)
            self.pop(largest, next(iter(self._tenants[largest])))
            self.num_forgotten += 1
            self._num_unlogged += 1
        if self._num_unlogged and time.monotonic() >= self._next_line:
            logger.warning(
                "the store of %s is full (limits.%s = %d): forgot the %d oldest",
                self._what,
                self._name,
                self._max_bytes,
                self._num_unlogged,
            )
            self._num_unlogged, self._next_line = 0, time.monotonic() + SECONDS_BETWEEN_LINES

    def _change(self, tenant: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._tenant_bytes[tenant] = self._tenant_bytes.get(tenant, 0) + num_bytes
