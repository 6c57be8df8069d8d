"""Events that have nothing but text are made the short way; they are those of the long way."""

from __future__ import annotations

from brlite.dialects.generation import Generation, Text
from brlite.engine.outputs import CompletionOutput, RequestOutput
from brlite.sampling_params import SamplingParams
from brlite.server.event_builder import EventBuilder
from tests.fakes import ByteTokenizer

CALL = Generation(model="m", prompts=(Text("p"), Text("q")), params=SamplingParams(n=2))
OUTPUTS = [
    (0, [CompletionOutput(index=0, text="a", token_ids=[1])], False),
    (1, [CompletionOutput(index=0, text="b", token_ids=[1]), CompletionOutput(index=1, text="", token_ids=[2])], False),
    (0, [CompletionOutput(index=1, text="c", token_ids=[3], finish_reason="stop", stop_reason="x")], False),
    (1, [CompletionOutput(index=1, text="", finish_reason="stop", stop_reason=7)], False),
    (0, [CompletionOutput(index=0, text="", token_ids=[4], finish_reason="length")], True),
    (1, [CompletionOutput(index=0, text="d", token_ids=[5], finish_reason="error", stop_reason="why")], True),
]


def test_events_of_text_alone_are_those_of_the_long_way() -> None:
    short, long = (EventBuilder(CALL, ByteTokenizer(), ("w",)) for _ in range(2))
    long._is_text_only = False
    assert short._is_text_only

    for index, completions, finished in OUTPUTS:
        output = RequestOutput(
            request_id="r", prompt_token_ids=[1, 2], outputs=completions, finished=finished, warnings=("cut",)
        )
        assert short.events(index, output) == long.events(index, output)
    assert short.usage() == long.usage()
