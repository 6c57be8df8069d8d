"""The incremental detokenizer, against decoding everything at once and cutting at the first stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from brlite.engine.detokenizer import Detokenizer


class Vocabulary:
    """A tokenizer whose ids are indexes into a list; those of `special` are control tokens."""

    def __init__(self, tokens: list[bytes], special: frozenset[int] = frozenset()) -> None:
        self.tokens = tokens
        self.special_token_ids = special

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def whole_text(self, token_id: int) -> str | None:
        text = self.tokens[token_id].decode(errors="ignore")
        return text if text.encode() == self.tokens[token_id] else None

    def special_token_id(self, text: str) -> int | None:
        return next((token_id for token_id in self.special_token_ids if self.tokens[token_id] == text.encode()), None)


def stream(tokens: list[bytes], *stop: str, special: frozenset[int] = frozenset(), **options: object) -> list[str]:
    """What each token releases, and at last what was held back."""
    detokenizer = Detokenizer(Vocabulary(tokens, special), stop, **options)
    return [*(detokenizer.push(token_id) for token_id in range(len(tokens))), detokenizer.finish()]


def whole_text(data: bytes) -> str:
    """All bytes decoded at once, without the beginning of a character at the end."""
    for num_bytes in (3, 2, 1):
        tail = data[-num_bytes:]
        if len(tail) == num_bytes and begins_a_character(tail):
            return data[:-num_bytes].decode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def begins_a_character(tail: bytes) -> bool:
    for rest in itertools.chain.from_iterable(itertools.product(b"\x80\x9f\xa0\xbf", repeat=n) for n in (1, 2, 3)):
        try:
            # Half a surrogate counts: Python's decoder waits for its third byte before it replaces all three.
            if len((tail + bytes(rest)).decode("utf-8", "surrogatepass")) == 1:
                return True
        except UnicodeDecodeError:
            continue
    return False


def first_stop(text: str, stop: list[str], *, ends_after: int) -> str | None:
    """The stop string that is complete first, the longest of those that are complete at the same character."""
    for end in range(ends_after + 1, len(text) + 1):
        complete = [word for word in stop if text.endswith(word, 0, end)]
        if complete:
            return max(complete, key=len)
    return None


def cut(text: str, word: str, *, ends_after: int, include_stop: bool) -> str:
    start = text.index(word, max(0, ends_after - len(word) + 1))
    return text[: start + len(word)] if include_stop else text[:start]


ALPHABET = "ab🙂é"
WORDS = st.text(ALPHABET, min_size=1, max_size=5)
VALID_BYTES = st.text(ALPHABET, max_size=30).map(str.encode)
ANY_BYTES = st.lists(
    st.sampled_from([b"a", b"b", *(bytes([b]) for b in "🙂é\ud7ff".encode()), b"\xed", b"\xc0", b"\xff"])
)
TEXTS = VALID_BYTES | ANY_BYTES.map(b"".join)


@st.composite
def token_lists(draw: st.DrawFn) -> list[bytes]:
    """A text's bytes, cut anywhere."""
    data = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


@settings(deadline=None)
@given(tokens=token_lists())
@example(tokens=[b"\xf0\x9f", b"\x99", b"\x82"])
@example(tokens=[b"\xed", b"\xa0", b"\x80"])
@example(tokens=[b"\xed\xa9"])
def test_without_stop_strings_the_text_is_that_of_all_bytes_at_once(tokens: list[bytes]) -> None:
    text = "".join(stream(tokens))

    assert text == whole_text(b"".join(tokens))


@settings(deadline=None)
@given(
    tokens=token_lists(),
    stop=st.lists(WORDS, min_size=1, max_size=4),
    include_stop=st.booleans(),
    min_tokens=st.integers(0, 6),
)
@example(tokens=[b"aabab"], stop=["abab", "ba"], include_stop=False, min_tokens=0)
@example(tokens=[b"aab", b"a", b"b"], stop=["ab", "aab"], include_stop=True, min_tokens=1)
def test_stop_strings_cut_where_the_whole_text_says(
    tokens: list[bytes], stop: list[str], include_stop: bool, min_tokens: int
) -> None:
    detokenizer = Detokenizer(Vocabulary(tokens), tuple(stop), include_stop=include_stop, min_tokens=min_tokens)
    text = whole_text(b"".join(tokens))
    ends_after = len(whole_text(b"".join(tokens[:min_tokens])))
    word = first_stop(text, stop, ends_after=ends_after)

    pieces = [detokenizer.push(token_id) for token_id in range(len(tokens))]
    streamed = "".join(pieces) + detokenizer.finish()

    assert detokenizer.stop_reason == word
    assert streamed == (text if word is None else cut(text, word, ends_after=ends_after, include_stop=include_stop))


