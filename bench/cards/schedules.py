"""The check of `card.py` that runs random schedules: a sequence must get the same bits in any company.

Each story is computed alone first, a token a step. Then several at a time go again as chance has it: in chunks, beside
others, on scattered blocks, begun anew, each step launched before the result of the one before is fetched, and now and
then a step that verifies drafts, right and wrong.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import msgspec
from cards import models
from cards.finding import Finding

from brlite.backends.torch.backend import TorchBackend
from brlite.engine.backend import Batch, SampledToken, SamplingInput, ScheduledSeq, StepResult
from brlite.models.precision import PrecisionName
from brlite.sampling_params import SamplingParams

NUM_STORIES, NUM_DRAWN = 12, 10
LENGTHS = (1, 2, 15, 16, 17, 40, 90, 300)
CONTEXT, MAX_ROWS, MAX_SEQS = 512, 200, 8
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),  # drawn by the host, with the bits of logits
)


@dataclass(frozen=True)
class Story:
    """A prompt, how it is drawn from, and what was drawn alone."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    drawn: list[SampledToken]


@dataclass
class Run:
    """A story on its way: how many of its tokens were given to steps, and how many draws were asked for."""

    seq_id: int
    story: Story
    table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_drawn: int = 0
    drawn_in: int = -1  # the step that made the last draw


