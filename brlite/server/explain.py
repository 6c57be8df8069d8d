"""`POST /explain`: the effective values of a request, the source of each, and its cost. The model does not run."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any, Literal

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType, field

from brlite.dialects import DIALECTS, openai_chat, openai_completions
from brlite.dialects.dialect import Dialect
from brlite.dialects.generation import Chat, Generation, TokenIds, in_client_words
from brlite.dialects.json_body import decode_fields
from brlite.engine.admission import admit as admit_to_engine
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Request
from brlite.errors import InvalidRequest
from brlite.http.body import read_body
from brlite.http.keys import API_KEY
from brlite.sampling_params import parameters
from brlite.server.engine_requests import make_requests, with_model_defaults
from brlite.server.generate import CONFIG, decode_call, json_response, loaded
from brlite.server.responses import responses_dialect
from brlite.server.tokens import prompt_text

# Further request names of parameters, besides those of `Generation.field_names`.
ALIASES = {
    "max_tokens": ("max_completion_tokens", "max_output_tokens"),
    "stop_token_ids": ("stop_tokens_ids",),
    "logprobs": ("top_logprobs",),
}
NOT_SHOWN = ("stop_tokens_ids",)  # an alias of stop_token_ids

ValueSource = Literal["request", "generation_config", "default", "server"]


class ExplainedPrompt(Struct):
    text: str
    num_tokens: int
    token_ids: list[int]


class ExplainedValue(Struct):
    """A value and its source: the request, the model's generation config, the parameter's default, or this server's
    config and limits."""

    value: Any
    origin: ValueSource = field(name="from")
    why: str | UnsetType = UNSET


class MemoryForecast(Struct):
    """KV blocks: all, those used now, and the maximum that the call needs, with all its sequences at full length."""

    block_size: int
    num_blocks: int
    num_used_blocks: int
    num_needed_blocks: int
    needed_bytes: int
    fits_now: bool


class QueueForecast(Struct):
    """Sequences now and of this call. Seconds are estimated from the means of earlier requests; null without any."""

    num_running: int
    num_waiting: int
    num_new: int
    max_num_seqs: int
    starts_at_once: bool
    prefill_seconds: float | None
    longest_decode_seconds: float | None


class Explanation(Struct, kw_only=True):
    object: Literal["explanation"] = "explanation"
    endpoint: str
    model: str
    prompts: list[ExplainedPrompt]
    parameters: dict[str, ExplainedValue]
    template_variables: dict[str, ExplainedValue]
    memory: MemoryForecast
    queue: QueueForecast
    warnings: tuple[str, ...]


async def explain(request: web.Request) -> web.Response:
    """The body is a request of any generating endpoint: that of the query parameter `endpoint`, else by its fields."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    body = await read_body(request, limits)
    given = {name for name, raw in decode_fields(body).items() if bytes(raw) != b"null"}
    dialect = _find_dialect(request, given)
    call = decode_call(request, dialect.decode, body)
    async with loaded(request, call.model) as (model, engine):
        call = with_model_defaults(call, engine)
        try:
            made = await make_requests(call, engine, model.spec, "explain", request[API_KEY])
            admitted = [admit_to_engine(each, engine.info, limits) for each in made.requests]
            prompts = call.prompts
            if call.truncation is not None:  # show the truncated prompts, which exist only as tokens
                prompts = tuple(TokenIds(each.prompt_token_ids) for each in made.requests)
            texts = [await prompt_text(prompt, engine, model, tenant) for prompt in prompts]
        except InvalidRequest as error:
            raise in_client_words(error, call.field_names) from None
    of_model = set() if call.params.use_beam_search else engine.sampling_defaults.keys() & call.unset
    clamps = [line for _, lines in admitted for line in lines]
    longest = [max_tokens for max_tokens, _ in admitted]
    variables: dict[str, ExplainedValue] = {}
    if isinstance(chat := call.prompts[0], Chat):
        variables = {name: ExplainedValue(value, "server") for name, value in model.spec.chat_template_kwargs.items()}
        variables |= {name: ExplainedValue(value, "request") for name, value in chat.variables.items()}
    explanation = Explanation(
        endpoint=dialect.path,
        model=model.name,
        prompts=[
            ExplainedPrompt(text, len(each.prompt_token_ids), each.prompt_token_ids)
            for (text, _), each in zip(texts, made.requests, strict=True)
        ],
        parameters=_parameters(call, given, of_model, max(longest), clamps),
        template_variables=variables,
        memory=_memory(made.requests, longest, engine),
        queue=_queue(made.requests, longest, engine),
        warnings=tuple(dict.fromkeys((*call.warnings, *made.warnings, *made.truncations, *clamps))),
    )
    return json_response(explanation)