@settings(deadline=None)
@given(tokens=token_lists(), stop=st.lists(WORDS, min_size=1, max_size=3), min_tokens=st.integers(0, 6))
@example(tokens=[b"ab"], stop=["ab", "baa"], min_tokens=1)
def test_nothing_is_held_back_that_cannot_be_the_beginning_of_a_stop_string(
    tokens: list[bytes], stop: list[str], min_tokens: int
) -> None:
    detokenizer = Detokenizer(Vocabulary(tokens), tuple(stop), min_tokens=min_tokens)
    released = ""

    for token_id in range(len(tokens)):
        released += detokenizer.push(token_id)
        held = whole_text(b"".join(tokens[: token_id + 1])).removeprefix(released)
        if detokenizer.stop_reason is not None:
            break
        assert not held or any(word.startswith(held) and word != held for word in stop)


def test_a_character_waits_for_its_last_byte() -> None:
    tokens = [bytes([byte]) for byte in "é🙂".encode()]

    assert stream(tokens) == ["", "é", "", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert stream(["你".encode(), "好".encode()[:2]]) == ["你", "", ""]


def test_bytes_that_no_character_has_are_replaced() -> None:
    assert stream([b"a\xff", b"\xe4", b"b"]) == ["a\ufffd", "", "\ufffdb", ""]


def test_a_stop_string_is_found_across_tokens_and_its_beginning_never_leaks() -> None:
    assert stream([b"one", b" ST", b"OP", b" two"], "STOP") == ["one", " ", "", "", ""]


def test_a_held_beginning_is_released_when_it_goes_on_differently() -> None:
    assert stream([b"ST", b"O", b"RY"], "STOP") == ["", "", "STORY", ""]


def test_a_held_beginning_is_released_at_the_end() -> None:
    assert stream([b"ab", b"S", b"T"], "STOP") == ["ab", "", "", "ST"]


def test_an_included_stop_string_ends_the_text() -> None:
    assert stream([b"a S", b"TOP b"], "STOP", include_stop=True) == ["a ", "STOP", ""]


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(Vocabulary([b"a.", b"b"]), (".",))

    text = detokenizer.push(0) + detokenizer.push(1) + detokenizer.finish()

    assert (text, detokenizer.stop_reason) == ("a", ".")


def test_the_stop_string_that_is_complete_first_wins() -> None:
    detokenizer = Detokenizer(Vocabulary([b"abcd"]), ("abcd", "bc"))

    text = detokenizer.push(0)

    assert (text, detokenizer.stop_reason) == ("a", "bc")


def test_of_two_complete_at_once_the_longer_wins() -> None:
    detokenizer = Detokenizer(Vocabulary([b"x\n\n"]), ("\n", "\n\n", "x\n"))

    text = detokenizer.push(0)

    assert (text, detokenizer.stop_reason) == ("", "x\n")


def test_before_min_tokens_a_stop_string_is_text() -> None:
    assert stream([b".", b".", b"a.", b"b"], ".", min_tokens=2) == [".", ".", "a", "", ""]


def test_a_stop_string_may_begin_before_min_tokens_and_end_after() -> None:
    assert stream([b"ST", b"OP", b"!"], "STOP", min_tokens=1) == ["", "", "", ""]


@pytest.mark.parametrize(("skip_special_tokens", "text"), [(True, "ab"), (False, "a<|x|>b")])
def test_special_tokens_are_left_out_or_shown(skip_special_tokens: bool, text: str) -> None:
    special = frozenset([1])

    pieces = stream([b"a", b"<|x|>", b"b"], special=special, skip_special_tokens=skip_special_tokens)

    assert "".join(pieces) == text


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize(("include_stop", "end"), [(False, ""), (True, "<|end|>")])
def test_a_special_token_that_is_a_stop_string_stops_shown_or_not(
    skip_special_tokens: bool, include_stop: bool, end: str
) -> None:
    tokens = [b"a", b"<|x|>", b"b<", b"<|end|>", b"c"]

    pieces = stream(
        tokens,
        "<|end|>",
        special=frozenset({1, 3}),
        skip_special_tokens=skip_special_tokens,
        include_stop=include_stop,
    )

    assert "".join(pieces) == ("ab<" if skip_special_tokens else "a<|x|>b<") + end


def test_before_min_tokens_a_hidden_stop_string_does_not_stop() -> None:
    detokenizer = Detokenizer(Vocabulary([b"a", b"<|end|>"], frozenset({1})), ("<|end|>",), min_tokens=2)

    assert [detokenizer.push(token_id) for token_id in (0, 1, 0, 1, 0)] == ["a", "", "a", "", ""]
    assert detokenizer.stop_reason == "<|end|>"


def test_the_space_before_a_word_is_kept() -> None:
    assert stream([b" fox", b" jumps"]) == [" fox", " jumps", ""]
