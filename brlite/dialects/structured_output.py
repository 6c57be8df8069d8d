"""The fields that bound what an answer can be, in the words of OpenAI, vLLM, llama.cpp and SGLang.

All come to one `StructuredOutput`. A schema stays the JSON text that the client sent: the order of its keys counts.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

from brlite.dialects.json_body import decode_value
from brlite.dialects.openai import NULL, GenerationFields, StructuredFields
from brlite.errors import InvalidRequest
from brlite.sampling_params import StructuredOutput

# The types of a `response_format`, with the keys that each may have.
FORMATS = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers", "format"),
}


class JsonSchemaFormat(Struct, forbid_unknown_fields=True):
    """`schema` is obeyed whether `strict` or not; the rest is for people."""

    name: str | None = None
    description: str | None = None
    schema: Raw = NULL
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """OpenAI's; llama.cpp takes a `schema` beside "json_object" too, vLLM a structural tag, whose keys stay encoded."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Raw = NULL
    structures: Raw = NULL
    triggers: Raw = NULL
    format: Raw = NULL


class VllmStructuredOutputs(Struct, forbid_unknown_fields=True):
    json: Raw = NULL
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Raw = NULL
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None  # there is none
    disable_any_whitespace: bool | None = None  # there is none unless a pattern allows it
    disable_additional_properties: bool | None = None


_FIELDS = [name for name in StructuredFields.__struct_fields__ if name not in GenerationFields.__struct_fields__]
_FORMAT = msgspec.json.Decoder(ResponseFormat)
_VLLM = msgspec.json.Decoder(VllmStructuredOutputs)
_TEXT = msgspec.json.Decoder(str)


def structured_output(body: StructuredFields) -> StructuredOutput | None:
    """What the answer must look like; None where no field says so. Raises `InvalidRequest` where two fields do."""
    if all(getattr(body, name) in (None, NULL) for name in _FIELDS):
        return None
    # An empty schema or text is llama.cpp's and SGLang's way to say none.
    is_empty = bytes(body.json_schema).replace(b" ", b"") in (b"{}", b'""')
    wishes: dict[str, dict[str, Any]] = {
        "response_format": _response_format(body.response_format),
        "structured_outputs": _structured_outputs(body.structured_outputs),
        "guided_json": _schema("guided_json", body.guided_json),
        "guided_regex": {"regex": body.guided_regex} if body.guided_regex else {},
        "guided_choice": {"choice": tuple(body.guided_choice)} if body.guided_choice else {},
        "guided_grammar": {"grammar": body.guided_grammar} if body.guided_grammar else {},
        "json_schema": {} if is_empty else _schema("json_schema", body.json_schema),
        "grammar": {"grammar": body.grammar} if body.grammar else {},
        "regex": {"regex": body.regex} if body.regex else {},
        "ebnf": {"grammar": body.ebnf} if body.ebnf else {},
    }
    given = {name: wish for name, wish in wishes.items() if wish}
    if len(given) > 1 and given.get("response_format") == {"json_object": True}:
        del given["response_format"]  # the other field says more of the object
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"only one of {' and '.join(given)} may be given", param=list(given)[1])
    ((name, wish),) = given.items()
    if body.guided_whitespace_pattern and ("json_schema" in wish or "json_object" in wish):
        wish = {"whitespace_pattern": body.guided_whitespace_pattern, **wish}
    return StructuredOutput(**wish, param=name)


def _response_format(raw: Raw) -> dict[str, Any]:
    if raw == NULL:
        return {}
    wanted = decode_value(raw, _FORMAT, "response_format")
    if wanted.type not in FORMATS:
        raise InvalidRequest(
            f"response_format.type must be one of {', '.join(FORMATS)}, got {wanted.type[:64]!r}",
            param="response_format.type",
        )
    for name in ResponseFormat.__struct_fields__:
        if name not in ("type", *FORMATS[wanted.type]) and getattr(wanted, name) not in (None, NULL):
            raise InvalidRequest(
                f"response_format.{name} cannot be given with the type {wanted.type}", param=f"response_format.{name}"
            )
    if wanted.type == "json_object":
        return {"json_object": True} if wanted.schema == NULL else _schema("response_format", wanted.schema)
    if wanted.type == "structural_tag":
        return {"structural_tag": bytes(raw).decode()}
    if wanted.type == "text":
        return {}
    if wanted.json_schema is None or wanted.json_schema.schema == NULL:
        raise InvalidRequest(
            'response_format.json_schema must be {"name": …, "schema": {…}}', param="response_format.json_schema"
        )
    return _schema("response_format", wanted.json_schema.schema)


def _structured_outputs(raw: Raw) -> dict[str, Any]:
    if raw == NULL:
        return {}
    wanted = decode_value(raw, _VLLM, "structured_outputs")
    if wanted.disable_additional_properties:
        raise InvalidRequest(
            "structured_outputs.disable_additional_properties is not supported; say additionalProperties: false in the "
            "schema",
            param="structured_outputs.disable_additional_properties",
        )
    wishes: dict[str, Any] = {
        **_schema("structured_outputs.json", wanted.json),
        "regex": wanted.regex,
        "choice": tuple(wanted.choice or ()),
        "grammar": wanted.grammar,
        "json_object": wanted.json_object,
        "structural_tag": _schema("structured_outputs.structural_tag", wanted.structural_tag).get("json_schema"),
    }
    given = {name: wish for name, wish in wishes.items() if wish}
    if given and wanted.whitespace_pattern:
        given["whitespace_pattern"] = wanted.whitespace_pattern
    return given


def _schema(name: str, raw: Raw) -> dict[str, Any]:
    """The text of a schema, which a client may send as an object or as a string of JSON."""
    if raw == NULL:
        return {}
    data = bytes(raw)
    return {"json_schema": decode_value(raw, _TEXT, name) if data.startswith(b'"') else data.decode()}
