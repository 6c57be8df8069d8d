"""`SamplingParams.bad_words`: the tokens that spell a word, and which token would complete one.

A word that is spelt with other tokens than those that the tokenizer chooses for it is not found, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from brlite.config.options import LimitsConfig
from brlite.errors import InvalidRequest
from brlite.tokenizer import Tokenizer

TokenIds = tuple[int, ...]


def encode_bad_words(words: Sequence[str], tokenizer: Tokenizer, limits: LimitsConfig) -> tuple[TokenIds, ...]:
    """The distinct token sequences of the words. Takes tens of microseconds a word; any thread may call it.

    Each word is encoded as inside an answer, with and without a space before it, and as a text of its own, in which
    the text of a control token is that token. Raises `InvalidRequest` beyond `max_bad_words` or `max_bad_word_length`.
    """
    if len(words) > limits.max_bad_words:
        raise InvalidRequest(
            f"bad_words must have at most {limits.max_bad_words} entries on this server (limits.max_bad_words), "
            f"got {len(words)}",
            param="bad_words",
        )
    longest = max(map(len, words), default=0)
    if longest > limits.max_bad_word_length:
        raise InvalidRequest(
            f"an entry of bad_words may have at most {limits.max_bad_word_length} characters on this server "
            f"(limits.max_bad_word_length), got {longest}",
            param="bad_words",
        )
    spelt: dict[TokenIds, None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for token_ids in (
            tokenizer.encode(bare, add_special_tokens=False, param="bad_words"),
            tokenizer.encode_continuation(bare),
            tokenizer.encode_continuation(f" {bare}"),
        ):
            if token_ids:
                spelt[tuple(token_ids)] = None
    return tuple(spelt)


def completing_tokens(bad_words: Iterable[TokenIds], token_ids: Sequence[int], num_output_tokens: int) -> TokenIds:
    """The distinct last tokens of the words whose other tokens are the last ones of the output.

    The output is the last `num_output_tokens` of `token_ids`. A word of one token is always among them.
    """
    num_tokens = len(token_ids)
    return tuple(
        {
            last: None
            for *beginning, last in bad_words
            if len(beginning) <= num_output_tokens and token_ids[num_tokens - len(beginning) :] == beginning
        }
    )
