"""llama.cpp's `/infill`: fills a gap in a text, given other files of its repository.

Fields and answers are llama.cpp's, without those that have no meaning here (`id_slot`, `timings`,
`generation_settings`). A prompt that is too long is refused: neither it nor the other files are cut. With
`max_tokens` 0, the one token that the engine must draw is neither shown nor counted. Editors send such requests to
fill the prefix cache.

`samplers` are obeyed in this server's order; those that are not listed are off. llama.cpp's sampler `infill` is left
out, with a warning.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, to_builtins

from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect, ResponseEncoder
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
from brlite.errors import InvalidRequest
from brlite.files.quoting import excerpt

# The engine's field names, mapped to the client's.
_FIELD_NAMES = {"prompt": "input_prefix", "suffix": "input_suffix", "start": "prompt", "files": "input_extra"}
# Parameters whose aliases (`n_cmpl`, `n_probs`) are not read: an answer is one text, without logprobs.
_NOT_READ = ("n", "logprobs")

# llama.cpp's samplers in the order in which they run here, each with the values that switch it off.
SAMPLERS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "dry": {"dry_multiplier": 0.0},
    "temperature": {"temperature": 1.0, "dynatemp_range": 0.0},
    "top_n_sigma": {"top_n_sigma": 0.0},
    "top_k": {"top_k": -1},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 0.0},
    "infill": {},
}
INFILL_WARNING = "the sampler infill was left out: the answer may go on where llama.cpp would end it as too uncertain"

Milliseconds = Annotated[float, Meta(ge=-1, le=86_400_000)]
StopType = Literal["eos", "word", "limit", "none"]


class ExtraFile(Struct):
    no_effect: ClassVar = ("time",)  # llama.vim's

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
    samplers: list[str] | None = None
    n_indent: Annotated[int, Meta(ge=0, le=1000)] | None = None
    t_max_predict_ms: Milliseconds | None = None
    response_fields: list[str] | None = None


class InfillGeneration(Generation, frozen=True, kw_only=True):
    """The answer ends before a line that begins with fewer than `indent` blanks and tabs, and after the first line feed
    that comes more than `line_seconds` after its first token.

    A response that is not streamed, and the last chunk of a stream, have only the fields of `shown`; empty: all.
    """

    indent: int = 0
    line_seconds: float | None = None
    shown: tuple[str, ...] = ()


class LineEnd:
    """Finds the line that an answer of an `InfillGeneration` ends with. It is called with each piece of the text."""

    def __init__(self, indent: int, seconds: float | None) -> None:
        # A line feed and too few blanks before another character.
        self._outdent = re.compile(rf"\n[ \t]{{0,{indent - 1}}}(?=[^ \t])") if indent else None
        self._last_line = ""  # with `_outdent`: the last line of the text, with the line feed before it
        self._seconds = seconds
        self._begun_at: float | None = None
        self.is_cut = False

    def __call__(self, text: str) -> bool:
        """Whether the answer ends in this piece of its text."""
        now = time.monotonic()
        self._begun_at = self._begun_at or now
        is_late = self._seconds is not None and now - self._begun_at > self._seconds
        self.cut(text)
        return self.is_cut or (is_late and "\n" in text)

    def cut(self, text: str) -> str:
        """The next piece of the text, up to the end of its last line that is indented enough."""
        if self.is_cut:
            return ""
        if self._outdent is not None:
            before, lines = self._last_line, self._last_line + text
            self._last_line = lines[max(0, lines.rfind("\n")) :]
            if match := self._outdent.search(lines):
                text, self.is_cut = text[: match.end() - len(before)], True
        return text


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


def decode(data: bytes, limits: LimitsConfig) -> InfillGeneration:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _DECODER.decode(data)
    more = take_undecoded(body, undecoded, _NOT_READ) if undecoded else NOTHING_MORE
    files = body.input_extra or []
    check_num_entries("input_extra", len(files), limits, "max_messages")
    infill = Infill(
        body.input_prefix,
        body.input_suffix,
        start=body.prompt or "",
        files=tuple((file.filename, file.text) for file in files),
    )
    field_names = {**_FIELD_NAMES, **more.field_names}
    given, warnings = dict(more.sampling), more.warnings
    if body.samplers is not None:
        given |= _without_others(body.samplers)
        if "infill" in body.samplers:
            warnings = (*warnings, INFILL_WARNING)
    shown = [name for name in InfillAnswer.__struct_fields__ if name in (body.response_fields or ())]
    others = [name for name in body.response_fields or () if name not in shown]
    if unknown := [name for name in others if name and name.partition("/")[0] != "timings"]:  # llama.vim sends these
        warnings = (*warnings, f"response_fields: the answer has none of {excerpt(unknown)}")
    if others and not shown:
        shown = ["warnings"]
    if body.max_tokens == 0:
        given["max_tokens"] = 1
    common, indent = generation_fields(body), body.n_indent or 0
    line_seconds = body.t_max_predict_ms / 1e3 if body.t_max_predict_ms and body.t_max_predict_ms > 0 else None
    return InfillGeneration(
        prompts=(infill,),
        params=sampling_params(body, limits, field_names, structured=structured_output(body), **given),
        is_echo_only=body.max_tokens == 0,
        continuous_usage=True,
        field_names=field_names,
        warnings=warnings,
        returns_token_ids=bool(body.stream or body.return_tokens),
        make_text_end=partial(LineEnd, indent, line_seconds) if indent or line_seconds is not None else None,
        line_seconds=line_seconds,
        indent=indent,
        shown=tuple(shown),
        **{**common, "unset": tuple(name for name in common["unset"] if name not in given)},
    )


def _without_others(samplers: list[str]) -> dict[str, Any]:
    """The parameters that switch off all samplers but these. Raises `InvalidRequest` for another name or order."""
    if samplers != [name for name in SAMPLERS if name in samplers]:
        raise InvalidRequest(
            f"samplers must be some of {', '.join(SAMPLERS)}, in this order, got {excerpt(', '.join(samplers))}",
            param="samplers",
        )
    return {name: value for sampler in SAMPLERS.keys() - set(samplers) for name, value in SAMPLERS[sampler].items()}


class InfillEncoder(ResponseEncoder):
    """Encodes events as chunks, or as one whole answer."""

    def __init__(self, call: Generation, answer_id: str, model: str, fingerprint: str) -> None:
        self._model = model
        self._has_new_line = False
        assert isinstance(call, InfillGeneration)
        self._shown = call.shown
        self._ends_with_line = call.line_seconds is not None
        self._line_end = LineEnd(call.indent, None)

    def encode(self, event: Event) -> bytes:
        """A chunk with the new text or tokens, if any, and at the end a chunk with the reason."""
        assert event.usage is not None  # the call has `continuous_usage`
        text = self._indented(event.text)
        chunks = b""
        if text or event.token_ids:
            chunks = frame(encode_json(_answer(text, event.token_ids or [], event.usage, stop=False)))
        if event.finish_reason is not None:
            chunks += frame(self._end(_answer("", [], event.usage, stop=True), event, event.warnings))
        return chunks

    def failing(self, error: BaseException) -> bytes:
        """The event that ends a stream after an error."""
        return encode_error(error)

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed."""
        (event,) = events
        text = self._indented(event.text)
        return self._end(_answer(text, event.token_ids or [], usage, stop=True), event, warnings)

    def _indented(self, text: str) -> str:
        """The next piece of the answer, up to its end."""
        text = self._line_end.cut(text)
        self._has_new_line |= "\n" in text
        return text

    def _end(self, answer: InfillAnswer, event: Event, warnings: Sequence[str]) -> bytes:
        """Fill in the answer's final fields and encode it."""
        assert event.usage is not None
        reason = event.stop_reason if isinstance(event.stop_reason, str) else ""
        stop_types: dict[str | None, StopType] = {"stop": "word" if reason else "eos", "length": "limit"}
        if self._ends_with_line or self._line_end.is_cut:
            stop_types["abort"] = "limit"
        if self._line_end.is_cut:
            stop_types, reason = dict.fromkeys(stop_types, "limit"), ""
        answer.model = self._model
        answer.tokens_cached = event.usage.cached
        answer.has_new_line = self._has_new_line
        answer.truncated = False
        answer.stop_type = stop_types.get(event.finish_reason, "none")
        if answer.stop_type == "none" and reason:  # llama.cpp has no field for this reason
            warnings, reason = (*warnings, f"the answer was ended: {reason}"), ""
        answer.stopping_word = reason
        answer.warnings = warnings or UNSET
        if not self._shown:
            return encode_json(answer)
        fields = to_builtins(answer)
        return encode_json({name: fields[name] for name in (*self._shown, "warnings") if name in fields})


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
