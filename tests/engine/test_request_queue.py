"""Which requests wait, for how long, and which are refused or displaced by others."""

from __future__ import annotations

import pytest

from brlite.config.options import LimitsConfig
from brlite.errors import InvalidRequest, QueueFull, QueueTimeout
from tests.engine.conftest import MakeDriver
from tests.fakes import VOCAB_SIZE


def test_many_completions_of_one_request_do_not_hold_up_those_who_wait(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=2, num_blocks=200)
    many = driver.submit("many", n=40, max_tokens=8)
    driver.step()

    small = [driver.submit(f"small {number}", max_tokens=1) for number in range(3)]
    driver.finish()

    assert [name for name in driver.finished if name != many] == small
    assert driver.finished[-1] == many


def test_requests_that_were_aborted_do_not_fill_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(limits=LimitsConfig(max_waiting=1))
    driver.engine.abort(driver.submit("first"))

    second = driver.submit("second")
    driver.finish()

    assert driver.outputs[second].finished


def test_a_request_whose_completions_wait_is_still_in_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=1))
    driver.submit("many", n=9, max_tokens=4)
    driver.step()

    with pytest.raises(QueueFull):
        driver.submit("another")

    driver.finish()
    driver.submit("another")


def test_an_exempt_request_outlasts_the_time_limit_of_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_wait_seconds=5.0))
    driver.submit("running", max_tokens=20)
    driver.step()

    request_id = driver.submit("waiting", is_exempt_from_queue_timeout=True)
    driver.finish()

    assert driver.outputs[request_id].finished


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=2))
    driver.submit("running")
    driver.step()
    driver.submit("waiting")
    driver.submit("waiting")

    with pytest.raises(QueueFull) as caught:
        driver.submit("too many")

    assert caught.value.retry_after_seconds is not None
    assert caught.value.retry_after_seconds >= 1


def test_a_request_that_is_refused_displaces_none_from_a_full_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=1, max_beam_width=VOCAB_SIZE))
    driver.submit("running")
    driver.step()
    waiting = driver.submit("waiting", priority=1)

    with pytest.raises(InvalidRequest, match="best_of"):
        driver.submit("more beams than tokens", use_beam_search=True, best_of=VOCAB_SIZE)
    driver.finish()

    assert not driver.errors
    assert driver.outputs[waiting].finished


def test_exempt_parts_do_not_fill_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=2))

    driver.submit("first part")
    parts = [driver.submit(f"part {number}", is_exempt_from_queue_timeout=True) for number in range(5)]
    driver.submit("somebody else")
    driver.finish()

    assert all(driver.outputs[part].finished for part in parts)


def test_a_request_that_waited_too_long_ends_with_an_error(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_wait_seconds=5.0))
    served = driver.submit("running", max_tokens=20)
    driver.step()

    overdue = driver.submit("waiting")
    driver.finish()

    assert isinstance(driver.errors[overdue], QueueTimeout)
    assert len(driver.token_ids(served)) == 20
