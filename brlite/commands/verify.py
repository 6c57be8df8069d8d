"""`brlite verify`: checks that this machine computes the same bits for a request alone and in any batch.

Prompts run alone, then in several kinds of batches; every token and every logprob is compared bit for bit. Any backend
can be verified, also one that does not promise equal bits (torch). Saved answers are compared in the same way, so that
another version or another machine can be checked against this one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from brlite.commands.given_config import given_config
from brlite.config.load import read_text
from brlite.config.options import Config, EngineConfig, LimitsConfig
from brlite.engine.admission import context_length
from brlite.engine.backend import Backend, BackendInfo
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput, TokenLogprob
from brlite.engine.request import Request, sibling_seed
from brlite.errors import BrliteError, ConfigError, InvalidRequest
from brlite.files.new_file import write_whole
from brlite.files.quoting import shown
from brlite.llm import Assembly, build_engine
from brlite.process.machine import physical_cores
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import Tokenizer

NUM_SIBLINGS = 2  # completions of one seeded request
NUM_ALTERNATIVES = 5
LIMITS = LimitsConfig(max_waiting=10**9, max_wait_seconds=10**6)
MAX_SAVED_BYTES = 2**28
SAVED_RUN = "the saved answers"

_HOUSE_RULES = (
    "You answer the questions of visitors to a small museum of ships. Keep to what the labels say, be brief, name the "
    "room in which the thing stands, and where you do not know something, say so and point to the desk at the door.\n\n"
)
_WINDS = ("north", "east", "south", "west")
_LOG = " ".join(f"Day {day}: wind from the {_WINDS[day % 4]}, {day * 7 % 12} ships passed." for day in range(1, 19))
PROMPTS = (
    "The sea is",
    "x",
    f"{_HOUSE_RULES}Where is the oldest anchor?",
    f"{_HOUSE_RULES}Where is the oldest anchor, and who found it?",
    f"{_HOUSE_RULES}How many sails has the model in the window?",
    _LOG,
    f"{_LOG[: len(_LOG) // 3]} In short:",
    "one two three one two three one two three one two three one two",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return",
    '{"name": "Ann", "age": 31}\n{"name": "Ben", "age": 32}\n{"name": "Cem", "age":',
    "描述一下夏天。夏天是",
    "2, 4, 6, 8, 10, 12, 14, 16,",
)


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the prompts. For a field that is None, the config's value is used."""

    name: str
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefix_caching: bool = False
    num_rounds: int = 1
    has_few_blocks: bool = False
    speculation: Literal["on", "off"] = "off"


ALONE = Way(name="alone", max_num_seqs=1)
CROWDS = (
    Way(name="all at once"),
    Way(name="chunks of 23 tokens", max_num_seqs=5, max_num_batched_tokens=23),
    Way(name="twice, prefixes cached", prefix_caching=True, num_rounds=2),
    Way(name="few blocks", prefix_caching=True, has_few_blocks=True),
    Way(name="drafts, 3 at a time", max_num_seqs=3, speculation="on"),
)


class ReplayedCompletion(NamedTuple):
    """Identifies a completion: prompt number from 0, greedy or seeded, and sibling number from 0."""

    prompt: int
    kind: Literal["greedy", "seeded"]
    sibling: int


class ReplayJob(NamedTuple):
    """A request, and the identity of its first completion."""

    first: ReplayedCompletion
    request: Request


Answers = Mapping[ReplayedCompletion, list[TokenLogprob]]
Load = Callable[[Config], Assembly]
Say = Callable[[str], object]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference of a run: prompt and token number from 1, and both tokens; None beyond an answer's end."""

    run: str
    prompt: int
    completion: str
    token: int
    expected: TokenLogprob | None
    found: TokenLogprob | None


