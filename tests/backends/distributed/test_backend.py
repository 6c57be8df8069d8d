"""Why a model of several ranks is lost: the same words whichever rank is heard first. Other ranks are sockets here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from brlite.backends.distributed.backend import ParallelBackend, RankModel
from brlite.backends.distributed.messages import Channel, Failed, Join, Joined, Loaded, Setup
from brlite.backends.distributed.processes import Member, Ranks
from brlite.engine.backend import Batch, StepResult
from brlite.errors import BackendLost, ConfigError, EngineError, RankGone
from tests.fakes import FakeBackend
from tests.limits import PATIENCE_SECONDS

REFUSED = Failed("the native step refused its batch: error 4", is_foreseen=True)
CONSEQUENCE = Failed("another rank went in the midst of a step", is_foreseen=True, is_consequence=True)


class Rank0(FakeBackend):
    """A rank's backend and its connection, whose steps and whose joining do what a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.is_aborted = threading.Event()
        self.do: Callable[[], None] = lambda: None
        self.do_join: Callable[[], None] = lambda: None

    def open(self, host: str) -> str:
        return host

    def join(self, place: str) -> None:
        self.do_join()

    def execute(self, batch: Batch) -> StepResult:
        self.do()
        return StepResult([])

    def abort(self) -> None:
        self.is_aborted.set()


class Scene:
    """Rank 0, and the far ends of the channels of ranks 1 and 2."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.ranks = Ranks([Member(rank, Channel(ours)) for rank, (ours, _) in enumerate(pairs, 1)])
        self.rank_1, self.rank_2 = (Channel(theirs) for _, theirs in pairs)
        self.model = Rank0()
        self.told: list[BackendLost] = []
        self.is_told = threading.Event()

    def note(self, error: BackendLost) -> None:
        self.told.append(error)
        self.is_told.set()

    def lose(self) -> str:
        """What a step says that fails, which must be what the next one says, and what is told, once."""
        backend = ParallelBackend(RankModel(self.model, self.model), self.ranks, self.model.info)
        backend.watch(self.note)
        errors = []
        for _ in range(2):
            with pytest.raises(BackendLost) as caught:
                backend.execute(Batch([]))
            errors.append(caught.value)
        assert self.is_told.wait(PATIENCE_SECONDS)
        backend.close()
        assert errors[0] is errors[1]
        assert self.told == errors[:1]
        return str(errors[0])


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.rank_1.close()
    scene.rank_2.close()


def test_rank_0s_own_failure_is_told_though_another_rank_was_heard_first(scene: Scene) -> None:
    def step() -> None:
        scene.rank_1.send(REFUSED)
        assert scene.model.is_aborted.wait(PATIENCE_SECONDS)  # it was heard
        raise EngineError("the native step refused its batch: error 4")

    scene.model.do = step

    assert scene.lose() == "a step failed on rank 0: the native step refused its batch: error 4"


def test_rank_0s_own_failure_is_told_where_another_rank_is_heard_later(scene: Scene) -> None:
    def step() -> None:
        raise EngineError("the native step refused its batch: error 4")

    scene.model.do = step

    assert scene.lose() == "a step failed on rank 0: the native step refused its batch: error 4"


@pytest.mark.parametrize("is_heard_first", [True, False])
def test_what_ended_the_other_rank_is_told_where_rank_0_only_missed_it(scene: Scene, is_heard_first: bool) -> None:
    def step() -> None:
        if is_heard_first:
            scene.rank_1.send(REFUSED)
            assert scene.model.is_aborted.wait(PATIENCE_SECONDS)
        else:
            threading.Timer(0.1, scene.rank_1.send, [REFUSED]).start()
        raise RankGone("another rank went in the midst of a step")

    scene.model.do = step

    assert scene.lose() == "rank 1: the native step refused its batch: error 4"


def test_a_rank_that_is_gone_when_a_step_is_sent_is_named(scene: Scene) -> None:
    scene.rank_2.close()

    assert scene.lose() == "rank 2 is gone"


def test_a_rank_that_ends_because_of_another_is_not_the_one_that_is_named(scene: Scene) -> None:
    def step() -> None:
        scene.rank_1.send(CONSEQUENCE)
        scene.rank_1.close()
        threading.Timer(0.1, scene.rank_2.close).start()
        raise RankGone("another rank went in the midst of a step")

    scene.model.do = step

    assert scene.lose() == "rank 2 is gone"


# While they load


def assemble(scene: Scene) -> ParallelBackend:
    def setup(rank: int) -> Setup:
        return Join("a setup")  # type: ignore[return-value]  # nobody reads it here

    model = RankModel(scene.model, scene.model)
    return ParallelBackend.assemble(scene.ranks, setup, lambda: model, lambda own, others: own, "127.0.0.1")


def test_a_rank_that_went_before_it_was_sent_its_setup_is_named(scene: Scene) -> None:
    scene.rank_2.close()

    with pytest.raises(BackendLost, match="rank 2 is gone"):
        assemble(scene)


def test_why_a_rank_did_not_join_is_told_and_not_that_rank_0_missed_it(scene: Scene) -> None:
    def join() -> None:
        scene.rank_1.send(Joined())
        threading.Timer(0.1, scene.rank_2.send, [Failed("one model at a time", is_foreseen=True)]).start()
        raise RankGone("rank 0 could not join the others: connection closed by peer")

    for rank in (scene.rank_1, scene.rank_2):
        rank.send(Loaded(1, 2, ""))
    scene.model.do_join = join

    with pytest.raises(ConfigError, match="rank 2: one model at a time"):
        assemble(scene)
    assert scene.model.is_closed


def test_a_rank_that_missed_another_while_they_joined_is_not_the_one_that_is_named(scene: Scene) -> None:
    for rank in (scene.rank_1, scene.rank_2):
        rank.send(Loaded(1, 2, ""))
    scene.rank_1.send(CONSEQUENCE)
    scene.rank_2.close()

    with pytest.raises(BackendLost, match="rank 2 is gone"):
        assemble(scene)
