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

    Operations take time linear in the classes, not in the sequences.
    """

    def __init__(self) -> None:
        self._classes: dict[int, Tenants] = {}  # only classes with waiting sequences
        self._priorities: list[int] = []  # the keys of `_classes`, sorted
        self._returned: dict[int, Group] = {}  # that were put back, by class; only classes with some
        self.num_waiting = 0
        self._last = ""  # the tenant that had the last turn
        self._num_in_a_row = 0  # how many turns it has had in a row

    @property
    def has_turns(self) -> bool:
        """Whether sequences wait for a turn and no sequence that was put back comes before them."""
        seq = self.next
        return seq is not None and self.waits_for_turn(seq)

    def waits_for_turn(self, seq: Sequence) -> bool:
        """Whether a sequence is queued and was not put back."""
        return seq.status == "waiting" and seq not in self._returned.get(seq.state.priority, ())

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
        returned = min(self._returned, default=None)
        if returned is not None and (not self._priorities or returned <= self._priorities[0]):
            return next(iter(self._returned[returned]))
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
        returned = self._returned.setdefault(seq.state.priority, OrderedDict())
        returned[seq] = None
        returned.move_to_end(seq, last=False)
        self.num_waiting += 1

    def take(self, seq: Sequence) -> None:
        """Take out the sequence whose turn it is. Its group's next turn comes last, and so does its tenant's.

        A tenant keeps its turn until it has had as many in a row as its weight.
        """
        is_turn = self.waits_for_turn(seq)
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
        request, priority = seq.state.request, seq.state.priority
        returned = self._returned.get(priority, OrderedDict())
        if seq in returned:
            del returned[seq]
            if not returned:
                del self._returned[priority]
            return
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
        waiting = [seq for seq in state.sequences if seq.status == "waiting"]
        returned = [seq for seq in waiting if not self.waits_for_turn(seq)]
        for seq in waiting:
            self.remove(seq)
        state.priority = priority
        for seq in reversed(waiting):
            if seq in returned:
                self.put_back(seq)
            else:
                self.add(seq, is_first=True)
