"""Turns by tenant, then by group, then as requests came: nobody's many requests keep another's few waiting."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from brlite.config.options import LimitsConfig
from brlite.engine.request import Request
from brlite.engine.turns import TurnQueue
from brlite.errors import QueueFull, QueueTimeout
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import PATIENT, Driver, MakeDriver
from tests.fakes import reference_tokens


def submit_many(driver: Driver, count: int, **fields: object) -> list[str]:
    return [driver.submit(f"prompt {number}", max_tokens=16, **fields) for number in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [({"group": "body"}, {}), ({"tenant": "a"}, {"tenant": "b"}), ({"tenant": "a", "group": "body"}, {"tenant": "b"})],
    ids=["one request of many prompts", "many requests of one tenant", "both"],
)
def test_many_prompts_cost_another_request_a_step_and_keep_their_texts(
    make_driver: MakeDriver, theirs: dict[str, str], mine: dict[str, str]
) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=4, max_model_len=32, budget=32, limits=PATIENT)
    many = submit_many(driver, 64, **theirs)
    for _ in range(3):
        driver.step()

    small = driver.submit("small", max_tokens=1, **mine)  # type: ignore[arg-type]
    driver.step()
    driver.step()
    is_served = driver.outputs[small].finished
    driver.finish()

    assert is_served
    for number, request_id in enumerate(many):
        assert driver.token_ids(request_id) == reference_tokens(f"prompt {number}".encode(), 16)


def test_places_are_shared_and_nobody_loses_the_last_one(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=4, max_model_len=32, budget=64, limits=PATIENT)
    for tenant in ("a", "b", "c", "d", "e"):
        submit_many(driver, 6, tenant=tenant)

    batches = driver.finish()

    assert driver.engine.stats.preemptions == 0  # whoever runs alone for its tenant stays
    assert len(driver.finished) == 30
    firsts = [driver.finished.index(f"request-{6 * number}") for number in range(5)]
    assert max(firsts) <= 5, f"the fifth tenant's first request ended after others' second ones: {firsts}"
    assert batches


def test_groups_of_one_tenant_take_turns_and_then_their_prompts(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1)
    for group in ("x", "y"):
        for number in range(3):
            driver.submit(f"{group}{number}", request_id=f"{group}{number}", group=group, max_tokens=1)

    driver.finish()

    assert driver.finished == ["x0", "y0", "x1", "y1", "x2", "y2"]


def test_a_long_prompt_is_not_overtaken_for_ever_by_short_ones_that_fit(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=9, max_num_seqs=4, max_model_len=32, budget=32, limits=PATIENT)
    driver.submit("running", max_tokens=16)
    driver.step()

    long = driver.submit("x" * 28, max_tokens=1, tenant="long")
    for number in range(30):
        driver.submit(f"{number}", max_tokens=4, tenant=f"short {number}")
    driver.finish()

    assert driver.finished.index(long) <= 4


def test_a_full_queue_takes_from_the_tenant_that_has_most(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=4))
    driver.submit("running", max_tokens=20, tenant="a")
    driver.step()
    greedy = [driver.submit(f"{number}", tenant="a") for number in range(4)]

    with pytest.raises(QueueFull):
        driver.submit("one more", tenant="a")
    others = [driver.submit(f"{number}", tenant="b") for number in range(2)]
    with pytest.raises(QueueFull):
        driver.submit("more than a share", tenant="b")
    with pytest.raises(QueueFull):
        driver.submit("more than a share", tenant="a")
    driver.finish()

    assert [isinstance(driver.errors.get(each), QueueFull) for each in greedy] == [False, False, True, True]
    assert all(driver.outputs[each].finished for each in (*greedy[:2], *others))


@pytest.mark.parametrize("is_shared", [False, True])
def test_another_tenants_prompt_is_found_in_the_cache_only_if_the_config_shares_it(
    make_driver: MakeDriver, is_shared: bool
) -> None:
    driver = make_driver(engine={"share_prefix_cache": is_shared})
    prompt = "a beginning that is long enough to be cached"

    found = []
    for fields in ({"tenant": "a"}, {"tenant": "a"}, {"tenant": "b"}, {"cache_salt": "1:a"}, {"tenant": "b"}):
        request_id = driver.submit(prompt, max_tokens=1, **fields)  # type: ignore[arg-type]
        driver.finish()
        found.append(driver.outputs[request_id].num_cached_tokens > 0)

    assert found == [False, True, is_shared, False, True]


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one_which_takes_twice_its_time_at_most(
    make_driver: MakeDriver,
) -> None:
    driver = make_driver(num_blocks=400, max_num_seqs=8, max_model_len=1024, budget=16, limits=PATIENT)
    alone = make_driver(num_blocks=400, max_num_seqs=8, max_model_len=1024, budget=16, limits=PATIENT)
    alone.submit("x" * 800, max_tokens=1)
    num_alone = len(alone.finish())

    long = driver.submit("x" * 800, max_tokens=1)
    for _ in range(3):
        driver.step()
    num_steps = 3
    waits = []
    while not (long in driver.outputs and driver.outputs[long].finished):
        small = driver.submit(f"{num_steps}", max_tokens=1)
        begin = num_steps
        while not (small in driver.outputs and driver.outputs[small].finished):
            driver.step()
            num_steps += 1
        waits.append(num_steps - begin)
    driver.finish()

    assert max(waits) <= 2
    assert num_steps <= 2 * num_alone
    assert driver.token_ids(long) == reference_tokens(b"x" * 800, 1)


def test_prompts_of_one_length_are_computed_one_after_the_other(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=400, max_num_seqs=8, max_model_len=512, budget=16, limits=PATIENT)
    prompts = [driver.submit(letter * 160, max_tokens=1) for letter in "abcd"]

    ends = {}
    for step in range(1, 60):
        driver.step()
        ends |= {each: step for each in driver.finished if each not in ends}

    assert [ends[each] for each in prompts] == [10, 20, 30, 40]


def test_a_tenant_gets_turns_in_proportion_to_its_weight(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=1, max_model_len=32, budget=64, limits=PATIENT)
    heavy = submit_many(driver, 12, tenant="heavy", weight=3)
    light = submit_many(driver, 12, tenant="light")

    driver.finish()

    first = driver.finished[:12]
    assert [len(set(first) & set(each)) for each in (heavy, light)] == [9, 3]
    assert len(driver.finished) == 24


def test_a_class_waits_for_all_classes_with_a_lower_number(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=1, max_model_len=32, budget=64, limits=PATIENT)
    batch, usual, urgent = (submit_many(driver, 3, tenant=f"{number}", priority=number) for number in (1, 0, -1))

    driver.finish()

    assert driver.finished == [*urgent, *usual, *batch]


def test_a_request_takes_the_place_of_one_of_a_class_behind_its_own(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=2, max_model_len=64, budget=64, limits=PATIENT)
    long = [driver.submit(f"long {number}", max_tokens=16, priority=number) for number in (1, 2)]
    driver.step()

    urgent = driver.submit("urgent", max_tokens=2)
    driver.finish()

    assert driver.finished == [urgent, *long]
    assert driver.engine.stats.preemptions == 1
    for number, request_id in zip((1, 2), long, strict=True):
        assert driver.token_ids(request_id) == reference_tokens(f"long {number}".encode(), 16)


def test_a_request_of_a_class_behind_takes_no_place_of_a_tenant_with_several(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=64, max_num_seqs=2, max_model_len=32, budget=64, limits=PATIENT)
    first = submit_many(driver, 4, tenant="a")
    driver.step()

    last = driver.submit("last", max_tokens=1, tenant="b", priority=5)
    driver.finish()

    assert driver.finished == [*first, last]
    assert driver.engine.stats.preemptions == 0


def test_where_blocks_run_out_the_last_class_gives_them_back(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=8, max_num_seqs=2, max_model_len=32, budget=64, limits=PATIENT)
    behind = driver.submit([1] * 10, max_tokens=12, priority=1)
    driver.step()

    before = driver.submit([2] * 10, max_tokens=12)
    driver.finish()

    assert driver.finished == [before, behind]
    assert driver.engine.stats.preemptions > 0


def test_a_class_before_takes_the_blocks_that_its_next_prompt_needs(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=8, max_num_seqs=4, max_model_len=32, budget=64, limits=PATIENT)
    behind = [driver.submit([number] * 10, max_tokens=5, priority=1) for number in (1, 2)]
    driver.step()

    before = driver.submit([3] * 18, max_tokens=2)
    driver.finish()

    assert driver.finished[0] == before
    for number, request_id in zip((1, 2), behind, strict=True):
        assert driver.token_ids(request_id) == reference_tokens(bytes([number] * 10), 5)


def test_a_sequence_that_lost_its_blocks_holds_up_no_class_before_its_own(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=8, max_num_seqs=3, max_model_len=32, budget=64, limits=PATIENT)
    behind = driver.submit([1] * 10, max_tokens=12, priority=1)
    before = driver.submit([2] * 10, max_tokens=12)
    while not driver.engine.stats.preemptions:
        driver.step()

    short = driver.submit([3] * 2, max_tokens=2)
    driver.finish()

    assert driver.finished == [short, before, behind]


def test_a_full_queue_loses_the_newest_request_of_the_last_class(make_driver: MakeDriver) -> None:
    limits = LimitsConfig(max_waiting=3, max_wait_seconds=1e6)
    driver = make_driver(num_blocks=64, max_num_seqs=1, max_model_len=32, budget=64, limits=limits)
    behind = submit_many(driver, 3, priority=1)

    driver.submit("usual", max_tokens=1)
    with pytest.raises(QueueFull):
        driver.submit("behind", max_tokens=1, priority=1)

    assert isinstance(driver.errors[behind[-1]], QueueFull)


def step_beside_busy_class(driver: Driver, num_steps: int) -> None:
    """Steps in which requests of class 0 always wait: each takes a place for two steps."""
    for _ in range(num_steps):
        for _ in range(4 - len(driver.engine.queued())):
            driver.submit("busy", max_tokens=2, tenant="busy")
        driver.step()


@pytest.mark.parametrize("n", [1, 3])
def test_a_preempted_request_continues_after_the_longest_wait_however_busy_an_earlier_class_is(
    make_driver: MakeDriver, n: int
) -> None:
    limits = LimitsConfig(max_waiting=64, max_wait_seconds=30)
    driver = make_driver(num_blocks=64, max_num_seqs=2, max_model_len=64, budget=64, limits=limits)
    behind = driver.submit("behind", max_tokens=6, n=n, priority=5, tenant="batch")
    driver.step()

    step_beside_busy_class(driver, 30)
    is_finished_before, wait = behind in driver.finished, driver.engine.longest_waits()[5]
    step_beside_busy_class(driver, 60)

    assert not is_finished_before
    assert 29 <= wait <= 30
    assert behind in driver.finished
    assert driver.engine.stats.promotions == 1
    assert [driver.token_ids(behind, index) for index in range(n)] == n * [reference_tokens(b"behind", 6)]


def test_a_request_that_has_not_begun_waits_for_earlier_classes_and_then_is_refused(make_driver: MakeDriver) -> None:
    limits = LimitsConfig(max_waiting=64, max_wait_seconds=30)
    driver = make_driver(num_blocks=64, max_num_seqs=2, max_model_len=64, budget=64, limits=limits)
    step_beside_busy_class(driver, 2)
    behind = driver.submit("behind", max_tokens=6, priority=5, tenant="batch")

    step_beside_busy_class(driver, 33)

    assert isinstance(driver.errors[behind], QueueTimeout)
    assert driver.engine.stats.promotions == 0


def test_what_was_put_back_changes_its_class_with_its_request() -> None:
    turns = TurnQueue()
    request = Request(request_id="r", prompt_token_ids=[1], params=SamplingParams())
    first, last = (Mock(status="waiting", state=Mock(request=request, priority=priority)) for priority in (1, 5))
    for seq in (first, last):
        seq.state.sequences = [seq]
        turns.put_back(seq)
    assert turns.next is first

    turns.change_class(last.state, 0)
    assert turns.next is last

    turns.take(last)
    turns.take(first)
    assert (turns.next, turns.num_waiting) == (None, 0)
