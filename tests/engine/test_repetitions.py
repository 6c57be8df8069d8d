"""DRY against its definition, computed from the whole text each time."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from brlite.engine.repetitions import MAX_PLACES, MAX_PROMPT_LENGTH, Repetitions
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import MakeDriver
from tests.fakes import ByteTokenizer


def costs_by_definition(text: Sequence[int], params: SamplingParams) -> dict[int, float]:
    """For each token, the longest ending of the text that it followed before, without a breaker."""
    breakers = {ord(each) for each in params.dry_sequence_breakers}
    window = text if params.dry_penalty_last_n < 0 else text[max(0, len(text) - params.dry_penalty_last_n) :]
    longest: dict[int, int] = {}
    for end in range(len(window) - 1):
        length = 0
        while length <= end and window[end - length] == window[-1 - length] and window[end - length] not in breakers:
            length += 1
        longest[window[end + 1]] = max(length, longest.get(window[end + 1], 0))
    return {
        token_id: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token_id, length in longest.items()
        if length >= params.dry_allowed_length and token_id not in breakers
    }


def costs(repetitions: Repetitions) -> dict[int, float]:
    token_ids, amounts = repetitions.costs()
    return dict(zip(array("i", token_ids), array("f", amounts), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dry_allowed_length": 1, "dry_base": 1.0},
        {"dry_allowed_length": 4, "dry_base": 3.0},
        {"dry_penalty_last_n": 7},
        {"dry_penalty_last_n": 0},
        {"dry_sequence_breakers": []},
        {"dry_sequence_breakers": ["a", "b"]},
    ],
)
def test_costs_are_those_of_the_definition_at_every_token(given: dict[str, Any]) -> None:
    params = SamplingParams(dry_multiplier=0.8, **given)
    rng = random.Random(3)
    for alphabet in (b"a", b"ab", b"abc:", b"abcdefgh\n"):
        text = [rng.choice(alphabet) for _ in range(40)]
        for num_prompt in (1, 17, 30):
            repetitions = Repetitions(params, text[:num_prompt], ByteTokenizer())
            for length in range(num_prompt, len(text) + 1):
                assert costs(repetitions) == pytest.approx(costs_by_definition(text[:length], params))
                if length < len(text):
                    repetitions.add(text[length])


def test_a_long_repetition_costs_a_finite_number() -> None:
    repetitions = Repetitions(SamplingParams(dry_multiplier=1e308, dry_base=1e308), [1] * 50_000, ByteTokenizer())

    assert costs(repetitions) == {1: pytest.approx(1e30)}


@pytest.mark.parametrize("text", [b"a", b"ab", b"a" * 900 + b"b"])
def test_what_a_token_costs_the_event_loop_does_not_grow_with_its_number_in_the_text(text: bytes) -> None:
    params = SamplingParams(dry_multiplier=1.0, dry_base=1.001)
    repetitions = Repetitions(params, list(text * 30_000)[:30_000], ByteTokenizer())

    for token_id in text[:2] * 20:
        repetitions.add(token_id)
        repetitions.costs()

    assert len(repetitions._lengths) <= 2 * MAX_PLACES  # what `add` and `costs` go through


@pytest.mark.parametrize("num_tokens", [2 * MAX_PLACES + 3, MAX_PLACES + 1, 40])
def test_a_prompt_of_one_token_is_a_repetition_up_to_a_bound(num_tokens: int) -> None:
    params = SamplingParams(dry_multiplier=1.0, dry_base=1.001)

    repetitions = Repetitions(params, [1] * num_tokens, ByteTokenizer())

    assert costs(repetitions) == {1: pytest.approx(1.001 ** (min(num_tokens - 1, MAX_PROMPT_LENGTH) - 2), rel=1e-5)}


def test_each_completion_of_a_prompt_has_a_text_of_its_own(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=lambda context, seed: b"abc"[(len(context) + seed) % 3])
    params = SamplingParams(dry_multiplier=0.8)

    request_id = driver.submit("abcabcab", n=3, max_tokens=9, dry_multiplier=0.8, seed=1, temperature=1)
    driver.finish()

    answers = [driver.token_ids(request_id, index) for index in range(3)]
    expected = [
        costs_by_definition([*b"abcabcab", *answer[:num]], params) for answer in answers for num in range(len(answer))
    ]
    given = [
        dict(zip(array("i", each.cost_token_ids), array("f", each.costs), strict=True))
        for batch in driver.backend.batches
        for each in (seq.sampling for seq in batch.seqs)
        if each is not None
    ]
    assert len({bytes(answer) for answer in answers}) > 1
    assert len(given) == len(expected) == 27
    assert all(pytest.approx(each) in expected for each in given)


@pytest.mark.parametrize("pressure", [{}, {"can_run_ahead": True}, {"max_draft_tokens": 4}, {"num_blocks": 6}])
def test_each_draw_is_given_the_costs_of_the_text_before_it(make_driver: MakeDriver, pressure: dict[str, Any]) -> None:
    driver = make_driver(next_token=lambda context, seed: b"abc"[len(context) % 3], **pressure)

    request_id = driver.submit("abcabcab", max_tokens=12, dry_multiplier=0.8)
    other = driver.submit("abcabcab", max_tokens=12)
    driver.finish()

    params = SamplingParams(dry_multiplier=0.8)
    text = [*b"abcabcab", *driver.token_ids(request_id)]
    assert driver.token_ids(other) == driver.token_ids(request_id)
    draws = [seq.sampling for batch in driver.backend.batches for seq in batch.seqs if seq.sampling is not None]
    given = [each for each in draws if each.params.dry_multiplier]
    assert {each.position for each in given} == set(range(12))
    for each in given:
        found = dict(zip(array("i", each.cost_token_ids), array("f", each.costs), strict=True))
        assert found == pytest.approx(costs_by_definition(text[: 8 + each.position], params))
    assert not any(each.costs for each in draws if not each.params.dry_multiplier)
