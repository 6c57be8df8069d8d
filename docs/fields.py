"""Writes docs/fields.md: `python docs/fields.py`.

The rows come from `brlite/dialects/fields.py`, types from the request structs, ranges and defaults of sampling
parameters from `brlite/sampling_params/params.py`. tests/dialects/test_field_table.py compares the page with this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from brlite.dialects.anthropic import MessagesRequest
from brlite.dialects.embeddings import EmbeddingRequest
from brlite.dialects.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    INFILL,
    MESSAGES,
    NOT_DECODED,
    OBEYED,
    OF_GENERATION,
    OF_ONE_ENDPOINT,
    OTHER_NAMES,
    RERANK,
    RESPONSES,
    SCORE,
    TOKENIZE,
    UNUSUAL,
)
from brlite.dialects.llama_infill import InfillRequest
from brlite.dialects.object_fields import Shape, shape_of
from brlite.dialects.openai_chat import ChatCompletionRequest
from brlite.dialects.openai_completions import CompletionRequest
from brlite.dialects.openai_tokens import DetokenizeRequest, TokenizeRequest
from brlite.dialects.responses import ResponsesRequest
from brlite.dialects.scores import RerankRequest, ScoreRequest
from brlite.sampling_params import parameters

REQUESTS: dict[str, type[msgspec.Struct]] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    EMBEDDINGS: EmbeddingRequest,
    RERANK: RerankRequest,
    SCORE: ScoreRequest,
    MESSAGES: MessagesRequest,
    INFILL: InfillRequest,
    TOKENIZE: TokenizeRequest,
    DETOKENIZE: DetokenizeRequest,
}
HEAD = """\
# The fields of requests

