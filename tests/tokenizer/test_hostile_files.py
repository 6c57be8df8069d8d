"""Tokenizers that exhaust memory or time, abort or panic: each is read in a process of its own, under bounds."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer.conftest import WriteGguf
from tests.tokenizer.sentencepiece_models import (
    BASE,
    BYTE,
    CONTROL,
    UNKNOWN,
    bytes_field,
    model,
    number_field,
    piece,
    varint,
    write_model,
)
from tests.tokenizer.sentencepiece_models import charsmap as charsmap_table
from tests.warm import WarmPython

Read = Callable[..., tuple[list[str], str]]

MEMORY_BYTES = 3 * 1024**3  # of address space, most of it reserved by libraries and never used
CPU_SECONDS = 60
TEXT_SECONDS = 0.3  # of CPU time, for texts that take any
IMPORTS = """
import resource, sys, tokenizers, sentencepiece
from pathlib import Path
from brlite.errors import BrliteError
from brlite.tokenizer import ChildLimits, load_tokenizer
"""
# Loads the tokenizer and encodes a text, then another. Prints what came of each in a line.
READ = """
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]),) * 2)
try:
    tokenizer = load_tokenizer(Path(sys.argv[1]), template_limits=ChildLimits(seconds=float(sys.argv[4])))
except BrliteError as error:
    sys.exit(f"{type(error).__name__} {error}")
for text in (sys.stdin.read(), "fine"):
    try:
        print("ids", len(tokenizer.encode(text)))
    except BrliteError as error:
        print(type(error).__name__, error)
