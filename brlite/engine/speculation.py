"""Speculative decoding: decides which drafts a step verifies, beside the tokens that it must compute.

Draft tokens come from a grammar that forces them, a draft model (`draft_model.py`) or n-grams (`drafting.py`, which
also has the arithmetic of what pays). They get those tokens and blocks of a step that no sequence needs.
"""

from __future__ import annotations

import copy
from itertools import islice

from brlite.config.options import EngineConfig
from brlite.engine.backend import Backend, BackendInfo
from brlite.engine.block_manager import BlockManager
from brlite.engine.draft_model import TRIAL_DRAFT_TOKENS, DraftModel, DraftPlan
from brlite.engine.drafting import NgramDrafter, RowTimes, StepForecast, WaitCost
from brlite.engine.request import Sequence

# A draft model first computes the tokens of a sequence that it has not seen. These numbers decide whether that pays.
FEW_TOKENS = 8  # up to so many missing tokens add almost no cost to the step of the first draft token
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
        self.row_times = RowTimes(info.row_costs)
        self._blocks = blocks
        self._max_num_batched_tokens = max_num_batched_tokens

    def add_drafts(self, scheduled: dict[Sequence, int], running: list[Sequence], budget: int) -> None:
        """Add drafts to a step while they pay: at most `budget`, and only in blocks that no other sequence needs."""
        may_draft = self.may_draft and len(running) <= self._max_draft_seqs
        may_use_ngrams = may_draft and (self.wait_cost is None or self._do_ngrams_pay(running))
        forecast = StepForecast(self._max_num_batched_tokens - budget, self.row_times.costs)
        for seq, num_tokens in scheduled.items():
            forced = seq.matcher.forced if seq.matcher is not None else ()
            if not (forced or may_draft):
                continue
            limit = min(_max_draft_tokens(seq, num_tokens, is_forced=bool(forced)), self.max_draft_tokens, budget)
            if limit <= 0:
                continue
            # Each sequence may need a block in the next step, and none may be preempted for another's drafts.
            limit = max(0, min(limit, self._blocks.num_spare_slots(seq, num_reserved=len(running))))
            draft = [] if forced or self.model is None else self.model.draft_for(seq)
            if forced or draft:  # that of a model is made already, since it pays
                seq.draft_token_ids = forecast.add_forced(list(islice(forced or draft, limit)))
            elif may_use_ngrams and (drafter := _ngrams(seq)) is not None:
                seq.draft_token_ids = forecast.add_ngrams(drafter, seq.token_ids, limit)
            self._blocks.grow(seq, seq.num_tokens + len(seq.draft_token_ids))
            budget -= len(seq.draft_token_ids)

    def _do_ngrams_pay(self, running: list[Sequence]) -> bool:
        """Whether n-grams are expected to gain more than the wait of the step behind them costs.

        Before the result of the step under way, its draws are expected to be as often right as draft tokens were.
        """
        forecast = StepForecast(len(running), self.row_times.costs)
        for seq in running:
            num_drawn = seq.num_output_tokens + seq.is_being_drawn
            limit = min(_max_after(seq, num_drawn), self.max_draft_tokens)
            if limit > 0 and (drafter := _ngrams(seq)) is not None:
                chance = drafter.acceptance if seq.is_being_drawn else 1.0
                forecast.add_draft_tokens(drafter.acceptance, limit, chance=chance, credit=drafter.credit)
        return forecast.gains(self._wait)

    @property
    def _wait(self) -> float:
        """The cost of a step that is not decided ahead."""
        return 0.0 if self.wait_cost is None else self.wait_cost.cost

    def wants_result(self, running: list[Sequence]) -> bool:
        """Whether the step after the one under way should wait for its result, to have drafts or a plan for them."""
        if not self.may_draft or not 0 < len(running) <= self._max_draft_seqs:
            return False
        if not all(seq.is_being_drawn for seq in running):
            return False  # a prompt is left
        return (self.model is not None and not self.model.use_rest()) or self._do_ngrams_pay(running)

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
        forecast, wanted = StepForecast(num_seqs, self.row_times.costs), list[tuple[Sequence, int]]()
        budget = self._max_num_batched_tokens - num_seqs
        for seq in running:
            limit = self._blocks.num_spare_slots(seq, num_reserved=num_seqs)
            limit = min(limit, _max_draft_tokens(seq, 1, is_forced=False), self.max_draft_tokens, budget)
            if limit <= 0 or (seq.matcher is not None and seq.matcher.forced):
                continue
            num_draft_tokens = self._num_model_draft_tokens(seq, limit, forecast, model.cost.per_draft_token(num_seqs))
            budget -= num_draft_tokens
            if num_draft_tokens:
                wanted.append((seq, num_draft_tokens))
        if forecast.gains(0.0):
            if forecast.gains(self._wait):
                model.note_paying()
            elif not model.is_trial_due(self._wait):
                wanted = []
        plan = model.plan(wanted, self._max_num_batched_tokens, now)
        if plan is None:
            model.rest()
        return plan

    def _num_model_draft_tokens(self, seq: Sequence, limit: int, forecast: StepForecast, cost: float) -> int:
        """How many tokens the draft model should draft for a sequence: as many as pay, or a few as a trial.

        `cost` is that of one.
        """
        assert self.model is not None, "it has a cost"
        draft = self.model.follow(seq)
        if draft is None:
            return 0
        drafter = _ngrams(seq)
        by_ngrams, by_model = copy.copy(forecast), copy.copy(forecast)
        if drafter is not None:
            by_ngrams.add_draft_tokens(drafter.acceptance, limit, credit=drafter.credit)
        num_draft_tokens = by_model.add_draft_tokens(draft.acceptance, limit, cost)
        num_missing = draft.num_tokens - draft.num_computed_tokens
        catch_up_cost = cost * self.row_times.costs.other * max(0, num_missing - FEW_TOKENS)
        num_expected = min(seq.state.max_tokens - seq.num_output_tokens, max(EXPECTED_TOKENS, seq.num_output_tokens))
        if (by_model.rate / by_ngrams.rate - 1) * num_expected > catch_up_cost:
            forecast.add_draft_tokens(draft.acceptance, limit, cost)
            return num_draft_tokens
        is_trial = self.model.is_trial_due(catch_up_cost + TRIAL_DRAFT_TOKENS * cost)
        return min(limit, TRIAL_DRAFT_TOKENS) if is_trial else 0


