"""A bounded queue that several keys share: keys get their turns in rotation, and none can fill it for the others.

Round robin between keys, first come, first served within one. A full queue drops from its longest key, as fair
queueing does with packets (RFC 8290 §5.2.1): a single key may fill the queue; items of other keys then displace its
newest ones. It has no clock; keys and items are any hashable objects, each item at most once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[K, T]):
    """At most `max_items` of all keys together. Adding to a full queue and choosing take time in the number of keys."""

    __slots__ = ("_items", "_num_items", "max_items")

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        # Keys in the order of their turns, and each one's items in the order in which they came. Not deques: items
        # that leave must be gone at once, or they would pile up behind one long wait.
        self._items: OrderedDict[K, OrderedDict[T, None]] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    @property
    def keys(self) -> Iterator[K]:
        """The keys that have items, the one whose turn is next first."""
        return iter(self._items)

    def count(self, key: K) -> int:
        """How many items of this key wait."""
        return len(self._items.get(key, ()))

    def add(self, key: K, item: T) -> T | None:
        """Add an item, and return the one that has to leave for it, if one has.

        That is the newest of the key with most items; or `item` itself, which then was not added, if its own key would
        have most.
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
        """The next item: of the key whose turn it is, or of `key`, which has some. Its key's next turn comes last.

        Raises `LookupError` if there is none.
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
        """Take an item out. False if it is not there (any more)."""
        items = self._items.get(key)
        if items is None or item not in items:
            return False
        del items[item]
        self._num_items -= 1
        if not items:
            del self._items[key]
        return True
