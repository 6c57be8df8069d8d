"""Speculative decoding: decides which drafts a step verifies, beside the tokens that it must compute.

Draft tokens come from a grammar that forces them, a draft model (`draft_model.py`) or n-grams (`ngrams.py`).
`drafting.py` decides what pays, by costs that `step_costs.py` measures. Drafts get those tokens and blocks of a step
that no sequence needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

from brlite.config.options import EngineConfig
from brlite.engine.backend import Backend, BackendInfo
from brlite.engine.block_manager import BlockManager
from brlite.engine.draft_model import FEW_TOKENS, TRIAL_DRAFT_TOKENS, DraftModel, DraftPlan
from brlite.engine.drafting import ALLOWED_LOSS, LEAST_CHANCE, NO_DRAFTS, DraftCandidate, DraftChoice, choose_drafts
from brlite.engine.ngrams import NgramDrafter
from brlite.engine.request import Sequence
from brlite.engine.step_costs import FreeDrafts, StepCosts, WaitCost

EXPECTED_TOKENS = 64  # the least expected length of an answer; a longer one is expected to double


class Speculation:
    """Adds drafts to steps of at most `max_draft_seqs` sequences, and forced tokens to any: they save a step each.

    No step is launched behind one with drafts. On a backend that can run ahead they must also pay for that wait.
    """

    def __init__(
        self,
        info: BackendInfo,
        config: EngineConfig,
        blocks: BlockManager,
        max_num_batched_tokens: int,
        draft_backend: Backend | None = None,
    ) -> None:
        """`draft_backend` computes the draft model."""
        is_off = config.speculation == "off"
        self.max_draft_tokens = 0 if is_off else min(config.max_draft_tokens, info.max_draft_tokens)
        self.model = None if draft_backend is None else DraftModel(draft_backend, info)
        drafts_text = config.drafts_text(has_draft=self.model is not None, runs_ahead=info.can_run_ahead)
        self.may_draft = drafts_text and info.verifies_drafts and self.max_draft_tokens > 0
        self.wait_cost = WaitCost(info.row_costs) if info.can_run_ahead else None
        self._max_draft_seqs = config.max_draft_seqs
        self.step_costs: StepCosts | FreeDrafts = StepCosts(info.row_costs)
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens

    def draft_freely(self) -> None:
        """Draft as if no step were longer for it."""
        self.step_costs, self.wait_cost = FreeDrafts(), None

    def add_drafts(self, scheduled: dict[Sequence, int], running: list[Sequence], budget: int) -> None:
        """Add drafts to a step while they pay: at most `budget`, and only in blocks that no other sequence needs."""
        may_draft = self.may_draft and len(running) <= self._max_draft_seqs
        candidates, wait = list[DraftCandidate](), self._wait
        for position, (seq, num_tokens) in enumerate(scheduled.items()):
            forced = seq.matcher.forced if seq.matcher is not None else ()
            if not (may_draft or forced):
                continue
            limit = min(_max_draft_tokens(seq, num_tokens, is_forced=bool(forced)), self.max_draft_tokens, budget)
            if limit <= 0:
                continue
            draft = [] if forced or self.model is None else self.model.draft_for(seq)
            if forced or draft:  # that of a model is made already, since it pays
                limit = self._num_spare_slots(seq, limit, len(running))
                seq.draft_token_ids = list(islice(forced or draft, limit))
                self._blocks.grow(seq, seq.num_tokens + len(seq.draft_token_ids))
                budget -= len(seq.draft_token_ids)
                wait = 0.0  # the step has it already
            elif (drafter := _ngrams(seq)) is not None and (limit := self._num_spare_slots(seq, limit, len(running))):
                candidates.append(DraftCandidate(position, drafter.acceptance, limit))
        if not candidates:
            return
        seqs = list(scheduled)
        choice = self._choose(self._max_num_batched_tokens - budget, candidates, seqs, wait)
        _charge(seqs, choice.cost)
        for position, num_draft_tokens in choice.num_draft_tokens.items():
            seq = seqs[position]
            limit = self._num_spare_slots(seq, min(num_draft_tokens, budget), len(running))
            assert seq.drafter is not None, "it has a draft"
            seq.draft_token_ids = seq.drafter.draft(seq.token_ids, limit)
            self._blocks.grow(seq, seq.num_tokens + limit)
            budget -= limit

    def _num_spare_slots(self, seq: Sequence, limit: int, num_running: int) -> int:
        """How many draft tokens, at most `limit`, find place in blocks that no other sequence needs.

        Each may need a block in the next step, and none may be preempted for another's drafts.
        """
        return max(0, min(limit, self._blocks.num_spare_slots(seq, num_reserved=num_running)))

    def _choose(
        self, num_rows: int, candidates: list[DraftCandidate], seqs: list[Sequence], wait: float
    ) -> DraftChoice:
        return choose_drafts(num_rows, self.step_costs.cost, candidates, [_budget(seq) for seq in seqs], wait)

    @property
    def _wait(self) -> float:
        """The cost of a step that is not decided ahead."""
        return 0.0 if self.wait_cost is None else self.wait_cost.cost

    def wants_result(self, running: list[Sequence]) -> bool:
        """Whether the step after the one under way should wait for its result, to have drafts or a plan for them.

        N-grams must be expected to gain more than that wait costs. The draws of the step under way are expected to be
        as often right as draft tokens were.
        """
        if not self.may_draft or not 0 < len(running) <= self._max_draft_seqs:
            return False
        if not all(seq.is_being_drawn for seq in running):
            return False  # a prompt is left
        if self.model is not None and not self.model.use_rest():
            return True
        candidates = list[DraftCandidate]()
        for position, seq in enumerate(running):
            limit = min(_max_after(seq, seq.num_output_tokens + 1), self.max_draft_tokens)
            if limit > 0 and (drafter := _ngrams(seq)) is not None:
                candidates.append(DraftCandidate(position, drafter.acceptance, limit, chance=drafter.acceptance))
        return bool(candidates and self._choose(len(running), candidates, running, self._wait).num_draft_tokens)

    def plan(self, running: list[Sequence], now: float) -> DraftPlan | None:
        """What the draft model should draft before a step that admits no sequence.

        None if that does not pay, and before a step with a prompt chunk. Sequences for which n-grams are expected to be
        better get no draft.
        """
        model = self.model
        if model is None or model.is_off or not self.may_draft:
            return None
        model.release_stopped()
        num_seqs = len(running)
        is_decoding = num_seqs > 0 and all(seq.num_left == 1 for seq in running)
        if not is_decoding or num_seqs > self._max_draft_seqs:
            return None
        candidates, trials = list[DraftCandidate](), list[DraftCandidate]()
        num_free, draft_cost = self._max_num_batched_tokens - num_seqs, model.cost.per_draft_token(1)
        missing_token_cost = draft_cost * self.step_costs.row_cost / self.step_costs.cost(num_seqs)
        budgets = [_budget(seq) for seq in running]
        for position, seq in enumerate(running):
            limit = min(_max_draft_tokens(seq, 1, is_forced=False), self.max_draft_tokens, num_free // num_seqs)
            limit = min(self._num_spare_slots(seq, limit, num_seqs), model.max_draft_tokens(seq))
            if limit <= 0 or (seq.matcher is not None and seq.matcher.forced):
                continue
            if (draft := model.follow(seq)) is None:
                continue
            num_missing = max(0, draft.num_tokens - draft.num_computed_tokens - FEW_TOKENS)
            missing_cost = num_missing * missing_token_cost
            num_done = seq.num_output_tokens
            num_expected = min(seq.state.max_tokens - num_done, max(EXPECTED_TOKENS, num_done))
            budgets[position] += model.exploration_budget(draft, num_expected)
            candidate = DraftCandidate(position, draft.acceptance, limit, 1.0, draft_cost, missing_cost)
            is_best = (self._model_gain(seq, candidate, num_seqs) - 1) * num_expected > missing_cost
            (candidates if is_best else trials).append(candidate)
        choice = choose_drafts(num_seqs, self.step_costs.cost, candidates, budgets, self._wait)
        if choice.num_draft_tokens:
            model.note_paying()
        else:
            choice = self._trial(trials, budgets, num_seqs)
        wanted = [(running[position], num) for position, num in choice.num_draft_tokens.items()]
        plan = model.plan(wanted, self._max_num_batched_tokens, now) if wanted else None
        if plan is None:
            model.rest()
            return None
        _charge(running, model.pay(choice.cost - plan.num_left_tokens * missing_token_cost))  # later plans pay for them
        return plan

    def _model_gain(self, seq: Sequence, candidate: DraftCandidate, num_seqs: int) -> float:
        """What the draft model gains for the sequence, beside what n-grams do. It drafts for all sequences together."""
        assert self.model is not None, "it has a candidate"
        by_model = candidate._replace(draft_cost=self.model.cost.per_draft_token(num_seqs), position=0)
        gain, by_ngrams = choose_drafts(num_seqs, self.step_costs.cost, [by_model], [math.inf]).gain, 1.0
        if gain > 1 and (drafter := _ngrams(seq)) is not None:
            ngrams = DraftCandidate(0, drafter.acceptance, candidate.limit)
            by_ngrams = choose_drafts(num_seqs, self.step_costs.cost, [ngrams], [math.inf]).gain
        return gain / by_ngrams

    def _trial(self, candidates: list[DraftCandidate], budgets: list[float], num_seqs: int) -> DraftChoice:
        """Two draft tokens for a sequence, if a trial is due and the budget of each sequence pays for it; else none."""
        assert self.model is not None, "it has candidates"
        plain = self.step_costs.cost(num_seqs)
        for each in candidates:
            num = min(TRIAL_DRAFT_TOKENS, each.limit)
            longer = (self.step_costs.cost(num_seqs + num) + num * each.draft_cost) / plain - 1
            cost = longer + each.start_cost
            if cost <= min(budgets):
                is_due = self.model.is_trial_due(cost + self._wait)
                return DraftChoice({each.position: num}, cost, 1.0) if is_due else NO_DRAFTS
        return NO_DRAFTS


def _budget(seq: Sequence) -> float:
    """The steps that drafts may cost the sequence, by the rule of `drafting.py`."""
    return ALLOWED_LOSS * seq.num_output_tokens + seq.steps_saved


def _charge(seqs: Iterable[Sequence], num_steps: float) -> None:
    """Note that the step of these sequences is so much longer. `Engine.update` adds the right draft tokens."""
    for seq in seqs:
        seq.steps_saved -= num_steps


def _ngrams(seq: Sequence) -> NgramDrafter | None:
    """The sequence's n-gram drafter if it has a draft now that may pay."""
    drafter = seq.drafter
    if drafter is None:
        drafter = seq.drafter = NgramDrafter(seq.num_prompt_tokens)
    return drafter if drafter.follow(seq.token_ids) and drafter.acceptance >= LEAST_CHANCE else None


