"""Beam search against its definition: by brute force, and step by step over the whole context."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from brlite.config.options import LimitsConfig
from brlite.engine.beam_search import BeamSearch, Hypothesis
from brlite.engine.detokenizer import Detokenizer
from brlite.engine.outputs import TokenLogprob
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import PATIENT, Driver, MakeDriver
from tests.fakes import ByteTokenizer, printable_token

END = 2  # of the toy vocabulary 0, 1, 2
MAX_TOKENS = 4
LETTERS = [*range(ord("a"), ord("a") + 6)]  # that end an answer of the fake model


def toy_logprobs(context: tuple[int, ...]) -> list[float]:
    """Of the three tokens, each different from all others."""
    weights = [1 + (7 * (hash((context, token)) % 1000) + token) / 1000 for token in range(3)]
    return [math.log(weight / sum(weights)) for weight in weights]


def search_toy(params: SamplingParams) -> list[Hypothesis]:
    search = BeamSearch(params, MAX_TOKENS, [END])
    beams = {0: Hypothesis(Detokenizer(ByteTokenizer(), ends={END: None}, max_tokens=MAX_TOKENS))}
    ids = itertools.count(1)
    while beams:
        search.go_on(beams)
        for seq_id, beam in beams.items():
            logprobs = toy_logprobs(tuple(beam.token_ids))
            top = sorted(enumerate(logprobs), key=lambda each: -each[1])[: search.num_logprobs]
            search.take(seq_id, TokenLogprob(*top[0], tuple(top)))
        beams = {next(ids): each.hypothesis for each in search.advance()}
    return search.best()


def all_answers() -> Iterator[tuple[int, ...]]:
    for length in range(1, MAX_TOKENS + 1):
        for tokens in itertools.product(range(3), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == MAX_TOKENS):
                yield tokens


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0, -2.0])
def test_with_a_beam_for_every_answer_the_best_of_all_are_found(length_penalty: float, early_stopping: Any) -> None:
    def score(tokens: tuple[int, ...]) -> float:
        total = sum(toy_logprobs(tokens[:at])[token] for at, token in enumerate(tokens))
        return float(total / len(tokens) ** length_penalty)

    found = search_toy(
        SamplingParams(
            use_beam_search=True,
            temperature=0,
            n=8,
            best_of=100,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
    )

    assert [tuple(each.token_ids) for each in found] == sorted(all_answers(), key=score, reverse=True)[:8]


def fake_logprob(token_id: int) -> float:
    return -0.3 - (37 * token_id % 101) / 100


def best_by_definition(prompt: bytes, max_tokens: int, width: int, *, penalty: float, stops_early: bool) -> list[str]:
    """The answers of a search, from the whole context each time; nothing is shared and nothing is cached."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    while True:
        candidates = []
        for total, tokens in beams:
            first = printable_token([*prompt, *tokens], 0)
            for i in range(width + len(LETTERS) + 1):
                candidates.append((total + fake_logprob(first) - i, [*tokens, (first + i) % 256]))
        candidates.sort(key=lambda each: -each[0])
        is_last = len(candidates[0][1]) == max_tokens
        ends = [each for each in candidates[:width] if is_last or each[1][-1] in LETTERS]
        ended += [(total / len(tokens) ** penalty, tokens) for total, tokens in ends]
        ended = sorted(ended, key=lambda each: -each[0])[:width]
        beams = [] if is_last else [each for each in candidates if each[1][-1] not in LETTERS][:width]
        is_full = len(ended) == width
        if not beams or (is_full and (stops_early or beams[0][0] / len(beams[0][1]) ** penalty <= ended[-1][0])):
            # As a stop string would be, a token that ends an answer is left out of its text.
            return [bytes(token for token in tokens if token not in LETTERS).decode() for _, tokens in ended]


PRESSURES: dict[str, dict[str, Any]] = {
    "roomy": {"max_num_seqs": 8, "budget": 64},
    "small steps": {"budget": 3},
    "one place": {"max_num_seqs": 1},
    "two places": {"max_num_seqs": 2, "budget": 5},
    "few blocks": {"num_blocks": 9, "max_num_seqs": 8},
    "no prefix cache": {"engine": {"prefix_caching": False}, "max_num_seqs": 8},
    "steps ahead": {"can_run_ahead": True, "max_num_seqs": 8},
    "drafts": {"max_draft_tokens": 4, "max_num_seqs": 8},
}


