"""Writes the grammar of an answer with reasoning or function calls, in Lark's notation.

In this grammar a special token is matched as a token, not as text, so free text cannot contain one. A lexeme marked
`[lazy]` ends at the first occurrence of its mark. `compiler.py` compiles the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from brlite.grammar.patterns import FORMAT_PATTERNS, WHOLE_FORMATS, PatternRefused, pattern_size
from brlite.grammar.schema_references import SchemaRefused
from brlite.grammar.schema_walk import WalkedSchema, parse_schema
from brlite.sampling_params import CallPart, Calls, ParameterNotation, Reasoning
from brlite.tokenizer import Tokenizer

SPACES = r"[ \n]{0,4}"  # after reasoning
_ANY = r"/(.|\n)*/"
_KEY = re.compile(r"[\w.-]+")
# The keywords that a schema may have if its properties are written one by one. Others constrain the object as a whole.
_OBJECT_KEYWORDS = frozenset(
    {
        *("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"),
        *("$comment", "title", "description", "default", "examples", "example", "x-guidance", "nullable"),
    }
)
_STRING_FORMATS = {
    **WHOLE_FORMATS,
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    "ipv4": r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)",
    "email": r"[A-Za-z0-9_+-]{1,64}(\.[A-Za-z0-9_+-]{1,32}){0,4}@([A-Za-z0-9]{1,63}\.){1,4}[A-Za-z]{2,24}",
}
_STRING_FORMATS["date-time"] = f"{WHOLE_FORMATS['date'][1:-1]}T{_STRING_FORMATS['time']}"


class WrittenAnswer(msgspec.Struct, frozen=True):
    """A grammar, and the schemas of its calls by their labels."""

    grammar: str
    schemas: Mapping[str, WalkedSchema]


class AnswerWriter:
    """Writes one grammar. `walk` checks a schema, `to_lark` converts a regular expression to Lark's notation.

    `check` raises `PatternRefused` for an expression in this notation that matches nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        json_options: Mapping[str, Any],
        walk: Callable[[Any], WalkedSchema],
        to_lark: Callable[[str], str],
        check: Callable[[str], None],
    ) -> None:
        self._json_options = json_options
        self._walk = walk
        self._to_lark = to_lark
        self._check = check
        names = (tokenizer.token_text(token_id) for token_id in tokenizer.special_token_ids)
        self._special_texts = sorted(filter(None, names), key=len, reverse=True)
        self._special_id = tokenizer.special_token_id
        self._lines: list[str] = []
        self._schemas: dict[str, WalkedSchema] = {}

    def write(self, reasoning: Reasoning | None, calls: Calls | None, value: str | None) -> WrittenAnswer:
        """The grammar of an answer: `reasoning` first, then `calls`, or `value`, or free text if it is None.

        `value` is the grammar of an answer without calls. Raises `SchemaRefused` or `PatternRefused`.
        """
        answer_begin = "" if reasoning is None else self._literal(reasoning.answer_begin)
        plain = "rest" if value is None else "@value"
        before = ""
        if reasoning is not None:
            before = "reasoning*" if answer_begin else "reasoning" if reasoning.begins_inside else "reasoning?"
            self._write_reasoning(reasoning)
        if calls is None:
            start = f"{before} {answer_begin} {plain}"
        else:
            self._write_calls(calls)
            if calls.is_leading and value is not None and not calls.is_forced and calls.parts[0].begin.startswith("{"):
                raise PatternRefused("calls that look like JSON have no grammar beside that of an answer")
            if calls.is_forced:
                start = f"{before} calls"
            elif answer_begin or value is not None:
                start = f"{before} (calls | {answer_begin} {plain})"
            else:
                start = self._free_text(reasoning, calls)
        lines = ["%llguidance {}", f"start: {start}", "rest: TEXT", f"TEXT: {_ANY}", f"spaces: /{SPACES}/"]
        main = "\n".join([*lines, *self._lines]) + "\n"
        grammars = [{"name": "answer", "lark_grammar": main}]
        if value is not None:
            parsed = json.loads(value)["grammars"][0] if value.startswith("{") else {"lark_grammar": value}
            grammars.append({**parsed, "name": "value"})
        return WrittenAnswer(json.dumps({"grammars": grammars}), self._schemas)

    def _write_reasoning(self, reasoning: Reasoning) -> None:
        begins = " | ".join(map(self._leading_literal, reasoning.begins))
        if self._is_token_first(reasoning.end):
            text = f"TEXT {self._literal(reasoning.end)}"
        else:
            text = "reasoning_text"
            self._lines.append(f"reasoning_text[lazy]: {_ANY} {json.dumps(reasoning.end)}")
        if not reasoning.begins_inside:
            self._lines.append(f"reasoning: ({begins}) {text} spaces")
        elif all(map(self._is_token_first, reasoning.begins)):  # some models repeat the mark that ends the prompt
            self._lines.append(f"reasoning: ({begins})? {text} spaces")
        else:
            self._lines.append(f"reasoning: {text} spaces")

    # Calls

    def _write_calls(self, calls: Calls) -> None:
        """Write the rules `call_INDEX`, one for each kind of call, and `calls`: one or more of them."""
        for index, part in enumerate(calls.parts):
            try:
                walked = self._walk(parse_schema(part.schema))
                if part.parameters is None:
                    arguments = self._json(walked.schema)
                else:
                    arguments = self._parameters(index, walked.schema, part.parameters)
            except (SchemaRefused, PatternRefused) as error:
                raise PatternRefused(f"{part.label}: {error}") from None
            self._schemas[part.label] = walked
            self._lines.append(f"arguments_{index}: {arguments}")
            end = self._literal(part.end)
            self._lines.append(f"call_{index}: {self._literal(part.begin)} arguments_{index} {end}")
        self._lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(calls.parts))))
        self._lines.append(f"calls: {self._literal(calls.opening)} call {self._more_calls(calls)}")
        if calls.is_leading:  # the rule for calls at the beginning of an answer: white space may precede the first
            first = " | ".join(
                f"{self._leading_literal(calls.opening + part.begin)} arguments_{index} {self._literal(part.end)}"
                for index, part in enumerate(calls.parts)
            )
            self._lines.append(f"leading_calls: ({first}) {self._more_calls(calls)}")

    def _more_calls(self, calls: Calls) -> str:
        """The expression after the first call: further calls and the closing text."""
        several = "" if calls.is_single else f"({self._literal(calls.separator)} call)*"
        return f"{several} {self._literal(calls.closing)}"

    def _free_text(self, reasoning: Reasoning | None, calls: Calls) -> str:
        """Free text with calls in it, with or without reasoning before it.

        If calls need no trigger, the text must not begin like a call. If reasoning is optional, text without it must
        not begin like reasoning.
        """
        leads = tuple(calls.opening + part.begin for part in calls.parts) if calls.is_leading else ()
        self._write_text_with_calls(calls, "more", ())
        behind = self._write_text_with_calls(calls, "text", leads) if leads else "more"
        if reasoning is None:
            return behind
        if reasoning.begins_inside:
            return f"reasoning {behind}"
        begins = tuple(begin for begin in reasoning.begins if not self._is_token_first(begin))
        if not begins:
            return f"reasoning? {behind}"
        return f"reasoning {behind} | {self._write_text_with_calls(calls, 'first', (*begins, *leads))}"

    def _write_text_with_calls(self, calls: Calls, name: str, not_first: Sequence[str]) -> str:
        """Write the rule `name`: text with calls in it that does not begin with any of `not_first`. Returns `name`."""
        any_text, excluded = "TEXT", ""
        if not_first:
            any_text = f"{name.upper()}_TEXT"
            excluded = rf" & ~/{SPACES}({'|'.join(map(_escaped, not_first))})(.|\n)*/"
            self._lines.append(f"{any_text}: {_ANY}{excluded}")
        self._lines.append(f"{name}_rest: {any_text}")
        ways = [f"{name}_rest"]
        if calls.is_leading and not_first:
            ways.append("leading_calls")
        for number, trigger in enumerate(dict.fromkeys(part.trigger for part in calls.parts if part.trigger)):
            mark = f"{name}_trigger_{number}"
            if self._special_id(trigger) is not None:
                self._lines.append(f"{mark}: {any_text} {self._literal(trigger)}")
            else:
                self._lines.append(f"{mark.upper()}: ({_ANY} {json.dumps(trigger)}){excluded}")
                self._lines.append(f"{mark}[lazy]: {mark.upper()}")
            if calls.is_leading:  # the trigger precedes calls that may also come without it
                rest = "leading_calls"
            elif calls.opening:
                rest = f"{self._literal(calls.opening.removeprefix(trigger))} call {self._more_calls(calls)}"
            else:
                rests = (
                    f"{self._literal(part.begin[len(trigger) :])} arguments_{index} {self._literal(part.end)}"
                    for index, part in enumerate(calls.parts)
                    if part.trigger == trigger
                )
                rest = f"({' | '.join(rests)})"
            ways.append(f"{mark} {rest} {'' if calls.is_single else 'more'}")
        self._lines.append(f"{name}: {' | '.join(ways)}")
        return name

    # Arguments

    def _parameters(self, index: int, schema: Mapping[str, Any], notation: ParameterNotation) -> str:
        """The properties of an object, written one by one in the schema's order.

        The rules `rest_INDEX_N` are the properties from N on if one was written before, `first_INDEX_N` if none was.
        """
        other = next((keyword for keyword in schema if keyword not in _OBJECT_KEYWORDS), None)
        if other is not None:
            raise PatternRefused(f"at #/{other}: it cannot be enforced in this format of calls")
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        missing = next((name for name in schema.get("required", ()) if name not in properties), None)
        if missing is not None or schema.get("type", "object") != "object":
            raise PatternRefused(f"at #: {'it is not an object' if missing is None else f'{missing!r} has no schema'}")
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        written: list[tuple[str, bool]] = []
        for number, (name, node) in enumerate(properties.items()):
            if node is False and name not in required:
                continue
            if not _KEY.fullmatch(name):
                raise PatternRefused(f"at #/properties/{name}: this format of tool calls cannot contain the name")
            self._lines.append(
                f"parameter_{index}_{number}: {self._literal(notation.begin.replace('{}', name))} "
                + self._parameter(f"{index}_{number}", name, node, shared, notation)
            )
            written.append((f"parameter_{index}_{number}", name in required))
        separator = json.dumps(notation.separator) if notation.separator else ""
        first, rest = '""', '""'  # the expressions of what follows, before and after the first parameter
        for number, (rule, is_required) in reversed(list(enumerate(written))):
            first = f"{rule} {rest}" if is_required else f"({rule} {rest} | {first})"
            later = f"{separator} {rule}" if is_required else f"({separator} {rule})?"
            self._lines.append(f"rest_{index}_{number}: {later} {rest}")
            self._lines.append(f"first_{index}_{number}: {first}")
            rest, first = f"rest_{index}_{number}", f"first_{index}_{number}"
        return first

    def _parameter(
        self, rule: str, name: str, node: Any, shared: Mapping[str, Any], notation: ParameterNotation
    ) -> str:
        """The expression of one parameter's value and of `notation.end`, the text that ends it."""
        end = self._literal(notation.end)
        kind = node.get("type") if isinstance(node, dict) else None
        if kind == "string" and notation.has_plain_strings:
            return self._plain_string(rule, name, node, notation)
        if kind == "boolean" and notation.has_python_constants and not {"enum", "const"} & set(node):
            return f'("True" | "False") {end}'
        if isinstance(node, dict) and "#/" in json.dumps(node):
            node = {**shared, **node}
        return f"{self._json(node)} {end}"

    def _plain_string(self, rule: str, name: str, node: Mapping[str, Any], notation: ParameterNotation) -> str:
        """The expression of a string without quotes and escapes, which ends at the first `notation.end`."""
        mark = notation.end.strip()
        narrowed = [{"pattern": FORMAT_PATTERNS.get(node.get("format", ""))}]  # by the walk, and in `_STRING_FORMATS`
        for keyword in ("$ref", "anyOf", "allOf"):
            if keyword in node and node[keyword] != narrowed:
                raise PatternRefused(f"at #/properties/{name}/{keyword}: it cannot be enforced in this format of calls")
        expressions = []  # all of them must match
        if {"enum", "const"} & node.keys():
            listed = [text for text in node.get("enum", [node.get("const")]) if text == node.get("const", text)]
            texts = [json.dumps(text) for text in listed if isinstance(text, str) and mark not in text]
            if not texts:
                raise PatternRefused(f"at #/properties/{name}/enum: no value can be written in this format of calls")
            expressions.append(f"({' | '.join(texts)})")
        least, most = node.get("minLength", 0), node.get("maxLength", "")
        if least or most != "":
            expressions.append(rf"/(.|\n){{{least},{most}}}/")
        for keyword in ("pattern", "format"):
            pattern = node.get(keyword) if keyword == "pattern" else _STRING_FORMATS.get(node.get(keyword, ""))
            if pattern is None and node.get(keyword) is None:
                continue
            if pattern is None or (keyword == "pattern" and pattern_size(pattern) and not _is_whole(pattern)):
                raise PatternRefused(f"at #/properties/{name}/{keyword}: it cannot be enforced in this format of calls")
            expressions.append(f"/{self._to_lark(pattern.removeprefix('^').removesuffix('$')) or '(.){0}'}/")
        body = f"({' & '.join(expressions)})" if expressions else _ANY
        if {"enum", "const"} & node.keys() and len(expressions) == 1:
            return f"{body} {self._literal(notation.end)}"
        if len(expressions) > 1:
            try:
                self._check(body)
            except PatternRefused as error:
                raise PatternRefused(f"at #/properties/{name}: no text matches all its keywords ({error})") from None
        if self._special_id(mark) is not None:
            self._lines.append(f"VALUE_{rule}: {body}")
            return f"VALUE_{rule} {self._literal(notation.end)}"
        head, _, tail = notation.end.partition(mark)  # the value ends at the first mark
        self._lines.append(f"value_{rule}[lazy]: VALUE_{rule}")
        self._lines.append(
            f"VALUE_{rule}: ({body} {json.dumps(head + mark)}) & ~({_ANY} {json.dumps(mark)} /(.|\\n)/ {_ANY})"
        )
        return f"value_{rule} {self._literal(tail)}"

    def _json(self, schema: Any) -> str:
        node = schema if isinstance(schema, dict) else {} if schema else {"enum": []}
        return "%json " + json.dumps(node | {"x-guidance": self._json_options})

    # Texts

    def _is_token_first(self, text: str) -> bool:
        """Whether the text begins with a special token."""
        return any(text.startswith(name) for name in self._special_texts)

    def _leading_literal(self, text: str) -> str:
        """The expression of the text with optional white space before it, as one lexeme.

        Free text is a lexeme too, and may begin with the same white space.
        """
        if self._is_token_first(text):
            return f"spaces {self._literal(text)}"
        head = next((text[: text.index(name)] for name in self._special_texts if name in text), text)
        return f"/{SPACES}{_escaped(head)}/ {self._literal(text.removeprefix(head))}"

    def _literal(self, text: str) -> str:
        """A text in Lark's notation, with special tokens as tokens."""
        found = [name for name in self._special_texts if name in text]
        if not found:
            return json.dumps(text) if text else ""
        pieces = re.split(f"({'|'.join(map(re.escape, found))})", text)
        return " ".join(
            f"<[{self._special_id(piece)}]>" if piece in found else json.dumps(piece) for piece in pieces if piece
        )