class SavedAnswers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `--save` writes, as msgpack: each text, its token ids (cut to the context), and the answers alone."""

    heading: str
    max_tokens: int
    texts: tuple[str, ...]
    prompts: list[list[int]]
    answers: list[tuple[ReplayedCompletion, list[TokenLogprob]]]


class Task(NamedTuple):
    """What is computed and with what it is compared. Without `texts`: those of `before`, else the built-in prompts."""

    texts: Sequence[str] | None = None
    max_tokens: int = 16
    before: SavedAnswers | None = None
    save: Path | None = None


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one run. `notes` count hits, preemptions and drafts: they show that the run tested these."""

    name: str
    num_tokens: int
    num_logprobs: int
    notes: tuple[str, ...]
    difference: Difference | None


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `brlite verify`."""

    is_equal: bool
    backend: str
    precision: str
    fingerprint: str
    is_batch_invariant: bool
    num_prompts: int
    num_tokens: int
    num_logprobs: int
    runs: list[RunReport]


def run(args: argparse.Namespace) -> int:
    task = Task(save=args.save)
    if args.max_tokens is not None:
        task = task._replace(max_tokens=args.max_tokens)
    if args.prompts is not None:
        task = task._replace(texts=read_prompts(args.prompts))
    if args.against is not None:
        for flag, value in (("--prompts", args.prompts), ("--max-tokens", args.max_tokens)):
            if value is not None:
                raise ConfigError(f"{flag} {value}: not with --against, whose file has it")
        before = read_saved(args.against)
        task = task._replace(before=before, max_tokens=before.max_tokens)
    return print_report(given_config(args), task, as_json=args.json)


def print_report(config: Config, task: Task, *, as_json: bool, load: Load = build_engine) -> int:
    """Verify and print it. Returns 1 for a difference."""
    report = verify(load, config, task, (lambda text: None) if as_json else lambda text: print(shown(text), flush=True))
    if as_json:
        print(msgspec.json.encode(report).decode())
    return 0 if report.is_equal else 1


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; write one on each line")
    return prompts


def read_saved(path: Path) -> SavedAnswers:
    """The answers that `--save` wrote. Raises `ConfigError`, also for a file of more than `MAX_SAVED_BYTES`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SAVED_BYTES + 1)
        if len(data) > MAX_SAVED_BYTES:
            raise ConfigError(f"{path}: allowed are {MAX_SAVED_BYTES} bytes")
        saved = msgspec.msgpack.decode(data, type=SavedAnswers)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ConfigError(f"{path}: `brlite verify --save` did not write this file") from None
    if not saved.prompts or len(saved.texts) != len(saved.prompts):
        raise ConfigError(f"{path}: holds no prompts")
    return saved


def verify(load: Load, config: Config, task: Task, say: Say) -> ReplayReport:
    """Run the prompts alone and in batches, then in batches on another number of threads.

    Raises `ConfigError` for a prompt that does not fit, and if a saved text is encoded to other tokens now.
    """
    max_tokens = task.max_tokens
    with closing(load(config)) as (engine, backend):
        prompts = _encode(engine, task)
        heading = _heading(engine.info, prompts, max_tokens)
        say("\n".join(heading))
        replay = _Replay(prompts, max_tokens, config.engine)
        expected = replay.alone(engine, backend)
        runs: list[RunReport] = []
        if (before := task.before) is not None:
            if sorted(each for each, _ in before.answers) != sorted(expected):
                found = f"{len(before.answers)} saved answers are not the {len(expected)} of"
                raise ConfigError(f"{found} {len(prompts)} prompts: the file is damaged, or of another version")
            runs.append(_report(SAVED_RUN, dict(before.answers), [expected], [f"of {before.heading}"], say))
        if task.save is not None:
            texts = tuple(task.texts or PROMPTS) if before is None else before.texts
            answers = list(expected.items())
            saved = SavedAnswers(
                heading=heading[0], max_tokens=max_tokens, texts=texts, prompts=prompts, answers=answers
            )
            _save(task.save, saved, say)
        runs += [replay.compare(engine, backend, way, expected, say) for way in CROWDS]
    num_threads = 2 if (config.engine.threads or physical_cores()) == 1 else 1
    other = msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, threads=num_threads))
    with closing(load(other)) as (engine, backend):
        way = Way(name=f"threads = {num_threads}")
        runs.append(replay.compare(engine, backend, way, expected, say))
    report = ReplayReport(
        is_equal=all(each.difference is None for each in runs),
        backend=engine.info.name,
        precision=engine.info.precision,
        fingerprint=engine.info.fingerprint,
        is_batch_invariant=engine.info.is_batch_invariant,
        num_prompts=len(prompts),
        num_tokens=sum(each.num_tokens for each in runs),
        num_logprobs=sum(each.num_logprobs for each in runs),
        runs=runs,
    )
    say("\n".join(_conclusion(report, engine.tokenizer)))
    return report