def _max_draft_tokens(seq: Sequence, num_tokens: int, *, is_forced: bool) -> int:
    """How many draft tokens may follow the `num_tokens` that a step computes of the sequence.

    None unless the step draws for it, and unless each draw depends only on the tokens before: penalties, bad words and
    `min_tokens` change with each draw, logits processors may, and beams change with each step. Drafts of text need one
    token of output; forced tokens may also follow the end of a prompt. The last token that `max_tokens` allows is never
    a draft. None while another step with it is under way.
    """
    length = len(seq.token_ids)  # not by properties: this runs for each sequence and step
    num_output_tokens = length - seq.num_prompt_tokens
    if seq.num_in_flight_tokens or seq.num_computed_tokens + num_tokens != length:
        return 0
    if num_tokens > 1 or num_output_tokens <= 0:  # the end of a prompt
        return 0 if not is_forced or seq.wants_prompt_logprobs else _max_after(seq, num_output_tokens)
    return _max_after(seq, num_output_tokens)


def _max_after(seq: Sequence, num_drawn: int) -> int:
    """How many draft tokens may follow the first `num_drawn` tokens of an answer."""
    state = seq.state
    if state.search is not None:
        return 0
    if not seq.is_plain:
        request = state.request
        if num_drawn < request.params.min_tokens or request.bad_words:
            return 0
        if seq.counts is not None or seq.repetitions is not None or seq.processors is not None:
            return 0
    return state.max_tokens - num_drawn - 1