@pytest.mark.parametrize("pressure", PRESSURES.values(), ids=PRESSURES)
def test_answers_depend_on_nothing_but_their_request(make_driver: MakeDriver, pressure: dict[str, Any]) -> None:
    driver = make_driver(logprob=fake_logprob, max_model_len=48, **pressure)
    asked = [
        {"prompt": b"a prompt of 22 letters", "width": 4, "penalty": 1.0, "stops_early": False},
        {"prompt": b"another", "width": 3, "penalty": 0.0, "stops_early": False},
        {"prompt": b"a prompt of 22 more", "width": 2, "penalty": 2.0, "stops_early": True},
    ]

    ids = [
        driver.submit(
            each["prompt"].decode(),
            max_tokens=12,
            use_beam_search=True,
            n=each["width"],
            length_penalty=each["penalty"],
            early_stopping=each["stops_early"],
            stop_token_ids=LETTERS,
        )
        for each in asked
    ]
    plain = driver.submit("beside them", max_tokens=20)
    driver.finish()

    for request_id, each in zip(ids, asked, strict=True):
        outputs = driver.outputs[request_id].outputs
        assert [output.text for output in outputs] == best_by_definition(max_tokens=12, **each)
        assert [output.index for output in outputs] == [*range(each["width"])]
        assert all(output.logprobs is None for output in outputs)
    assert len(driver.token_ids(plain)) == 20


def test_beams_share_the_blocks_of_what_they_have_in_common(make_driver: MakeDriver) -> None:
    driver = make_driver(logprob=fake_logprob, budget=64, max_num_seqs=8)

    driver.submit("a prompt of 22 letters", max_tokens=12, use_beam_search=True, n=4)
    batches = driver.finish()

    assert len(batches) == 12
    blocks = [{seq.block_table[0] for seq in batch.seqs} for batch in batches]
    assert all(len(first) == 1 for first in blocks)
    assert max(len(seq.token_ids) for batch in batches[1:] for seq in batch.seqs) <= driver.backend.info.block_size


@pytest.mark.parametrize("max_num_seqs", [1, 2, 4, 6])
def test_searches_that_wait_for_places_or_blocks_compute_their_prompts_once(
    make_driver: MakeDriver, max_num_seqs: int
) -> None:
    """The blocks are enough for one search at a time, not for two."""
    driver = make_driver(
        logprob=fake_logprob, budget=512, max_num_seqs=max_num_seqs, num_blocks=40, max_model_len=128, limits=PATIENT
    )

    for letter in "abcd":
        driver.submit(letter * 100, max_tokens=12, use_beam_search=True, best_of=4)
    batches = driver.finish()

    num_computed = sum(len(seq.token_ids) for batch in batches for seq in batch.seqs)
    assert len(driver.outputs) == 4
    assert num_computed < 4 * (100 + 4 * 12 * driver.backend.info.block_size)


@pytest.mark.parametrize("tenant", ["a", "b"])
def test_a_search_of_more_beams_than_places_leaves_others_a_place(make_driver: MakeDriver, tenant: str) -> None:
    driver = make_driver(logprob=fake_logprob, max_num_seqs=2, budget=64)
    driver.submit("hello", max_tokens=20, use_beam_search=True, best_of=8, tenant="a")
    for _ in range(6):
        driver.step()

    other = driver.submit("other", max_tokens=5, tenant=tenant)
    for _ in range(6):
        driver.step()

    assert driver.finished == [other]


