"""Makes the engine's requests from the prompts of a call: renders, encodes and truncates them."""

from __future__ import annotations

import operator

import msgspec

from brlite.chat.reply import find_reply_format
from brlite.chat.turns import NO_EXTRAS
from brlite.config.options import ModelSpec
from brlite.dialects.generation import Chat, Generation, Infill, Prompt, Text, TokenIds, Truncation, refuse_warnings
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Request
from brlite.errors import InvalidRequest
from brlite.http.api_key import ApiKey
from brlite.sampling_params import SamplingParams
from brlite.server.chat_replies import ChatReplies, template_extras
from brlite.tokenizer import Tokenizer
from brlite.tokenizer.infill import InfillText

FILES_AS_TEXT = (
    "other files stand before the prompt as plain text, without their names: the model's vocabulary has no token for "
    "files, such as <|file_sep|>"
)
_template_fields = operator.attrgetter("tools", "documents", "variables", "reasoning_effort", "reasoning_hint")


class EngineRequests(msgspec.Struct, frozen=True):
    """One request for each prompt, in order, and the reader of the replies.

    `warnings` name ignored fields; `truncations` name the prompts that were truncated, which the call allows.
    """

    requests: list[Request]
    warnings: list[str]
    truncations: list[str]
    replies: ChatReplies | None


async def make_requests(
    call: Generation, engine: EngineLoop, spec: ModelSpec, answer_id: str, key: ApiKey
) -> EngineRequests:
    """The requests of a call. Raises `InvalidRequest`.

    They share one turn of the key's tenant in the queue. Only the first can fail by the queue timeout. Of a strict
    call the first of the `warnings` is raised.
    """
    requests, warnings, truncations, tenant = list[Request](), list[str](), list[str](), key.tenant
    replies = make_replies(call, engine.tokenizer, spec)
    params = call.params if call.params.best_of is None else call.params.for_all_answers()
    if isinstance(call.prompts[0], Infill):  # then all prompts are of this type
        params = _infill_params(params, call.prompts[0], engine.tokenizer, warnings)
    grammar = bad_words = None
    if params.structured is not None and replies is None:
        grammar = await engine.compile(params.structured, tenant=tenant)
    if params.bad_words:
        bad_words = await engine.prompts.encode_bad_words(params, tenant=tenant)
    for index, prompt in enumerate(call.prompts):
        room = 1 if call.truncation is None else None
        token_ids, ignored = await encode(prompt, engine, tenant, spec=spec, room=room)
        warnings += ignored
        kept = token_ids if call.truncation is None else _truncated(token_ids, call, call.truncation, engine)
        is_cut = len(kept) < len(token_ids)
        if is_cut:
            truncations.append(f"a prompt of {len(token_ids)} tokens was cut to {len(kept)} by truncate_prompt_tokens")
        requests.append(
            Request(
                request_id=f"{answer_id}-{index}",
                prompt=prompt.text if isinstance(prompt, Text) and not is_cut else None,  # it has to match the tokens
                prompt_token_ids=kept,
                params=params,
                cache_salt=call.cache_salt,
                tenant=tenant,
                weight=key.weight,
                priority=key.priority if call.priority is None else call.priority,
                group=answer_id,
                is_exempt_from_queue_timeout=index > 0,
                grammar=grammar,
                bad_words=bad_words,
                processors=await engine.make_processors(params, tenant=tenant) if params.logits_processors else None,
                is_strict=call.is_strict,
            )
        )
    if replies is not None:
        replies.begin(requests[0].prompt_token_ids)
        requests[0] = await _constrained(requests[0], replies, engine, warnings)
    if call.is_strict:
        refuse_warnings(warnings)
    return EngineRequests(requests, warnings, truncations, replies)


def with_model_defaults(call: Generation, engine: EngineLoop) -> Generation:
    """The call, with the model's defaults for the sampling parameters that the client did not give."""
    params = call.params.with_defaults(engine.sampling_defaults, call.unset)
    return msgspec.structs.replace(call, params=params)


