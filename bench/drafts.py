"""What drafts cost and gain: the same prompts with them and without, in turns, on two engines of this process.

    python bench/drafts.py --model BIG --draft SMALL          # a draft model, 1 and 4 streams, 3 rounds
    python bench/drafts.py                                    # the default model drafts for itself: what that costs
    python bench/drafts.py --texts                            # n-grams: 50 texts with and without, one by one
    python bench/drafts.py --texts --streams 4 --threads 1    # the same, four texts at a time
    python bench/drafts.py --texts --model BIG --draft SMALL  # n-grams and a draft model, against neither
    python bench/drafts.py --short                            # for CI

A model that drafts for itself is always right and never pays. So the rate then shows what deciding costs: it should be
that without a draft model. Answers are compared, too. One engine runs while the other waits.

With `--texts` each text has the ratio of its time without drafts to that with them, from its first token on. It is
counted: a step takes what all steps of as many rows take in the median, so other programs hardly change it. The ratio
of processor time stands beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from measuring import prompts, subject

from brlite.config.options import DEFAULT_MODEL
from brlite.engine.backend import Backend, Batch, StepResult
from brlite.errors import BrliteError
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import Tokenizer

CONTEXT = 512
KINDS = ("greedy", "temperature 1", "greedy chat", "chat at temperature 1")
REPETITION = "repetition"
NUM_EACH = 10  # texts of each kind
LENGTHS = (32, 64, 128, 256)  # tokens of an answer, unless the model ends it before

# Of a step: whether it is the draft model's, and its number of rows. None of one that computes a part of a prompt.
StepKind = tuple[bool, int] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if an answer differs, or 2 if a model could not be had."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            has_failed = not args.texts and _compare_rates(args, stack)
            if args.texts or args.short:
                has_failed |= _compare_texts(args, stack)
    except BrliteError as error:
        print(f"drafts: error: {error}", file=sys.stderr)
        return 2
    if has_failed:
        print("drafts: an answer differs with drafts", file=sys.stderr)
    return int(has_failed)


def _compare_rates(args: argparse.Namespace, stack: ExitStack) -> bool:
    """Tokens a second with a draft model and without. Returns whether an answer differs."""
    num_prompts, max_tokens = (4, 16) if args.short else (16, 128)
    asked = prompts.read_prompts(prompts.PROMPTS)[:num_prompts]
    has_failed = False
    draft = subject.find_model(args.draft or DEFAULT_MODEL)
    engines = [_engine(args, stack, **fields) for fields in ({}, {"draft": {"path": str(draft.path)}})]
    for num_streams in args.streams:
        rounds = []
        for _ in range(args.rounds):
            (plain, expected), (drafted, found) = (_rate(engine, asked, num_streams, max_tokens) for engine in engines)
            rounds.append((plain, drafted))
            has_failed |= found != expected
        without, beside = (median(rates) for rates in zip(*rounds, strict=True))
        print(f"{num_streams} streams: {without:.1f} tokens/s without, {beside:.1f} with: {beside / without:.2f}x")
    stats, draft_model = engines[1]._engine.stats, engines[1]._engine.draft_model
    assert draft_model is not None
    right = f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens were right (n-grams' included)"
    cost = draft_model.cost.per_draft_token(1)
    print(f"{right}; a step of the draft model took {cost:.2f} of the served model's")
    return has_failed


def _rate(engine: LLM, asked: Sequence[str], num_streams: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the answers."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start, answers = time.perf_counter(), list[list[int]]()
    for first in range(0, len(asked), num_streams):
        outputs = engine.generate(asked[first : first + num_streams], params)
        answers += (output.outputs[0].token_ids for output in outputs)
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


class Text(NamedTuple):
    kind: str
    prompt: str | list[int]
    params: SamplingParams


class Step(NamedTuple):
    """A step, and the processor time at its start; in a list of steps that are done, its seconds of it."""

    is_draft: bool
    batch: Batch
    seconds: float

    @property
    def kind(self) -> StepKind:
        if not self.is_draft and any(len(seq.token_ids) > 1 + seq.num_draft_tokens for seq in self.batch.seqs):
            return None
        return self.is_draft, self.batch.num_tokens


class Times(NamedTuple):
    """What a text took from the first token of its turn's last prompt on.

    Steps, seconds by the medians of such steps, and seconds of processor time.
    """

    num_steps: int = 0
    counted: float = 0.0
    processor: float = 0.0


class Compared(NamedTuple):
    """A text without drafts and with them."""

    kind: str
    num_tokens: int
    plain: Times
    drafted: Times

    def ratio(self, field: str) -> float:
        """Above 1 is faster with drafts."""
        return float(getattr(self.plain, field) / getattr(self.drafted, field))


class LoggedBackend:
    """A backend that adds its steps to a log."""

    def __init__(self, backend: Backend, log: list[Step], *, is_draft: bool) -> None:
        self.info, self.close = backend.info, backend.close
        self._backend, self._log, self._is_draft = backend, log, is_draft

    def execute(self, batch: Batch) -> StepResult:
        self._log.append(Step(self._is_draft, batch, time.process_time()))
        return self._backend.execute(batch)


def _compare_texts(args: argparse.Namespace, stack: ExitStack) -> bool:
    """Print what each text takes without drafts and with them, in turns. Returns whether an answer differs."""
    draft = {} if args.draft is None else {"draft": {"path": str(subject.find_model(args.draft).path)}}
    engines, log = [_engine(args, stack, "off"), _engine(args, stack, "auto", **draft)], list[Step]()
    for engine in engines:
        engine._backend = LoggedBackend(engine._backend, log, is_draft=False)
        if (model := engine._engine.draft_model) is not None:
            model.backend = LoggedBackend(model.backend, log, is_draft=True)
    texts, has_failed = _texts(engines[0].tokenizer, 1 if args.short else NUM_EACH), False
    for num_streams in args.streams[:1] if args.short else args.streams:
        turns = [texts[first : first + num_streams] for first in range(0, len(texts), num_streams)]
        _turn(engines[0], turns[0], log)  # what is made once is made here
        done = [[_turn(engine, turn, log) for engine in engines] for turn in turns]
        has_failed |= any(plain[0] != drafted[0] for plain, drafted in done)
        costs = _costs(step for pair in done for _, steps in pair for step in steps)
        compared = [
            Compared(text.kind, len(answer), *times)
            for turn, ((answers, plain), (_, drafted)) in zip(turns, done, strict=True)
            for text, answer, *times in zip(turn, answers, _times(plain, costs), _times(drafted, costs), strict=True)
            if all(each.num_steps for each in times)
        ]
        print(_render(compared, costs, num_streams))
    return has_failed


def _texts(tokenizer: Tokenizer, num_each: int) -> list[Text]:
    """So many texts of each kind: four kinds in turns, the four of one length, and repetitions at the end."""
    asked = prompts.read_prompts(prompts.PROMPTS)
    texts = []
    for number, prompt in enumerate(asked[: num_each * len(KINDS)]):
        row, column = divmod(number, len(KINDS))
        params = SamplingParams(temperature=column % 2, seed=number, max_tokens=LENGTHS[row % len(LENGTHS)])
        chat = tokenizer.encode_chat([{"role": "user", "content": prompt}])
        texts.append(Text(KINDS[column], chat if "chat" in KINDS[column] else prompt, params))
    params = SamplingParams(temperature=0.0, max_tokens=128)
    return texts + [Text(REPETITION, prompt, params) for prompt in prompts.rewrite_prompts(asked)[:num_each]]


def _turn(engine: LLM, texts: Sequence[Text], log: list[Step]) -> tuple[list[list[int]], list[Step]]:
    """The answers, and the steps that made them."""
    log.clear()
    outputs = engine.generate([text.prompt for text in texts], [text.params for text in texts])
    log.append(Step(False, Batch([]), time.process_time()))
    steps = [step._replace(seconds=after.seconds - step.seconds) for step, after in pairwise(log)]
    return [output.outputs[0].token_ids for output in outputs], steps


def _costs(steps: Iterable[Step]) -> dict[StepKind, float]:
    """Seconds of a step of each kind: the median."""
    seconds = defaultdict[StepKind, list[float]](list)
    for step in steps:
        seconds[step.kind].append(step.seconds)
    return {kind: median(each) for kind, each in seconds.items()}


def _times(steps: Sequence[Step], costs: Mapping[StepKind, float]) -> list[Times]:
    """What each text of a turn took, in their order. A draft model's steps count for all that are in the next step."""
    taken = defaultdict[int, Times](Times)
    counted = processor = 0.0
    for step in steps:
        counted, processor = counted + costs[step.kind], processor + step.seconds
        if step.is_draft:
            continue
        for seq in step.batch.seqs:
            num_steps, *before = taken[seq.seq_id]
            taken[seq.seq_id] = Times(num_steps + 1, before[0] + counted, before[1] + processor)
            if step.kind is None:
                taken[seq.seq_id] = Times()
        counted = processor = 0.0
    return [taken[seq_id] for seq_id in sorted(taken)]