def _heading(info: BackendInfo, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    """What is compared, a line each; the first one names the backend."""
    fingerprint = f", fp_{info.fingerprint}" if info.fingerprint else ""
    lines = [f"backend {info.name}, {info.device}, {info.precision}{fingerprint}"]
    if not info.is_batch_invariant:
        lines.append("This backend does not promise the same bits for every batch; this run compares them:")
    lengths = f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    kinds = f"each greedy and seeded ({NUM_SIBLINGS} completions), {max_tokens} tokens"
    return [*lines, f"{len(prompts)} prompts of {lengths}, {kinds}; compared with each completion alone:"]


class _Replay:
    """Runs the same completions in several ways."""

    def __init__(self, prompts: Sequence[list[int]], max_tokens: int, config: EngineConfig) -> None:
        self._apart = list(_jobs(prompts, max_tokens, is_alone=True))
        self._together = list(_jobs(prompts, max_tokens, is_alone=False))
        self._most_tokens = max(map(len, prompts)) + max_tokens
        self._config = config

    def alone(self, engine: Engine, backend: Backend) -> Answers:
        """The reference answers: one completion after the other, with nothing cached."""
        return _complete(self._engine(engine, ALONE), backend, self._apart)

    def compare(self, engine: Engine, backend: Backend, way: Way, expected: Answers, say: Say) -> RunReport:
        """Run all jobs in a random order that is the same each time. Reports the first difference."""
        jobs = random.Random(way.name).sample(self._together, len(self._together))
        fresh = self._engine(engine, way)
        rounds = [_complete(fresh, backend, jobs) for _ in range(way.num_rounds)]
        stats, notes = fresh.stats, []
        if stats.prefix_cache_hits:
            notes.append(f"{stats.prefix_cache_hits} prompt tokens from the cache")
        if stats.preemptions:
            notes.append(f"{stats.preemptions} preemptions")
        if stats.draft_tokens:
            notes.append(f"{stats.draft_tokens} draft tokens, {stats.accepted_tokens} of them right")
        return _report(way.name, expected, rounds, notes, say)

    def _engine(self, engine: Engine, way: Way) -> Engine:
        """A new engine for this way, with nothing cached, within the backend's limits."""
        info, budget = engine.info, self._config.step_tokens(engine.info.step_tokens)
        fewest = math.ceil(min(self._most_tokens, context_length(info)) / info.block_size) + 1
        info = msgspec.structs.replace(
            info,
            max_num_seqs=min(way.max_num_seqs or info.max_num_seqs, info.max_num_seqs),
            num_blocks=min(fewest, info.num_blocks) if way.has_few_blocks else info.num_blocks,
        )
        config = msgspec.structs.replace(
            self._config,
            max_num_batched_tokens=min(way.max_num_batched_tokens or budget, budget),
            prefix_caching=way.prefix_caching,
            speculation=way.speculation,
        )
        fresh = Engine(info, engine.tokenizer, config, LIMITS)
        fresh.draft_freely()  # by measured costs, a busy machine would make none
        return fresh


def _report(name: str, expected: Answers, rounds: Sequence[Answers], notes: Sequence[str], say: Say) -> RunReport:
    """The report of a run that was made in `rounds`, which is printed as a line."""
    entries = [entry for found in rounds for answer in found.values() for entry in answer]
    differences = (_first_difference(name, expected, found) for found in rounds)
    report = RunReport(
        name=name,
        num_tokens=len(entries),
        num_logprobs=sum(1 + len(entry.top) for entry in entries),
        notes=tuple(notes),
        difference=next(filter(None, differences), None),
    )
    what = "DIFFERENT" if report.difference else "equal"
    say(f"  {name:24}{what:11}{report.num_tokens:6} tokens  {', '.join(notes)}".rstrip())
    return report


def _save(path: Path, saved: SavedAnswers, say: Say) -> None:
    data = msgspec.msgpack.encode(saved)
    try:
        write_whole(path, data)
    except OSError as error:
        raise ConfigError(f"--save {path}: cannot be written: {error.strerror}") from error
    say(f"saved to {path}: {len(data)} bytes")


def _encode(engine: Engine, task: Task) -> list[list[int]]:
    """Token ids. Built-in prompts are cut to the context; a prompt that does not fit raises `ConfigError`."""
    tokenizer, room = engine.tokenizer, context_length(engine.info) - task.max_tokens
    if task.texts is None and task.before is None:
        return [tokenizer.encode(text)[: max(1, room)] for text in PROMPTS]
    prompts = [tokenizer.encode(text) for text in task.texts or ()]
    if task.before is not None:
        prompts = task.before.prompts
        for number, (text, prompt) in enumerate(zip(task.before.texts, prompts, strict=True), 1):
            if tokenizer.encode(text)[: len(prompt)] != prompt:
                raise ConfigError(f"prompt {number} is encoded to other tokens than when it was saved: {text!r:.80}")
    params = SamplingParams(max_tokens=task.max_tokens)
    for number, prompt in enumerate(prompts, 1):
        try:
            engine.check(Request(request_id="", prompt_token_ids=prompt, params=params))
        except InvalidRequest as error:
            raise ConfigError(f"prompt {number}: {error}") from None
    return prompts


def _jobs(prompts: Sequence[list[int]], max_tokens: int, *, is_alone: bool) -> Iterator[ReplayJob]:
    """Each prompt's requests. Alone, each sibling is its own request, with its seed of the joint request."""
    common = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=NUM_ALTERNATIVES)
    for number, token_ids in enumerate(prompts):
        greedy = msgspec.structs.replace(common, temperature=0)
        seeded = msgspec.structs.replace(common, temperature=1.0, top_p=0.95, seed=number)
        wanted = {ReplayedCompletion(number, "greedy", 0): greedy}
        if is_alone:
            for sibling in range(NUM_SIBLINGS):
                own = msgspec.structs.replace(seeded, seed=sibling_seed(number, sibling))
                wanted[ReplayedCompletion(number, "seeded", sibling)] = own
        else:
            wanted[ReplayedCompletion(number, "seeded", 0)] = msgspec.structs.replace(seeded, n=NUM_SIBLINGS)
        for first, params in wanted.items():
            name = "-".join(map(str, first))
            yield ReplayJob(first, Request(request_id=name, prompt_token_ids=token_ids, params=params))