def read_structural_tag(text: str) -> Calls:
    """vLLM's structural tag: free text in which each trigger begins one of the parts that start with it.

    Raises `PatternRefused` or `SchemaRefused`.
    """
    tag = parse_schema(text)
    structures, triggers = (tag.get(name) for name in ("structures", "triggers"))
    if not (isinstance(structures, list) and structures and isinstance(triggers, list)):
        raise PatternRefused("a structural tag has structures, a list of {begin, schema, end}, and triggers, a list")
    other = next((name for name in tag if name not in ("type", "structures", "triggers")), None)
    if other is not None:
        raise PatternRefused(f"a structural tag has structures and triggers; {other[:64]!r} is not taken")
    parts = []
    for index, part in enumerate(structures):
        if not (isinstance(part, dict) and all(isinstance(part.get(name), str) for name in ("begin", "end"))):
            raise PatternRefused(f"structures[{index}] must have begin and end, both texts, and a schema")
        trigger = next((each for each in triggers if isinstance(each, str) and part["begin"].startswith(each)), "")
        if not trigger:
            raise PatternRefused(f"structures[{index}].begin begins with none of the triggers")
        schema = json.dumps(part.get("schema", True))
        label = f"structures[{index}].schema"
        parts.append(CallPart(label=label, trigger=trigger, begin=part["begin"], schema=schema, end=part["end"]))
    return Calls(parts=tuple(parts))


def _escaped(text: str) -> str:
    """A text as an expression of Lark's notation."""
    return re.sub(r"[\\^$.|?*+()\[\]{}/]", r"\\\g<0>", text).replace("\n", r"\n")


def _is_whole(pattern: str) -> bool:
    """Whether a pattern has both anchors and no alternatives at its top level."""
    depth, is_escaped, is_class = 0, False, False
    for character in pattern:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif is_class:
            is_class = character != "]"
        elif character == "|" and depth == 0:
            return False
        else:
            is_class = character == "["
            depth += (character == "(") - (character == ")")
    return pattern.startswith("^") and pattern.endswith("$") and not is_escaped
