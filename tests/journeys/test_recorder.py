"""The recorder itself, on functions that look as if they were brlite's."""

import asyncio

import pytest

from tests.journeys.recorder import PACKAGE, record

SOURCE = """
import asyncio

async def leaf():
    await asyncio.sleep(0)
    await asyncio.sleep(0)

async def tree():
    await leaf()
    await leaf()

def numbers():
    yield 1
    yield 2

def add():
    return sum([number for number in numbers()])
"""


def functions():
    namespace = {}
    exec(compile(SOURCE, f"{PACKAGE}forest.py", "exec"), namespace)
    return namespace


def test_a_coroutine_counts_once_however_often_it_resumes():
    tree = functions()["tree"]

    with record() as journey:
        asyncio.run(tree())

    assert [(call.function, call.depth) for call in journey.calls] == [("tree", 0), ("leaf", 1), ("leaf", 1)]
    assert (len(journey.functions), journey.files) == (2, {"forest.py"})


def test_a_generator_counts_once_and_a_comprehension_not_at_all():
    add = functions()["add"]

    with record() as journey:
        assert add() == 3

    assert [call.function for call in journey.calls] == ["add", "numbers"]


def test_a_journey_begins_and_ends_at_the_calls_named():
    namespace = functions()

    with record(since=("forest.py", "leaf"), until=("forest.py", "add")) as journey:
        asyncio.run(namespace["tree"]())
        namespace["add"]()
        namespace["add"]()

    assert [call.function for call in journey.calls] == ["leaf", "leaf", "add"]


def test_a_journey_that_does_not_arrive_fails():
    with pytest.raises(AssertionError, match="add"), record(until=("forest.py", "add")):
        list(functions()["numbers"]())