Every field of the OpenAI, Anthropic, vLLM, llama.cpp and SGLang APIs, and what brlite does with it. A field that is in
none of these tables is ignored, and the answer's `warnings` name it. null is the default of every optional field.
Numbers and lists may have a [limit](refusals.md#limits) below the largest value here.
With `strict: true` (in a request, or `server.strict` for all) each warning is a 400 instead. A field that is given
twice in one object is a 400, and so is an object of more than 1,024 fields.

This page is printed by `docs/fields.py` from `brlite/dialects/fields.py`; do not edit it.

## Obeyed

`chat` is `/v1/chat/completions`, `completions` is `/v1/completions`, `responses` is `/v1/responses`,
`embeddings` is `/v1/embeddings` and `/pooling`, `rerank` is also `/v2/rerank` and `/v1/reranking`,
`score` is `/v1/score`, `messages` is `/v1/messages`, `infill` is `/infill`.
[Sampling parameters](sampling.md) have a page of their own.

| field | at | value | default | known to | |
|---|---|---|---|---|---|
"""
OTHER = """
Other APIs' names of these, in chats, completions and infills:

| name | known to | is | |
|---|---|---|---|
"""
OTHERS = """
## Accepted without effect, or refused

A value that cannot change the answer is accepted; if it asks for something that does not happen, and the field is
neither OpenAI's nor Anthropic's, the answer's `warnings` say so. Any other is a 400, `unsupported_parameter`, that
names the field.

| field | known to | accepted | instead |
|---|---|---|---|
"""
ONE_ENDPOINT = """
The same for fields that only another endpoint obeys:

| field | known to | accepted | instead |
|---|---|---|---|
"""
GENERATION = """
The same for fields that only some endpoints obey, and that bound what is generated. Where nothing is, they are a
warning:

| field | known to | accepted | instead |
|---|---|---|---|
"""
OBJECTS = """
## In the objects of a request

The same holds in objects, such as a message or a tool: a field that this server does not know is ignored, and the
answer's `warnings` name it (`tools[].frob`) unless it is null. Objects of free content may have any fields: `metadata`,
JSON schemas, arguments of calls, `chat_template_kwargs`, `documents` of a chat. These fields change no answer, and are
accepted without a warning, since clients send them by default or send back what an answer had:

| object | at | fields |
|---|---|---|
"""
KINDS: dict[type[Any], str] = {
    inspect.IntType: "integer",
    inspect.FloatType: "number",
    inspect.StrType: "string",
    inspect.BoolType: "true or false",
    inspect.ListType: "list",
    inspect.DictType: "object",
    inspect.StructType: "object",
    inspect.RawType: "string or object",
    inspect.AnyType: "any",
}
PARAMETERS = parameters()


def main() -> None:
    (Path(__file__).parent / "fields.md").write_text(render(), encoding="utf-8")


def render() -> str:
    """The whole page as Markdown."""
    obeyed_names = {name for row in OBEYED for name in row.names.split()}
    undecoded = {name: row.endpoints for row in UNUSUAL for name in row.names.split()}
    obeyed = []
    for row in (*OBEYED, *UNUSUAL):
        for name in row.names.split():
            if row in UNUSUAL and name in obeyed_names:
                continue  # it stands among those, with these endpoints
            endpoints = row.endpoints if row in UNUSUAL else (*row.endpoints, *undecoded.get(name, ()))
            note = row.note or (PARAMETERS[name].text if name in PARAMETERS else "")
            obeyed.append(
                f"| `{name}` | {', '.join(endpoints)} | {describe_value(name, endpoints[0])} | {show_default(name)} | "
                f"{', '.join(row.known_to)} | {note} |\n"
            )
    other_names = [
        f"| `{other.name}` | {', '.join(other.known_to)} | `{other.parameter}` | {other.note} |\n"
        for other in OTHER_NAMES
    ]
    obeyed += [OTHER, *other_names]
    others = [OTHERS, describe_rows(NOT_DECODED), ONE_ENDPOINT, describe_rows(OF_ONE_ENDPOINT)]
    return "".join([HEAD, *obeyed, *others, GENERATION, describe_rows(OF_GENERATION), OBJECTS, *describe_objects()])


def describe_value(name: str, endpoint: str) -> str:
    parameter = PARAMETERS.get(name)
    if parameter is not None and name != "logprobs":
        return parameter.allowed
    fields = {field.name: field.type for field in msgspec.structs.fields(REQUESTS[endpoint])}
    return describe_type(inspect.type_info(fields[name]))


def describe_type(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f'"{value}"' for value in kind.values)
    if isinstance(kind, inspect.Metadata):
        return "object" if "holds" in (kind.extra or {}) else describe_type(kind.type)
    if isinstance(kind, inspect.UnionType):
        kinds = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
        has_number = any(isinstance(each, inspect.FloatType) for each in kinds)
        kinds = [each for each in kinds if not (has_number and isinstance(each, inspect.IntType))]
        return " or ".join(dict.fromkeys(map(describe_type, kinds)))
    return KINDS[type(kind)]


def describe_objects() -> list[str]:
    """Rows for the objects that may have fields without effect, each by the first of its paths."""
    endpoints: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for endpoint, request in REQUESTS.items():
        found, seen = [("", shape_of(request))], set[tuple[str, ...]]()
        while found:  # an object may have others of its kind
            path, shape = found.pop(0)
            if shape.no_effect and shape.no_effect not in seen:
                endpoints.setdefault((path, shape.no_effect), []).append(endpoint)
            if not shape.no_effect or shape.no_effect not in seen:
                found[:0] = inner_shapes(path, shape)
            seen.add(shape.no_effect)
    return [
        f"| `{path}` | {', '.join(at)} | {', '.join(f'`{name}`' for name in names)} |\n"
        for (path, names), at in endpoints.items()
    ]


def inner_shapes(path: str, shape: Shape) -> list[tuple[str, Shape]]:
    items = [] if shape.item is None else [(f"{path}[]", shape.item)]
    return [*items, *((f"{path}.{name}".lstrip("."), inner) for name, inner in shape.inner.items())]


def show_default(name: str) -> str:
    default = PARAMETERS[name].default if name in PARAMETERS else None
    if name == "max_tokens":
        return "completions, infill: 16"
    return "" if default in (None, {}, ()) else f"`{json.dumps(default)}`"


def describe_rows(rows: tuple[Any, ...]) -> str:
    lines = []
    for row in rows:
        names = ", ".join(f"`{name}`" for name in row.names.split())
        values = "any value" if row.neutral is None else ", ".join(f"`{json.dumps(each)}`" for each in row.neutral)
        if row.switch:
            values = f"any value where `{row.switch}` is off"
        instead = " or ".join(row.instead.split())
        lines.append(f"| {names} | {', '.join(row.known_to)} | {values or 'null'} | {instead} |\n")
    return "".join(lines)


if __name__ == "__main__":
    main()