def _complete(engine: Engine, backend: Backend, jobs: Sequence[ReplayJob]) -> Answers:
    """Run all jobs at once, as far as the engine lets them, until the last is done."""
    answers: dict[ReplayedCompletion, list[TokenLogprob]] = {}
    errors: list[BrliteError] = []

    def receive(first: ReplayedCompletion, output: RequestOutput | BrliteError) -> None:
        if isinstance(output, BrliteError):
            errors.append(output)
            return
        for each in output.outputs:
            completion = first._replace(sibling=first.sibling + each.index)
            answers.setdefault(completion, []).extend(each.logprobs or ())

    for job in jobs:
        engine.add_request(job.request, partial(receive, job.first))
    while not errors and (batch := engine.schedule()) is not None:
        engine.update(backend.execute(batch))
    if errors:
        raise errors[0]
    return answers


def _first_difference(name: str, expected: Answers, found: Answers) -> Difference | None:
    for completion in sorted(expected):
        pairs = itertools.zip_longest(expected[completion], found.get(completion, ()))
        for number, (right, other) in enumerate(pairs, 1):
            if _bits(right) != _bits(other):
                return Difference(
                    run=name,
                    prompt=completion.prompt + 1,
                    completion="greedy" if completion.kind == "greedy" else f"seeded {completion.sibling + 1}",
                    token=number,
                    expected=right,
                    found=other,
                )
    return None


def _bits(entry: TokenLogprob | None) -> bytes:
    """Equal only if all bits of all numbers are equal. For `==`, 0 equals -0, and NaN never equals NaN."""
    return msgspec.msgpack.encode(entry)


def _conclusion(report: ReplayReport, tokenizer: Tokenizer) -> Iterator[str]:
    compared = f"{report.num_prompts} prompts, {report.num_tokens} tokens, {report.num_logprobs} logprobs"
    differences = [each.difference for each in report.runs if each.difference is not None]
    if not differences:
        yield f"equal: {compared}, bit for bit"
        return
    yield f"different: {len(differences)} of {len(report.runs)} runs ({compared}); the first difference:"
    first = differences[0]
    yield f"  {first.run}: prompt {first.prompt}, {first.completion}, token {first.token}"
    is_saved = first.run == SAVED_RUN
    yield f"    {'saved' if is_saved else 'alone':10}{_show(first.expected, tokenizer)}"
    yield f"    {'now' if is_saved else 'in a run':10}{_show(first.found, tokenizer)}"


def _show(entry: TokenLogprob | None, tokenizer: Tokenizer) -> str:
    if entry is None:
        return "nothing"
    top = " ".join(f"{token_id}:{logprob!r}" for token_id, logprob in entry.top)
    return f"{entry.token_id} {tokenizer.token_text(entry.token_id)!r} {entry.logprob!r}; best {top}"
