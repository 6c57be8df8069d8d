"""How byte-level vocabularies split a text before merging, by the name in GGUF files.

A name stands for a list of regular expressions; each splits the pieces of the one before. A file with an unknown name
is refused: wrong splits would give wrong token ids without an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Splitting(NamedTuple):
    """The expressions, and what else a name means.

    `composes_unicode`: Unicode NFC first. `ignores_merges`: a word that is a token is never merged from parts.
    `adds_bos`: a BOS, unless the file turns it off.
    """

    patterns: tuple[str, ...]
    composes_unicode: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = Splitting((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignores_merges=True, adds_bos=True)

SPLITTINGS = {
    "default": Splitting((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Splitting((_GPT2,)),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Splitting((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",), composes_unicode=True),
}


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PUBLISHED = frozenset(
    {
        *(pattern for splitting in SPLITTINGS.values() for pattern in splitting.patterns),
        # GPT-4's, as Phi-4 has it
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
        r"\s*[\r\n]|\s+(?!\S)|\s+",
        # Mistral's Tekken, and GPT-4o's
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_O200K_REST}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
        rf"\p{{N}}{{1,3}}|{_O200K_REST}",
        # DeepSeek's
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
_PROPERTY = r"\\[pP]\{\w+\}"
_CLASS = rf"\[\^?(?:[^\\\[\]]|{_PROPERTY}|\\[^pP])+\]"
_CHARACTER = rf"{_PROPERTY}|\\[^pPkg\d]|[^\\\[\](){{}}|*+?.^$]"
# A series of characters and classes with at most one unbounded repetition, at the end. With few optional parts, each of
# 10 lengths at most, it hardly backtracks.
_SIMPLE = re.compile(rf"(?:(?:{_CLASS}|{_CHARACTER})(?:\?|\{{\d(?:,\d)?\}})?){{1,8}}(?:[*+]|\{{\d,\}})?")
_OPTIONAL = re.compile(r"\?|,\d\}")
_MAX_OPTIONAL = 2


def ends_soon(expression: str) -> bool:
    """Whether an expression is known to take linear time. Others run in a child process, which can be stopped."""
    if expression in _PUBLISHED:
        return True
    return _SIMPLE.fullmatch(expression) is not None and len(_OPTIONAL.findall(expression)) <= _MAX_OPTIONAL


def build_pre_tokenizer(splitting: Splitting) -> pre_tokenizers.PreTokenizer:
    """The splits, then GPT-2's alphabet for the bytes of each piece."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