def _find_dialect(request: web.Request, given: set[str]) -> Dialect:
    responses = responses_dialect(request)
    likely = (
        openai_chat.DIALECT if "messages" in given else responses if "input" in given else openai_completions.DIALECT
    )
    path = request.query.get("endpoint", likely.path)
    by_path = {dialect.path: dialect for dialect in (*DIALECTS, responses)}
    if path not in by_path:
        raise InvalidRequest(f"endpoint must be one of {', '.join(by_path)}, got {path[:64]!r}", param="endpoint")
    return by_path[path]


def _parameters(
    call: Generation, given: Set[str], of_model: Set[str], max_tokens: int, clamps: Iterable[str]
) -> dict[str, ExplainedValue]:
    explained: dict[str, ExplainedValue] = {}
    for name, parameter in parameters().items():
        value = getattr(call.params, name)
        names = (name, call.field_names.get(name, name), *ALIASES.get(name, ()))
        origin: ValueSource = "default"
        if name in of_model:
            origin = "generation_config"
        elif any(each in given for each in names) or value != parameter.default:
            origin = "request"
        if name not in NOT_SHOWN:
            explained[name] = ExplainedValue(value, origin)
    clamp = next(iter(clamps), None)
    if clamp is not None:
        explained["max_tokens"] = ExplainedValue(max_tokens, "server", clamp)
    elif call.params.max_tokens is None:
        why = "half of the context, or what the prompt has left of it"
        explained["max_tokens"] = ExplainedValue(max_tokens, "server", why)
    if call.params.seed is None:
        explained["seed"] = ExplainedValue(None, "default", "a new random one for each request")
    return explained


def _memory(requests: list[Request], longest: list[int], engine: EngineLoop) -> MemoryForecast:
    """The blocks of the requests, each with the `longest` completion that it may have, beside those in use now."""
    info, stats = engine.info, engine.stats
    needed = 0
    for request, max_tokens in zip(requests, longest, strict=True):
        num_prompt_tokens, size = len(request.prompt_token_ids), info.block_size
        num_sequences = request.params.beam_width  # without beam search, the number of completions
        num_shared = num_prompt_tokens // size if num_sequences > 1 else 0
        needed += num_shared + num_sequences * (-(-(num_prompt_tokens + max_tokens) // size) - num_shared)
    return MemoryForecast(
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        num_used_blocks=stats.num_used_blocks,
        num_needed_blocks=needed,
        needed_bytes=needed * (info.kv_bytes // info.num_blocks if info.num_blocks else 0),
        fits_now=needed <= info.num_blocks - stats.num_used_blocks,
    )


def _queue(requests: list[Request], longest: list[int], engine: EngineLoop) -> QueueForecast:
    """What runs and waits before the requests, and how long they take if it goes on as until now."""
    info, stats = engine.info, engine.stats
    num_new = sum(request.params.beam_width for request in requests)
    num_computed = stats.prompt_tokens - stats.cached_prompt_tokens
    num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    num_gaps = sum(stats.inter_token_latency.counts)
    return QueueForecast(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_new=num_new,
        max_num_seqs=info.max_num_seqs,
        starts_at_once=stats.num_running + stats.num_waiting + num_new <= info.max_num_seqs,
        prefill_seconds=stats.prefill_time.total / num_computed * num_prompt_tokens if num_computed else None,
        longest_decode_seconds=stats.inter_token_latency.total / num_gaps * max(longest) if num_gaps else None,
    )
