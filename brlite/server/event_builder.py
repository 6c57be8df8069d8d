"""Makes events from the engine's outputs: texts, tokens with logprobs and offsets, echoed prompts, usage.

It does not depend on a dialect. Offsets count characters of the text as it is sent. A token is held back until its text
is sent, so no token behind the end of the text is shown.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from msgspec import structs

from brlite.chat.reasoning import ReasoningTokenCounter
from brlite.chat.reply import ReplyParser
from brlite.chat.tools import ReasoningDelta, TextDelta, ToolCallDelta
from brlite.dialects.event import Event, Token, TokenText, TokenUsage
from brlite.dialects.generation import Generation
from brlite.engine.outputs import CompletionOutput, RequestOutput, TokenLogprob
from brlite.server.chat_replies import ChatReplies
from brlite.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """What is sent of one choice so far. `parser` and `counter` read a reply; None: it is plain text."""

    index: int
    prompt_index: int
    parser: ReplyParser | None
    counter: ReasoningTokenCounter | None
    track: TokenTrack | None = None
    is_echoed: bool = False
    has_begun: bool = False  # the token ids and logprobs of its prompt are sent
    unsent_token_ids: list[int] = field(default_factory=list)


class EventBuilder:
    """Makes the events of one call. The index of a choice is prompt index * `n` + completion index."""

    def __init__(
        self, call: Generation, tokenizer: Tokenizer, warnings: Sequence[str], replies: ChatReplies | None = None
    ) -> None:
        """`replies` parses reasoning and tool calls of a chat; without it replies are plain text."""
        self._call = call
        self._replies = replies
        self._tokenizer = tokenizer
        self._warnings = dict.fromkeys(warnings)
        self._num_open = len(call.prompts)
        self._is_plain = not call.echo and call.params.logprobs is None
        self._num_prompt = self.num_completion = self._num_cached = 0  # tokens so far
        self._num_unshown = 0  # tokens that a beam search has computed for other beams than its answers
        self._counted_prompts: set[int] = set()
        self._choices: dict[int, Choice] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        self._returns_tokens = call.returns_token_ids or call.returns_prompt_logprobs
        # Whether the only choice's events, but the first and the last, have nothing but text. The caller may encode it,
        # and add its tokens to `num_completion`.
        has_more = call.continuous_usage or call.is_echo_only or call.echoed_text or self._returns_tokens
        has_more = has_more or call.make_text_end is not None  # which reads the text
        is_single = len(call.prompts) == call.params.n == 1
        self.is_text_only = self._is_plain and replies is None and is_single and not has_more

    def events(self, prompt_index: int, output: RequestOutput) -> list[Event]:
        """The events of an output. No event for a part of a character, or of a possible stop string.

        The last event of the call has its warnings, each once: every clamped value and every ignored field.
        """
        self.count(prompt_index, output)
        if output.prompt_logprobs is not None:  # the engine sends them once; every choice of the prompt repeats them
            self._prompt_logprobs[prompt_index] = output.prompt_logprobs
        call = self._call
        usage = self.usage() if call.continuous_usage else None
        if output.finished:
            self._num_open -= 1
            self._warnings |= dict.fromkeys(output.warnings)
        events: list[Event] = []
        for completion in output.outputs:
            choice = self._choice(prompt_index, completion)
            is_last = output.finished and not self._num_open and completion is output.outputs[-1]
            if call.is_echo_only:  # show no text of it, only the finish reason "length"
                no_logprobs: list[TokenLogprob] | None = None if completion.logprobs is None else []
                completion = CompletionOutput(index=completion.index, logprobs=no_logprobs, finish_reason="length")
            text, tokens = (completion.text, None) if self._is_plain else self._shown(choice, output, completion)
            num_events = len(events)
            if text or tokens or completion.finish_reason is not None:
                event = Event(
                    choice=choice.index,
                    text=text,
                    tokens=tokens,
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                    usage=usage,
                )
                events += [event] if choice.parser is None else self._read(event, choice.parser)
            if call.echoed_text and not choice.is_echoed and len(events) > num_events:
                choice.is_echoed = True
                if choice.parser is None:
                    first = events[num_events]
                    events[num_events] = structs.replace(first, text=call.echoed_text + first.text)
                else:  # the text of the continued message is not parsed
                    events.insert(num_events, Event(choice=choice.index, text=call.echoed_text))
            if self._returns_tokens:
                choice.unsent_token_ids += completion.token_ids
                events[num_events:] = self._with_tokens(choice, output, events[num_events:])
            if is_last and self._warnings:
                events[-1] = structs.replace(events[-1], warnings=tuple(self._warnings))
        return events

    def count(self, prompt_index: int, output: RequestOutput) -> None:
        """Count the tokens of an output; those of completions only if they are shown. `events` calls it."""
        if prompt_index not in self._counted_prompts:
            self._counted_prompts.add(prompt_index)
            self._num_prompt += len(output.prompt_token_ids)
            self._num_cached += output.num_cached_tokens
        if output.num_searched_tokens:
            num_shown = sum(len(completion.token_ids) for completion in output.outputs)
            self._num_unshown += max(0, output.num_searched_tokens - num_shown)
        if not self._call.is_echo_only:
            for completion in output.outputs:
                self.num_completion += len(completion.token_ids)
                if self._replies is not None and (counter := self._choice(prompt_index, completion).counter):
                    for token_id in completion.token_ids:
                        counter.feed(self._tokenizer.token_bytes(token_id))

    def _choice(self, prompt_index: int, completion: CompletionOutput) -> Choice:
        index, replies = prompt_index * self._call.params.n + completion.index, self._replies
        if index not in self._choices:
            readers = (None, None) if replies is None else (replies.parser(), replies.token_counter())
            self._choices[index] = Choice(index, prompt_index, *readers)
        return self._choices[index]

    def usage(self) -> TokenUsage:
        """The tokens used so far."""
        num_reasoning = sum(each.counter.num_tokens for each in self._choices.values() if each.counter is not None)
        return TokenUsage(self._num_prompt, self.num_completion, self._num_cached, num_reasoning)

    def spent(self) -> tuple[int, int]:
        """The tokens of prompts and completions that are charged so far, also those that are in no answer."""
        return self._num_prompt, self.num_completion + self._num_unshown

    def whole(self, outputs: Sequence[RequestOutput]) -> tuple[list[Event], tuple[str, ...]]:
        """The events and warnings of a response that is not streamed: one event a choice unless `keeps_order`."""
        params = self._call.params
        if params.ranks_answers:  # the tokens of dropped completions count too
            for output in outputs:
                self.num_completion += output.keep_best(params.n, keeps_logprobs=params.logprobs is not None)
        events = [event for index, output in enumerate(outputs) for event in self.events(index, output)]
        if self._replies is not None and not self._call.keeps_order:
            events = joined_events(events)
        return sorted(events, key=lambda event: event.choice), tuple(self._warnings)

    def _with_tokens(self, choice: Choice, output: RequestOutput, events: list[Event]) -> list[Event]:
        """Add the token ids and prompt logprobs that the call requests to a choice's new events, if there are any."""
        if not events:
            return events
        token_ids, choice.unsent_token_ids = choice.unsent_token_ids, []
        is_first, choice.has_begun = not choice.has_begun, True
        if self._call.returns_token_ids:
            events[-1] = structs.replace(events[-1], token_ids=token_ids)
            if is_first:
                events[0] = structs.replace(events[0], prompt_token_ids=output.prompt_token_ids)
        if self._call.returns_prompt_logprobs and is_first:
            entries = self._prompt_logprobs.get(choice.prompt_index, [])
            prompt_tokens = [None if entry is None else self._token(entry, 0) for entry in entries]
            events[0] = structs.replace(events[0], prompt_tokens=prompt_tokens)
        return events

    def _read(self, event: Event, parser: ReplyParser) -> list[Event]:
        """Split an event of a reply's text into events of reasoning, content and calls."""
        parts = parser.feed(event.text)
        if event.finish_reason is not None:
            parts += parser.finish(is_cut=event.finish_reason == "length")
            self._warnings |= dict.fromkeys(parser.warnings)
        events: list[Event] = []
        for part in parts:
            if isinstance(part, TextDelta):
                events.append(Event(choice=event.choice, text=part.text))
            elif isinstance(part, ToolCallDelta):
                events.append(Event(choice=event.choice, text="", calls=(part,)))
            elif isinstance(part, ReasoningDelta) and self._call.shows_reasoning:
                events.append(Event(choice=event.choice, text="", reasoning=part.text))
        has_more = event.finish_reason is not None or (event.tokens is not None and not events)
        if has_more and not (events and events[-1].text):  # the finish reason does not travel with a call
            events.append(Event(choice=event.choice, text=""))
        if events:
            reason = event.finish_reason
            # As at OpenAI, the finish reason is `stop` if the client named the function to call.
            ends_with_calls = reason == "stop" and parser.has_calls and not self._call.tool_choice.is_named
            events[-1] = structs.replace(
                events[-1],
                tokens=event.tokens,
                finish_reason="tool_calls" if ends_with_calls else reason,
                stop_reason=event.stop_reason,
                usage=event.usage,
            )
        return events

    def _shown(
        self, choice: Choice, output: RequestOutput, completion: CompletionOutput
    ) -> tuple[str, list[Token] | None]:
        """The text and tokens that a delta shows. The first delta of a choice contains the echoed prompt."""
        call = self._call
        prompt, is_echoed = "", call.echo and not choice.is_echoed
        if is_echoed:
            choice.is_echoed = True
            if output.prompt is not None:
                prompt = output.prompt
            else:  # the prompt was given as token ids, or truncated
                prompt = self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        if completion.logprobs is None:
            return prompt + completion.text, None

        tokens: list[Token] = []
        if is_echoed:
            offsets = prompt_offsets(output.prompt, output.prompt_token_ids, self._tokenizer)
            entries = self._prompt_logprobs.get(choice.prompt_index, [None] * len(offsets))
            for token_id, offset, entry in zip(output.prompt_token_ids, offsets, entries, strict=True):
                tokens.append(self._token(entry or TokenLogprob(token_id, 0.0), offset, is_first=entry is None))
        if choice.track is None:
            skipped = self._tokenizer.special_token_ids if call.params.skip_special_tokens else frozenset[int]()
            if self._replies is not None:
                skipped = skipped - self._replies.shown_token_ids()
            choice.track = TokenTrack(self._tokenizer, skipped, len(prompt))
        tokens += [self._token(entry, offset) for entry, offset in choice.track.take(completion)]
        return prompt + completion.text, tokens

    def _token(self, entry: TokenLogprob, offset: int, *, is_first: bool = False) -> Token:
        """The token with its alternatives. If it is one of them, both entries have the same logprob."""
        top = tuple(
            (self._text(token_id), entry.logprob if token_id == entry.token_id else logprob)
            for token_id, logprob in entry.top
        )
        return Token(self._text(entry.token_id), offset, None if is_first else entry.logprob, top)

    def _text(self, token_id: int) -> TokenText:
        return token_text(token_id, self._tokenizer)


