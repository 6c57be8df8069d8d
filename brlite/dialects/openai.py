"""The common part of chat and completion requests: fields, checks, structured output.

Names, defaults and shapes are OpenAI's (API reference for chat, completions and models), with the vLLM extensions that
the manual names. `fields.py` lists the fields that are recognized but not decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Struct, structs

from brlite.config.options import LimitsConfig
from brlite.dialects.fields import Undecoded, not_supported, read_undecoded
from brlite.dialects.generation import Priority, Timeout, Truncation, in_client_words
from brlite.dialects.json_body import check_num_entries, decode_value, given_twice
from brlite.dialects.object_fields import holds
from brlite.errors import InvalidRequest
from brlite.sampling_params import MODEL_DEFAULTS, SamplingParams, StructuredOutput

NULL = msgspec.Raw(b"null")  # the value of an absent field that stays encoded
# The types of `response_format`, with the keys that each may have.
RESPONSE_FORMATS = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers", "format"),
}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # refused if true


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# JSON has one number type, so 6.0 may stand for 6.
Whole = int | float


class GenerationFields(Struct, kw_only=True):
    """Fields that all dialects have, under the same names. `None` means the default, as in OpenAI's schema."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Whole | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    timeout: Timeout | None = None
    priority: Priority | None = None
    strict: bool | None = None


class StructuredFields(GenerationFields, kw_only=True):
    """The common fields, and those that constrain the answer. Values that may be objects stay encoded until needed."""

    response_format: Annotated[msgspec.Raw, holds(ResponseFormat)] = NULL
    guided_json: msgspec.Raw = NULL
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    structured_outputs: Annotated[msgspec.Raw, holds(VllmStructuredOutputs)] = NULL
    json_schema: msgspec.Raw = NULL
    grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None


class JsonSchemaFormat(Struct, forbid_unknown_fields=True):
    """`schema` is enforced with or without `strict`; `name` and `description` have no effect."""

    name: str | None = None
    description: str | None = None
    schema: msgspec.Raw = NULL
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True):
    """OpenAI's format. llama.cpp adds `schema` for the type "json_object", vLLM "structural_tag" with the keys that
    stay encoded."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: msgspec.Raw = NULL
    structures: msgspec.Raw = NULL
    triggers: msgspec.Raw = NULL
    format: msgspec.Raw = NULL


class VllmStructuredOutputs(Struct, forbid_unknown_fields=True):
    json: msgspec.Raw = NULL
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: msgspec.Raw = NULL
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None  # no effect: there is no fallback
    disable_any_whitespace: bool | None = None  # no effect: only a pattern allows white space
    disable_additional_properties: bool | None = None


class SamplingFields(StructuredFields, kw_only=True):
    """The fields that chats and completions have in common."""

    n: Whole | None = None
    best_of: Whole | None = None
    use_beam_search: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = None
    min_tokens: Whole | None = None
    top_n_sigma: float | None = None
    logit_bias: dict[str, Any] | None = None  # the sampling parameter checks each entry
    stop: str | list[str] | None = None
    stop_token_ids: list[Whole] | None = None
    stop_tokens_ids: list[Whole] | None = None
    allowed_token_ids: list[Whole] | None = None
    bad_words: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Whole | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Whole | None = None


# The field of `LimitsConfig` that bounds the number of entries of each list or map.
_LIST_LIMITS = {
    "stop": "max_stop_strings",
    "stop_token_ids": "max_stop_strings",
    "dry_sequence_breakers": "max_stop_strings",
    "stop_tokens_ids": "max_stop_strings",
    "logit_bias": "max_logit_bias",
    "allowed_token_ids": "max_logit_bias",
    "bad_words": "max_bad_words",
}
_SAMPLING_TYPES = {field.name: field.type for field in structs.fields(SamplingFields)}
_structured_fields = attrgetter(*StructuredFields.__struct_fields__[len(GenerationFields.__struct_fields__) :])
_NOT_STRUCTURED = _structured_fields(StructuredFields())
_RESPONSE_FORMAT = msgspec.json.Decoder(ResponseFormat)
_STRUCTURED_OUTPUTS = msgspec.json.Decoder(VllmStructuredOutputs)
_TEXT = msgspec.json.Decoder(str)
_ANYTHING = msgspec.json.Decoder()


def take_undecoded(
    body: GenerationFields, undecoded: Mapping[str, msgspec.Raw], own: Collection[str] = ()
) -> Undecoded:
    """Read the fields that the body's struct lacks. For an alias, the struct's field is set.

    Aliases of the `own` parameters are not read. Raises `InvalidRequest` for a field that would change the answer and
    is not implemented, and for two names of one field.
    """
    more = read_undecoded(undecoded, body.__struct_fields__, own)
    for parameter, value in more.sampling.items():
        if parameter == "logprobs":
            _take_num_logprobs(body, more.field_names[parameter], value)
        elif parameter in body.__struct_fields__:
            name = more.field_names.get(parameter, parameter)
            try:
                value = msgspec.convert(value, _SAMPLING_TYPES[parameter])
            except msgspec.ValidationError as error:
                raise InvalidRequest(f"Invalid value for {name!r}: {error}", param=name) from None
            if getattr(body, parameter) not in (None, value):
                raise given_twice(name, parameter)
            setattr(body, parameter, value)
    rest = {name: value for name, value in more.sampling.items() if name not in body.__struct_fields__}
    return more._replace(sampling=rest)


def _take_num_logprobs(body: GenerationFields, name: str, value: Any) -> None:
    """Set the number of alternatives: `top_logprobs` in a chat, else `logprobs`. 0 means no logprobs."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"{name} must be a 64-bit integer, at least 0, got {value!r:.64}", param=name)
    number = "top_logprobs" if "top_logprobs" in body.__struct_fields__ else "logprobs"
    if getattr(body, number) not in (None, value) or body.logprobs not in (None, True, value):  # type: ignore[attr-defined]  # both kinds have it
        raise given_twice(name, number)
    if value:
        body.logprobs = True  # type: ignore[attr-defined]
        setattr(body, number, value)


