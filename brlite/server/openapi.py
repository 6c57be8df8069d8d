"""`/openapi.json`: the endpoints as OpenAPI 3.1, generated from the request structs and the table of fields.

A field's type, range and default are those that the decoder checks. An endpoint that is not in `DETAILS` is listed only
with its path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

import brlite
from brlite.dialects.anthropic import MessagesRequest
from brlite.dialects.anthropic_encoder import ShownMessage
from brlite.dialects.embeddings import EmbeddingAnswer, EmbeddingRequest, PoolingAnswer
from brlite.dialects.errors import is_anthropic
from brlite.dialects.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    INFILL,
    MESSAGES,
    NOT_DECODED,
    OBEYED,
    RERANK,
    RESPONSES,
    SCORE,
    TOKENIZE,
)
from brlite.dialects.llama_infill import InfillAnswer, InfillRequest
from brlite.dialects.openai_chat import ChatChunk, ChatCompletion, ChatCompletionRequest
from brlite.dialects.openai_completions import Completion, CompletionRequest
from brlite.dialects.openai_tokens import (
    AppliedTemplate,
    DetokenizeAnswer,
    DetokenizeRequest,
    InputTokens,
    MessageTokens,
    RenderedRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from brlite.dialects.responses import ResponsesRequest
from brlite.dialects.responses_events import Item
from brlite.dialects.scores import RerankAnswer, RerankRequest, ScoreAnswer, ScoreRequest, TeiRank
from brlite.sampling_params import MAX, parameters
from brlite.server.explain import Explanation
from brlite.server.model_actions import ModelAction, ModelActionDone
from brlite.server.model_list import ModelCard, ModelList, ModelProps, SlotState

REF = "#/components/schemas/{name}"


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct):
    """OpenAI's error object, with the flat keys of vLLM 0.4.0.post1 beside it."""

    error: ErrorDetail
    object: str
    message: str
    type: str
    param: str | None
    code: int


class MessagesErrorDetail(Struct):
    type: str
    message: str
    param: str | UnsetType = UNSET
    details: dict[str, str] | UnsetType = UNSET


class MessagesErrorAnswer(Struct):
    """Anthropic's error object, below /v1/messages."""

    type: Literal["error"]
    error: MessagesErrorDetail


class ResponseAnswer(Struct):
    """A response of the Responses API; docs/http-api.md says what else it has."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[Item]
    usage: dict[str, Any] | None


class ItemList(Struct):
    object: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BodyFields(NamedTuple):
    """A request's struct, and the name of its endpoint in the table of fields."""

    kind: type[Struct]
    endpoint: str


class Operation(NamedTuple):
    """The input and output of an endpoint. It takes one of `bodies`, and any of the parameters in `query`."""

    summary: str
    bodies: tuple[BodyFields | type[Struct], ...] = ()
    answer: Any = None
    chunk: Any = None  # the type of each event's data in a stream
    query: tuple[str, ...] = ()


CHAT_BODY = BodyFields(ChatCompletionRequest, CHAT)
COMPLETION_BODY = BodyFields(CompletionRequest, COMPLETIONS)
RESPONSE_BODY = BodyFields(ResponsesRequest, RESPONSES)
EMBEDDING_BODY = BodyFields(EmbeddingRequest, EMBEDDINGS)
RERANK_BODY = BodyFields(RerankRequest, RERANK)
RERANK_ANSWER = RerankAnswer | list[TeiRank]  # the second for a request with `texts`
SCORE_BODY = BodyFields(ScoreRequest, SCORE)
MESSAGES_BODY = BodyFields(MessagesRequest, MESSAGES)
INFILL_BODY = BodyFields(InfillRequest, INFILL)