tokenizer.close()
"""


def charsmap(*parts: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"".join(parts)).decode()}


def replace(old: dict[str, str], new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": old, "content": new}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def template_processing(token_id: int) -> dict[str, Any]:
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"x": {"id": "x", "ids": [token_id], "tokens": ["x"]}}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
EVERY = {"Regex": "."}
# What is put into a good tokenizer.json, and the reason that its refusal gives.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a trie of 4 GB in four bytes": ({"normalizer": charsmap(struct.pack("<I", 2**32 - 4))}, "names a trie"),
    "a trie of 8.6 GB in four bytes": ({"normalizer": charsmap(struct.pack("<I", 2**32 - 1))}, "names a trie"),
    "no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "é"}}, "must be base64"),
    "a trie that leads beyond its end": ({"normalizer": charsmap(struct.pack("<I", 8), b"\xff\x01\x02\x03" * 2)}, ""),
    "a character that becomes a megabyte": (
        {"normalizer": charsmap(struct.pack("<I", 4), b"\0" * 4, b"x" * 2**20, b"\0")},
        "replaces a character with more than",
    ),
    "ten replacements": ({"normalizer": sequence(*[replace({"String": "a"}, "a" * 10)] * 10)}, "times as long"),
    "replacements in sequences": (
        {"normalizer": sequence(*[sequence(replace({"String": "a"}, "aa"))] * 10)},
        "times as long",
    ),
    "one for every character": ({"normalizer": replace(EVERY, "a" * 1000)}, "times as long"),
    "one for nothing": ({"normalizer": replace({"String": ""}, "a")}, "replaces an empty text"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "a" * 2**20}}, "characters before it"),
    "many prefixes": ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "aa"}] * 40)}, "characters before it"),
    "bytes of bytes": ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 20)}, "times as long"),
    "bytes of bytes, cut": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 20}}, "times as"),
    "many steps": ({"normalizer": sequence(*[{"type": "NFC"}] * 100)}, "steps of normalising"),
    "a decoder that grows": (
        {"decoder": {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 10)] * 10}},
        "times as long",
    ),
    "a key that stands twice": ({"normalizer": "TWICE"}, "is given twice in one object"),
    "an id beyond its end": ({"post_processor": template_processing(2**32 - 1)}, "token ids must be from 0 to"),
    "a number for a step": ({"normalizer": 5}, ""),
    "a broken expression": ({"pre_tokenizer": split("(")}, ""),
}
# Expressions that are no crime by themselves: only the text that they run away with is refused.
RUNAWAY = {
    "exponential": (r"(a+)+$", "a" * 40 + "b", "retry-limit-in-match"),
    "exponential by choice": (r"(?:a|aa)+$", "a" * 60 + "b", "retry-limit-in-match"),
    "polynomial": (r"\s*\s*(?!z)\S", " " * 3000 + "z", "CPU time"),
    "polynomial by optional parts": ("a{0,9}" * 6 + "[bc][de]", ("a" * 50 + "b") * 400, "CPU time"),
    "quadratic": (r"\s+(?!z)\S", " " * 200_000 + "z", "CPU time"),
}


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """What came of a text, and of the next; and why the tokenizer was not read."""
    python = WarmPython(IMPORTS)

    def read(path: Path, text: str = "hello", seconds: float = 1.0) -> tuple[list[str], str]:
        result = python.run(READ, path, MEMORY_BYTES, CPU_SECONDS, seconds, text=text)
        assert result.returncode in (0, 1), result.stderr[-2000:]
        return result.stdout.splitlines(), result.stderr.strip().splitlines()[-1] if result.returncode else ""

    yield read
    python.close()


@pytest.fixture
def folder(qwen2_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((qwen2_folder / "tokenizer.json").read_bytes())
    return tmp_path


def edit(folder: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads((folder / "tokenizer.json").read_bytes())
    text = json.dumps({**content, **changes}).replace('"TWICE"', '{"type": "NFC", "type": "NFD"}')
    (folder / "tokenizer.json").write_text(text)


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_would_exhaust_us_is_refused_in_one_line(read: Read, folder: Path, case: str) -> None:
    changes, reason = REFUSED[case]
    edit(folder, changes)

    _, refusal = read(folder)

    assert refusal.startswith(f"ModelError {folder / 'tokenizer.json'}: ")
    assert reason in refusal
    assert len(refusal) < 700


@pytest.mark.parametrize("token_id", [2**32 - 1, 2**31, 10**400, -1, 1.5])
@pytest.mark.parametrize("where", ["vocabulary", "added tokens"])
def test_a_token_id_beyond_the_files_size_is_refused(read: Read, folder: Path, where: str, token_id: float) -> None:
    content = json.loads((folder / "tokenizer.json").read_bytes())
    if where == "vocabulary":
        content["model"]["vocab"]["zzz"] = token_id
    else:
        content["added_tokens"][0]["id"] = token_id
    edit(folder, content)

    _, refusal = read(folder)

    assert refusal.startswith("ModelError")
    assert len(refusal) < 700


@pytest.mark.parametrize("case", RUNAWAY)
def test_an_expression_that_runs_away_costs_the_text_and_nothing_else(read: Read, folder: Path, case: str) -> None:
    expression, text, reason = RUNAWAY[case]
    edit(folder, {"pre_tokenizer": split(expression)})

    (outcome, next_outcome), refusal = read(folder, text, TEXT_SECONDS if reason == "CPU time" else 1.0)

    assert refusal == ""
    assert outcome.startswith("InvalidRequest the model's tokenizer failed on the text")
    assert reason in outcome
    assert next_outcome.startswith("ids")


PIECES = [["<unk>", 0.0], *(["a" * length, -float(length)] for length in range(1, 3000))]
SLOW_MODELS: dict[str, dict[str, Any]] = {
    "words of any length": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 10**9,
        "vocab": {"[UNK]": 0, "a": 1, "##a": 2},
    },
    "pieces of any length": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": PIECES},
}


@pytest.mark.parametrize("case", SLOW_MODELS)
def test_a_model_of_quadratic_time_costs_the_text_and_nothing_else(read: Read, tmp_path: Path, case: str) -> None:
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    content = {"version": "1.0", "added_tokens": [], **parts, "decoder": BYTE_LEVEL, "model": SLOW_MODELS[case]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))

    (outcome, next_outcome), refusal = read(tmp_path, "a" * 100_000)

    assert refusal == ""
    assert outcome.startswith("InvalidRequest the model's tokenizer failed on the text")
    assert next_outcome.startswith("ids")


def test_an_expression_that_nobody_knows_gives_the_ids_of_the_library(folder: Path) -> None:
    from tokenizers import Tokenizer as Backend

    from brlite.tokenizer import load_tokenizer

    edit(folder, {"pre_tokenizer": split(r"(?:\w|\s\w)+")})
    expected = Backend.from_file(str(folder / "tokenizer.json"))

    tokenizer = load_tokenizer(folder)

    assert tokenizer.encode("The quick  brown fox<|im_end|>") == expected.encode("The quick  brown fox<|im_end|>").ids
    tokenizer.close()


def test_padding_and_truncation_left_in_the_file_cost_nothing(read: Read, folder: Path) -> None:
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    edit(folder, {"padding": padding})

    outcomes, _ = read(folder)

    assert [outcome.split()[0] for outcome in outcomes] == ["ids", "ids"]
    assert int(outcomes[0].split()[1]) < 10


@pytest.mark.parametrize("name", ["added_tokens", "tokenizer_config"])
def test_added_tokens_with_huge_ids_are_refused(read: Read, folder: Path, name: str) -> None:
    content: dict[str, Any] = (
        {"<x>": 2**40} if name == "added_tokens" else {"added_tokens_decoder": {str(2**40): {"content": "<x>"}}}
    )
    (folder / f"{name}.json").write_text(json.dumps(content))

    _, refusal = read(folder)

    assert "cannot get the id" in refusal


def test_a_gguf_piece_of_a_megabyte_is_refused(
    read: Read, write_gguf: WriteGguf, pieces_keys: Mapping[str, Any]
) -> None:
    one_more = {"tokens": "a" * 2**20, "scores": 0.0, "token_type": 1}
    keys = {key: [*value, one_more[key]] if key in one_more else value for key, value in pieces_keys.items()}

    _, refusal = read(write_gguf(**keys))

    assert "a piece of the vocabulary has 1048576 characters" in refusal


def broken_trie() -> bytes:
    table = bytearray(charsmap_table({b"a": b"b"}))
    table[4:8] = struct.pack("<I", 2**31 - 1)
    return bytes(table)


# What stands in a tokenizer.model, and the reason that its refusal gives; none where the library's own differs.
REFUSED_MODELS: dict[str, tuple[bytes, str]] = {
    "a piece longer than the file": (model() + varint(1 << 3 | 2) + varint(2**40), "goes beyond the"),
    "a field longer than its piece": (model([bytes_field(1, b"\x0a\x7fa")]), "goes beyond the 3 bytes"),
    "a length of 2**64 - 1": (model() + varint(1 << 3 | 2) + varint(2**64 - 1), "goes beyond the"),
    "a number without an end": (model() + number_field(9, 1)[:-1] + b"\xff" * 20, "does not end"),
    "a number that is cut": (model() + b"\x80", "does not end"),
    "groups in groups": (model() + b"\x0b" * 100_000, "wire type 3"),
    "field 0": (model() + b"\0\0", "field 0"),
    "a number for a piece": (model() + number_field(1, 5), "has a number where"),
    "a number for a text": (model([bytes_field(1, number_field(1, 5))]), "has a number where"),
    "a number for a score": (model([bytes_field(1, bytes_field(1, b"b") + number_field(2, 5))]), "score"),
    "a score of 8 bytes": (model([bytes_field(1, bytes_field(1, b"b") + varint(2 << 3 | 1) + b"\0" * 8)]), "score"),
    "a score that is no number": (model([piece("b", score=float("nan"))]), "finite"),
    "an endless score": (model([piece("b", score=float("inf"))]), "finite"),
    "a kind that is none": (model([piece("b", 7)]), "kind must be from 1 to 6"),
    "a kind of 2**63": (model([piece("b", 2**63)]), "kind must be from 1 to 6"),
    "empty pieces": (model([bytes_field(1, b"")] * 1_000_000), "1 to 1024 characters"),
    "a piece of a megabyte": (model([piece("b" * 2**20)]), "1 to 1024 characters"),
    "a zero byte": (model([piece("a\0b")]), "no zero byte"),
    "no UTF-8": (model([piece(b"\xff\x1b[2J")]), "must be UTF-8"),
    "no pieces": (model(base=[]), "has no pieces"),
    "no unknown piece": (model(base=BASE[1:]), ""),
    "two unknown pieces": (model([piece("<unk2>", UNKNOWN)]), ""),
    "a piece twice": (model([piece("a")]), ""),
    "a byte piece that is none": (model([piece("<0xZZ>", BYTE)]), ""),
    "no end token": (model(base=[each for each in BASE if each != piece("</s>", CONTROL, 0.0)]), "no end token"),
    "a trie of 4 GB in four bytes": (model(charsmap=struct.pack("<I", 2**32 - 4)), "names a trie"),
    "a table of one byte": (model(charsmap=b"\1"), "at least 4 bytes"),
    "a trie that leads beyond its end": (model(charsmap=broken_trie()), "leads beyond its end"),
    "a replacement without an end": (model(charsmap=charsmap_table({b"a": b"b"})[:-1]), "end with a zero byte"),
    "a leaf beyond the replacements": (
        model(charsmap=charsmap_table({b"a": b"x" * 200, b"b": b"y"})[:-202] + b"\0"),
        "leads beyond its end",
    ),
    "a character that becomes a megabyte": (
        model(charsmap=charsmap_table({b"a": b"x" * 2**20})),
        "replaces a character with more than",
    ),
    "a broken table to undo it": (
        model() + bytes_field(5, bytes_field(2, struct.pack("<I", 2**32 - 4))),
        "names a trie",
    ),
    "words of a web page": (b"<p>not found</p>", ""),
}


@pytest.mark.parametrize(
    ("case", "model_type"),
    [*((case, "chatglm") for case in REFUSED_MODELS), ("empty pieces", "llama"), ("two unknown pieces", "llama")],
)
def test_a_sentencepiece_model_that_would_exhaust_us_is_refused_in_one_line(
    read: Read, tmp_path: Path, case: str, model_type: str
) -> None:
    data, reason = REFUSED_MODELS[case]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_model(tmp_path, data)

    _, refusal = read(tmp_path)

    assert refusal.startswith(f"ModelError {tmp_path / 'tokenizer.model'}: ")
    assert reason in refusal
    assert refusal.isprintable()
    assert len(refusal) < 700


def test_a_sentencepiece_model_beyond_any_size_is_not_read(read: Read, tmp_path: Path) -> None:
    write_model(tmp_path, model())
    with (tmp_path / "tokenizer.model").open("r+b") as file:
        file.truncate(2**40)

    _, refusal = read(tmp_path)

    assert "has more than 67108864 bytes" in refusal


# Models that are right, and a text that each takes too much time or memory for.
RUNAWAY_MODELS = {
    "256 bytes for one": (model(charsmap=charsmap_table({b"a": b"x" * 256})), "a" * 2**21),
    "a thousand pieces everywhere": (
        model([piece("a" * length) for length in range(2, 1025)]),
        "a" * 2**22,
    ),
}


@pytest.mark.parametrize("case", RUNAWAY_MODELS)
def test_a_text_that_exhausts_sentencepiece_is_refused_and_the_next_one_is_not(
    read: Read, tmp_path: Path, case: str
) -> None:
    data, text = RUNAWAY_MODELS[case]
    (tmp_path / "config.json").write_text('{"model_type": "chatglm"}')
    write_model(tmp_path, data)

    (outcome, next_outcome), refusal = read(tmp_path, text, TEXT_SECONDS)

    assert refusal == ""
    assert outcome.startswith("InvalidRequest the model's tokenizer failed on the text")
    assert next_outcome.startswith("ids")