def _check_best_of(best_of: Whole, body: SamplingFields, limits: LimitsConfig) -> None:
    least, key = body.n or 1, "max_beam_width" if body.use_beam_search else "max_n"
    most = getattr(limits, key)
    if best_of != int(best_of) or not least <= best_of <= max(most, least):
        raise InvalidRequest(
            f"best_of must be a whole number from n, which is {least}, to {most} on this server "
            f"(limits.{key}), got {best_of}",
            param="best_of",
        )
    if best_of > least and body.stream and not body.use_beam_search:
        raise InvalidRequest(
            f"best_of must be n, which is {least}, in a stream: which answers are the best is known at their end",
            param="best_of",
        )


def structured_output(body: StructuredFields) -> StructuredOutput | None:
    """The constraint on the answer; None if no field has one. Raises `InvalidRequest` if several fields have one.

    A schema stays the JSON text that the client sent, because the order of its keys matters.
    """
    if _structured_fields(body) == _NOT_STRUCTURED:
        return None
    # In llama.cpp and SGLang an empty schema or text means none.
    is_empty = decode_value(body.json_schema, _ANYTHING, "json_schema") in ({}, "")
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
        del given["response_format"]  # the other field is more specific
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequest(f"only one of {' and '.join(given)} may be given", param=list(given)[1])
    ((name, wish),) = given.items()
    if body.guided_whitespace_pattern and ("json_schema" in wish or "json_object" in wish):
        wish = {"whitespace_pattern": body.guided_whitespace_pattern, **wish}
    return StructuredOutput(**wish, param=name)


def _response_format(raw: msgspec.Raw) -> dict[str, Any]:
    if raw == NULL:
        return {}
    wanted = decode_value(raw, _RESPONSE_FORMAT, "response_format")
    if wanted.type not in RESPONSE_FORMATS:
        raise InvalidRequest(
            f"response_format.type must be one of {', '.join(RESPONSE_FORMATS)}, got {wanted.type[:64]!r}",
            param="response_format.type",
        )
    for name in ResponseFormat.__struct_fields__:
        if name not in ("type", *RESPONSE_FORMATS[wanted.type]) and getattr(wanted, name) not in (None, NULL):
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


def _structured_outputs(raw: msgspec.Raw) -> dict[str, Any]:
    if raw == NULL:
        return {}
    wanted = decode_value(raw, _STRUCTURED_OUTPUTS, "structured_outputs")
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