def joined_events(events: Sequence[Event]) -> list[Event]:
    """One event for each choice, with the whole text and complete calls."""
    joined: dict[int, Event] = {}
    for event in events:
        before = joined.get(event.choice)
        if before is None:
            joined[event.choice] = event
            continue
        calls = {call.index: call for call in before.calls}
        for piece in event.calls:
            if (call := calls.get(piece.index)) is not None:
                piece = structs.replace(call, arguments=call.arguments + piece.arguments)
            calls[piece.index] = piece
        joined[event.choice] = structs.replace(
            event,
            text=before.text + event.text,
            reasoning=before.reasoning + event.reasoning,
            calls=tuple(calls.values()),
            tokens=_joined(before.tokens, event.tokens),
            token_ids=_joined(before.token_ids, event.token_ids),
            prompt_token_ids=before.prompt_token_ids,
            prompt_tokens=before.prompt_tokens,
        )
    return list(joined.values())


def _joined(first: Sequence[T] | None, second: Sequence[T] | None) -> list[T] | None:
    return None if first is None and second is None else [*(first or ()), *(second or ())]


def token_text(token_id: int, tokenizer: Tokenizer) -> TokenText:
    """The token's id, text and bytes, as answers show them."""
    return TokenText(token_id, tokenizer.token_text(token_id), tokenizer.token_bytes(token_id))


