"""Estimates the cost of a grammar in Lark's or llama.cpp's notation (GBNF, EBNF) before it is compiled.

Reads just enough of the notation to find rules, brackets, expressions and repetitions. The compiler finds other errors.
"""

from __future__ import annotations

import re

from brlite.grammar.patterns import PatternRefused, pattern_size

MAX_DEPTH = 100  # of brackets
MAX_CONJUNCTIONS = 8  # Lark's `&`, in the whole grammar: a conjunction of 20 patterns took 1.8 s and 230 MB
MAX_UNCLOSED = 16  # quotes, slashes and square brackets: for each the rest of the text is searched for its end

_TOKENS = re.compile(
    r"""(?P<comment>(?://|\#)[^\n]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*")
    |(?P<pattern>/(?:[^/\\\n]|\\.)+/)
    |(?P<characters>\[(?:[^\]\\]|\\.)*\])
    |(?P<directive>%[A-Za-z_]+)
    |(?P<rule>^[ \t]*[?!]?[A-Za-z_][^\n"/:]*(?:::=|:))
    |(?P<repetition>[{~][ ]*(?P<least>\d{1,12})[ ]*(?:(?:,|\.\.)[ ]*(?P<most>\d{0,12}))?)
    |(?P<open>\()|(?P<close>\))|(?P<conjunction>&)|(?P<unclosed>["/\[])""",
    re.VERBOSE | re.MULTILINE,
)


def is_gbnf(text: str) -> bool:
    """Whether a grammar is in llama.cpp's notation (GBNF, EBNF); else it is in Lark's."""
    return any(token["rule"] and token["rule"].endswith("::=") for token in _TOKENS.finditer(text))


def check_grammar(text: str, *, max_rules: int, max_repetitions: int) -> None:
    """Raise `PatternRefused` above `max_rules`, or above `max_repetitions` (with the characters of expressions)."""
    if text.lstrip().startswith("{"):
        raise PatternRefused("is JSON; allowed are Lark's notation and llama.cpp's")
    num_rules = num_repetitions = num_conjunctions = num_unclosed = depth = 0
    for token in _TOKENS.finditer(text):
        value = token.group()
        if token["rule"]:
            num_rules, depth = num_rules + 1, 0
        elif token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
        elif token["conjunction"]:
            num_conjunctions += 1
        elif token["unclosed"]:
            num_unclosed += 1
        elif token["pattern"]:
            num_repetitions += pattern_size(value[1:-1])
        elif token["repetition"]:
            num_repetitions += int(token["most"] or token["least"])
        elif value in ("%json", "%regex", "%lark"):
            raise PatternRefused(f"uses {value}, which is not taken in a grammar: send a schema as a schema")
        if num_rules > max_rules:
            raise PatternRefused(f"has more than {max_rules} rules (grammar.max_rules)")
        if num_conjunctions > MAX_CONJUNCTIONS:
            raise PatternRefused(f"has more than {MAX_CONJUNCTIONS} conjunctions (&)")
        if num_unclosed > MAX_UNCLOSED:
            raise PatternRefused(
                f"has more than {MAX_UNCLOSED} quotes, slashes and square brackets that are not closed"
            )
        if depth > MAX_DEPTH:
            raise PatternRefused(f"has brackets nested more than {MAX_DEPTH} deep")
        if num_repetitions > max_repetitions:
            raise PatternRefused(f"has repetitions of more than {max_repetitions} in all (grammar.max_repetitions)")
