"""`brlite verify`: what is equal is called so, and the smallest difference that company makes is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from brlite.commands.verify import CROWDS, PROMPTS, SAVED_RUN, Task, print_report, read_prompts, read_saved, verify
from brlite.config.options import Config, EngineConfig
from brlite.engine.backend import Batch, SampledToken, SeqResult, StepResult
from brlite.engine.engine import Engine
from brlite.errors import ConfigError
from brlite.llm import Assembly
from tests.fakes import ByteTokenizer, FakeBackend, repeating_token

CONFIG = Config(engine=EngineConfig(threads=2, max_num_batched_tokens=64))
MAX_TOKENS = 6
Change = Callable[[Batch, SeqResult, SampledToken], SampledToken]


class SociableBackend(FakeBackend):
    """A model that gives what `change` makes of each token drawn, which may depend on the whole batch."""

    def __init__(self, change: Change = lambda batch, result, token: token) -> None:
        super().__init__(
            num_blocks=400,
            max_num_seqs=8,
            max_model_len=1024,
            block_size=8,
            max_draft_tokens=4,
            next_token=repeating_token,
        )
        self._change = change

    def execute(self, batch: Batch) -> StepResult:
        results = super().execute(batch).seqs
        return StepResult([self._changed(batch, result) for result in results])

    def _changed(self, batch: Batch, result: SeqResult) -> SeqResult:
        tokens = [self._change(batch, result, token) for token in result.tokens]
        return msgspec.structs.replace(result, tokens=tokens)


class Loader:
    """Stands in for `build_engine`; keeps what it was asked for and what it gave."""

    def __init__(self, make: Callable[[], FakeBackend] = SociableBackend) -> None:
        self.configs: list[Config] = []
        self.backends: list[FakeBackend] = []
        self._make = make

    def __call__(self, config: Config) -> Assembly:
        backend = self._make()
        self.configs.append(config)
        self.backends.append(backend)
        return Assembly(Engine(backend.info, ByteTokenizer(), config.engine, config.limits), backend)


def changed_logprob(token: SampledToken, **changes: object) -> SampledToken:
    assert token.logprob is not None
    return msgspec.structs.replace(token, logprob=msgspec.structs.replace(token.logprob, **changes))


def another_token(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    return SampledToken(98, token.logprob) if len(batch.seqs) == 4 else token


def another_token_id_in_logprob(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    return changed_logprob(token, token_id=98) if len(batch.seqs) > 1 else token


def the_last_bit_of_an_alternative(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    assert token.logprob is not None
    *others, (token_id, logprob) = token.logprob.top
    nudged = (*others, (token_id, logprob + 2.0**-50))
    return changed_logprob(token, top=nudged) if len(batch.seqs) == 7 else token


def the_sign_of_zero(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    return changed_logprob(token, logprob=0.0 if len(batch.seqs) == 1 else -0.0)


def a_chunk_border(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    (seq,) = (seq for seq in batch.seqs if seq.seq_id == result.seq_id)
    return changed_logprob(token, logprob=-0.25) if 1 < len(seq.token_ids) == 17 else token


def another_logprob(batch: Batch, result: SeqResult, token: SampledToken) -> SampledToken:
    return changed_logprob(token, logprob=-0.75)


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_backend_whose_rows_do_not_know_each_other_is_equal(lines: list[str]) -> None:
    loader = Loader()

    report = verify(loader, CONFIG, Task(None, MAX_TOKENS), lines.append)

    num_tokens = len(PROMPTS) * 3 * MAX_TOKENS
    assert report.is_equal
    assert [each.num_tokens for each in report.runs] == [num_tokens, num_tokens, 2 * num_tokens, *[num_tokens] * 3]
    assert report.num_logprobs == 6 * report.num_tokens
    assert lines[-1].startswith(f"equal: 12 prompts, {report.num_tokens} tokens")


def test_every_run_is_what_it_says() -> None:
    loader = Loader()

    report = verify(loader, CONFIG, Task(None, 2 * MAX_TOKENS), lambda line: None)  # fewer need no preemption

    notes = {each.name: " ".join(each.notes) for each in report.runs}
    assert list(notes) == [*(way.name for way in CROWDS), "threads = 1"]
    assert "from the cache" in notes["twice, prefixes cached"]
    assert "preemptions" in notes["few blocks"]
    assert "draft tokens" in notes["drafts, 3 at a time"]
    assert [config.engine.threads for config in loader.configs] == [2, 1]
    assert max(len(batch.seqs) for batch in loader.backends[0].batches) == 8
    assert all(backend.is_closed for backend in loader.backends)


def test_what_runs_alone_runs_alone() -> None:
    loader = Loader()

    verify(loader, CONFIG, Task(["one", "another"], MAX_TOKENS), lambda line: None)

    num_alone = 2 * 3 * MAX_TOKENS
    batches = loader.backends[0].batches
    assert all(len(batch.seqs) == 1 and not batch.seqs[0].num_draft_tokens for batch in batches[:num_alone])
    assert len(batches[num_alone].seqs) > 1


@pytest.mark.parametrize(
    "change",
    [another_token_id_in_logprob, another_token, the_last_bit_of_an_alternative, the_sign_of_zero, a_chunk_border],
)
def test_any_bit_that_depends_on_company_is_found(lines: list[str], change: Change) -> None:
    report = verify(Loader(lambda: SociableBackend(change)), CONFIG, Task(None, MAX_TOKENS), lines.append)

    first = next(each.difference for each in report.runs if each.difference)
    assert not report.is_equal
    assert f"{first.run}: prompt {first.prompt}, {first.completion}, token {first.token}" in lines[-1]
    assert "alone  " in lines[-1]
    assert "DIFFERENT" in "".join(lines)


def test_a_difference_is_told_with_both_sides() -> None:
    report = verify(
        Loader(lambda: SociableBackend(another_token_id_in_logprob)),
        CONFIG,
        Task(["abc"], MAX_TOKENS),
        lambda line: None,
    )

    difference = report.runs[0].difference
    assert difference is not None
    assert difference.expected is not None
    assert difference.found is not None
    assert difference.found.token_id == 98 != difference.expected.token_id


def test_a_backend_that_promises_nothing_is_said_to_first(lines: list[str]) -> None:
    def make() -> FakeBackend:
        backend = SociableBackend()
        backend.info = msgspec.structs.replace(backend.info, is_batch_invariant=False, fingerprint="")
        return backend

    report = verify(Loader(make), CONFIG, Task(None, MAX_TOKENS), lines.append)

    assert "does not promise" in lines[0].splitlines()[1]
    assert "fp_" not in lines[0]
    assert not report.is_batch_invariant
    assert report.is_equal


def test_a_machine_of_one_thread_is_compared_with_two() -> None:
    loader = Loader()
    config = Config(engine=EngineConfig(threads=1))

    report = verify(loader, config, Task(["abc"], MAX_TOKENS), lambda line: None)

    assert report.runs[-1].name == "threads = 2"
    assert loader.configs[-1].engine.threads == 2


def test_our_own_prompts_are_cut_to_a_short_context() -> None:
    def make() -> FakeBackend:
        return FakeBackend(max_model_len=64, num_blocks=64)

    report = verify(Loader(make), CONFIG, Task(None, MAX_TOKENS), lambda line: None)

    assert report.is_equal
    assert report.num_prompts == len(PROMPTS)


def test_a_prompt_that_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="prompt 2: This model's maximum context length"):
        verify(Loader(), CONFIG, Task(["fits", "x" * 2000], MAX_TOKENS), lambda line: None)


def test_a_backend_is_closed_whatever_happens() -> None:
    loader = Loader(lambda: FakeBackend(max_model_len=512, num_blocks=200, fault=lambda seq: "not finite"))

    with pytest.raises(Exception, match="not finite"):
        verify(loader, CONFIG, Task(["abc"], MAX_TOKENS), lambda line: None)

    assert [backend.is_closed for backend in loader.backends] == [True]


def test_the_command_reads_prompts_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\nsecond\n")

    status = print_report(CONFIG, Task(read_prompts(path), 5), as_json=True, load=Loader())

    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert (report["is_equal"], report["num_prompts"], report["fingerprint"]) == (True, 2, "fake")


def test_the_command_fails_where_there_is_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    loader = Loader(lambda: SociableBackend(another_token_id_in_logprob))

    status = print_report(CONFIG, Task(None, 5), as_json=False, load=loader)

    assert status == 1
    assert "different: 6 of 6 runs" in capsys.readouterr().out


def test_saved_answers_are_compared_with_those_of_today(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "saved"
    verify(Loader(), CONFIG, Task(["one", "another"], MAX_TOKENS, save=path), lambda line: None)
    task = Task(before=read_saved(path), max_tokens=MAX_TOKENS)

    same = verify(Loader(), CONFIG, task, lines.append)
    other = verify(Loader(lambda: SociableBackend(another_logprob)), CONFIG, task, lines.append)

    assert same.is_equal
    assert same.runs[0].name == SAVED_RUN
    assert same.num_prompts == 2
    assert [each.name for each in other.runs if each.difference] == [SAVED_RUN]
    assert "    saved     " in lines[-1]
    assert "    now       " in lines[-1]


def test_other_tokens_for_a_saved_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    verify(Loader(), CONFIG, Task(["one", "another"], MAX_TOKENS, save=path), lambda line: None)
    before = read_saved(path)
    before = msgspec.structs.replace(before, texts=("one", "And another"))

    with pytest.raises(ConfigError, match="prompt 2 is encoded to other tokens than when it was saved: 'And another'"):
        verify(Loader(), CONFIG, Task(before=before, max_tokens=MAX_TOKENS), lambda line: None)


def test_missing_saved_answers_are_no_equal_ones(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    verify(Loader(), CONFIG, Task(["one", "another"], MAX_TOKENS, save=path), lambda line: None)
    before = read_saved(path)
    before = msgspec.structs.replace(before, answers=before.answers[:-1])

    with pytest.raises(ConfigError, match="5 saved answers are not the 6 of 2 prompts: the file is damaged"):
        verify(Loader(), CONFIG, Task(before=before, max_tokens=MAX_TOKENS), lambda line: None)


@pytest.mark.parametrize("content", [b"", b"no", b"\xc1", msgspec.msgpack.encode({"heading": 1})])
def test_a_file_that_was_not_saved_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "saved"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="did not write this file"):
        read_saved(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(content)

    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(path)
