"""Decides which tokens the next step computes, from sequences and blocks: no tensors, no clocks, no text.

A sequence has no prefill or decode phase, only tokens and the number of them that are computed. A prompt chunk, a
prefix-cache hit, a decode and a preemption all change that one number.
"""

from __future__ import annotations

import sys
from itertools import takewhile
from operator import attrgetter

from brlite.config.options import EngineConfig
from brlite.engine.backend import Backend, BackendInfo, PoolingInput, SamplingInput, ScheduledSeq
from brlite.engine.bad_words import completing_tokens
from brlite.engine.block_manager import BlockManager
from brlite.engine.draft_model import DraftPlan
from brlite.engine.pacing import StepPace
from brlite.engine.request import Sequence
from brlite.engine.running import RunningSequences, largest, youngest
from brlite.engine.speculation import Speculation
from brlite.engine.turns import TurnQueue

Runs = dict[Sequence, int]  # the sequences of a step, each with the number of its tokens to compute
_priority = attrgetter("state.priority")


class Scheduler:
    """Schedules sequences in the order of `TurnQueue`, within limits of sequences, of tokens a step and of blocks.

    Order: sequences with one token left, then prompts that have begun, then new ones.

    Preemption for blocks: if blocks run out, the latest sequence is stopped, its blocks are freed, and it waits at the
    head of the queue to be computed again. Sequences with the highest `priority` number are stopped first.

    Preemption for classes: a waiting sequence that lacks a place or blocks gets those of a class with a higher number.
    A request that has begun never waits for ever: see `promote`.

    Preemption for places: if all places are taken, the next tenant without a place gets one from a tenant with several.
    Within a tenant the same holds for groups. So 64 prompts of one request delay another request by one step.

    Prompts: while answers run, a step has as many prompt tokens as fit the time of `pace`, which bounds the time
    between two tokens of a stream.

    Drafts: what is left of the budgets goes to `Speculation`. No step is decided behind one with drafts.

    A step may be decided while the one before is under way, if `can_schedule_ahead`. A sequence that the earlier step
    ends is then in one step too many. It keeps its blocks until that step has ended.
    """

    def __init__(
        self, info: BackendInfo, config: EngineConfig, blocks: BlockManager, draft_backend: Backend | None
    ) -> None:
        """`draft_backend` computes the draft model."""
        self.pace = StepPace(config.max_step_seconds) if config.max_step_seconds else None
        self.waiting = TurnQueue()
        self.running: list[Sequence] = []
        self._places = RunningSequences()  # the same sequences
        self.num_preemptions = 0
        self._begun_waiting: dict[Sequence, None] = {}  # of requests that have begun; those that wait longest first
        self._blocks = blocks
        self._max_num_seqs = info.max_num_seqs
        self._max_num_batched_tokens = max(config.step_tokens(info.step_tokens), info.max_num_seqs)
        self.speculation = Speculation(info, config, blocks, self._max_num_batched_tokens, draft_backend)
        self._now = 0.0  # the time of the last `schedule`

    @property
    def is_empty(self) -> bool:
        """Whether no sequence runs or waits."""
        return not self.running and not self.waiting.num_waiting

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.add(seq)

    def add_siblings(self, seqs: list[Sequence]) -> None:
        """Queue the further completions of a cached prompt, before the other sequences of their group."""
        for seq in reversed(seqs):
            self.waiting.add(seq, is_first=True)
            self._begun_waiting[seq] = None

    def finish(self, seq: Sequence) -> None:
        """End a running or waiting sequence. Frees its blocks, after the step under way if that writes to them."""
        if seq.status == "running":
            self.running.remove(seq)
            self._places.remove(seq)
        elif seq.status == "waiting":
            self.waiting.remove(seq)
            self._begun_waiting.pop(seq, None)
        seq.status = "finished"
        if not seq.num_in_flight_tokens:
            self._blocks.release(seq)

    def hand_over(self, seq: Sequence, siblings: list[Sequence]) -> None:
        """End a running sequence. If no sibling runs, the first one that waits for a turn gets its place."""
        self.finish(seq)
        successor = next(filter(self.waiting.waits_for_turn, siblings), None)
        if successor is not None and not any(each.status == "running" for each in siblings):
            self.waiting.remove(successor)
            self.waiting.put_back(successor)

    def promote(self, before: float) -> int:
        """Move requests that have begun, and have waited since `before`, to the first class. Returns their number.

        The first class is that of the lowest `priority` that runs or waits. Without this, a preempted request would
        wait for as long as requests of earlier classes arrive.
        """
        overdue = list(takewhile(lambda seq: seq.waiting_since < before, self._begun_waiting))
        if not overdue:
            return 0
        candidates = self.running if self.waiting.next is None else [*self.running, self.waiting.next]
        first = min(seq.state.priority for seq in candidates)
        states = dict.fromkeys(seq.state for seq in overdue if seq.state.priority > first)
        for state in states:
            self.waiting.change_class(state, first)
        if states:
            self._places = RunningSequences(self.running)
        return len(states)

    def fork(self, seq: Sequence, parent: Sequence) -> None:
        """Let a running sequence, whose tokens now continue those of `parent`, share the parent's computed blocks."""
        self._blocks.fork(seq, parent)

    def end_step(self, runs: Runs) -> None:
        """Note that the step with these runs has ended. Call it before the step's result is used."""
        for seq, num_tokens in runs.items():
            seq.num_in_flight_tokens -= num_tokens
            if seq.status == "finished" and not seq.num_in_flight_tokens:
                self._blocks.release(seq)

    def can_schedule_ahead(self) -> bool:
        """Whether the next step can be decided before the result of the one under way is known.

        It cannot if that result tells how many draft tokens were right, if the input of a sequence's next draw depends
        on the token that is being drawn (a grammar, a window of penalties, DRY, bad words, logits processors), if the
        next step is expected to gain from drafts, or if a sequence must be preempted.
        """
        num_missing, block_size = 0, self._blocks.block_size
        for seq in self.running:
            if seq.draft_token_ids:
                return False
            num_slots, num_tokens = len(seq.block_table) * block_size, len(seq.token_ids)
            if seq.is_being_drawn:
                if not seq.ends_with_step:
                    if not seq.is_plain and _depends_on_last_draw(seq):
                        return False
                    num_tokens += 1
            elif seq.num_in_flight_tokens and seq.state.pooling == "mean":
                return False
            if num_tokens > num_slots:
                num_missing += self._blocks.num_blocks_for(num_tokens - num_slots)
        has_room = num_missing <= self._blocks.num_free and self._next_to_replace() is None
        return has_room and not self.speculation.wants_result(self.running)

    def schedule(self, now: float) -> Runs:
        """The runs of the step at `now`. Its sequences hold the blocks that these need."""
        scheduled: Runs = {}
        self._now = now
        self._free_place()
        prompts, growing = list[Sequence](), list[Sequence]()
        block_size = self._blocks.block_size
        for seq in self.running:
            num_begun = seq.num_computed_tokens + seq.num_in_flight_tokens
            # `seq.num_left`, mostly without its call: this runs for each stream and step
            num_left = len(seq.token_ids) - num_begun or seq.num_left
            if num_left > 1:
                prompts.append(seq)
            elif num_left and len(seq.block_table) * block_size > num_begun:
                scheduled[seq] = 1
            elif num_left:
                growing.append(seq)  # it needs one more block
        budget, last_start = self._paced_limits(prompts)
        num_held_back = self._max_num_batched_tokens - budget  # prompts do not get these tokens, drafts may
        num_preemptions, victims = self.num_preemptions, list[Sequence]()
        budget -= len(scheduled)
        for seq in growing:
            budget -= self._schedule_running(seq, budget, scheduled, victims)
        for seq in prompts:
            budget -= self._schedule_running(seq, self._share(seq, budget), scheduled, victims)
        # After a preemption blocks are scarce: a sequence admitted now would be preempted next.
        while budget > 0 and num_preemptions == self.num_preemptions and (matched := self._match_next()) is not None:
            if len(matched) * block_size > last_start:
                break  # the budget is too large for it; the next step's is not
            prompts.append(self._admit(matched))
            scheduled[prompts[-1]] = min(prompts[-1].num_left, budget)
            budget -= scheduled[prompts[-1]]
        for seq in prompts:  # give long prompts the tokens that shorter ones left over
            if seq in scheduled:
                rest = min(seq.num_left - scheduled[seq], budget)
                scheduled[seq] += rest
                budget -= rest
        if self.speculation.max_draft_tokens:
            self.speculation.add_drafts(scheduled, self.running, budget + num_held_back)
        return scheduled

    def plan_drafts(self, now: float) -> DraftPlan | None:
        """What the draft model should draft before the next step, by `Speculation.plan`."""
        return None if self._match_next() is not None else self.speculation.plan(self.running, now)

    def _paced_limits(self, prompts: list[Sequence]) -> tuple[int, int]:
        """How many tokens the step may have, and the latest position at which one of its prompts may go on.

        Both are bounded while answers run: the tokens fit the time of `pace` at that position.
        """
        unbounded = self._max_num_batched_tokens, sys.maxsize
        if self.pace is None or not self.running:
            return unbounded
        matched = self._match_next()
        starts = [seq.num_scheduled_tokens for seq in prompts]
        if matched is not None:
            starts.append(len(matched) * self._blocks.block_size)
        answers = [seq.num_scheduled_tokens for seq in self.running if seq.num_left <= 1] if starts else []
        if not answers:
            return unbounded
        num_tokens = len(answers) + self.pace.num_chunk_tokens(max(starts), answers)
        return min(self._max_num_batched_tokens, num_tokens), max(starts)

    def _share(self, seq: Sequence, budget: int) -> int:
        """The tokens that a running prompt may have in a step: half the budget while a shorter prompt comes after it.

        So a short prompt does not wait for the end of a long one. The long one takes at most twice as long.
        """
        num_left = seq.num_left
        if seq.status != "running":
            return budget
        after = self.running[self.running.index(seq) + 1 :]
        is_shorter_after = any(1 < other.num_left < num_left for other in after)
        new = self.waiting.next
        is_shorter_new = new is not None and new.num_tokens < num_left and self._match_next() is not None
        return -(-budget // 2) if is_shorter_after or is_shorter_new else budget

    def _schedule_running(self, seq: Sequence, budget: int, scheduled: Runs, victims: list[Sequence]) -> int:
        """Schedule the sequence's tokens within the budget, and preempt the latest sequences if blocks are missing.

        `victims` is one list for all calls of a step, at first empty: the running sequences, sorted only once.

        Returns the change in the step's number of tokens, negative if preemptions removed more than was added.
        """
        num_tokens = min(seq.num_left, budget)
        if num_tokens == 0 or seq.status != "running":
            return 0
        returned = 0
        while not self._blocks.grow(seq, seq.num_scheduled_tokens + num_tokens):
            if not victims:
                victims += sorted(self.running, key=_priority)
            victim = victims.pop()
            returned += scheduled.pop(victim, 0)
            self._stop(victim)
            self.waiting.put_back(victim)
            if victim is seq:
                return -returned
        scheduled[seq] = num_tokens
        return num_tokens - returned

    def _match_next(self) -> list[int] | None:
        """The cached blocks that the next waiting sequence can share; None if it lacks a place or blocks.

        A sequence needs blocks for all the tokens it has. Without a waiting sequence it is None.
        """
        seq = self.waiting.next
        if seq is None or len(self.running) >= self._max_num_seqs:
            return None
        # A request that needs a result of each prompt token can share no blocks.
        is_whole = seq.wants_prompt_logprobs or seq.state.pooling == "mean"
        matched = [] if is_whole else self._blocks.match_prefix(seq)
        return matched if self._blocks.num_missing(matched, seq.num_tokens) <= self._blocks.num_free else None

    def _admit(self, matched: list[int]) -> Sequence:
        """Start the next waiting sequence with all the blocks it needs so far: those `matched`, and new ones."""
        seq = self.waiting.next
        assert seq is not None, "the blocks were matched for it"
        self.waiting.take(seq)
        self._begun_waiting.pop(seq, None)
        self._blocks.share(seq, matched)
        self._blocks.grow(seq, seq.num_tokens)
        self.running.append(seq)
        self._places.add(seq)
        seq.status = "running"
        return seq

    def _free_place(self) -> None:
        """Preempt a running sequence if another class, tenant or group has a right to its place or blocks.

        It waits for its group's next turn. Its computed blocks stay in the prefix cache until they are reused.
        """
        replacement = self._next_to_replace()
        if replacement is not None:
            seq, tenant, group = replacement
            self._stop(seq)
            self.waiting.add(seq, is_first=True)
            self.waiting.bring_forward(tenant, group)

    def _next_to_replace(self) -> tuple[Sequence, str, str | None] | None:
        """The running sequence to preempt, and the tenant and group whose turn comes next; None without a preemption.

        In this order: the latest of a class after the waiting sequence's, if that lacks a place or blocks; if all
        places are taken, the latest of the tenant with most places in the same class, if another tenant has none;
        within a tenant, the latest of the group with most places.
        """
        if not self.running or not self.waiting.has_turns or self.waiting.next is None:
            return None
        priority, latest = self.waiting.next.state.priority, max(self._places.classes)
        if latest > priority and self._match_next() is None:
            return youngest(self._places.classes[latest].seqs), next(iter(self.waiting.tenants)), None
        running = self._places.classes.get(priority)
        if len(self.running) < self._max_num_seqs or running is None:
            return None
        tenants = running.tenants
        newcomer = next((tenant for tenant in self.waiting.tenants if tenant not in tenants), None)
        if newcomer is not None:
            if len(tenants) == len(running.seqs):  # none has several
                return None
            return youngest(largest(each.seqs for each in tenants.values())), newcomer, None
        for tenant in self.waiting.tenants:
            groups = tenants[tenant].groups
            if len(groups) == len(tenants[tenant].seqs):
                continue
            new_group = next((group for group in self.waiting.groups(tenant) if group not in groups), None)
            if new_group is not None:
                return youngest(largest(groups.values())), tenant, new_group
        return None

    def _stop(self, seq: Sequence) -> None:
        """Preempt a running sequence: free its blocks. The caller queues it."""
        place = next(place for place in reversed(range(len(self.running))) if self.running[place] is seq)
        del self.running[place]  # mostly the last one
        self._places.remove(seq)
        self._blocks.release(seq)
        seq.status = "waiting"
        seq.waiting_since = self._now
        self._begun_waiting[seq] = None
        self.num_preemptions += 1


def scheduled_seq(seq: Sequence, num_tokens: int) -> ScheduledSeq:
    """A run of a sequence as plain data, for a `Batch`."""
    token_ids, drafts = seq.token_ids, seq.draft_token_ids
    start, length = seq.num_computed_tokens + seq.num_in_flight_tokens, len(token_ids)
    if seq.is_plain and start == length - 1 and not drafts:  # most runs: half of the instructions
        sampling = SamplingInput(seq.state.request.params, seq.seed, length - seq.num_prompt_tokens)
        return ScheduledSeq(seq.seq_id, start, [token_ids[start]], seq.block_table, sampling)
    request, end, pooling_input = seq.state.request, start + num_tokens, None
    pooling = request.pooling
    if seq.state.pooling == "mean":
        total = seq.hidden_total if start else b""  # at position 0 the prompt is computed again, and so is its sum
        pooling_input = PoolingInput(num_tokens, total, pooling if end >= length else None, length)
    elif pooling is not None and end >= length:
        pooling_input = PoolingInput(1, params=pooling)
    return ScheduledSeq(
        seq_id=seq.seq_id,
        start=start,
        token_ids=[0] if start == length else token_ids[start:end] + drafts,
        block_table=seq.block_table,
        sampling=_sampling_input(seq, end - seq.num_prompt_tokens) if end >= length and pooling is None else None,
        prompt_targets=token_ids[start + 1 : min(end + 1, seq.num_prompt_tokens)] if seq.wants_prompt_logprobs else [],
        num_prompt_logprobs=request.params.prompt_logprobs or 0,
        num_draft_tokens=len(drafts),
        pooling=pooling_input,
        takes_last_draw=start == length,
    )


def _depends_on_last_draw(seq: Sequence) -> bool:
    """Whether a draw needs the token before it as input. Backends add it to the counts of a whole text themselves."""
    has_window = seq.counts is not None and seq.counts.is_windowed
    is_edited = has_window or seq.repetitions is not None or seq.processors is not None
    return is_edited or seq.matcher is not None or bool(seq.state.request.bad_words)


def _sampling_input(seq: Sequence, position: int) -> SamplingInput:
    state = seq.state
    params, bad_words = state.request.params, state.request.bad_words
    banned = tuple(state.ends) if position < params.min_tokens else ()
    if bad_words:
        banned += completing_tokens(bad_words, seq.token_ids, position)
    cost_token_ids, costs = (b"", b"") if seq.repetitions is None else seq.repetitions.costs()
    return SamplingInput(
        params=params,
        seed=seq.seed,
        position=position,
        counted_token_ids=seq.counts.token_ids if seq.counts else b"",
        output_counts=seq.counts.output_counts if seq.counts else b"",
        banned_token_ids=banned,
        cost_token_ids=cost_token_ids,
        costs=costs,
    )