DETAILS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation("Answer a chat", (CHAT_BODY,), ChatCompletion, ChatChunk),
    ("post", "/v1/completions"): Operation("Continue a text", (COMPLETION_BODY,), Completion, Completion),
    ("post", "/v1/responses"): Operation("Create a response", (RESPONSE_BODY,), ResponseAnswer, dict[str, Any]),
    ("get", "/v1/responses/{response_id}"): Operation(
        "A stored response", answer=ResponseAnswer, query=("stream", "starting_after")
    ),
    ("delete", "/v1/responses/{response_id}"): Operation("Forget a stored response", answer=dict[str, Any]),
    ("post", "/v1/responses/{response_id}/cancel"): Operation("End a background response", answer=ResponseAnswer),
    ("get", "/v1/responses/{response_id}/input_items"): Operation(
        "What went into a stored response", answer=ItemList, query=("order", "after", "limit")
    ),
    ("post", "/v1/responses/input_tokens"): Operation(
        "Count the tokens of a response's input", (RESPONSE_BODY,), InputTokens
    ),
    ("post", "/v1/embeddings"): Operation("Texts to vectors", (EMBEDDING_BODY,), EmbeddingAnswer),
    ("post", "/pooling"): Operation("The same in vLLM's shape", (EMBEDDING_BODY,), PoolingAnswer),
    ("post", "/v1/rerank"): Operation("Documents by relevance to a query", (RERANK_BODY,), RERANK_ANSWER),
    ("post", "/v2/rerank"): Operation("The same", (RERANK_BODY,), RERANK_ANSWER),
    ("post", "/v1/reranking"): Operation("The same, by llama.cpp's name", (RERANK_BODY,), RERANK_ANSWER),
    ("post", "/v1/score"): Operation("How well texts go together", (SCORE_BODY,), ScoreAnswer),
    ("post", "/v1/messages"): Operation("Answer a chat", (MESSAGES_BODY,), ShownMessage, dict[str, Any]),
    ("post", "/infill"): Operation("Fill a gap in a text", (INFILL_BODY,), InfillAnswer, InfillAnswer),
    ("post", "/v1/messages/count_tokens"): Operation("Count the tokens of a chat", (MESSAGES_BODY,), MessageTokens),
    ("post", "/v1/chat/completions/render"): Operation("A chat as the engine gets it", (CHAT_BODY,), RenderedRequest),
    ("post", "/v1/completions/render"): Operation(
        "Completions as the engine gets them", (COMPLETION_BODY,), list[RenderedRequest]
    ),
    ("post", "/apply-template"): Operation("A chat as text", (CHAT_BODY,), AppliedTemplate),
    ("post", "/tokenize"): Operation(
        "Text or a chat to tokens", (BodyFields(TokenizeRequest, TOKENIZE),), TokenizeAnswer
    ),
    ("post", "/detokenize"): Operation(
        "Tokens to text", (BodyFields(DetokenizeRequest, DETOKENIZE),), DetokenizeAnswer
    ),
    ("post", "/explain"): Operation(
        "What a request would come to, and where each value is from",
        (CHAT_BODY, COMPLETION_BODY, RESPONSE_BODY, MESSAGES_BODY, INFILL_BODY),
        Explanation,
        query=("endpoint",),
    ),
    ("delete", "/v1/requests/{request_id}"): Operation("End a running request", answer=dict[str, Any]),
    ("get", "/v1/models"): Operation("The models that the key may use", answer=ModelList),
    ("get", "/v1/models/{name}"): Operation("One model", answer=ModelCard),
    ("get", "/tokenizer_info"): Operation("The tokenizer", answer=TokenizerInfo, query=("model",)),
    ("post", "/models/load"): Operation("Load a model", (ModelAction,), ModelActionDone),
    ("post", "/models/unload"): Operation("Unload a model", (ModelAction,), ModelActionDone),
    ("get", "/props"): Operation("llama.cpp's numbers of a model", answer=ModelProps, query=("model",)),
    ("get", "/slots"): Operation("Running requests, as llama.cpp's slots", answer=list[SlotState], query=("model",)),
    ("get", "/load"): Operation("Requests in progress", answer=dict[str, int]),
    ("get", "/version"): Operation("The version", answer=dict[str, str]),
    ("get", "/health"): Operation("Is the process alive", answer=dict[str, str]),
    **{(method, "/ping"): Operation("The same, as SageMaker asks") for method in ("get", "post")},
    ("get", "/openapi.json"): Operation("This API, for programs", answer=dict[str, Any]),
    ("get", "/docs"): Operation("This page"),
    ("get", "/ready"): Operation("Can it serve", answer=dict[str, Any]),
    ("get", "/metrics"): Operation("Metrics for Prometheus", query=("upstream",)),
}
PARAMETERS = parameters()
NOTES = {name: row.note for row in OBEYED for name in row.names.split()}


