"""What is asked: texts to go on with, texts of a given number of tokens, or texts to write again. Knows no servers.

Every task is text, not token ids: all servers take it, and all of them count its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from brlite.tokenizer import Tokenizer

PROMPTS = Path(__file__).with_name("prompts.txt")
QUALITY_TEXT = Path(__file__).with_name("quality_text.txt")
NUM_LONG = 40
MIN_REWRITTEN, MAX_REWRITTEN = 250, 600  # characters
# Shown twice, so that a small model too knows what to do; what it copies is then in the prompt, as for a rewriting.
REWRITE = "Text: {text}\n\nThe same text again: {text}\n\nThe same text again:"


def read_prompts(path: Path) -> list[str]:
    """Prompts are paragraphs: an empty line ends one, a line break within one is a space."""
    paragraphs = path.read_text(encoding="utf-8").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def long_prompts(texts: Sequence[str], num_tokens: int, tokenizer: Tokenizer) -> list[str]:
    """Texts of `num_tokens` tokens, give or take a few where a cut falls within a word; each begins elsewhere."""
    token_ids = tokenizer.encode("\n\n".join(texts), add_special_tokens=False)
    while len(token_ids) < 2 * num_tokens:
        token_ids += token_ids
    starts = [number * len(token_ids) // NUM_LONG for number in range(NUM_LONG)]
    around = token_ids + token_ids[:num_tokens]
    return [tokenizer.decode(around[start : start + num_tokens]) for start in starts]


def rewrite_prompts(texts: Sequence[str]) -> list[str]:
    """Tasks whose answers repeat what the prompt has: what speculation is for."""
    cut = [text[:MAX_REWRITTEN].rpartition(". ")[0] + "." for text in texts if len(text) >= MIN_REWRITTEN]
    return [REWRITE.format(text=text) for text in cut if len(text) >= MIN_REWRITTEN]
