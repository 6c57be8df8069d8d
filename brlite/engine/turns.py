"""The queue of waiting sequences. It orders them by class, by tenant, by group, then by arrival.

A tenant is the owner of requests (a server's API key), a group is what one request asked for (the prompts of one
body, the completions of one prompt). Both are opaque strings here. So neither many requests nor one request with many
prompts delays others of its class by more than one turn. It decides only the order; the scheduler assigns places and
blocks.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable

from brlite.engine.request import RequestState, Sequence

Group = OrderedDict[Sequence, None]
Tenants = OrderedDict[str, OrderedDict[str, Group]]


class TurnQueue:
    """Round robin of tenants, and of each tenant's groups. A tenant has as many turns in a row as its requests' weight.

    Requests of one `priority` are a class; lower numbers come first. Methods without a sequence apply to the first
    class that has sequences. `next` stays the same until it is taken or removed, or an earlier class gets a sequence.

    Operations take constant time, but for a class's first and last sequence, which take time linear in the classes, and
    `next`, linear in the sequences that were put back.
    """

    def __init__(self) -> None:
        self._classes: dict[int, Tenants] = {}  # only classes with waiting sequences
        self._priorities: list[int] = []  # the keys of `_classes`, sorted
        self._returned: OrderedDict[Sequence, None] = OrderedDict()
        self.num_waiting = 0
        self._last = ""  # the tenant that had the last turn
        self._num_in_a_row = 0  # how many turns it has had in a row

    @property
    def has_turns(self) -> bool:
        """Whether sequences wait for a turn and no sequence that was put back comes before them."""
        seq = self.next
        return seq is not None and seq not in self._returned

    def waits_for_turn(self, seq: Sequence) -> bool:
        """Whether a sequence is queued and was not put back."""
        return seq.status == "waiting" and seq not in self._returned

    @property
    def _tenants(self) -> Tenants:
        return self._classes[self._priorities[0]] if self._priorities else OrderedDict()

    @property
    def tenants(self) -> Iterable[str]:
        """The tenants with waiting requests, in the order of their next turns."""
        return self._tenants.keys()

    def groups(self, tenant: str) -> Iterable[str]:
        """A waiting tenant's groups, in the order of their turns."""
        return self._tenants[tenant].keys()

    def bring_forward(self, tenant: str, group: str | None = None) -> None:
        """Give the next turn to this tenant, and to this one of its groups."""
        self._tenants.move_to_end(tenant, last=False)
        if group is not None:
            self._tenants[tenant].move_to_end(group, last=False)

    @property
    def next(self) -> Sequence | None:
        """The sequence whose turn it is."""
        returned = min(self._returned, key=lambda seq: seq.state.priority, default=None)
        if returned is not None and (not self._priorities or returned.state.priority <= self._priorities[0]):
            return returned
        if not self._priorities:
            return None
        groups = next(iter(self._tenants.values()))
        return next(iter(next(iter(groups.values()))))

    def add(self, seq: Sequence, *, is_first: bool = False) -> None:
        """Queue a sequence as the last of its group, or as its first."""
        request = seq.state.request
        priority = seq.state.priority
        tenants = self._classes.get(priority)
        if tenants is None:
            tenants = self._classes[priority] = OrderedDict()
            insort(self._priorities, priority)
        group = tenants.setdefault(request.tenant, OrderedDict()).setdefault(request.group, OrderedDict())
        group[seq] = None
        if is_first:
            group.move_to_end(seq, last=False)
        self.num_waiting += 1

    def put_back(self, seq: Sequence) -> None:
        """Queue a sequence whose turn has come already, such as one that lost its blocks: before all of its class."""
        self._returned[seq] = None
        self._returned.move_to_end(seq, last=False)
        self.num_waiting += 1

    def take(self, seq: Sequence) -> None:
        """Take out the sequence whose turn it is. Its group's next turn comes last, and so does its tenant's.

        A tenant keeps its turn until it has had as many in a row as its weight.
        """
        is_turn = seq not in self._returned
        self.remove(seq)
        request = seq.state.request
        tenants = self._classes.get(seq.state.priority, OrderedDict())
        groups = tenants.get(request.tenant)
        if is_turn:
            self._num_in_a_row = self._num_in_a_row + 1 if request.tenant == self._last else 1
            self._last = request.tenant
        if is_turn and groups is not None:
            if self._num_in_a_row >= request.weight:
                tenants.move_to_end(request.tenant)
                self._num_in_a_row = 0
            if request.group in groups:
                groups.move_to_end(request.group)

    def remove(self, seq: Sequence) -> None:
        """Take out any sequence that waits."""
        self.num_waiting -= 1
        if seq in self._returned:
            del self._returned[seq]
            return
        request, priority = seq.state.request, seq.state.priority
        tenants = self._classes[priority]
        groups = tenants[request.tenant]
        del groups[request.group][seq]
        if not groups[request.group]:
            del groups[request.group]
        if not groups:
            del tenants[request.tenant]
        if not tenants:
            del self._classes[priority]
            self._priorities.remove(priority)

    def change_class(self, state: RequestState, priority: int) -> None:
        """Move a request's waiting sequences to another class, and give it the next turn there."""
        waiting = list(filter(self.waits_for_turn, state.sequences))
        for seq in waiting:
            self.remove(seq)
        state.priority = priority
        for seq in reversed(waiting):
            self.add(seq, is_first=True)
