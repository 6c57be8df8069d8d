"""Checks a `tokenizer.json` before the library reads it: the library aborts the process where it should raise.

Checked are sizes against the file's, and by how much each step can lengthen a text. Builds no tokenizer.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from brlite.errors import ModelError
from brlite.files.quoting import reason
from brlite.files.text_file import unique_fields
from brlite.tokenizer.charsmap import check_charsmap

MAX_GROWTH = 64  # how many times as long the steps may make a text; published ones stay below 10
MAX_PREPENDED = 64  # characters that steps may put before each part of a text
MAX_STEPS = 64  # of normalizing and splitting; published tokenizers have fewer than 10
# Characters of a word that WordPiece tries in whole, or of Unigram's longest piece. Their time grows with its square.
MAX_TRIED = 128
BYTE_GROWTH = 4  # a character has up to 4 bytes; each becomes a character
# The factor by which a step can lengthen a text, for steps whose fields do not determine it.
_GROWTH = {"ByteLevel": BYTE_GROWTH, "BertNormalizer": 3, "BertPreTokenizer": 1, "Precompiled": 1}


class TokenizerCost(NamedTuple):
    """What decides whether a tokenizer takes time in proportion to a text: its expressions and its model."""

    expressions: list[str]
    has_linear_model: bool


def check_tokenizer_json(path: Path, text: str) -> TokenizerCost:
    """Raises `ModelError` for a file that could exhaust or crash the process."""
    try:
        content = json.loads(text, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {reason(error)}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    try:
        _check_ids(content, len(text))
        steps = [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]
        _check_steps(steps)
        decoding = list(_steps(content.get("decoder")))
        _check_steps(decoding)
        is_linear = _is_linear(content.get("model", {}))
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise ModelError(f"{path}: {reason(error)}") from None
    patterns = (step.get("pattern") for step in (*steps, *decoding))
    expressions = [pattern["Regex"] for pattern in patterns if isinstance(pattern, dict) and "Regex" in pattern]
    return TokenizerCost(expressions, is_linear)


def _is_linear(model: dict[str, Any]) -> bool:
    """Whether a model is known to take time in proportion to a text. Old files do not name the kind of BPE."""
    kind = model.get("type") or ("BPE" if "merges" in model else "")
    if kind == "WordPiece":
        return bool(model.get("max_input_chars_per_word", 0) <= MAX_TRIED)
    if kind == "Unigram":
        return max((len(piece) for piece, _ in model["vocab"]), default=0) <= MAX_TRIED
    return kind in ("BPE", "WordLevel")


def _check_ids(content: dict[str, Any], num_bytes: int) -> None:
    """Refuse ids above the file's size: tables go up to the highest id, and each real id takes some bytes."""
    vocabulary = content.get("model", {}).get("vocab", ())
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary)]
    ids += [token["id"] for token in content.get("added_tokens") or ()]
    processors = [content.get("post_processor") or {}]
    while processors:
        processor = processors.pop()
        processors += processor.get("processors") or ()
        if isinstance(tokens := processor.get("special_tokens"), dict):
            for token in tokens.values():
                ids += token["ids"]
    highest = max(ids, default=0)
    if type(highest) is not int or min(ids, default=0) < 0 or highest > num_bytes:
        raise ValueError(f"token ids must be from 0 to {num_bytes}, the file's size")


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a sequence, and of sequences in it, in their order."""
    if step is None:
        return
    inner = [step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step]
    if not inner:
        yield step
    for each in inner:
        for part in each:
            yield from _steps(part)


def _check_steps(steps: list[dict[str, Any]]) -> None:
    if len(steps) > MAX_STEPS:
        raise ValueError(f"has {len(steps)} steps of normalising, cutting or decoding; at most {MAX_STEPS} are allowed")
    growth, prepended = 1.0, 0
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            pattern, content = step["pattern"], step["content"]
            if "String" not in pattern:  # an expression may match a single character, or the empty text
                growth *= 1 + len(content)
            elif not pattern["String"]:
                raise ValueError("replaces an empty text")
            else:
                growth *= max(1.0, len(content) / len(pattern["String"]))
        elif kind == "Prepend":
            prepended += len(step["prepend"])
        else:
            growth *= _GROWTH.get(kind, 1)
        if kind == "Precompiled":
            try:
                data = base64.b64decode(step["precompiled_charsmap"], validate=True)
            except ValueError:
                raise ValueError("precompiled_charsmap must be base64") from None
            check_charsmap(data)
    if growth > MAX_GROWTH or prepended > MAX_PREPENDED:
        raise ValueError(
            f"its steps can make a text {growth:.3g} times as long and put {prepended} characters before it; "
            f"allowed are {MAX_GROWTH} and {MAX_PREPENDED}"
        )
