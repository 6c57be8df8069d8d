"""Speculative decoding with a draft model: a smaller model of the same vocabulary drafts, the served one verifies.

Decides what the small model computes, and keeps its KV cache: blocks of its own, and for each sequence the number of
tokens that it has computed. That number may be behind the sequence's: after a preemption, a hit of the served model's
prefix cache, or steps without drafts. The missing tokens are then computed with the next drafts. The scheduler
decides whether drafts pay. `DraftModel.run` is called on the step thread, all else on the engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from brlite.engine.backend import Backend, BackendInfo, Batch, SamplingInput, ScheduledSeq
from brlite.engine.block_manager import BlockManager
from brlite.engine.ngrams import NEWEST_WEIGHT
from brlite.engine.request import Sequence
from brlite.engine.step_costs import DraftCost
from brlite.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

INITIAL_ACCEPTANCE = 0.7  # the share of right draft tokens that is assumed until some are measured
SHARED_WEIGHT = 0.05  # weight of one draft token in the running estimate that new sequences start from
FIRST_TRIAL_STEPS = 64  # steps without drafts until two tokens are tried again; each trial that fails doubles it
MAX_TRIAL_STEPS = 4096
TRIAL_DRAFT_TOKENS = 2
REST_STEPS = 16  # launched ahead after drafts did not pay; each decision whether they pay costs one that is not
TRIAL_SHARE = 0.02  # the largest share of the time that trials may take
INITIAL_BUDGET, MAX_BUDGET = 8.0, 64.0  # steps for exploration; a model that is never right costs all answers so many
EXPLORED_SHARE = 1 / 16  # of an answer's expected steps
FEW_TOKENS = 8  # up to so many tokens that it lacks add almost no cost to the step of the first draft token
LEAST_COST = 0.02  # assumed cost of a small model's step, in steps of the served one, until it is measured


@dataclass(eq=False)
class DraftSeq:
    """The small model's state of a sequence. It shares the sequence's list of token ids.

    `draft_token_ids` followed the first `num_tokens_before` tokens. `num_computed_tokens` counts the sequence's tokens,
    never draft tokens. `params` are the sequence's without logprobs. `num_explored_steps` of the budget for exploration
    have been used while it ran, less what its right drafts saved.
    """

    token_ids: list[int]
    cache_root: bytes
    acceptance: float
    params: SamplingParams
    block_table: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_sealed_blocks: int = 0
    num_computed_tokens: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    num_tokens_before: int = 0
    has_failed: bool = False
    num_explored_steps: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class DraftPlan(NamedTuple):
    """The small model's work before a step of the served one.

    The runs of `batch` compute the tokens that it lacks. Those with `sampling` draw a draft token. Each further one,
    up to `num_draft_tokens[seq_id]`, is a step of one token. The block tables have room for all of them. The others
    leave `num_left_tokens` to later plans, beside `FEW_TOKENS` each.
    """

    batch: Batch
    num_draft_tokens: dict[int, int]
    start: float
    num_left_tokens: int


class DraftModel:
    """Drafts for as many sequences as its backend and its blocks can hold; other sequences get no drafts.

    `budget` is what its drafts may cost all answers together, beside the budget of each sequence (`drafting.py`), in
    steps: for exploration `INITIAL_BUDGET`, then one more for each right draft token, less the cost of all drafts.
    """

    def __init__(self, backend: Backend, served: BackendInfo) -> None:
        """`served` is the model that verifies. Draft tokens beyond its vocabulary are cut off."""
        self.info = backend.info
        expected = max(LEAST_COST, backend.info.weight_bytes / max(1, served.weight_bytes))
        self.cost = DraftCost(expected, served.row_costs)
        self.acceptance = INITIAL_ACCEPTANCE
        self.budget = INITIAL_BUDGET
        self.is_off = False  # true after a failure
        self.backend = backend
        self._vocab_size = served.vocab_size
        self._blocks = BlockManager(backend.info.num_blocks, backend.info.block_size)
        self._followed: dict[Sequence, DraftSeq] = {}
        self._num_steps_without = 0
        self._trial_steps = FIRST_TRIAL_STEPS
        self._num_steps_to_rest = 0

    def release_stopped(self) -> None:
        """Free the blocks of sequences that do not run. Their contents stay in the cache until they are reused."""
        for seq in [seq for seq in self._followed if self.is_off or seq.status != "running"]:
            self._blocks.release(self._followed.pop(seq))

    def follow(self, seq: Sequence) -> DraftSeq | None:
        """The small model's state of a sequence, updated to its tokens; None if it can have no drafts."""
        draft = self._followed.get(seq)
        if draft is None:
            if len(self._followed) >= self.info.max_num_seqs:
                return None
            params = seq.state.request.params
            if params.logprobs is not None or params.prompt_logprobs is not None:
                params = msgspec.structs.replace(params, logprobs=None, prompt_logprobs=None)
            draft = DraftSeq(seq.token_ids, seq.cache_root, self.acceptance, params)
            named = (*params.logit_bias, *params.allowed_token_ids)
            draft.has_failed = any(token_id >= self.info.vocab_size for token_id in named)
            self._blocks.share(draft, self._blocks.match_prefix(draft))
            self._followed[seq] = draft
        elif draft.num_tokens > draft.num_tokens_before and draft.draft_token_ids:
            self._compare_draft(draft)
        return None if draft.has_failed else draft

    def _compare_draft(self, draft: DraftSeq) -> None:
        """Compare the draft with the drawn tokens. The right tokens count as computed, except the draft's last."""
        num_right = 0
        drawn = draft.token_ids[draft.num_tokens_before :]
        for draft_token_id, token_id in zip(draft.draft_token_ids, drawn, strict=False):
            is_right = draft_token_id == token_id
            draft.acceptance += NEWEST_WEIGHT * (is_right - draft.acceptance)
            self.acceptance += SHARED_WEIGHT * (is_right - self.acceptance)
            if not is_right:
                break
            num_right += 1
        self.budget = min(MAX_BUDGET, self.budget + num_right)
        draft.num_explored_steps = max(0.0, draft.num_explored_steps - num_right)
        draft.num_computed_tokens = draft.num_tokens_before + min(num_right, len(draft.draft_token_ids) - 1)
        draft.draft_token_ids = []
        self._blocks.seal(draft)

    def exploration_budget(self, draft: DraftSeq, num_expected: int) -> float:
        """The steps that drafts may cost a sequence beyond its own budget. It is expected to have so many tokens more.

        `budget` is for all answers together, since only drafts show whether the model is good. What right drafts have
        earned is for any of them.
        """
        earned = self.budget - INITIAL_BUDGET
        return max(0.0, earned, min(self.budget, EXPLORED_SHARE * num_expected - draft.num_explored_steps))

    def pay(self, num_steps: float) -> float:
        """Pay the cost of a plan from `budget`. Returns the rest, which the sequences pay."""
        paid = min(num_steps, self.budget)
        self.budget -= paid
        for draft in self._followed.values():  # all wait for a longer step
            draft.num_explored_steps += paid
        return num_steps - paid

    def is_trial_due(self, cost: float) -> bool:
        """Whether to try drafts that are not expected to pay, so that a wrong estimate is corrected.

        `cost` is their cost in steps of one row. Call it for each step that may have drafts and has none.
        """
        self._num_steps_without += 1
        if self._num_steps_without < max(self._trial_steps, cost / TRIAL_SHARE):
            return False
        self._num_steps_without = 0
        self._trial_steps = min(2 * self._trial_steps, MAX_TRIAL_STEPS)
        return True

    def rest(self) -> None:
        """Note that drafts did not pay, so that the next `REST_STEPS` steps may be launched ahead."""
        self._num_steps_to_rest = REST_STEPS

    def use_rest(self) -> bool:
        """Use one of the steps that may be launched ahead, without a plan of drafts. False if none is left."""
        if self.is_off:
            return True
        self._num_steps_to_rest -= 1
        self._num_steps_without += 1
        return self._num_steps_to_rest >= 0

    def note_paying(self) -> None:
        """Note that drafts pay: the next trial comes after `FIRST_TRIAL_STEPS` again."""
        self._num_steps_without, self._trial_steps = 0, FIRST_TRIAL_STEPS

    def max_draft_tokens(self, seq: Sequence) -> int:
        """How many draft tokens of the sequence the model's context has room for. The last one is not computed."""
        return self.info.max_model_len - seq.num_tokens + 1

    def plan(self, wanted: Iterable[tuple[Sequence, int]], budget: int, start: float) -> DraftPlan | None:
        """The steps that draw the wanted number of draft tokens for each sequence. Call `follow` for each one before.

        The first step has at most `budget` tokens. A sequence that lacks more gets its draft in a later plan.
        """
        runs, num_draft_tokens, num_left_tokens = [], dict[int, int](), 0
        for seq, num in wanted:
            draft = self._followed[seq]
            begin, end = draft.num_computed_tokens, draft.num_tokens
            token_ids, sampling = draft.token_ids[begin : min(end, begin + budget)], None
            draft.has_failed = max(token_ids, default=0) >= self.info.vocab_size  # padding in the served model's head
            if draft.has_failed or not token_ids or not self._blocks.grow(draft, end + num - 1):
                continue
            budget -= len(token_ids)
            if begin + len(token_ids) == end:
                num_draft_tokens[seq.seq_id] = num
                sampling = SamplingInput(draft.params, seq.seed, seq.num_output_tokens)
            num_left_tokens += max(0, end - begin - len(token_ids) - FEW_TOKENS)
            runs.append(ScheduledSeq(seq.seq_id, begin, token_ids, draft.block_table, sampling))
        return DraftPlan(Batch(runs), num_draft_tokens, start, num_left_tokens) if runs else None

    def run(self, plan: DraftPlan) -> dict[int, list[int]] | None:
        """Compute the drafts, by `seq_id`: shorter where the model failed for a sequence, None where it failed."""
        drafts: dict[int, list[int]] = {seq.seq_id: [] for seq in plan.batch.seqs}
        batch = plan.batch
        try:
            while batch.seqs:
                result = self.backend.execute(batch)
                following = []
                for run, found in zip(batch.seqs, result.seqs, strict=True):
                    if not found.tokens or run.sampling is None or found.tokens[0].token_id >= self._vocab_size:
                        continue
                    drawn = drafts[run.seq_id]
                    drawn.append(found.tokens[0].token_id)
                    if len(drawn) < plan.num_draft_tokens[run.seq_id]:
                        sampling = msgspec.structs.replace(run.sampling, position=run.sampling.position + 1)
                        start = run.start + len(run.token_ids)
                        following.append(
                            ScheduledSeq(run.seq_id, start, drawn[-1:], run.block_table, sampling),
                        )
                batch = Batch(following)
        except Exception:  # the served model continues without drafts
            logger.exception("the draft model failed and is not used any more")
            return None
        return drafts

    def take_in(self, plan: DraftPlan, drafts: dict[int, list[int]] | None, now: float) -> None:
        """Keep the result of `run` for `draft_for`, and measure its cost."""
        if drafts is None:
            self.is_off = True
            self.release_stopped()
            return
        num_rows = [plan.batch.num_tokens]
        for step in range(1, max(plan.num_draft_tokens.values(), default=1)):
            num_rows.append(sum(num > step for num in plan.num_draft_tokens.values()))
        if num_rows[0] <= 2 * len(plan.batch.seqs):  # with more rows, computing takes longer than reading the weights
            self.cost.observe_drafts(num_rows, now - plan.start)
        followed = {seq.seq_id: draft for seq, draft in self._followed.items()}
        for run in plan.batch.seqs:
            draft = followed[run.seq_id]
            draft.num_computed_tokens = run.start + len(run.token_ids)
            self._blocks.seal(draft)
            draft.draft_token_ids, draft.num_tokens_before = drafts[run.seq_id], draft.num_tokens
            draft.has_failed = run.sampling is not None and not draft.draft_token_ids

    def draft_for(self, seq: Sequence) -> list[int]:
        """The draft of the sequence's next tokens; empty if it has grown since that was made."""
        draft = self._followed.get(seq)
        return draft.draft_token_ids if draft is not None and draft.num_tokens_before == draft.num_tokens else []

    @property
    def num_used_blocks(self) -> int:
        return self._blocks.num_used

    def check_integrity(self) -> None:
        """Raise `EngineError` if a block of the small model is lost, owned twice, or owned by no sequence."""
        self._blocks.check_integrity(self._followed.values())
