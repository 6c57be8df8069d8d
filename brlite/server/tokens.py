"""The endpoints of the tokenizer and the chat template. They show the text and tokens of a prompt; no model runs."""

from __future__ import annotations

import uuid

from aiohttp import web
from msgspec import UNSET, UnsetType, structs

from brlite.dialects import openai_chat
from brlite.dialects.anthropic import decode_count_tokens
from brlite.dialects.dialect import Dialect
from brlite.dialects.generation import Chat, Generation, Prompt, Text, TokenIds, in_client_words, refuse_warnings
from brlite.dialects.openai_answer import token_name
from brlite.dialects.openai_tokens import (
    AppliedTemplate,
    DetokenizeAnswer,
    MessageTokens,
    RenderedRequest,
    TokenizeAnswer,
    TokenizerInfo,
    TokenPiece,
    decode_detokenize,
    decode_tokenize,
    token_piece,
)
from brlite.engine.admission import admit as admit_to_engine
from brlite.engine.async_engine import EngineLoop
from brlite.errors import InvalidRequest
from brlite.http.keys import API_KEY
from brlite.sampling_params import check_token_ids
from brlite.server.chat_replies import template_extras
from brlite.server.engine_requests import encode, make_requests, with_model_defaults
from brlite.server.event_builder import token_text
from brlite.server.generate import CONFIG, json_response, loaded, read_call
from brlite.server.served_model import ServedModel


async def tokenize(request: web.Request) -> web.Response:
    """Count and show the tokens of a text of any length: only the body's size is limited."""
    call = await read_call(request, decode_tokenize)
    async with loaded(request, call.model) as (model, engine):
        tokens, ignored = await encode(call.prompt, engine, request[API_KEY].tenant, spec=model.spec, room=None)
        texts = {}
        if call.names_tokens or call.has_pieces:
            texts = {token_id: token_text(token_id, engine.tokenizer) for token_id in set(tokens)}
    token_strs: list[str] | UnsetType = UNSET
    if call.names_tokens:
        names = {token_id: token_name(text) for token_id, text in texts.items()}
        token_strs = [names[token_id] for token_id in tokens]
    shown: list[int | TokenPiece] = [*tokens]
    if call.has_pieces:
        pieces = {token_id: token_piece(text) for token_id, text in texts.items()}
        shown = [pieces[token_id] for token_id in tokens]
    if call.is_strict:
        refuse_warnings(ignored)
    warnings = (*call.warnings, *ignored) or UNSET
    return json_response(TokenizeAnswer(len(tokens), engine.info.max_model_len, shown, token_strs, warnings))


async def detokenize(request: web.Request) -> web.Response:
    call = await read_call(request, decode_detokenize)
    async with loaded(request, call.model) as (_, engine):
        check_token_ids(call.token_ids, engine.info.vocab_size, param="tokens")
        text = await engine.prompts.decode(call.token_ids, tenant=request[API_KEY].tenant)
    return json_response(DetokenizeAnswer(text, text, call.warnings or UNSET))


async def tokenizer_info(request: web.Request) -> web.Response:
    """The tokenizer's properties, which lm-eval requests first. With several models the query needs `model`."""
    async with loaded(request, request.query.get("model")) as (_, engine):
        tokenizer = engine.tokenizer
        bos, eos = tokenizer.bos_token_id, next(iter(tokenizer.eos_token_ids), None)
        info = TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            bos_token=None if bos is None else tokenizer.token_text(bos),
            eos_token=None if eos is None else tokenizer.token_text(eos),
            pad_token=None,
            chat_template=tokenizer.chat_template_text,
            model_max_length=engine.info.max_model_len,
            vocab_size=tokenizer.vocab_size,
        )
    return json_response(info)


async def apply_template(request: web.Request) -> web.Response:
    """llama.cpp's endpoint: the text of a chat of any length. It takes the fields of a chat request."""
    call = await read_call(request, openai_chat.decode)
    async with loaded(request, call.model) as (model, engine):
        text, ignored = await prompt_text(call.prompts[0], engine, model, request[API_KEY].tenant)
    if call.is_strict:
        refuse_warnings(ignored)
    return json_response(AppliedTemplate(text, (*call.warnings, *ignored) or UNSET))


async def render(dialect: Dialect, request: web.Request) -> web.Response:
    """vLLM's endpoint: the engine's request for a chat; for completions a list with one for each prompt."""
    limits, tenant = request.app[CONFIG].limits, request[API_KEY].tenant
    call = await read_call(request, dialect.decode)
    async with loaded(request, call.model) as (model, engine):
        call = with_model_defaults(call, engine)
        answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
        try:
            made = await make_requests(call, engine, model.spec, answer_id, request[API_KEY])
            rendered = []
            for prompt, each in zip(call.prompts, made.requests, strict=True):
                max_tokens, clamps = admit_to_engine(each, engine.info, limits)
                shown = prompt if call.truncation is None else TokenIds(each.prompt_token_ids)
                text, _ = await prompt_text(shown, engine, model, tenant)
                rendered.append(
                    RenderedRequest(
                        request_id=each.request_id,
                        model=call.model or model.name,
                        prompt=text,
                        token_ids=each.prompt_token_ids,
                        sampling_params=structs.asdict(structs.replace(each.params, max_tokens=max_tokens)),
                        cache_salt=call.cache_salt or None,
                        stream=call.is_streamed,
                        warnings=(*call.warnings, *made.warnings, *made.truncations, *clamps) or UNSET,
                    )
                )
        except InvalidRequest as error:
            raise in_client_words(error, call.field_names) from None
    return json_response(rendered[0] if isinstance(call.prompts[0], Chat) else rendered)


async def count_message_tokens(request: web.Request) -> web.Response:
    """`POST /v1/messages/count_tokens`. Agents call it often."""
    return await count_prompt_tokens(request, await read_call(request, decode_count_tokens), MessageTokens)


async def count_prompt_tokens(request: web.Request, call: Generation, answer: type[MessageTokens]) -> web.Response:
    """Count the tokens of a call's chat of any length: only the body's size is limited."""
    (chat,) = call.prompts
    assert isinstance(chat, Chat)
    async with loaded(request, call.model) as (model, engine):
        try:
            token_ids, ignored = await encode(chat, engine, request[API_KEY].tenant, spec=model.spec, room=None)
        except InvalidRequest as error:
            raise in_client_words(error, call.field_names) from None
    if call.is_strict:
        refuse_warnings(ignored)
    return json_response(answer(input_tokens=len(token_ids), warnings=(*call.warnings, *ignored) or UNSET))


async def prompt_text(prompt: Prompt, engine: EngineLoop, model: ServedModel, tenant: str) -> tuple[str, list[str]]:
    """The text of a prompt, a chat rendered by its template, and a warning for each field that the template ignores."""
    if isinstance(prompt, Text):
        return prompt.text, []
    if not isinstance(prompt, Chat):  # an infill or token ids: decode them
        token_ids, _ = await encode(prompt, engine, tenant, spec=model.spec, room=None)
        return await engine.prompts.decode(token_ids, tenant=tenant), []
    extras, ignored = template_extras(prompt, engine.tokenizer.chat_format, model.spec)
    text = await engine.prompts.render_chat(
        prompt.messages,
        add_generation_prompt=prompt.add_generation_prompt,
        continue_final_message=prompt.continue_final_message,
        extras=extras,
        tenant=tenant,
    )
    return text, ignored