class ShownToken(NamedTuple):
    """A token that an answer shows, and the offset of its text in characters."""

    entry: TokenLogprob
    offset: int


class OffsetCounter:
    """Computes the offset of each token in the joined text, in characters. `start` is the offset of the first one."""

    def __init__(self, start: int = 0) -> None:
        self._end = start  # end of the complete characters
        self._partial = b""

    def add(self, data: bytes) -> int:
        """Add the bytes of the next token and return its offset. Parts of a character have the character's offset."""
        begun = self._partial + data[:1]
        text, _ = codecs.utf_8_decode(begun, "replace", False)
        is_given_up = bool(self._partial and text) and text.encode() != begun  # the part before became U+FFFD
        offset = self._end + is_given_up
        data = self._partial + data
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[num_used:]
        self._end += len(text)
        return offset


class TokenTrack:
    """The tokens of one choice that are not sent yet. `start` is the offset of its text, behind an echoed prompt."""

    def __init__(self, tokenizer: Tokenizer, skipped_token_ids: Collection[int], start: int) -> None:
        self._tokenizer = tokenizer
        self._skipped_token_ids = skipped_token_ids
        self._counter = OffsetCounter(start)
        self._num_sent = start
        self._waiting: list[ShownToken] = []

    def take(self, completion: CompletionOutput) -> list[ShownToken]:
        """The tokens to send with this delta. If a stop string ended the reply, tokens behind the cut are dropped."""
        for entry in completion.logprobs or ():
            is_skipped = entry.token_id in self._skipped_token_ids
            data = b"" if is_skipped else self._tokenizer.token_bytes(entry.token_id)
            self._waiting.append(ShownToken(entry, self._counter.add(data)))
        self._num_sent += len(completion.text)
        if completion.finish_reason is not None and not isinstance(completion.stop_reason, str):
            num_shown = len(self._waiting)
        else:
            num_shown = sum(token.offset < self._num_sent for token in self._waiting)  # offsets never fall
        shown, self._waiting = self._waiting[:num_shown], self._waiting[num_shown:]
        return shown