def _ngrams(seq: Sequence) -> NgramDrafter | None:
    """The sequence's n-gram drafter if it has a draft now."""
    seq.drafter = seq.drafter or NgramDrafter(seq.num_prompt_tokens)
    return seq.drafter if seq.drafter.follow(seq.token_ids) else None


def _max_draft_tokens(seq: Sequence, num_tokens: int, *, is_forced: bool) -> int:
    """How many draft tokens may follow the `num_tokens` that a step computes of the sequence.

    None unless the step draws for it, and unless each draw depends only on the tokens before: penalties, bad words and
    `min_tokens` change with each draw, logits processors may, and beams change with each step. Drafts of text need one
    token of output; forced tokens may also follow the end of a prompt. The last token that `max_tokens` allows is never
    a draft. None while another step with it is under way.
    """
    is_drawn = seq.num_scheduled_tokens + num_tokens == seq.num_tokens and not seq.wants_prompt_logprobs
    if not is_drawn or not (is_forced or (num_tokens == 1 and seq.num_output_tokens > 0)):
        return 0
    return 0 if seq.num_in_flight_tokens else _max_after(seq, seq.num_output_tokens)


def _max_after(seq: Sequence, num_drawn: int) -> int:
    """How many draft tokens may follow the first `num_drawn` tokens of an answer."""
    request = seq.state.request
    if num_drawn < request.params.min_tokens or request.bad_words or seq.state.search is not None:
        return 0
    if seq.counts is not None or seq.repetitions is not None:
        return 0
    if seq.processors is not None:
        return 0
    return seq.state.max_tokens - num_drawn - 1
