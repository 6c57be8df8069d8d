"""A token of one stream, from the step's result to the client's socket."""

from tests.journeys.chat import run_chat
from tests.journeys.recorder import Journey, record


def journey() -> Journey:
    """The second token's, since the first one also ends the prompt: from one `update` to the next `schedule`.

    The last call is the write to the socket. The loop makes it after it has begun the next step.
    """
    calls = run_chat(record()).calls
    starts = [index for index, call in enumerate(calls) if call.function == "Engine.update"]
    end = next(index for index in range(starts[1], len(calls)) if calls[index].function == "EngineLoop._step")
    write = next(call for call in calls[end:] if call.function == "EventStream.flush")
    return Journey([*calls[starts[1] : end], write])


def test_a_token_is_with_the_client_after_few_calls():
    token = journey()

    assert len(token.calls) <= 19