def _render(compared: Sequence[Compared], costs: Mapping[StepKind, float], num_streams: int) -> str:
    """A row for each text, and one for each kind of text."""
    lines = [f"{num_streams} streams", "", "| text | tokens | steps | counted | processor time |"]
    lines.append("|---|---:|---:|---:|---:|")
    for each in compared:
        numbers = f"{each.num_tokens} | {each.drafted.num_steps}"
        lines.append(f"| {each.kind} | {numbers} | {each.ratio('counted'):.3f}x | {each.ratio('processor'):.3f}x |")
    lines += ["", "| texts | counted: least | median | all | processor time: least | median | all |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for kind in (*KINDS, REPETITION, "any kind"):
        own = [each for each in compared if kind in (each.kind, "any kind")]
        if not own:
            continue
        cells = [f"{len(own)}, {kind}"]
        for field in ("counted", "processor"):
            ratios = [each.ratio(field) for each in own]
            plain, drafted = (
                sum(getattr(each, field) for each in side) for side in zip(*(each[2:] for each in own), strict=True)
            )
            cells += [f"{ratio:.3f}x" for ratio in (min(ratios), median(ratios), plain / drafted)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for is_draft, name in ((False, "served"), (True, "draft")):
        rows = sorted(kind[1] for kind in costs if kind is not None and kind[0] == is_draft)
        of_rows = ", ".join(f"{each}: {costs[is_draft, each] / costs[False, num_streams]:.2f}" for each in rows)
        lines += [f"cost of a step of the {name} model by its rows: {of_rows}"] if rows else []
    return "\n".join(lines)


def _engine(args: argparse.Namespace, stack: ExitStack, speculation: str | None = None, **fields: object) -> LLM:
    tables = subject.chosen(args)
    if speculation is not None:
        # Else the chunks of prompts, and where a text is counted from, would depend on the time of steps.
        tables["engine"] |= {"speculation": speculation, "prefix_caching": False, "max_step_seconds": 0.0}
    model = subject.find_model(args.model)
    config = subject.engine_config(model, tables, build_seq=CONTEXT, build_batch=max(args.streams), **fields)
    return stack.enter_context(LLM(config=config))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.add_argument("--draft", metavar="NAME|PATH", help="the draft model (the default model; --texts: none)")
    parser.add_argument("--texts", action="store_true", help="what single texts take with drafts and without")
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="(1 4; --texts: 1)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--short", action="store_true", help="few prompts and texts, one round")
    args = parser.parse_args(argv)
    args.streams = args.streams or ([1] if args.texts else [1, 4])
    if args.short:
        args.rounds = 1
    return args


if __name__ == "__main__":
    sys.exit(main())
