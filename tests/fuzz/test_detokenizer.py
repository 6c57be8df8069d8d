"""The detokenizer and its stop matcher: the streamed pieces are the same text however the bytes are cut into tokens."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from brlite.engine.detokenizer import Detokenizer
from tests.engine.test_detokenizer import Vocabulary, first_stop, whole_text
from tests.fuzz.budget import PLACES, cuts, fuzz, mutated

# Stop strings that begin, end and repeat like each other, so that many are half complete at a time.
WORDS = st.text("ab\n🙂é", min_size=1, max_size=6) | st.sampled_from(["</s>", "\n\n", "aab", "abab", "🙂🙂"])
SPECIAL = "</s>"
TEXTS = mutated(st.lists(WORDS | st.text(max_size=3), max_size=12).map("".join).map(lambda text: text.encode()))
CASES = st.tuples(TEXTS, PLACES, st.lists(WORDS, max_size=5), st.booleans())


def stream(tokens: list[bytes], stop: list[str], *, include_stop: bool) -> tuple[str, str | None]:
    """The pieces joined, and the stop string. After it no piece may come."""
    detokenizer = Detokenizer(Vocabulary(tokens), tuple(stop), include_stop=include_stop)  # type: ignore[arg-type]
    pieces: list[str] = []
    for token_id in range(len(tokens)):
        has_stopped = detokenizer.stop_reason is not None
        pieces.append(detokenizer.push(token_id))
        assert not (has_stopped and pieces[-1])
    return "".join(pieces) + detokenizer.finish(), detokenizer.stop_reason


@fuzz(CASES)
def test_the_pieces_join_to_the_whole_text_up_to_its_first_stop_string(
    case: tuple[bytes, list[int], list[str], bool],
) -> None:
    data, places, stop, include_stop = case
    text = whole_text(data)
    word = first_stop(text, stop, ends_after=0)
    end = len(text) if word is None else text.index(word) + (len(word) if include_stop else 0)

    for tokens in ([data], cuts(data, places), [data[at : at + 1] for at in range(len(data))]):
        assert stream(tokens, stop, include_stop=include_stop) == (text[:end], word)


@fuzz(st.tuples(st.lists(st.tuples(TEXTS, PLACES), min_size=1, max_size=4), st.lists(WORDS, max_size=4), st.booleans()))
def test_special_tokens_between_the_pieces_of_a_text_show_or_end_it_but_never_split_it(
    case: tuple[list[tuple[bytes, list[int]]], list[str], bool],
) -> None:
    parts, stop, skips = case
    pieces = list(itertools.chain.from_iterable(cuts(data, places) for data, places in parts))
    tokens = [SPECIAL.encode(), *pieces]  # the special token has the id 0
    ids = [0] if not pieces else [*range(1, len(tokens) // 2 + 1), 0, *range(len(tokens) // 2 + 1, len(tokens)), 0]
    vocabulary = Vocabulary(tokens, frozenset({0}))
    detokenizer = Detokenizer(vocabulary, tuple(stop), skip_special_tokens=skips)  # type: ignore[arg-type]
    ends_at_special = skips and SPECIAL in stop
    shown = [
        tokens[token_id] for token_id in (ids[: ids.index(0)] if ends_at_special else ids) if token_id or not skips
    ]
    plain = Detokenizer(Vocabulary(shown), tuple(stop))  # type: ignore[arg-type]

    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    expected = "".join(map(plain.push, range(len(shown)))) + plain.finish()

    word = plain.stop_reason or (SPECIAL if ends_at_special else None)
    assert (text, detokenizer.stop_reason) == (expected, word)
