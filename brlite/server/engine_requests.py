"""A call's prompts to the engine's requests: rendered, encoded and cut as the call says."""

from __future__ import annotations

from brlite.dialects.generation import Chat, Generation, Prompt, Text, Truncation
from brlite.engine.admission import context_length
from brlite.engine.async_engine import EngineLoop
from brlite.engine.request import Request


async def make_requests(
    call: Generation, engine: EngineLoop, answer_id: str, tenant: str
) -> tuple[list[Request], list[str]]:
    """One request a prompt, in order, and a line for each prompt that was cut. Raises `InvalidRequest`.

    They share a turn of their tenant's, and only the first may be ended for waiting too long.
    """
    requests: list[Request] = []
    warnings: list[str] = []
    grammar = await engine.compile(call.params.structured, tenant=tenant)
    for index, prompt in enumerate(call.prompts):
        text = prompt.text if isinstance(prompt, Text) else None
        token_ids = await encode(prompt, engine, tenant, is_bounded=call.truncation is None)
        if call.truncation is not None:
            num_kept = _num_kept(call, call.truncation, engine)
            if len(token_ids) > num_kept:
                warnings.append(f"a prompt of {len(token_ids)} tokens was cut to {num_kept} by truncate_prompt_tokens")
                token_ids = token_ids[:num_kept] if call.truncation.keeps_start else token_ids[-num_kept:]
                text = None  # a cut prompt has no text any more
        requests.append(
            Request(
                request_id=f"{answer_id}-{index}",
                prompt=text,
                prompt_token_ids=token_ids,
                params=call.params,
                cache_salt=call.cache_salt,
                tenant=tenant,
                group=answer_id,
                is_exempt_from_queue_timeout=index > 0,
                grammar=grammar,
            )
        )
    return requests, warnings


async def encode(prompt: Prompt, engine: EngineLoop, tenant: str, *, is_bounded: bool) -> list[int]:
    """The token ids of a prompt. Raises `PromptTooLong`, if it `is_bounded`, before the work of encoding is done."""
    if isinstance(prompt, Chat):
        return await engine.encode_chat(
            prompt.messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            is_bounded=is_bounded,
            tenant=tenant,
        )
    if isinstance(prompt, Text):
        return await engine.encode(
            prompt.text, add_special_tokens=prompt.add_special_tokens, is_bounded=is_bounded, tenant=tenant
        )
    return prompt.token_ids


def _num_kept(call: Generation, truncation: Truncation, engine: EngineLoop) -> int:
    """How many tokens of a prompt are kept: so many, or what leaves the room that `max_tokens` asks for.

    That room is half of the context at most and by default.
    """
    if truncation.num_tokens is not None:
        return truncation.num_tokens
    length = context_length(engine.info)
    return length - min(call.params.max_tokens or length // 2, length // 2)