def schedules(args: argparse.Namespace) -> Iterator[Finding]:
    """As many schedules as `--schedules` says in each precision, or until the time of a check is nearly up."""
    precisions: tuple[PrecisionName, ...] = ("bf16", "a_bf16_w_int8_kv_int8")
    for precision in precisions[: 1 if args.short else None]:
        try:
            yield _check(args, precision)
        except Exception as error:
            yield Finding(precision, False, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _check(args: argparse.Namespace, precision: PrecisionName) -> Finding:
    kernels, began, number = models.kernels()[0] if args.device != "cpu" else "auto", time.monotonic(), 0
    with closing(
        models.make_backend(
            "tiny", precision, args.device, kernels, rows=MAX_SEQS, context=CONTEXT, num_blocks=MAX_SEQS * CONTEXT // 16
        )
    ) as backend:
        choose = random.Random(0)
        lengths = LENGTHS[: 5 if args.short else None]
        stories = [live_alone(backend, choose, number, lengths) for number in range(NUM_STORIES)]
        is_exact, num_different, num_verified = backend.info.is_batch_invariant, 0, 0
        while number < args.schedules and time.monotonic() - began < args.seconds:
            some = choose.choices(stories, k=choose.randint(1, MAX_SEQS))
            different, verified = run_schedule(backend, some, choose)
            num_different, num_verified, number = num_different + different, num_verified + verified, number + 1
    promise = "equal bits are promised" if is_exact else "this path does not promise equal bits"
    text = f"{num_different} draws with other bits in {number} of {args.schedules} random schedules"
    text += f", {num_verified} right draft tokens; {promise}"
    values = {
        "num_verified": num_verified,
        "schedules": number,
        "wanted": args.schedules,
        "num_different": num_different,
        "is_exact": is_exact,
    }
    return Finding(precision, number > 0 and (num_different == 0 or not is_exact), text, values)


def live_alone(backend: TorchBackend, choose: random.Random, number: int, lengths: Sequence[int]) -> Story:
    """Compute a story by itself, a token a step."""
    prompt = [choose.randrange(3, backend.info.vocab_size) for _ in range(choose.choice(lengths))]
    story = Story(prompt, PARAMS[number % len(PARAMS)], number, [])
    token_ids, table = list(prompt), list(range(CONTEXT // backend.info.block_size))
    for position in range(len(prompt) + NUM_DRAWN - 1):
        is_drawn = position >= len(prompt) - 1
        sampling = SamplingInput(story.params, number, len(story.drawn)) if is_drawn else None
        seq = ScheduledSeq(0, position, [token_ids[position]], table, sampling)
        (result,) = backend.execute(Batch([seq])).seqs
        story.drawn.extend(result.tokens)
        token_ids += [token.token_id for token in result.tokens]
    return story


def run_schedule(backend: TorchBackend, stories: Sequence[Story], choose: random.Random) -> tuple[int, int]:
    """Run several stories together, with a step in flight. Returns how many draws were not those alone, and how many
    draft tokens were right."""
    runs = [Run(number, story) for number, story in enumerate(stories)]
    free = list(range(backend.info.num_blocks))
    choose.shuffle(free)
    under_way: tuple[list[tuple[Run, int]], Callable[[], StepResult]] | None = None
    step = num_different = num_verified = 0
    while under_way or any(run.num_drawn < NUM_DRAWN for run in runs):
        launched = None
        going = [run for run in runs if run.num_drawn < NUM_DRAWN]
        if under_way is None and going and choose.random() < 0.5:
            different, verified = _verify(backend, going, free, choose)
            num_different, num_verified = num_different + different, num_verified + verified
            going = [run for run in going if run.num_drawn < NUM_DRAWN]
        is_last = choose.random() < 0.15  # nothing is launched behind it, so that drafts may follow
        if going and not (is_last and under_way):
            seqs, draws = _batch(going, free, choose, step, backend.info.block_size)
            launched = draws, backend.launch(Batch(seqs))
        if under_way is not None:
            num_different += _num_different(under_way[0], under_way[1]())
        under_way = launched
        step += 1
    return num_different, num_verified


def _verify(backend: TorchBackend, runs: Sequence[Run], free: list[int], choose: random.Random) -> tuple[int, int]:
    """Verify drafts, some tokens right and some wrong, of the runs whose tokens are computed but for the last."""
    seqs, verified = list[ScheduledSeq](), list[tuple[Run, int]]()
    for run in runs:
        ids = [token.token_id for token in run.story.drawn]
        if run.num_drawn == 0 or run.num_computed != len(run.story.prompt) + run.num_drawn - 1:
            continue
        limit = NUM_DRAWN - run.num_drawn - 1
        draft = ids[run.num_drawn : run.num_drawn + choose.randint(0, limit)]
        draft += [choose.randrange(3, backend.info.vocab_size) for _ in range(choose.randint(0, limit - len(draft)))]
        num_right = 0
        while num_right < len(draft) and draft[num_right] == ids[run.num_drawn + num_right]:
            num_right += 1
        while len(run.table) * backend.info.block_size < run.num_computed + 1 + len(draft):
            run.table.append(free.pop(choose.randrange(len(free))))
        token_ids, sampling = (
            [ids[run.num_drawn - 1], *draft],
            SamplingInput(run.story.params, run.story.seed, run.num_drawn),
        )
        table = list(run.table)
        seqs.append(ScheduledSeq(run.seq_id, run.num_computed, token_ids, table, sampling, num_draft_tokens=len(draft)))
        verified.append((run, num_right))
    num_different = 0
    for (run, num_right), found in zip(verified, backend.execute(Batch(seqs)).seqs if seqs else (), strict=True):
        if found.error:
            raise RuntimeError(found.error)
        expected = run.story.drawn[run.num_drawn : run.num_drawn + num_right + 1]
        num_different += msgspec.msgpack.encode(found.tokens) != msgspec.msgpack.encode(expected)
        run.num_drawn, run.num_computed, run.drawn_in = (
            run.num_drawn + len(expected),
            run.num_computed + len(expected),
            -1,
        )
    return num_different, sum(num_right for _, num_right in verified)


def _batch(
    going: list[Run], free: list[int], choose: random.Random, step: int, block_size: int
) -> tuple[list[ScheduledSeq], list[tuple[Run, int]]]:
    """Pieces of some of the runs, and for each which draw it makes, -1 for none."""
    seqs, draws, budget = list[ScheduledSeq](), list[tuple[Run, int]](), MAX_ROWS
    for run in choose.sample(going, choose.randint(1, len(going))):
        if run.drawn_in < step - 1 and choose.random() < 0.02:
            free += run.table
            run.table, run.num_computed = [], 0
        known = run.story.prompt + [token.token_id for token in run.story.drawn[: run.num_drawn]]
        size = min(len(known) - run.num_computed, budget, choose.choice((1, 3, 16, 40, MAX_ROWS)))
        start, end = run.num_computed, run.num_computed + size
        if size == 0:
            break
        while len(run.table) * block_size < end:
            run.table.append(free.pop(choose.randrange(len(free))))
        takes_last = run.num_drawn > 0 and run.drawn_in == step - 1
        is_drawn = end == len(known)
        sampling = SamplingInput(run.story.params, run.story.seed, run.num_drawn) if is_drawn else None
        token_ids = [0] if takes_last else known[start:end]
        seqs.append(ScheduledSeq(run.seq_id, start, token_ids, list(run.table), sampling, takes_last_draw=takes_last))
        draws.append((run, run.num_drawn if is_drawn else -1))
        run.num_computed, budget = end, budget - size
        if is_drawn:
            run.num_drawn, run.drawn_in = run.num_drawn + 1, step
    return seqs, draws


def _num_different(draws: list[tuple[Run, int]], result: StepResult) -> int:
    """Draws that are not the story's, by their bytes: `==` would take -0 for 0."""
    number = 0
    for (run, draw), found in zip(draws, result.seqs, strict=True):
        if found.error:
            raise RuntimeError(found.error)
        expected = run.story.drawn[draw : draw + 1] if draw >= 0 else []
        number += msgspec.msgpack.encode(found.tokens) != msgspec.msgpack.encode(expected)
    return number