def prompt_offsets(text: str | None, token_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The offset of each token of an echoed prompt, in characters. `text` is None if the client sent token ids.

    Tokens that the tokenizer added (BOS, the space before the first word) have length 0.
    """
    if text is None:
        counter = OffsetCounter()
        offsets = [counter.add(tokenizer.token_bytes(token_id)) for token_id in token_ids]
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        num_stripped = counter.add(b"") - len(whole) if not whole.endswith("�") else 0
        return [max(0, offset - max(0, num_stripped)) for offset in offsets]
    data, at, num_characters, offsets = text.encode(), 0, 0, []
    for token_id in token_ids:
        is_inside = at < len(data) and _continues(data[at])
        offsets.append(num_characters - is_inside)
        part = tokenizer.token_bytes(token_id)
        if data.startswith(part, at):
            length = len(part)
        elif part[:1] == b" " and data.startswith(part[1:], at):
            length = len(part) - 1
        elif token_id in tokenizer.special_token_ids:
            length = 0
        else:  # a normalizer has rewritten the text
            length = min(len(part), len(data) - at)
        num_characters += sum(not _continues(byte) for byte in data[at : at + length])
        at += length
    return offsets


def _continues(byte: int) -> bool:
    """Whether a byte is a UTF-8 continuation byte."""
    return byte & 0xC0 == 0x80
