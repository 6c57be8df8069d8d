"""Constraints on an answer: JSON, a regular expression, choices, a grammar, function calls, reasoning before it.

These are plain values. `brlite/grammar/` compiles them.
"""

from __future__ import annotations

import json

import msgspec

from brlite.errors import InvalidRequest


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """Optional reasoning before an answer: any text between one of `begins` and `end`.

    With `begins_inside` the prompt ends with `begins`, so the text up to `end` is required. With `answer_begin`, the
    text that begins the answer, there may be several parts of reasoning.
    """

    begins: tuple[str, ...]
    end: str
    begins_inside: bool = False
    answer_begin: str = ""


class ParameterNotation(msgspec.Struct, frozen=True, kw_only=True):
    """The text of each parameter of a call: `begin`, in which `{}` stands for the name, then the value, then `end`.

    Values are JSON. With `has_plain_strings`, strings have no quotes; with `has_python_constants`, constants are
    Python's (`True`, `False`).
    """

    begin: str
    end: str = ""
    separator: str = ""
    has_plain_strings: bool = False
    has_python_constants: bool = False


class CallPart(msgspec.Struct, frozen=True, kw_only=True):
    """A call: `begin`, its arguments by a JSON schema, and `end`.

    `trigger` is the beginning of `begin`; in free text it shows that a call begins. Arguments are a JSON object, or
    written one by one in the notation `parameters`. `label` names the part in errors.
    """

    label: str
    begin: str
    schema: str
    end: str
    trigger: str = ""
    parameters: ParameterNotation | None = None


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """Calls in an answer of free text. With `is_forced` the answer is one or more calls and nothing else.

    Several calls are written as `opening`, the calls with `separator` between them, `closing`. With `is_single` there
    is at most one call, and the answer ends after it. With `is_leading` calls at the beginning of an answer need no
    trigger.
    """

    parts: tuple[CallPart, ...]
    opening: str = ""
    separator: str = ""
    closing: str = ""
    is_forced: bool = False
    is_single: bool = False
    is_leading: bool = False


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The constraint on an answer: exactly one of the first six fields. Raises `InvalidRequest` otherwise.

    `json_schema` is a schema as an object or as JSON, `json_object` any JSON object, `regex` matches the whole answer,
    `choice` lists all answers, `grammar` is in Lark's or llama.cpp's notation (GBNF, EBNF). `structural_tag` is free
    text with parts that have a schema: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`.

    JSON is written without whitespace unless `whitespace_pattern`, a regular expression, allows some between tokens.
    `calls` are an alternative to the constrained answer, and may be given without one of the six. `reasoning` comes
    before either. `param` names the request's field in errors.
    """

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    calls: Calls | None = None
    reasoning: Reasoning | None = None
    param: str = "structured"

    def __post_init__(self) -> None:
        for name in ("json_schema", "structural_tag"):
            value = getattr(self, name)
            if isinstance(value, (dict, bool)):
                msgspec.structs.force_setattr(self, name, json.dumps(value))
        msgspec.structs.force_setattr(self, "choice", tuple(self.choice))
        texts = (self.json_schema, self.regex, self.grammar, self.structural_tag, self.whitespace_pattern, *self.choice)
        if not all(text is None or (isinstance(text, str) and text) for text in texts):
            raise InvalidRequest(f"{self.param}: schemas, patterns, grammars and choices are texts", param=self.param)
        num_wishes = sum(map(bool, (*texts[:4], self.json_object, self.choice)))
        if num_wishes > 1 or (num_wishes == 0 and self.calls is None):
            names = "json_schema, json_object, regex, choice, grammar, structural_tag"
            raise InvalidRequest(f"{self.param} must have exactly one of {names}, got {num_wishes}", param=self.param)
        if self.whitespace_pattern and not (self.json_schema or self.json_object or self.structural_tag):
            raise InvalidRequest(f"{self.param}: whitespace_pattern is for JSON only", param=self.param)