def make_replies(call: Generation, tokenizer: Tokenizer, spec: ModelSpec) -> ChatReplies | None:
    """The reader of the replies of a call. None if they are plain text."""
    chat, chat_format = call.prompts[0], tokenizer.chat_format
    if not isinstance(chat, Chat) or chat_format is None:
        return None
    can = chat_format.capabilities
    names = (spec.tool_parser, spec.reasoning_parser)
    if call.tool_choice.mode == "none" and names == ("auto", "auto") and not (can.reasoning_marks or can.marks_content):
        return None
    reply_format = find_reply_format(chat_format, spec.tool_parser, spec.reasoning_parser)
    has_calls = call.tool_choice.mode != "none" or reply_format.reads_all
    has_reasoning = reply_format.marks is not None and (call.splits_reasoning or call.params.structured is not None)
    return ChatReplies(call, chat, tokenizer, reply_format) if has_calls or has_reasoning else None


def _infill_params(params: SamplingParams, prompt: Infill, tokenizer: Tokenizer, warnings: list[str]) -> SamplingParams:
    """The parameters for an infill, which the tokens that end one stop. Without them, unchanged."""
    infill = tokenizer.infill
    if infill is None:
        return params
    if prompt.files and infill.file is None:
        warnings.append(FILES_AS_TEXT)
    return msgspec.structs.replace(params, stop_token_ids=(*params.stop_token_ids, *infill.ends))


async def _constrained(request: Request, replies: ChatReplies, engine: EngineLoop, warnings: list[str]) -> Request:
    """The request with the grammar of its reply.

    If a tool's schema cannot be enforced, calls are not constrained, with a warning. If a call is forced or strict, or
    the answer has a grammar, it raises `InvalidRequest` instead.
    """
    shown, params = replies.shown_token_ids(), request.params
    try:
        structured = replies.structured(params.structured)
        if structured is not None:
            if params.structured is not None:  # first by itself, so that an error names this field
                await engine.compile(params.structured, tenant=request.tenant)
            grammar = await engine.compile(structured, tenant=request.tenant)
            params = msgspec.structs.replace(params, structured=structured)
            request = msgspec.structs.replace(request, grammar=grammar)
            replies.is_constrained = True
    except InvalidRequest as error:
        if replies.must_constrain or params.structured is not None:
            raise
        warnings.append(f"calls of tools are not constrained: {error}")
    return msgspec.structs.replace(request, params=params, shown_token_ids=shown)


async def encode(
    prompt: Prompt, engine: EngineLoop, tenant: str, *, spec: ModelSpec, room: int | None
) -> tuple[list[int], list[str]]:
    """The token ids of a prompt, and a warning for each variable that a chat's template ignores.

    `room` and errors are as in `PromptEncoder`.
    """
    encoder = engine.prompts
    if isinstance(prompt, Chat):
        extras, ignored = NO_EXTRAS, list[str]()
        if any((*_template_fields(prompt), spec.chat_template_kwargs)):
            extras, ignored = template_extras(prompt, engine.tokenizer.chat_format, spec)
        token_ids = await encoder.encode_chat(
            prompt.messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            add_special_tokens=prompt.add_special_tokens,
            extras=extras,
            room=room,
            tenant=tenant,
        )
        return token_ids, ignored
    if isinstance(prompt, TokenIds):
        return prompt.token_ids, []
    adds = prompt.add_special_tokens
    if isinstance(prompt, Text):
        return await encoder.encode(prompt.text, add_special_tokens=adds, room=room, tenant=tenant), []
    text = InfillText(prompt.before, prompt.after, prompt.start, prompt.files)
    return await encoder.encode_infill(text, add_special_tokens=adds, room=room, tenant=tenant), []


def _truncated(token_ids: list[int], call: Generation, truncation: Truncation, engine: EngineLoop) -> list[int]:
    """Truncate a prompt to the number of tokens that the call gives, or else so that `max_tokens` fit behind it.

    The room left for the reply is at most half of the context, which is also the default.
    """
    length = context_length(engine.info)
    num_kept = truncation.num_tokens
    if num_kept is None:
        num_kept = length - min(call.params.max_tokens or length // 2, length // 2)
    return token_ids[:num_kept] if truncation.keeps_start else token_ids[-num_kept:]
