"""Schemas of the kinds that people send: what pydantic, zod, OpenAI's strict mode, LangChain and others print."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

Schema = Any

STRINGS = {"type": "string"}
INTEGER = {"type": "integer"}
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 12}, "zip": {"type": "string", "pattern": r"^\d{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}

PATTERNS = [
    *(
        r"^[a-z]{3}$",
        r"^\d{4}-\d{2}$",
        r"^(red|green|blue)$",
        r"^[A-Z][a-z]+$",
        r"^#[0-9a-fA-F]{6}$",
        r"^\+?[0-9]{7,15}$",
    ),
    *(r"ab", r"^ab", r"ab$", r"^$", r"^.{2,6}$", r"^\S+$", r"^[^,]{1,5}$", r"^(\w+-)*\w+$", r"^[\w.]+$", r"^a|b$"),
    *(r"^(?:[0-9]{1,3}\.){3}[0-9]{1,3}$", r"^[a-z0-9]+(?:-[a-z0-9]+)*$", r"^v\d+\.\d+\.\d+$", r"^\/api\/[a-z]+$"),
    *(r"^[cC][^\s-]{8,}$", r"^[0-9a-z]+$", r"^[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}$", r"^\+(?:[0-9]){6,14}[0-9]$"),
    *(r"^[A-Za-z0-9_-]*$", r"^$|^(?:[0-9a-zA-Z+/]{4})*(?:(?:[0-9a-zA-Z+/]{2}==)|(?:[0-9a-zA-Z+/]{3}=))?$"),
    *(r"^([a-z]+)(,([a-z]+)){0,3}$", r"^\{[a-z]\}$", r"^[\[\]]{2}$", r"^\"?[a-z]\"?$", r"^é{1,2}$"),
    r"^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12})$",
    r"^-?P(?:\d+Y)?(?:\d+M)?(?:\d+W)?(?:\d+D)?(?:T(?:\d+H)?(?:\d+M)?(?:\d+S)?)?$",
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$",
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,0}|(?=[\d.]{1,3}0*$)\d{0,0}\.\d{0,2}0*$)",
    r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,5}|(?=[\d.]{1,6}0*$)\d*\.\d*0*$)",
]
FORMATS = [
    *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    *("path", "file-path", "directory-path", "password", "binary", "byte", "cuid", "ulid", "nanoid", "base64"),
    *("int32", "int64", "double", "uri-reference", "iri", "json-pointer", "uri-template", "idn-hostname", "color"),
]
VALUES: list[Any] = [
    1,
    -3,
    2.5,
    "a",
    'ä\n"\\',
    "",
    True,
    False,
    None,
    [],
    [1, "x"],
    {},
    {"k": [None]},
    0.1,
    1e10,
    "2020",
]


def strings() -> Iterator[Schema]:
    yield STRINGS
    yield from (
        {"type": "string", "minLength": low, "maxLength": high} for low, high in ((0, 0), (0, 1), (3, 3), (2, 9))
    )
    yield from ({"type": "string", "maxLength": most} for most in (4, 255, 2000))
    yield from ({"type": "string", "pattern": pattern} for pattern in PATTERNS)
    yield from ({"type": "string", "format": name} for name in FORMATS)
    yield from ({"type": ["string", "null"], "format": name} for name in FORMATS[:8])
    yield from ({"anyOf": [{"type": "string", "pattern": pattern}, {"type": "null"}]} for pattern in PATTERNS[:16])
    yield {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4}
    yield {"type": "string", "format": "email", "pattern": PATTERNS[-6]}
    yield {"type": "string", "format": "date", "title": "Day", "examples": ["2020-01-01"], "default": "2020-01-01"}


def numbers() -> Iterator[Schema]:
    for kind in ("integer", "number"):
        yield {"type": kind}
        bounds = (
            {"minimum": 0},
            {"maximum": -1},
            {"minimum": 1, "maximum": 5},
            {"exclusiveMinimum": 0},
            {"minimum": 10**6},
        )
        yield from ({"type": kind, **bound} for bound in bounds)
        yield {"type": kind, "exclusiveMinimum": 0, "exclusiveMaximum": 100}
        yield {"type": kind, "minimum": -5, "maximum": 5}
        yield {"type": kind, "minimum": -9223372036854775808, "maximum": 9223372036854775807}
        yield {"type": kind, "minimum": -9007199254740991, "maximum": 9007199254740991}
    yield from ({"type": "integer", "multipleOf": step} for step in (2, 5, 7))
    yield {"type": "number", "multipleOf": 0.5}
    yield {"type": "number", "minimum": 0.0, "maximum": 1.0}
    yield {"type": "integer", "minimum": 3, "maximum": 3}
    yield {"type": "number", "minimum": 0.25, "maximum": 0.75}
    yield {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 5,
        "exclusiveMinimum": True,
    }


def listed() -> Iterator[Schema]:
    yield from ({"const": value} for value in VALUES)
    yield {"enum": VALUES}
    yield {"type": "string", "enum": ["red", "green", "blue"]}
    yield {"type": ["string", "null"], "enum": ["red", None]}
    yield {"type": "integer", "enum": [1, 2, 3]}
    yield {"enum": [f"value-{number}" for number in range(2000)]}
    yield {"oneOf": [{"const": number, "title": f"Level {number}"} for number in (1, 2, 3)]}
    yield {"oneOf": [{"const": name, "title": name.upper()} for name in ("low", "high")]}
    yield {"anyOf": [{"const": "a", "description": "first"}, {"const": "b", "description": "second"}]}
    yield {"type": "boolean"}
    yield {"type": "null"}


def arrays() -> Iterator[Schema]:
    items = (STRINGS | {"maxLength": 3}, INTEGER, {"type": "boolean"}, {"enum": ["x", "y"]}, ADDRESS, {"type": "null"})
    sizes: tuple[dict[str, int], ...] = (
        {"maxItems": 3},
        {"minItems": 1, "maxItems": 2},
        {"minItems": 2, "maxItems": 2},
    )
    yield from ({"type": "array", "items": item, **size} for item, size in itertools.product(items, sizes))
    yield {"type": "array", "items": INTEGER}
    yield {"type": "array", "maxItems": 0}
    yield {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False, "minItems": 2}
    yield {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "minItems": 2, "maxItems": 2}
    yield {
        "type": "array",
        "items": [INTEGER, {"type": "null"}],
        "additionalItems": False,
        "minItems": 2,
        "$schema": DRAFT_7,
    }
    yield {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 2}, "maxItems": 2}
    yield {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True}
    yield {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 2}
    yield {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 1}
    yield {"type": "array", "items": STRINGS, "uniqueItems": True, "maxItems": 1}
    yield {"type": "array", "items": INTEGER, "uniqueItems": False, "maxItems": 2}
    yield {
        "type": "array",
        "items": {"$ref": "#/$defs/c"},
        "uniqueItems": True,
        "$defs": {"c": {"enum": ["r", "g"], "title": "C", "type": "string"}},
    }


DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def objects() -> Iterator[Schema]:
    properties = {"a": INTEGER, "b": {"type": "string", "maxLength": 4}, "c": {"type": "boolean"}}
    for num_required, extra in itertools.product(
        range(4), ({"additionalProperties": False}, {"additionalProperties": INTEGER}, {})
    ):
        yield {"type": "object", "properties": properties, "required": list(properties)[:num_required], **extra}
    yield {"type": "object"}
    yield {"type": "object", "additionalProperties": False}
    yield {"type": "object", "additionalProperties": {"type": "string", "maxLength": 3}, "maxProperties": 2}
    yield {"type": "object", "additionalProperties": INTEGER, "minProperties": 1, "maxProperties": 3}
    yield {
        "type": "object",
        "patternProperties": {"^x-[a-z]$": INTEGER},
        "additionalProperties": False,
        "maxProperties": 3,
    }
    yield {
        "type": "object",
        "patternProperties": {"^a": INTEGER, "^b": {"type": "null"}},
        "additionalProperties": False,
    }
    yield {"type": "object", "propertyNames": STRINGS, "additionalProperties": INTEGER, "maxProperties": 2}
    yield {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{2}$"},
        "additionalProperties": INTEGER,
        "maxProperties": 2,
    }
    for names in (
        {"minLength": 2, "maxLength": 3},
        {"maxLength": 1},
        {"format": "uuid"},
        {"format": "date", "title": "D"},
    ):
        yield {"type": "object", "propertyNames": names, "additionalProperties": INTEGER, "maxProperties": 2}
    yield {"type": "object", "propertyNames": {"type": "string", "enum": ["p", "q"]}, "additionalProperties": INTEGER}
    yield {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "unevaluatedProperties": False}
    yield {
        "type": "object",
        "properties": {'quo"te': INTEGER, "ü": INTEGER, "a b": INTEGER},
        "required": ['quo"te', "ü", "a b"],
    }
    yield {"type": "object", "properties": {"x": True, "y": {}}, "required": ["x"], "additionalProperties": False}
    yield {
        "type": "object",
        "properties": {f"p{i}": {"type": "boolean"} for i in range(40)},
        "additionalProperties": False,
    }
    yield {"properties": {"a": INTEGER}, "required": ["a"]}
    yield {
        "type": "object",
        "properties": {"inner": ADDRESS, "list": {"type": "array", "items": ADDRESS, "maxItems": 1}},
    }
    yield {
        "type": "object",
        "properties": {"properties": INTEGER, "required": INTEGER, "$ref": INTEGER},
        "required": ["$ref"],
    }


def combined() -> Iterator[Schema]:
    yield {"anyOf": [INTEGER, {"type": "string", "maxLength": 3}]}
    yield {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}
    yield {"type": ["string", "integer", "null"], "maxLength": 4}
    yield {"oneOf": [INTEGER, {"type": "string", "maxLength": 3}]}
    yield {"oneOf": [{"type": "number"}, {"type": "boolean"}, {"type": "array", "items": INTEGER, "maxItems": 1}]}
    yield {"allOf": [INTEGER, {"minimum": 3}, {"maximum": 5}]}
    yield {"allOf": [{"$ref": "#/$defs/a"}], "title": "A", "description": "wrapped", "$defs": {"a": ADDRESS}}
    yield {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"type": "object", "properties": {"b": INTEGER}},
        ]
    }
    yield {"allOf": [{"type": "string", "pattern": "^[a-z]+$"}, {"maxLength": 3}, {"minLength": 1}]}
    yield {"anyOf": [{"allOf": [INTEGER, {"minimum": 1}]}, {"const": "none"}]}
    for tag in ("kind", "type"):
        cat = {
            "type": "object",
            "properties": {tag: {"const": "cat"}, "lives": {"type": "integer", "maximum": 9}},
            "required": [tag],
        }
        dog = {
            "type": "object",
            "properties": {tag: {"const": "dog"}, "good": {"type": "boolean"}},
            "required": [tag, "good"],
        }
        yield {"oneOf": [cat, dog], "discriminator": {"propertyName": tag}}
        yield {"anyOf": [cat, dog]}
        yield {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": {"cat": cat, "dog": dog}}
    yield True
    yield {}
    yield {"title": "Anything", "description": "at all"}


def referring() -> Iterator[Schema]:
    yield {"$ref": "#/$defs/A", "$defs": {"A": ADDRESS}}
    yield {"$ref": "#/definitions/A", "definitions": {"A": ADDRESS}}
    yield {"type": "object", "properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}}, "required": ["a", "b"]}
    yield {"type": "array", "prefixItems": [{"enum": ["x"]}, {"$ref": "#/prefixItems/0"}], "minItems": 2, "maxItems": 2}
    yield {"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}}
    yield {"$ref": "#/$defs/a%20b", "$defs": {"a b": INTEGER}}
    yield {"$ref": "#/$defs/a b", "$defs": {"a b": INTEGER}}
    yield {"$ref": "#item", "$defs": {"x": {"$anchor": "item", "type": "boolean"}}}
    yield {"$id": "https://example.com/root.json", "$ref": "#/$defs/x", "$defs": {"x": INTEGER}}
    yield {
        "$id": "https://example.com/root.json",
        "$ref": "item.json",
        "$defs": {"x": {"$id": "item.json", "type": "null"}},
    }
    yield {
        "$ref": "#/$defs/Node",
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {"v": INTEGER, "next": {"$ref": "#/$defs/Node"}},
                "required": ["v"],
            }
        },
    }
    yield {
        "$ref": "#/$defs/Tree",
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {
                    "v": INTEGER,
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 2},
                },
                "required": ["v", "kids"],
                "additionalProperties": False,
            }
        },
    }
    yield {
        "type": "object",
        "properties": {"child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["child"],
        "additionalProperties": False,
    }
    yield {
        "anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}],
        "$defs": {
            "a": {
                "type": "object",
                "properties": {"b": {"$ref": "#/$defs/b"}},
                "required": ["b"],
                "additionalProperties": False,
            },
            "b": {"type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 1},
        },
    }


def published() -> Iterator[Schema]:
    """As libraries print them, shortened."""
    yield {  # OpenAI's documentation of strict mode
        "type": "object",
        "properties": {
            "steps": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "explanation": {"type": "string", "maxLength": 8},
                        "output": {"type": "string", "maxLength": 8},
                    },
                    "required": ["explanation", "output"],
                    "additionalProperties": False,
                },
            },
            "final_answer": {"type": "string", "maxLength": 8},
        },
        "required": ["steps", "final_answer"],
        "additionalProperties": False,
        "$schema": DRAFT_7,
    }
    yield {  # pydantic
        "$defs": {
            "Role": {"enum": ["admin", "user"], "title": "Role", "type": "string"},
            "Item": {
                "properties": {
                    "sku": {"pattern": "^[A-Z]{3}-\\d{3}$", "title": "Sku", "type": "string"},
                    "qty": {"exclusiveMinimum": 0, "title": "Qty", "type": "integer", "maximum": 999},
                    "price": {
                        "anyOf": [{"type": "number"}, {"pattern": PATTERNS[-5], "type": "string"}],
                        "title": "Price",
                    },
                },
                "required": ["sku", "qty", "price"],
                "title": "Item",
                "type": "object",
            },
        },
        "properties": {
            "id": {"format": "uuid", "title": "Id", "type": "string"},
            "created": {"format": "date-time", "title": "Created", "type": "string"},
            "role": {"$ref": "#/$defs/Role", "default": "user"},
            "note": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}], "default": None, "title": "Note"},
            "items": {"items": {"$ref": "#/$defs/Item"}, "maxItems": 2, "title": "Items", "type": "array"},
            "tags": {"items": {"$ref": "#/$defs/Role"}, "title": "Tags", "type": "array", "uniqueItems": True},
            "path": {"format": "path", "title": "Path", "type": "string", "maxLength": 5},
        },
        "required": ["id", "created", "items", "path"],
        "title": "Invoice",
        "type": "object",
    }
    yield {  # zod 4
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "email": {"type": "string", "format": "email", "pattern": PATTERNS[-6]},
            "scores": {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": {"type": "number"},
            },
            "age": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
            "when": {"type": "string", "format": "date"},
            "pair": {
                "type": "array",
                "prefixItems": [{"type": "boolean"}, {"type": "null"}],
                "minItems": 2,
                "maxItems": 2,
            },
        },
        "required": ["email", "scores", "age", "when", "pair"],
        "additionalProperties": False,
    }
    yield {  # LangChain, the arguments of a tool
        "properties": {
            "query": {"description": "what to look for", "type": "string", "maxLength": 10},
            "k": {"default": 4, "type": "integer"},
            "filters": {
                "anyOf": [
                    {"additionalProperties": {"type": "string", "maxLength": 3}, "type": "object", "maxProperties": 1},
                    {"type": "null"},
                ],
                "default": None,
            },
        },
        "required": ["query"],
        "type": "object",
    }
    yield {  # an extractor's, nested four levels
        "type": "object",
        "properties": {
            "person": {
                "type": "object",
                "properties": {
                    "name": {
                        "type": "object",
                        "properties": {
                            "first": {"type": "string", "maxLength": 6},
                            "last": {"type": "string", "maxLength": 6},
                        },
                        "required": ["first", "last"],
                    },
                    "addresses": {"type": "array", "items": ADDRESS, "minItems": 1, "maxItems": 1},
                },
                "required": ["name", "addresses"],
            },
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["person", "confidence"],
    }


SCHEMAS: list[Schema] = [
    *strings(),
    *numbers(),
    *listed(),
    *arrays(),
    *objects(),
    *combined(),
    *referring(),
    *published(),
]
