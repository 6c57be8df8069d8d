"""A token of one stream, from the step's result to the client's socket."""

from tests.journeys.chat import run_chat
from tests.journeys.recorder import Journey, record


def journey() -> Journey:
    """The second token's, since the first one also ends the prompt: from one `update` to the next `schedule`."""
    recorded = run_chat(record())
    starts = [index for index, call in enumerate(recorded.calls) if call.function == "Engine.update"]
    ends = [index for index, call in enumerate(recorded.calls) if call.function == "EngineLoop._step"]
    return Journey(recorded.calls[starts[1] : next(end for end in ends if end > starts[1])])


def test_a_token_is_with_the_client_after_few_calls():
    token = journey()

    assert len(token.calls) <= 30