def _schema(name: str, raw: msgspec.Raw) -> dict[str, Any]:
    """The JSON text of a schema, which a client may send as an object or as a string, under `json_schema`."""
    if raw == NULL:
        return {}
    data = bytes(raw)
    return {"json_schema": decode_value(raw, _TEXT, name) if data.startswith(b'"') else data.decode()}


@functools.cache
def _parameters_of(kind: type[GenerationFields]) -> tuple[list[str], Callable[[GenerationFields], Iterable[Any]]]:
    """The names of the fields that are sampling parameters, and a function that gets their values."""
    names = [name for name in SamplingParams.__struct_fields__ if name in kind.__struct_fields__]
    return names, attrgetter(*names)


def sampling_params(
    body: GenerationFields, limits: LimitsConfig, field_names: Mapping[str, str], **more: Any
) -> SamplingParams:
    """The sampling parameters in the body's fields, and `more`, which override them.

    Raises `InvalidRequest` with the client's field name, also for a list that is too long.
    """
    names, values_of = _parameters_of(type(body))
    given = {name: value for name, value in zip(names, values_of(body), strict=True) if value is not None} | more
    for name, value in given.items():  # before any code iterates over a list: a long one would block the event loop
        if name in _LIST_LIMITS and isinstance(value, (list, dict)):
            check_num_entries(field_names.get(name, name), len(value), limits, _LIST_LIMITS[name])
    try:
        return SamplingParams(**given)
    except InvalidRequest as error:
        raise in_client_words(error, field_names) from None


def generation_fields(body: GenerationFields) -> dict[str, Any]:
    """The fields of a `Generation` that all dialects read in the same way."""
    return {
        "model": body.model,
        "is_streamed": bool(body.stream),
        "cache_salt": body.cache_salt or "",
        "timeout_seconds": body.timeout,
        "priority": body.priority,
        "is_strict": bool(body.strict),
        "unset": tuple([name for name in MODEL_DEFAULTS if getattr(body, name) is None]),
    }


def completion_fields(body: SamplingFields, more: Undecoded, num_prompts: int, limits: LimitsConfig) -> dict[str, Any]:
    """The fields of a `Generation` that chats and completions read in the same way.

    Raises `InvalidRequest` for invalid values or combinations of the body's fields.
    """
    if body.best_of is not None:
        _check_best_of(body.best_of, body, limits)
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs is not available in a stream", param="prompt_logprobs")
    options = body.stream_options
    if options is not None:
        if options.include_obfuscation:
            raise not_supported("stream_options.include_obfuscation")
        if options.continuous_usage_stats and not options.include_usage:
            raise InvalidRequest(
                "continuous_usage_stats needs include_usage to be true", param="stream_options.continuous_usage_stats"
            )
        if options.include_usage and not body.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    name, count = ("n", body.n or 1) if body.best_of is None else ("best_of", body.best_of)
    num_sequences = num_prompts * count
    if num_sequences > limits.max_sequences:
        raise InvalidRequest(
            f"prompts times {name} must be at most {limits.max_sequences} on this server (limits.max_sequences), "
            f"got {num_sequences}",
            param=name,
        )
    cut = body.truncate_prompt_tokens
    return {
        **generation_fields(body),
        "include_usage": options is not None and bool(options.include_usage),
        "continuous_usage": options is not None and bool(options.continuous_usage_stats),
        "names_are_ids": bool(body.return_tokens_as_token_ids),
        "truncation": None if cut is None else truncation(cut, body.truncation_side),
        "warnings": more.warnings,
        "returns_token_ids": bool(body.return_token_ids),
        "returns_prompt_logprobs": body.prompt_logprobs is not None,
    }


def truncation(wanted: Whole, side: str | None) -> Truncation:
    """Decode `truncate_prompt_tokens`. Raises `InvalidRequest`."""
    if wanted != int(wanted) or (wanted != -1 and wanted < 1):
        raise InvalidRequest(
            f"truncate_prompt_tokens must be -1 or a whole number of at least 1, got {wanted}",
            param="truncate_prompt_tokens",
        )
    return Truncation(None if wanted == -1 else int(wanted), keeps_start=side == "right")
