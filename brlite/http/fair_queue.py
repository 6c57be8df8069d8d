"""A bounded fair queue that several keys share: no key can lock the others out.

Round robin between keys; first come, first served within a key. A full queue drops from the key with most items, as
fair queueing does with packets (RFC 8290 §5.2.1): a single key may fill the queue, and items of other keys then
displace its newest ones. It has no clock. Keys and items are hashable objects; each item is in the queue at most once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[K, T]):
    """Holds at most `max_items` in total. Adding to a full queue and choosing take O(number of keys)."""

    __slots__ = ("_items", "_num_items", "max_items")

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        # Keys in the order of their turns; for each key its items in order of arrival. Not deques: a removed item must
        # be deleted at once, or removed items would pile up behind one that waits long.
        self._items: OrderedDict[K, OrderedDict[T, None]] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    @property
    def keys(self) -> Iterator[K]:
        """The keys that have items, in the order of their turns."""
        return iter(self._items)

    def count(self, key: K) -> int:
        """The number of waiting items of this key."""
        return len(self._items.get(key, ()))

    def add(self, key: K, item: T) -> T | None:
        """Add an item, and return the one that is dropped because the queue is full, if any.

        That is the newest item of the key with most items. If that would be its own key, `item` itself is returned and
        not added.
        """
        dropped = None
        if self._num_items >= self.max_items:
            longest = max(self._items, key=self.count, default=None)
            if longest is None or self.count(longest) <= self.count(key) + 1:
                return item
            dropped = next(reversed(self._items[longest]))
            self.remove(longest, dropped)
        self._items.setdefault(key, OrderedDict())[item] = None
        self._num_items += 1
        return dropped

    def pop(self, key: K | None = None) -> T:
        """Remove and return the next item: of the next key in turn, or of `key`, which must have one.

        The item's key then moves to the end of the rotation. Raises `LookupError` if there is no item.
        """
        if key is None:
            if not self._items:
                raise LookupError("the queue is empty")
            key = next(iter(self._items))
        items = self._items[key]
        item, _ = items.popitem(last=False)
        self._num_items -= 1
        if items:
            self._items.move_to_end(key)
        else:
            del self._items[key]
        return item

    def remove(self, key: K, item: T) -> bool:
        """Remove an item. False if it is not or no longer in the queue."""
        items = self._items.get(key)
        if items is None or item not in items:
            return False
        del items[item]
        self._num_items -= 1
        if not items:
            del self._items[key]
        return True
