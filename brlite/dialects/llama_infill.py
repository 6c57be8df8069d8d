"""llama.cpp's `/infill`: fills a gap in a text, given other files of its repository.

Fields and answers are llama.cpp's, without those that have no meaning here (`id_slot`, `timings`,
`generation_settings`). A prompt that is too long is refused: neither it nor the other files are cut. With
`max_tokens` 0, the one token that the engine must draw is neither shown nor counted. Editors send such requests to
fill the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect
from brlite.dialects.errors import error_body
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.fields import NOTHING_MORE
from brlite.dialects.generation import Generation, Infill
from brlite.dialects.json_body import BodyDecoder, check_num_entries
from brlite.dialects.openai import (
    StructuredFields,
    Whole,
    generation_fields,
    sampling_params,
    structured_output,
    take_undecoded,
)
from brlite.dialects.openai_answer import encode_json
from brlite.dialects.sse import frame

# The engine's field names, mapped to the client's.
_FIELD_NAMES = {"prompt": "input_prefix", "suffix": "input_suffix", "start": "prompt", "files": "input_extra"}
# There is one answer, without logprobs: aliases of these are not read.
_NOT_READ = ("n", "logprobs")

StopType = Literal["eos", "word", "limit", "none"]


class ExtraFile(Struct):
    text: str
    filename: str = "tmp"


class InfillRequest(StructuredFields, kw_only=True):
    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] | None = None
    prompt: str | None = None
    max_tokens: Whole | None = None
    stop: str | list[str] | None = None
    return_tokens: bool | None = None


class InfillAnswer(Struct, kw_only=True):
    """A whole answer, or one chunk of it. Only a stream's last chunk has the optional fields; it has no content."""

    index: Literal[0] = 0
    content: str
    tokens: list[int]
    stop: bool
    tokens_predicted: int
    tokens_evaluated: int
    model: str | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    has_new_line: bool | UnsetType = UNSET
    truncated: Literal[False] | UnsetType = UNSET
    stop_type: StopType | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    warnings: Sequence[str] | UnsetType = UNSET


_DECODER = BodyDecoder(InfillRequest)


def decode(data: bytes, limits: LimitsConfig) -> Generation:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _DECODER.decode(data)
    more = take_undecoded(body, undecoded, limits, _NOT_READ) if undecoded else NOTHING_MORE
    files = body.input_extra or []
    check_num_entries("input_extra", len(files), limits.max_messages)
    infill = Infill(
        body.input_prefix,
        body.input_suffix,
        start=body.prompt or "",
        files=tuple((file.filename, file.text) for file in files),
    )
    field_names = {**_FIELD_NAMES, **more.field_names}
    given = dict(more.sampling)
    if body.max_tokens == 0:
        given["max_tokens"] = 1
    return Generation(
        prompts=(infill,),
        params=sampling_params(body, limits, field_names, structured=structured_output(body), **given),
        is_echo_only=body.max_tokens == 0,
        continuous_usage=True,
        field_names=field_names,
        warnings=more.warnings,
        tells_token_ids=bool(body.stream or body.return_tokens),
        **generation_fields(body),
    )


class InfillEncoder:
    """Encodes events as chunks, or as one whole answer."""

    def __init__(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> None:
        self._model = model
        self._has_new_line = False

    def opening(self, usage: TokenUsage) -> bytes:
        """Nothing."""
        return b""

    def encode(self, event: Event) -> bytes:
        """A chunk with the new text or tokens, if any, and at the end a chunk with the reason."""
        assert event.usage is not None  # the call has `continuous_usage`
        self._has_new_line |= "\n" in event.text
        chunks = b""
        if event.text or event.token_ids:
            chunks = frame(encode_json(_answer(event.text, event.token_ids or [], event.usage, stop=False)))
        if event.finish_reason is not None:
            chunks += frame(encode_json(self._end(_answer("", [], event.usage, stop=True), event, event.warnings)))
        return chunks

    def closing(self, usage: TokenUsage) -> bytes:
        """Nothing: the last chunk has `stop`."""
        return b""

    def failing(self, error: BaseException) -> bytes:
        """The event that ends a stream after an error."""
        return encode_error(error)

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed."""
        (event,) = events
        self._has_new_line = "\n" in event.text
        return encode_json(self._end(_answer(event.text, event.token_ids or [], usage, stop=True), event, warnings))

    def _end(self, answer: InfillAnswer, event: Event, warnings: Sequence[str]) -> InfillAnswer:
        """Fill in and return the answer's final fields."""
        assert event.usage is not None
        reason = event.stop_reason if isinstance(event.stop_reason, str) else ""
        stop_types: dict[str | None, StopType] = {"stop": "word" if reason else "eos", "length": "limit"}
        answer.model = self._model
        answer.tokens_cached = event.usage.cached
        answer.has_new_line = self._has_new_line
        answer.truncated = False
        answer.stop_type = stop_types.get(event.finish_reason, "none")
        if answer.stop_type == "none" and reason:  # llama.cpp has no field for this reason
            warnings, reason = (*warnings, f"the answer was ended: {reason}"), ""
        answer.stopping_word = reason
        answer.warnings = warnings or UNSET
        return answer


def _answer(content: str, token_ids: list[int], usage: TokenUsage, *, stop: bool) -> InfillAnswer:
    return InfillAnswer(
        content=content,
        tokens=token_ids,
        stop=stop,
        tokens_predicted=usage.completion,
        tokens_evaluated=usage.prompt,
    )


def encode_error(error: BaseException) -> bytes:
    """The event that ends a stream after an error."""
    return frame(error_body(error))


DIALECT = Dialect("/infill", "infill-", decode, InfillEncoder, encode_error)
