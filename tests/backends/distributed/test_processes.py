"""Real ranks in real processes, without a server: how they load, what they refuse, and that none is left."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from brlite.backends.choose import load_backend
from brlite.backends.distributed import parallel
from brlite.backends.distributed.backend import ParallelBackend
from brlite.backends.distributed.messages import Joined, Loaded, Setup
from brlite.backends.distributed.processes import start_local
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.errors import BackendLost, ConfigError
from brlite.sampling_params import SamplingParams
from tests.limits import PATIENCE_SECONDS
from tests.processes import children, wait_gone
from tests.tiny_models import write_tiny_model

PROMPT = [5, 17, 200, 3, 3, 90, 41]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"))


def load(path: Path, backend: str = "native", *, tensor_parallel: int = 2, **fields: Any) -> ParallelBackend:
    spec = ModelSpec(
        name="tiny",
        path=str(path),
        build_seq=64,
        build_batch=2,
        tensor_parallel=tensor_parallel,
        devices=tuple(range(tensor_parallel)),
        **fields,
    )
    engine = EngineConfig(backend=backend, device="cpu", threads=tensor_parallel)
    checkpoint = open_checkpoint(path)
    loaded = load_backend(checkpoint, check_model(checkpoint, spec), spec, engine)
    assert isinstance(loaded, ParallelBackend) or tensor_parallel == 1
    return loaded  # type: ignore[return-value]


def draw(backend: ParallelBackend) -> int:
    sampling = SamplingInput(SamplingParams(temperature=0), 0, 0)
    table = list(range(64 // backend.info.block_size))
    return backend.execute(Batch([ScheduledSeq(0, 0, PROMPT, table, sampling)])).seqs[0].tokens[0].token_id


@pytest.fixture(autouse=True)
def _none_is_left() -> Any:
    before = set(children(os.getpid()))
    yield
    wait_gone([child for child in children(os.getpid()) if child not in before])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_ranks_are_told_of_as_one_backend(model: Path, backend: str) -> None:
    with closing(load(model, backend, tensor_parallel=1)) as one:
        expected, alone = draw(one), one.info

    with closing(load(model, backend)) as two:
        token_id, together = draw(two), two.info

    assert token_id == expected
    assert together.name == backend
    assert together.device.endswith("2 ranks")
    assert together.vocab_size == alone.vocab_size
    assert together.kv_bytes == alone.kv_bytes
    assert alone.weight_bytes <= together.weight_bytes < 1.4 * alone.weight_bytes
    assert bool(together.fingerprint) == bool(alone.fingerprint)


def test_the_fingerprint_of_ranks_is_that_of_their_weights(model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path, seed=1)
    prints = []
    for path in (model, model, other):
        with closing(load(path)) as backend:
            prints.append(backend.info.fingerprint)

    assert prints[0] == prints[1] != prints[2]


def test_each_rank_keeps_packed_weights_of_its_own(model: Path, tmp_path: Path) -> None:
    image = tmp_path / "packed"
    with closing(load(model, serialize_file=str(image))) as backend:
        expected, fingerprint = draw(backend), backend.info.fingerprint
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    with closing(load(model, serialize_file=str(image))) as backend:
        assert (draw(backend), backend.info.fingerprint) == (expected, fingerprint)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert set(files) == {"packed.rank-0-of-2", "packed.rank-1-of-2"}


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_rank_that_dies_is_told_of_once_and_every_step_says_so(model: Path, backend: str) -> None:
    told, is_told = list[BackendLost](), threading.Event()
    with closing(load(model, backend)) as ranks:
        ranks.watch(lambda error: (told.append(error), is_told.set()))
        draw(ranks)
        (rank,) = children(os.getpid())

        os.kill(rank, signal.SIGKILL)

        assert is_told.wait(PATIENCE_SECONDS)
        for _ in range(2):
            with pytest.raises(BackendLost, match="rank 1 died of signal 9"):
                draw(ranks)
    assert len(told) == 1


def test_what_a_rank_refuses_is_raised_here(model: Path, tmp_path: Path) -> None:
    ranks = start_local(2)
    spec = ModelSpec(name="tiny", path=str(tmp_path / "nowhere"), build_seq=64, tensor_parallel=2, devices=(0, 1))

    ranks.send_each(lambda rank: Setup(rank, spec, EngineConfig(device="cpu"), "kind"))

    with pytest.raises(ConfigError, match=r"rank 1: .*nowhere"):
        ranks.receive(Loaded)
    ranks.close()


def test_a_rank_that_finds_another_model_is_refused(model: Path) -> None:
    ranks = start_local(2)
    spec = ModelSpec(name="tiny", path=str(model), build_seq=64, tensor_parallel=2, devices=(0, 1))

    ranks.send_each(lambda rank: Setup(rank, spec, EngineConfig(device="cpu"), "another kind"))

    with pytest.raises(ConfigError, match="is another model than rank 0's"):
        ranks.receive(Loaded)
    ranks.close()


def test_a_rank_that_is_killed_while_it_loads_is_told_of(model: Path) -> None:
    ranks = start_local(2)
    (rank,) = children(os.getpid())

    os.kill(rank, signal.SIGKILL)

    with pytest.raises(BackendLost, match="rank 1 died of signal 9 while it was loading"):
        ranks.receive(Joined)
    ranks.close()


def test_what_rank_0_refuses_ends_the_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ConfigError("the KV cache takes 9 TiB, which is not there")

    monkeypatch.setattr(parallel, "load_native_rank", fail)

    with pytest.raises(ConfigError, match="9 TiB"):
        load(model)


def test_a_step_that_fails_on_rank_0_ends_all_for_the_ranks_are_not_in_step_any_more(model: Path) -> None:
    with closing(load(model)) as backend:
        too_many = ScheduledSeq(0, 0, [1] * 200, list(range(4)))

        with pytest.raises(BackendLost, match="a step failed on rank 0: the native step refused its batch"):
            backend.execute(Batch([too_many]))
        with pytest.raises(BackendLost):
            draw(backend)


@pytest.mark.torch
def test_ranks_that_a_launcher_has_started_compute_on_torch_and_must_be_as_many(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match="tensor_parallel is 2, but WORLD_SIZE is 3"):
        load(model, "auto")
    with pytest.raises(ConfigError, match="ranks of native kernels share memory"):
        load(model, "native")
