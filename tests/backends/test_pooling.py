"""Hidden states of native code and of torch: transformers' own, and the same however their prompts are computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.backends.torch.backend import TorchBackend
from brlite.checkpoint import open_checkpoint
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Backend, Batch, PoolingInput, SamplingInput, ScheduledSeq
from brlite.sampling_params import SamplingParams
from tests.backends.native_models import MODELS, load_native, make_checkpoint, random_ids
from tests.backends.rank_threads import load_native_ranks
from tests.load_plans import make_plan
from tests.tiny_models import NETWORKS, TINY_CONFIGS, write_tiny_model

# transformers computes these itself; the others' code comes with the model.
FAMILIES = [name for name in ("llama-tied", *NETWORKS) if TINY_CONFIGS[name]["model_type"] in CONFIG_MAPPING]
LENGTH = 90
CHUNKS = ([LENGTH], [1, 16, 40, 33], [LENGTH - 1, 1], [15, 17, 58])
SPEC = ModelSpec(name="tiny", build_seq=128, build_batch=3)
FLOAT32 = EngineConfig(device="cpu", dtype="float32", threads=1)

Totals = npt.NDArray[np.float64]


def load_torch(path: Path) -> TorchBackend:
    checkpoint = open_checkpoint(path)
    return TorchBackend.load(make_plan(checkpoint, SPEC, FLOAT32))


def pooled(backend: Backend, token_ids: Sequence[int], *, wants_mean: bool, chunks: Sequence[int] = ()) -> Totals:
    """The sum over a whole prompt, or its last token's hidden state, computed in chunks."""
    total, start = b"", 0
    for size in chunks or [len(token_ids)]:
        is_wanted = wants_mean or start + size == len(token_ids)
        pooling = PoolingInput(size if wants_mean else 1, total) if is_wanted else None
        total = compute(backend, [piece(0, token_ids[start : start + size], pooling, start)])[0]
        start += size
    return np.frombuffer(total, np.float64)


def piece(seq_id: int, token_ids: Sequence[int], pooling: PoolingInput | None, start: int = 0) -> ScheduledSeq:
    return ScheduledSeq(seq_id, start, list(token_ids), list(range(10 * seq_id, 10 * seq_id + 10)), pooling=pooling)


def drawing(seq_id: int, token_ids: Sequence[int]) -> ScheduledSeq:
    params = SamplingParams(temperature=0, logprobs=5)
    return msgspec.structs.replace(piece(seq_id, token_ids, None), sampling=SamplingInput(params, 0, 0))


def compute(backend: Backend, seqs: list[ScheduledSeq]) -> list[bytes]:
    return [result.hidden_total for result in backend.execute(Batch(seqs)).seqs]


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, name)
    token_ids = random_ids(40, seed=1)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([token_ids])).last_hidden_state[0].double().numpy()

    with closing(load_torch(path)) as backend:
        mean = pooled(backend, token_ids, wants_mean=True) / len(token_ids)
        last = pooled(backend, token_ids, wants_mean=False)

    assert np.abs(mean - expected.mean(axis=0)).max() < 1e-4
    assert np.abs(last - expected[-1]).max() < 1e-4


@pytest.mark.parametrize("wants_mean", [False, True], ids=["last", "mean"])
def test_torch_gives_a_prompt_in_chunks_what_it_gives_the_whole(wants_mean: bool, tmp_path: Path) -> None:
    token_ids = random_ids(LENGTH, seed=2)
    with closing(load_torch(write_tiny_model(tmp_path, "llama"))) as backend:
        whole, *chunked = [pooled(backend, token_ids, wants_mean=wants_mean, chunks=chunks) for chunks in CHUNKS]

    for total in chunked:
        assert np.allclose(total, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_native_hidden_states_are_near_those_of_the_torch_path(
    name: str, native_library: NativeLibrary, tmp_path: Path
) -> None:
    token_ids = random_ids(LENGTH, seed=3)
    with closing(TorchBackend.load(make_plan(make_checkpoint(name), SPEC, FLOAT32))) as backend:
        expected = pooled(backend, token_ids, wants_mean=True) / LENGTH
    with closing(load_native(native_library, name)) as backend:
        found = pooled(backend, token_ids, wants_mean=True) / LENGTH

    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)  # activations are bfloat16 there


@pytest.mark.parametrize("wants_mean", [False, True], ids=["last", "mean"])
@pytest.mark.parametrize("name", MODELS)
def test_native_bits_are_the_same_in_chunks_in_company_and_on_ranks(
    name: str, wants_mean: bool, native_library: NativeLibrary
) -> None:
    token_ids, other = random_ids(LENGTH, seed=4), random_ids(20, seed=5)
    pooling = PoolingInput(50 if wants_mean else 1)

    with closing(load_native(native_library, name)) as backend:
        whole, *chunked = [pooled(backend, token_ids, wants_mean=wants_mean, chunks=chunks) for chunks in CHUNKS]
        [alone] = compute(backend, [piece(0, token_ids[:50], pooling)])
        seqs = [drawing(1, other), piece(0, token_ids[:50], pooling), piece(2, other, PoolingInput(20))]
        results = backend.execute(Batch(seqs)).seqs
        [drawn_alone] = backend.execute(Batch(seqs[:1])).seqs
    with closing(load_native(native_library, name, threads=3)) as backend:
        of_threads = pooled(backend, token_ids, wants_mean=wants_mean)
    with closing(load_native_ranks(native_library, name, "bf16", 2)) as ranks:
        of_ranks = pooled(ranks, token_ids, wants_mean=wants_mean, chunks=CHUNKS[1])

    assert all(np.array_equal(total, whole) for total in (*chunked, of_threads, of_ranks))
    assert results[1].hidden_total == alone
    assert results[0] == drawn_alone
    assert results[0].tokens
    assert not results[1].tokens


def test_every_instruction_set_gives_the_same_hidden_states(native_library: NativeLibrary) -> None:
    token_ids = random_ids(LENGTH, seed=6)
    totals = []
    for isa in available_isas(native_library.functions):
        with closing(load_native(native_library, "llama", "a_bf16_w_int8", isa=isa)) as backend:
            totals.append(pooled(backend, token_ids, wants_mean=True))

    assert all(np.array_equal(total, totals[0]) for total in totals)


def test_a_total_is_added_to(native_library: NativeLibrary) -> None:
    token_ids = random_ids(9, seed=7)
    before = np.arange(72, dtype=np.float64)
    with closing(load_native(native_library, "llama")) as backend:
        plain, more = (
            compute(backend, [piece(0, token_ids, PoolingInput(1))]),
            compute(backend, [piece(0, token_ids, PoolingInput(1, before.tobytes()))]),
        )

    assert np.array_equal(np.frombuffer(more[0], np.float64), before + np.frombuffer(plain[0], np.float64))
