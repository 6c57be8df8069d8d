"""The text of an event that has nothing else is taken without making the event; it is the same text."""

from __future__ import annotations

from brlite.dialects.event import Event
from brlite.dialects.generation import Generation, Text
from brlite.engine.outputs import CompletionOutput, RequestOutput
from brlite.sampling_params import SamplingParams
from brlite.server.event_builder import EventBuilder
from tests.fakes import ByteTokenizer

CALL = Generation(model="m", prompts=(Text("p"),), params=SamplingParams())


def output(text: str, *, finished: bool = False, index: int = 0) -> RequestOutput:
    reason = "stop" if finished else None
    completion = CompletionOutput(index=index, text=text, token_ids=[1, 2], finish_reason=reason)
    return RequestOutput(request_id="r", prompt_token_ids=[1, 2, 3], outputs=[completion], finished=finished)


def test_text_that_is_only_counted_leaves_the_other_events_as_they_are() -> None:
    short, long = (EventBuilder(CALL, ByteTokenizer(), ("w",)) for _ in range(2))

    assert short.is_text_only
    assert short.events(0, output("a")) == long.events(0, output("a"))
    for text in ("b", "", "c"):
        short.num_completion += 2
        assert long.events(0, output(text)) == ([Event(choice=0, text=text)] if text else [])
    assert short.events(0, output("d", finished=True)) == long.events(0, output("d", finished=True))
    assert short.usage() == long.usage()


def test_events_of_several_choices_or_with_more_than_text_are_made() -> None:
    for call in (
        Generation(model="m", prompts=(Text("p"), Text("q")), params=SamplingParams()),
        Generation(model="m", prompts=(Text("p"),), params=SamplingParams(n=2)),
        Generation(model="m", prompts=(Text("p"),), params=SamplingParams(logprobs=0)),
        Generation(model="m", prompts=(Text("p"),), params=SamplingParams(), continuous_usage=True),
        Generation(model="m", prompts=(Text("p"),), params=SamplingParams(), returns_token_ids=True),
    ):
        assert not EventBuilder(call, ByteTokenizer(), ()).is_text_only


def test_the_warnings_of_several_prompts_come_once_with_the_last_event() -> None:
    call = Generation(model="m", prompts=(Text("p"), Text("q"), Text("r")), params=SamplingParams())
    outputs = [output(text, finished=True) for text in "abc"]
    outputs[0].warnings = outputs[2].warnings = ("cut",)
    outputs[1].warnings = ("other",)
    streamed, whole = (EventBuilder(call, ByteTokenizer(), ("w",)) for _ in range(2))

    warnings = [[event.warnings for event in streamed.events(index, outputs[index])] for index in (1, 0, 2)]

    assert warnings == [[()], [()], [("w", "other", "cut")]]
    assert set(whole.whole(outputs)[1]) == {"w", "other", "cut"}
