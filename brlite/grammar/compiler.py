"""Compiles the grammars of answers for one model's tokenizer, on a thread with a deep stack, and caches them.

Compiling takes a millisecond for ordinary schemas and cannot be interrupted. So `library.py` bounds its cost before.
It needs a deep stack: call it on a thread that was started inside `deep_stack`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from brlite.config.options import GrammarConfig
from brlite.errors import InvalidRequest
from brlite.grammar.matcher import Grammar
from brlite.sampling_params import StructuredOutput
from brlite.tokenizer import Tokenizer

if TYPE_CHECKING:
    from brlite.grammar.library import Library

STACK_BYTES = 512 * 1024**2  # address space; only a deep schema uses much of it as memory
# The memory of a compiled grammar, measured on large ones: a base, and bytes for each character of its schema or
# expression. A full cache takes 20 % more through fragmentation, which stops growing after some 2,000 grammars;
# malloc_trim frees it.
_BASE_BYTES, _BYTES_A_CHARACTER = 64 * 1024, 128


class GrammarCompiler:
    """Compiles for one tokenizer. Its methods block. They must be called by one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, config: GrammarConfig) -> None:
        """`vocab_size` is the width of the model's logits, at least the tokenizer's."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._config = config
        self._library: Library | None = None
        self._cache: OrderedDict[StructuredOutput, tuple[Grammar | str, int]] = OrderedDict()
        self._cached_bytes = 0

    def prepare(self) -> None:
        """Read the vocabulary; otherwise the first grammar does it. Holds the GIL meanwhile: other threads wait.

        Measured: 0.27 s and 20 MB for 49,152 tokens, 1.3 s and 50 MB for 152,000.
        """
        if self._library is None:
            from brlite.grammar.library import Library

            self._library = Library(self._tokenizer, self._vocab_size, self._config)

    def compile(self, wish: StructuredOutput) -> Grammar:
        """The grammar of an answer, cached if possible. Raises `InvalidRequest` with the reason and its place."""
        key = msgspec.structs.replace(wish, param="structured")
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            result = found[0]
        else:
            result = self._compile_new(key)
        if isinstance(result, str):
            raise InvalidRequest(f"{wish.param}: {result}", param=wish.param)
        return result

    def compile_on_thread(self, wish: StructuredOutput | None) -> Grammar | None:
        """As `compile`, on a new thread with a deep stack. The thread ends afterwards."""
        if wish is None:
            return None
        with ThreadPoolExecutor(1, thread_name_prefix="brlite-grammar") as thread:
            with deep_stack():
                compiling = thread.submit(self.compile, wish)
            return compiling.result()

    def _compile_new(self, wish: StructuredOutput) -> Grammar | str:
        """The grammar or an error message. Both are cached."""
        self.prepare()
        assert self._library is not None
        texts = [wish.json_schema, wish.regex, wish.grammar, wish.structural_tag, wish.whitespace_pattern, *wish.choice]
        texts += [text for part in wish.calls.parts for text in (part.begin, part.schema)] if wish.calls else []
        num_bytes = sum(len(text) for text in texts if text)
        if num_bytes > self._config.max_bytes:
            most = self._config.max_bytes
            return f"{num_bytes} characters are too many; at most {most} are allowed here (grammar.max_bytes)"
        result = self._library.compile(wish, num_bytes)
        size = _BASE_BYTES + self._vocab_size // 8 + num_bytes * _BYTES_A_CHARACTER
        self._cache[wish] = result, size
        self._cached_bytes += size
        while self._cached_bytes > self._config.cache_bytes and self._cache:
            self._cached_bytes -= self._cache.popitem(last=False)[1][1]
        return result


@contextmanager
def deep_stack() -> Iterator[None]:
    """While the context is open, each new thread has a stack of `STACK_BYTES`."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)
