"""From texts and chats to tokens and back. Long work runs beside the event loop, on one thread, in turns by tenant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from brlite.engine.admission import context_length, prompt_too_long
from brlite.engine.bad_words import TokenIds
from brlite.engine.engine import Engine
from brlite.engine.fair_thread import FairThread
from brlite.errors import stopping
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import NO_EXTRAS, TemplateExtras
from brlite.tokenizer.infill import InfillText
from brlite.tokenizer.tokenizer import LONG_TEXT


class PromptEncoder:
    """Encodes the prompts of one engine. Used on the engine's event loop; from another it raises `RuntimeError`.

    `room` of a method is the number of tokens that must fit into the context behind the prompt. A text whose fewest
    possible tokens leave less is refused with `PromptTooLong` before it is encoded. None: a text of any length.
    Tenants share the other thread in turns.
    """

    def __init__(self, engine: Engine, check_loop: Callable[[], None]) -> None:
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._check_loop = check_loop
        self._thread = FairThread("brlite-encode", stopping)  # starts with the first chat or long text

    async def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        param: str = "prompt",
        room: int | None = 1,
        tenant: str = "",
    ) -> list[int]:
        """Token ids of a text. What takes over a millisecond is encoded on the other thread."""
        self._check_loop()
        self._check_length(text, param, room)
        encode = functools.partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens, param=param)
        return await self._run(tenant, text, encode)

    async def encode_infill(
        self, text: InfillText, *, add_special_tokens: bool = True, room: int | None = 1, tenant: str = ""
    ) -> list[int]:
        """Token ids of a fill-in-the-middle prompt; otherwise as `encode`."""
        self._check_loop()
        whole = "".join((text.before, text.after, text.start, *(part for file in text.files for part in file)))
        self._check_length(whole, "prompt", room)
        encode = functools.partial(self._tokenizer.encode_infill, text, add_special_tokens=add_special_tokens)
        return await self._run(tenant, whole, encode)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        extras: TemplateExtras = NO_EXTRAS,
        room: int | None = 1,
        tenant: str = "",
    ) -> list[int]:
        """Token ids of a rendered chat, which brings its own special tokens; otherwise as `encode`.

        Even a short chat is rendered on the other thread: a template may run until its time limit.
        """
        self._check_loop()

        def render_and_encode() -> list[int]:
            text = self._tokenizer.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                extras=extras,
            )
            self._check_length(text, "messages", room)
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens, param="messages")

        return await self._thread.run(tenant, render_and_encode)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extras: TemplateExtras = NO_EXTRAS,
        tenant: str = "",
    ) -> str:
        """The text that `encode_chat` encodes, rendered as there."""
        self._check_loop()
        render = functools.partial(
            self._tokenizer.render_chat,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            extras=extras,
        )
        return str(await self._thread.run(tenant, render))  # a plain str: without the marks of control tokens

    async def decode(self, token_ids: Sequence[int], *, tenant: str = "") -> str:
        """The text of tokens, with special tokens. Many tokens are decoded on the other thread."""
        self._check_loop()
        decode = functools.partial(self._tokenizer.decode, token_ids, skip_special_tokens=False)
        return await self._thread.run(tenant, decode) if len(token_ids) > LONG_TEXT else decode()

    async def encode_bad_words(self, params: SamplingParams, *, tenant: str = "") -> tuple[TokenIds, ...] | None:
        """As `Engine.encode_bad_words`, on the other thread."""
        if not params.bad_words:
            return None
        self._check_loop()
        return await self._thread.run(tenant, functools.partial(self._engine.encode_bad_words, params))

    def close(self) -> None:
        """Refuse work that is queued or comes later, with `NotReady`. May be called twice, and without a loop."""
        self._thread.close()

    async def _run(self, tenant: str, text: str, encode: Callable[[], list[int]]) -> list[int]:
        """The result of `encode`, on the other thread if `text`, which it encodes, is long or a child encodes it."""
        is_short = len(text) <= LONG_TEXT and self._tokenizer.encodes_in_process
        return encode() if is_short else await self._thread.run(tenant, encode)

    def _check_length(self, text: str, param: str, room: int | None) -> None:
        if room is None:
            return
        fewest = self._tokenizer.fewest_tokens(text)
        if fewest > context_length(self._engine.info) - room:
            raise prompt_too_long(fewest, self._engine.info, param=param, at_least="at least ", num_further=room)