def document(endpoints: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The OpenAPI document of `endpoints`, pairs of method and path."""
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for method, path in endpoints:
        operation = DETAILS.get((method, path), Operation(path))
        paths.setdefault(path, {})[method] = _operation(operation, method, path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "brlite",
            "version": brlite.__version__,
            "description": "Paths also work without /v1, and with doubled or trailing slashes.",
        },
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


class Schemas:
    """JSON Schemas of types; those of structs are collected in `components`."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        (schema,), components = msgspec.json.schema_components([kind], ref_template=REF)
        self.components |= components
        return schema

    def of_request(self, body: BodyFields) -> dict[str, Any]:
        """The schema of a request body: all supported fields, and those that are accepted only with neutral values."""
        properties: dict[str, Any] = {}
        required = []
        for field in msgspec.structs.fields(body.kind):
            schema, note = self.of(field.type), NOTES.get(field.name, "")
            parameter = PARAMETERS.get(field.name)
            if parameter is not None and not (body.endpoint == CHAT and field.name == "logprobs"):
                bounded = {name: value for name, value in self.of(parameter.type).items() if value not in (-MAX, MAX)}
                note = note or bounded.pop("description")
                if "type" in bounded and bounded["type"] in ("integer", "number"):
                    schema = {"anyOf": [bounded, {"type": "null"}]}
            properties[field.encode_name] = {**schema, **({"description": note} if note else {})}
            if field.required:
                required.append(field.encode_name)
        for row in NOT_DECODED:
            for name in row.names.split():
                if name in properties:
                    continue
                if row.neutral is None:
                    properties[name] = {"description": "accepted without effect"}
                elif row.switch:
                    properties[name] = {
                        "description": f"accepted without effect where {row.switch} is off; else refused"
                    }
                else:
                    remedy = f"; use {row.instead}" if row.instead else ""
                    description = f"any other value is refused{remedy}"
                    properties[name] = {"enum": [None, *row.neutral], "description": description}
        name = body.kind.__name__
        self.components[name] = {"type": "object", "properties": properties, "required": required}
        return {"$ref": REF.format(name=name)}


def _operation(operation: Operation, method: str, path: str, schemas: Schemas) -> dict[str, Any]:
    content: Mapping[str, Any] = {}
    if operation.answer is not None:
        content = {"application/json": {"schema": schemas.of(operation.answer)}}
    elif path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
    if operation.chunk is not None:
        name = schemas.of(operation.chunk).get("$ref", "an object").rpartition("/")[2]
        description = f"With stream: true. The data of each event is {name}, as JSON."
        content = {**content, "text/event-stream": {"schema": {"type": "string", "description": description}}}
    error_answer = schemas.of(MessagesErrorAnswer if is_anthropic(path) else ErrorAnswer)
    error = {"description": "An error", "content": {"application/json": {"schema": error_answer}}}
    in_path = re.findall(r"{(\w+)}", path)
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"),
        "parameters": [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path),
            *({"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query),
        ],
        "responses": {"200": {"description": "OK", "content": content}, "4XX": error, "5XX": error},
    }
    bodies = [
        schemas.of_request(body) if isinstance(body, BodyFields) else schemas.of(body) for body in operation.bodies
    ]
    if bodies:
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described
