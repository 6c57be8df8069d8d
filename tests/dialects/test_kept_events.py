"""Events that are kept compressed are read as they came, also by readers that follow a stream without room."""

from __future__ import annotations

import gc
import os
import weakref

from brlite.dialects.kept_events import LAST_BYTES, EventReader, KeptEvents


def make_event(num_bytes: int = 20) -> bytes:
    return b"data: %b\n\n" % os.urandom(num_bytes).hex().encode()


def read_all(reader: EventReader) -> list[bytes]:
    events = list[bytes]()
    while (piece := reader.read()) is not None:
        events += piece
    return events


def test_a_reader_gets_each_event_once_while_more_come() -> None:
    kept, events = KeptEvents(), [make_event(1 + number * 50) for number in range(100)]
    reader, later = EventReader(kept, 0), EventReader(kept, 30)

    read = list[bytes]()
    for event in events:
        kept.add(event)
        read += read_all(reader)

    assert read == events
    assert read_all(later) == events[30:]
    assert kept.finish()
    assert read_all(EventReader(kept, 0)) == events
    assert kept.num_events == 100


def test_an_event_longer_than_one_read_is_whole() -> None:
    kept, event = KeptEvents(), b"data: %b\n\n" % (b"x" * 10**6)
    kept.add(event + event)
    kept.finish()

    assert read_all(EventReader(kept, 0)) == [event, event]


def test_without_room_only_a_reader_that_keeps_up_gets_the_rest() -> None:
    kept, events = KeptEvents(), [make_event(1000) for _ in range(100)]
    kept.count_with(lambda num_bytes: kept.num_events < 8)
    prompt, late = EventReader(kept, 0), EventReader(kept, 0)

    read = list[bytes]()
    for event in events:
        kept.add(event)
        read += read_all(prompt)

    assert read == events
    assert (kept.is_dropped, kept.finish(), prompt.is_late, late.is_late) == (True, False, False, True)
    assert kept.num_forgotten_bytes > 2 * LAST_BYTES  # of some 100 KB


def test_finished_events_are_freed_with_their_last_reference() -> None:
    def make() -> weakref.ref[KeptEvents]:
        kept = KeptEvents()
        kept.count_with(lambda num_bytes: kept.num_events < 8)  # it refers to the events, as that of a server does
        kept.add(make_event())
        kept.finish()
        return weakref.ref(kept)

    gc.disable()
    try:
        assert make()() is None
    finally:
        gc.enable()