def test_answers_end_at_stop_strings_and_not_before_min_tokens(make_driver: MakeDriver) -> None:
    driver = make_driver(logprob=fake_logprob, max_num_seqs=8)

    stopped = driver.submit("x", max_tokens=20, use_beam_search=True, n=3, stop=["f", "g", "h", "ij"])
    long = driver.submit("x", max_tokens=20, min_tokens=8, use_beam_search=True, n=3, stop_token_ids=LETTERS)
    driver.finish()

    outputs = driver.outputs[stopped].outputs
    assert any(output.stop_reason in ("f", "g", "h", "ij") for output in outputs)
    assert not any(stop in output.text for output in outputs for stop in ("f", "g", "h", "ij"))
    assert all(len(output.token_ids) > 8 for output in driver.outputs[long].outputs)


def test_logprobs_are_those_of_each_answers_own_tokens(make_driver: MakeDriver) -> None:
    driver = make_driver(logprob=fake_logprob, max_num_seqs=8)

    request_id = driver.submit("hello", max_tokens=6, use_beam_search=True, n=3, logprobs=2)
    driver.finish()

    for output in driver.outputs[request_id].outputs:
        assert output.logprobs is not None
        assert [entry.token_id for entry in output.logprobs] == output.token_ids
        context = list(b"hello")
        for entry in output.logprobs:
            first = printable_token(context, 0)
            assert entry.top == ((first, fake_logprob(first)), (first + 1, fake_logprob(first) - 1))
            context.append(entry.token_id)


def test_an_aborted_search_gives_its_best_so_far(make_driver: MakeDriver) -> None:
    driver = make_driver(logprob=fake_logprob, max_num_seqs=8)
    request_id = driver.submit("hello", max_tokens=20, use_beam_search=True, n=2, best_of=4)
    early = driver.submit("hello", max_tokens=20, use_beam_search=True, n=2)

    driver.engine.abort(early)
    for _ in range(5):
        driver.step()
    driver.engine.abort(request_id)
    driver.finish()

    best, other = driver.outputs[request_id].outputs
    assert [best.finish_reason, other.finish_reason] == ["abort", "abort"]
    assert len(best.token_ids) == len(other.token_ids) > 2
    assert [output.finish_reason for output in driver.outputs[early].outputs] == ["abort", "abort"]


def test_a_fault_ends_one_search_and_no_other(make_driver: MakeDriver) -> None:
    faulty: set[int] = set()
    driver = make_driver(
        logprob=fake_logprob, max_num_seqs=8, fault=lambda seq: "broken" if seq.seq_id in faulty else None
    )
    broken = driver.submit("hello", max_tokens=12, use_beam_search=True, n=3)
    whole = driver.submit("hello", max_tokens=12, use_beam_search=True, n=3)
    for _ in range(4):
        batch = driver.step()
    assert batch is not None

    faulty.add(batch.seqs[0].seq_id)
    driver.finish()

    assert str(driver.errors[broken]) == "broken"
    expected = best_by_definition(b"hello", 12, 3, penalty=1.0, stops_early=False)
    assert len(driver.outputs[whole].outputs) == len(expected) == 3


def test_a_search_has_no_more_beams_than_the_server_allows(make_driver: MakeDriver) -> None:
    driver = make_driver(limits=LimitsConfig(max_beam_width=3))

    with pytest.raises(
        InvalidRequest, match=r"best_of must be at most 3 on this server \(limits.max_beam_width\), got 4"
    ):
        driver.submit("x", use_beam_search=True, best_of=4)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_step_of_a_search_costs_the_same_behind_a_prompt_of_any_length(prefix_caching: bool) -> None:
    """Counts the lines of the block manager that run in steps with splits, which walk no chain of blocks."""

    def num_lines(num_blocks: int) -> int:
        driver = Driver(
            budget=4096, num_blocks=2000, block_size=4, max_model_len=4096, engine={"prefix_caching": prefix_caching}
        )
        driver.submit([97 + i % 5 for i in range(4 * num_blocks)], use_beam_search=True, best_of=4, max_tokens=40)
        for _ in range(3):  # the prompt, then the first split, which makes the beams
            driver.step()
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith("block_manager.py"):
                return None
            lines += event == "line"
            return trace

        sys.settrace(trace)
        try:
            for _ in range(12):
                driver.begin()
                driver.end()
        finally:
            sys.settrace(None)
        driver.finish()
        return lines

    assert num_lines(900) == num_lines(30)
