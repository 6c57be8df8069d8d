"""Random schedules: a few sequences computed in pieces, in any company, on any blocks, and held against plain runs.

A `Story` is a sequence as it went alone: one row a step, nothing shared. A `Schedule` lets several go again, in random
chunks, with prefixes that others computed, with drafts right and wrong, computed anew from the start, all at once.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from brlite.engine.backend import Backend, Batch, SampledToken, SamplingInput, ScheduledSeq, SeqResult
from brlite.engine.outputs import TokenLogprob
from brlite.sampling_params import SamplingParams
from tests.backends.native_models import MAX_ROWS
from tests.tiny_models import VOCAB_SIZE

NUM_ALTERNATIVES = 20
NUM_DRAWN = 12
SHORT_LENGTHS = (1, 2, 15, 16, 17, 31, 33, 49, 70)
LONG_LENGTHS = (250, 505, 588)  # attention works on 256 tokens at a time: these cross the borders
MAX_RESTARTS = 2


@dataclass(frozen=True)
class Story:
    """A prompt with its logprobs after each token, and what was drawn from there on."""

    prompt: list[int]
    seed: int
    params: SamplingParams
    prompt_logprobs: list[TokenLogprob]
    drawn: list[SampledToken]

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + [token.token_id for token in self.drawn]


def live_alone(backend: Backend, prompt: list[int], seed: int) -> Story:
    """Compute one sequence by itself, one token a step, on blocks that nobody had before."""
    params = SamplingParams(temperature=0.0 if seed % 2 else 1.2, top_p=0.9, logprobs=NUM_ALTERNATIVES)
    size = backend.info.block_size
    logprobs: list[TokenLogprob] = []
    drawn: list[SampledToken] = []
    token_ids = list(prompt)
    for position in range(len(prompt) + NUM_DRAWN - 1):
        is_last = position >= len(prompt) - 1
        seq = ScheduledSeq(
            seq_id=0,
            start=position,
            token_ids=[token_ids[position]],
            block_table=list(range(position // size + 1)),
            sampling=SamplingInput(params, seed, len(drawn)) if is_last else None,
            prompt_targets=[] if is_last else [token_ids[position + 1]],
            num_prompt_logprobs=NUM_ALTERNATIVES,
        )
        (result,) = backend.execute(Batch([seq])).seqs
        logprobs += result.prompt_logprobs
        drawn += result.tokens
        token_ids += [token.token_id for token in result.tokens]
    return Story(prompt, seed, params, logprobs, drawn)


def make_prompts(seed: int) -> list[list[int]]:
    """Short ones and long ones; some begin alike, for some blocks."""
    numbers = np.random.default_rng(seed)
    shared = numbers.integers(3, VOCAB_SIZE, 48).tolist()
    lengths = (*SHORT_LENGTHS, *LONG_LENGTHS)
    prompts = [numbers.integers(3, VOCAB_SIZE, length).tolist() for length in lengths]
    return prompts + [shared[:length] + numbers.integers(3, VOCAB_SIZE, 9).tolist() for length in (20, 32, 33, 48, 48)]


@dataclass
class _Run:
    """A story on its way again."""

    seq_id: int
    story: Story
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_drawn: int = 0
    num_restarts: int = 0

    @property
    def num_known(self) -> int:
        return len(self.story.prompt) + self.num_drawn

    @property
    def is_done(self) -> bool:
        return self.num_drawn >= NUM_DRAWN


class Schedule:
    """Several stories at once on one backend, as `choose` has it. `run` raises `AssertionError` at the first bit that
    is not that of the story."""

    def __init__(self, backend: Backend, stories: Sequence[Story], choose: random.Random) -> None:
        self._backend = backend
        self._choose = choose
        self._runs = [_Run(number, story) for number, story in enumerate(stories)]
        self._block_size = backend.info.block_size
        self._free = list(range(backend.info.num_blocks))
        self._owners = [0] * backend.info.num_blocks
        choose.shuffle(self._free)
        has_long = any(len(story.prompt) > max(SHORT_LENGTHS) for story in stories)
        self._max_chunk = choose.choice((40, MAX_ROWS) if has_long else (1, 3, 7, 16, 40, MAX_ROWS))
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        while going := [run for run in self._runs if not run.is_done]:
            self._disturb(going)
            batch = self._batch(going)
            self.seen["mixed batches"] += len({len(seq.token_ids) == 1 for seq in batch.seqs}) == 2
            for seq, result in zip(batch.seqs, self._backend.execute(batch).seqs, strict=True):
                self._take_in(self._runs[seq.seq_id], seq, result)

    def _disturb(self, going: list[_Run]) -> None:
        """Now and then one starts anew, on other blocks, perhaps with what another has computed of its beginning."""
        for run in going:
            restarts = run.num_restarts < MAX_RESTARTS and self._choose.random() < 0.03
            run.num_restarts += restarts
            self.seen["restarts"] += restarts
            if restarts or run.num_computed == 0:
                self._release(run)
                self._share(run)

    def _share(self, run: _Run) -> None:
        mine = run.story.token_ids[: run.num_known - 1]
        tables = [
            other.block_table[: _num_alike(mine, other.story.token_ids[: other.num_computed]) // self._block_size]
            for other in self._runs
            if other is not run
        ]
        if self._choose.random() < 0.8:
            run.block_table = max(tables, key=len, default=[])
        run.num_computed = len(run.block_table) * self._block_size
        self.seen["shared blocks"] += len(run.block_table)
        for block in run.block_table:
            self._owners[block] += 1

    def _release(self, run: _Run) -> None:
        for block in run.block_table:
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.insert(self._choose.randrange(len(self._free) + 1), block)
        run.block_table, run.num_computed = [], 0

    def _batch(self, going: list[_Run]) -> Batch:
        chosen = self._choose.sample(going, self._choose.randint(1, len(going)))
        budget = MAX_ROWS
        seqs = []
        for run in chosen:
            seq = self._piece(run, budget)
            budget -= len(seq.token_ids)
            seqs.append(seq)
            if budget == 0:
                break
        return Batch(seqs)

    def _piece(self, run: _Run, budget: int) -> ScheduledSeq:
        left = run.num_known - run.num_computed
        size = min(left, budget, self._choose.randint(1, self._max_chunk))
        start, end = run.num_computed, run.num_computed + size
        token_ids = run.story.token_ids[start:end]
        has_draw = size == left
        draft = self._draft(run, budget - size) if has_draw and run.num_drawn else []
        self._grow(run, end + len(draft))
        # What follows each token of the prompt is reported where it is at hand, now and then.
        targets = run.story.prompt[start + 1 : end + 1] if not draft and self._choose.random() < 0.4 else []
        return ScheduledSeq(
            seq_id=run.seq_id,
            start=start,
            token_ids=token_ids + draft,
            block_table=run.block_table + self._choose.sample(self._free, min(1, len(self._free))),
            sampling=SamplingInput(run.story.params, run.story.seed, run.num_drawn) if has_draw else None,
            prompt_targets=targets,
            num_prompt_logprobs=NUM_ALTERNATIVES,
            num_draft_tokens=len(draft),
        )

    def _draft(self, run: _Run, budget: int) -> list[int]:
        """Some that are right, then some that most likely are not."""
        limit = min(budget, NUM_DRAWN - run.num_drawn - 1, 7)
        if limit <= 0 or self._choose.random() < 0.5:
            return []
        right = run.story.token_ids[run.num_known : run.num_known + self._choose.randint(0, limit)]
        num_wrong = self._choose.randint(0, limit - len(right))
        return right + [self._choose.randrange(3, VOCAB_SIZE) for _ in range(num_wrong)]

    def _grow(self, run: _Run, num_tokens: int) -> None:
        while len(run.block_table) * self._block_size < num_tokens:
            block = self._free.pop()
            self._owners[block] = 1
            run.block_table.append(block)

    def _take_in(self, run: _Run, seq: ScheduledSeq, result: SeqResult) -> None:
        story = run.story
        assert result.error is None
        expected = story.prompt_logprobs[seq.start : seq.start + len(seq.prompt_targets)]
        self._same(result.prompt_logprobs, expected)
        if seq.sampling is not None:
            assert 1 <= len(result.tokens) <= seq.num_draft_tokens + 1
            self._same(result.tokens, story.drawn[run.num_drawn : run.num_drawn + len(result.tokens)])
            num_right = _num_right(seq, story, run.num_drawn)
            assert len(result.tokens) == num_right + 1
            self.seen["right draft tokens"] += num_right
            self.seen["wrong draft tokens"] += seq.num_draft_tokens - num_right
        run.num_computed += len(seq.token_ids) - seq.num_draft_tokens + max(0, len(result.tokens) - 1)
        run.num_drawn += len(result.tokens)

    def _same(self, found: Sequence[object], expected: Sequence[object]) -> None:
        is_same = msgspec.msgpack.encode(found) == msgspec.msgpack.encode(expected)  # `==` would take -0 for 0
        assert is_same, f"found {found}\nalone {expected}"
        self.seen["compared"] += len(expected)


def _num_right(seq: ScheduledSeq, story: Story, num_drawn: int) -> int:
    draft = seq.token_ids[len(seq.token_ids) - seq.num_draft_tokens :]
    return _num_alike(draft, [token.token_id for token in story.drawn[num_drawn:]])


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first tokens are the same."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def run_schedules(backend: Backend, stories: Sequence[Story], *, count: int, seed: int) -> Counter[str]:
    """Run `count` schedules, of which one in 25 may have long stories in it. Returns what happened how often."""
    choose = random.Random(seed)
    short = [story for story in stories if len(story.prompt) <= max(SHORT_LENGTHS)]
    seen: Counter[str] = Counter()
    for number in range(count):
        pool = list(stories) if number % 25 == 0 else short
        schedule = Schedule(backend, choose.choices(pool, k=choose.randint(1, 5)), choose)
        schedule.run()
        seen += schedule.seen
    return seen
