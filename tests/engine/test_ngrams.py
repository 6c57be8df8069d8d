"""Drafts from a sequence's own words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.engine.ngrams import INITIAL_ACCEPTANCE, MAX_NEW_TOKENS, NgramDrafter


def draft(text: str, num_tokens: int = 4) -> str | None:
    token_ids = list(text.encode())
    drafter = NgramDrafter(num_prompt_tokens=len(token_ids))
    return bytes(drafter.draft(token_ids, num_tokens)).decode() if drafter.follow(token_ids) else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three, one t", "wo t"),
        ("abcd..bcX..abc", "d..b"),  # three tokens that agree say more than two
        ("abX abY ab", "Y ab"),  # of equal places the latest
        ("abcdef", None),
        ("ab", None),
        ("", None),
    ],
)
def test_what_followed_the_last_words_before_is_drafted(text: str, expected: str | None) -> None:
    assert draft(text) == expected


def test_a_draft_that_reaches_the_end_goes_round() -> None:
    assert draft("xyxyx", 7) == "yxyxyxy"


def test_a_copy_stays_with_its_source_where_the_words_are_ambiguous() -> None:
    source = "the red cat sat by the red dog and the red fox;"

    token_ids = list((source + "the red cat sat by the red ").encode())
    drafter = NgramDrafter(num_prompt_tokens=len(source))

    assert drafter.follow(token_ids)
    assert bytes(drafter.draft(token_ids, 3)) == b"dog"


@given(chunks=st.lists(st.text("ab", max_size=5), max_size=12))
def test_tokens_taken_in_one_by_one_or_together_give_the_same_drafts(chunks: list[str]) -> None:
    whole = list("".join(chunks).encode())
    together, apart, token_ids = NgramDrafter(3), NgramDrafter(3), list[int]()

    for chunk in chunks:
        token_ids += chunk.encode()
        apart.follow(token_ids)

    assert together.follow(whole) == apart.follow(whole)
    assert together.acceptance == apart.acceptance
    if together.follow(whole):
        assert together.draft(whole, 5) == apart.draft(whole, 5)


def test_a_long_prompt_is_taken_in_a_part_at_a_time() -> None:
    token_ids = [1, 2, 3, 4] * MAX_NEW_TOKENS
    drafter = NgramDrafter(num_prompt_tokens=len(token_ids))

    answers = [drafter.follow(token_ids) for _ in range(4)]

    assert answers == [False, False, False, True]


def test_acceptance_is_learnt_from_what_was_drawn_without_a_draft() -> None:
    prompt = list(range(30))
    copying, drafter = NgramDrafter(len(prompt)), NgramDrafter(len(prompt))

    copying.follow(prompt + prompt)
    drafter.follow([*prompt, 0, 1, 99, 0, 1, 98, 0, 1, 97])

    assert copying.acceptance > 0.95
    assert drafter.acceptance < INITIAL_ACCEPTANCE


def test_a_prompt_that_repeats_itself_promises_nothing_of_the_answer() -> None:
    prompt = [1, 2] * 50
    drafter = NgramDrafter(len(prompt))

    drafter.follow([*prompt, 7])

    assert drafter.acceptance < INITIAL_ACCEPTANCE
