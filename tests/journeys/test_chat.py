"""A streaming chat, from its first byte to the scheduler's queue."""

from tests.journeys.chat import run_chat
from tests.journeys.recorder import Journey, record


def journey() -> Journey:
    first_byte, queue = ("http/connection.py", "Connection.data_received"), ("engine/scheduler.py", "Scheduler.add")
    return run_chat(record(since=first_byte, until=queue))


def test_a_chat_is_in_the_queue_after_few_calls():
    chat = journey()

    assert len(chat.calls) <= 50
    assert len(chat.functions) <= 48
    assert len(chat.files) <= 19
