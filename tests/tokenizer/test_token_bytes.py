"""The bytes behind each token: joined, they are the text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from brlite.errors import ModelError
from brlite.tokenizer import Tokenizer, load_tokenizer
from brlite.tokenizer.token_bytes import read_token_bytes


@pytest.fixture(scope="module")
def byte_level(qwen2_folder: Path) -> Iterator[Tokenizer]:
    with closing(load_tokenizer(qwen2_folder)) as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module")
def pieces(sentencepiece_folder: Path) -> Iterator[Tokenizer]:
    with closing(load_tokenizer(sentencepiece_folder)) as tokenizer:
        yield tokenizer


@pytest.fixture(scope="module", params=["byte_level", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def table(decoder: decoders.Decoder | None, *tokens: str) -> tuple[bytes, ...]:
    backend = Backend(models.BPE(vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    return read_token_bytes(backend, source="here").table


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    found = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}

    # A text in UTF-8 never needs 0xC0, 0xC1 and 0xF5 to 0xFF, but the vocabularies have them.
    assert found >= {bytes([byte]) for byte in range(256)}


@settings(deadline=None)
@given(text=st.text().filter(lambda text: "▁" not in text))
def test_joined_bytes_are_the_text_and_the_space_before_it(pieces: Tokenizer, text: str) -> None:
    ids = pieces.encode(f"x{text}", add_special_tokens=False)

    assert b"".join(map(pieces.token_bytes, ids)) == f" x{text}".encode()


@settings(deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cs"])))
def test_joined_bytes_of_a_byte_level_vocabulary_are_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)

    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()
    assert byte_level.decode(ids) == text


def test_added_tokens_are_their_literal_text(qwen2_folder: Path, tmp_path: Path) -> None:
    backend = Backend.from_file(str(qwen2_folder / "tokenizer.json"))
    backend.add_special_tokens(["<é Ġ>"])

    table = read_token_bytes(backend, source="here").table

    assert table[backend.token_to_id("<é Ġ>")] == "<é Ġ>".encode()


def test_ids_without_a_token_have_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([-1, 10**9]) == ""
    assert tokenizer.whole_text(-1) == tokenizer.whole_text(10**9) == ""


def test_a_gap_in_the_ids_has_no_bytes() -> None:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 3}, merges=[]))
    backend.decoder = decoders.ByteLevel()

    assert read_token_bytes(backend, source="here").table == (b"a", b"", b"", b"b")


def test_a_token_for_reading_shows_a_broken_character(byte_level: Tokenizer) -> None:
    [first, *_] = byte_level.encode("🙂")

    assert byte_level.token_text(first) == "\ufffd"
    assert byte_level.whole_text(first) is None
    assert "".join(map(str, map(byte_level.whole_text, byte_level.encode(" a")))) == " a"


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (decoders.ByteLevel(), [b" a", "▁a".encode(), b"<0x41>", "日".encode(), b"a b"]),
        (decoders.Metaspace(), ["Ġa".encode(), b" a", b"<0x41>", "日".encode(), b"a b"]),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
            ["Ġa".encode(), b" a", b"A", "日".encode(), b"a b"],
        ),
    ],
)
def test_the_decoder_decides_what_a_token_stands_for(decoder: decoders.Decoder, expected: list[bytes]) -> None:
    assert list(table(decoder, "Ġa", "▁a", "<0x41>", "日", "a b")) == expected


@pytest.mark.parametrize(
    "decoder",
    [None, decoders.CTC(), decoders.Sequence([decoders.ByteFallback()]), decoders.Sequence([decoders.BPEDecoder()])],
)
def test_a_decoder_that_is_not_bytes_a_token_is_refused(decoder: decoders.Decoder | None) -> None:
    with pytest.raises(ModelError, match=r"here: its decoder \(.*\) is not supported; allowed are ByteLevel"):
        table(decoder, "a")


@settings(deadline=None)
@given(
    text=st.text(max_size=200) | st.text("▁ aoe\u0301\u0328", max_size=400) | st.just("\u03b1\u0313\u0300\u0345" * 50)
)
def test_no_text_has_fewer_tokens_than_its_length_says(byte_level: Tokenizer, pieces: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, pieces):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_a_text_far_too_long_is_known_by_its_length(byte_level: Tokenizer) -> None:
    assert byte_level.fewest_tokens("x" * 1_000_000) > 1000


def test_a_token_that_swallows_white_space_says_nothing_about_length(qwen2_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen2_folder, tmp_path / "model")
    backend = Backend.from_file(str(qwen2_folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))

    tokenizer = load_tokenizer(tmp_path / "model")

    assert len(tokenizer.encode(" " * 10_000 + "<mask>")) == 1
    assert tokenizer.fewest_tokens(" " * 10_000 + "<mask>") == 0
