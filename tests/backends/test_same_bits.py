"""The same bits in any company, over 800 random schedules, on every instruction set, on one thread and two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest

from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.engine.backend import Batch, SampledToken, SeqResult, StepResult
from brlite.models.precision import PRECISIONS, PrecisionOption
from tests.backends.native_models import MODELS, load_native, random_ids
from tests.backends.rank_threads import load_native_ranks
from tests.backends.schedules import LONG_LENGTHS, Story, live_alone, make_prompts, run_schedules

NUM_SCHEDULES = 14  # of each model in each precision, on one thread
# Long sequences are most of the time, row by row. What works on them in chunks is attention, which does not know how
# the weights are stored: so they come with each model in each format of the cache.
WITH_LONG = ("bf16", "a_bf16_w_int8_kv_int8")
NUM_MORE = 6  # on two threads, and with the kernels of every instruction set
NUM_OF_RANKS = 3  # on ranks, which have two cores for all their threads here


class Alone(NamedTuple):
    """A backend of one thread on the best instruction set, and what several sequences were on it, one by one."""

    name: str
    precision: PrecisionOption
    backend: NativeBackend
    stories: list[Story]

    @property
    def seed(self) -> int:
        return 100 * list(MODELS).index(self.name) + list(PRECISIONS).index(self.precision)


# Each model once and each precision at least twice, and as many pairs again: for what takes too long with all of them.
ONCE = [(name, list(PRECISIONS)[index % 4]) for index, name in enumerate(MODELS)]
TWICE = ONCE + [(name, list(PRECISIONS)[(index + 2) % 4]) for index, name in enumerate(MODELS)]
once, twice = (pytest.mark.parametrize("alone", pairs, ids="-".join, indirect=True) for pairs in (ONCE, TWICE))


def num_heads(name: str) -> int:
    heads: int = MODELS[name]["num_attention_heads"]
    return heads


def live(backend: NativeBackend, *, has_long: bool = True) -> list[Story]:
    prompts = [prompt for prompt in make_prompts(seed=0) if has_long or len(prompt) < min(LONG_LENGTHS)]
    return [live_alone(backend, prompt, seed) for seed, prompt in enumerate(prompts)]


# Not rounded to 4 bits: those panels are a Q4_1 file's, of test_quantized.py.
ALL = [(name, precision) for name in MODELS for precision in PRECISIONS if precision != "a_bf16_w_int4"]


@pytest.fixture(scope="module", params=ALL, ids="-".join)
def alone(request: pytest.FixtureRequest, native_library: NativeLibrary) -> Iterator[Alone]:
    name, precision = request.param
    with closing(load_native(native_library, name, precision)) as backend:
        yield Alone(name, precision, backend, live(backend, has_long=precision in WITH_LONG))


def test_a_row_has_the_bits_it_has_alone_whatever_the_schedule(alone: Alone) -> None:
    seen = run_schedules(alone.backend, alone.stories, count=NUM_SCHEDULES, seed=alone.seed)

    assert seen["compared"] > 20 * NUM_SCHEDULES
    assert min(seen[what] for what in ("restarts", "shared blocks", "right draft tokens", "wrong draft tokens")) > 1
    assert seen["mixed batches"] > NUM_SCHEDULES


@once
def test_two_threads_give_the_bits_of_one(alone: Alone, native_library: NativeLibrary) -> None:
    with closing(load_native(native_library, alone.name, alone.precision, threads=2)) as backend:
        seen = run_schedules(backend, alone.stories, count=NUM_MORE, seed=alone.seed)

    assert seen["compared"] > NUM_MORE


@once
def test_a_number_of_threads_that_changes_gives_the_bits_of_one(alone: Alone, native_library: NativeLibrary) -> None:
    with closing(load_native(native_library, alone.name, alone.precision, threads=3)) as backend:
        run = backend._run
        counts = cycle((3, 1, 2))

        def run_on_some(*args: Any, **more: Any) -> None:
            backend._num_threads = next(counts)
            run(*args, **more)

        backend._run = run_on_some  # type: ignore[assignment, method-assign]
        seen = run_schedules(backend, alone.stories, count=NUM_MORE, seed=alone.seed)

    assert seen["compared"] > NUM_MORE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_that_threads_share_have_the_bits_of_a_threads_own(
    precision: PrecisionOption, native_library: NativeLibrary
) -> None:
    token_ids = random_ids(300, seed=1)  # divided; 140 are shared one by one; of 40 each thread makes all
    with (
        closing(load_native(native_library, "llama", precision, max_rows=300)) as one_thread,
        closing(load_native(native_library, "llama", precision, max_rows=300, threads=5)) as five_threads,
    ):
        expected = one_thread.logits(token_ids)
        divided, shared, own = (five_threads.logits(token_ids[:count]) for count in (300, 140, 40))

    assert np.array_equal(divided, expected)
    assert np.array_equal(shared, expected[:140])
    assert np.array_equal(own, expected[:40])


@once
def test_several_ranks_give_the_bits_of_one(alone: Alone, native_library: NativeLibrary) -> None:
    size = min(2 + list(MODELS).index(alone.name) // 4 % 2, num_heads(alone.name))
    with closing(load_native_ranks(native_library, alone.name, alone.precision, size)) as backend:
        seen = run_schedules(backend, alone.stories, count=NUM_OF_RANKS, seed=alone.seed)

    assert seen["compared"] > NUM_OF_RANKS


def test_ranks_of_several_threads_give_the_same_bits(native_library: NativeLibrary) -> None:
    with closing(load_native(native_library, "llama", "bf16")) as backend:
        stories = live(backend)
    with closing(load_native_ranks(native_library, "llama", "bf16", 2, threads=2)) as backend:
        seen = run_schedules(backend, stories, count=NUM_OF_RANKS, seed=0)

    assert seen["compared"] > NUM_OF_RANKS


@twice
def test_every_instruction_set_of_this_machine_gives_the_same_bits(alone: Alone, native_library: NativeLibrary) -> None:
    for isa in available_isas(native_library.functions):
        with closing(load_native(native_library, alone.name, alone.precision, isa=isa)) as backend:
            seen = run_schedules(backend, alone.stories, count=NUM_MORE, seed=alone.seed + isa)

        assert seen["compared"] > NUM_MORE


@once
def test_blocks_of_several_pages_give_the_same_bits(alone: Alone, native_library: NativeLibrary) -> None:
    with closing(load_native(native_library, alone.name, alone.precision, block_size=64, num_blocks=60)) as backend:
        seen = run_schedules(backend, alone.stories, count=NUM_MORE, seed=alone.seed)

    assert seen["compared"] > NUM_MORE


Change = Callable[[Batch, SampledToken], SampledToken]


class Changed:
    """A backend that gives what `change` makes of each token drawn in a batch."""

    def __init__(self, backend: NativeBackend, change: Change) -> None:
        self.info = backend.info
        self._backend = backend
        self._change = change

    def execute(self, batch: Batch) -> StepResult:
        return StepResult([self._changed(batch, result) for result in self._backend.execute(batch).seqs])

    def close(self) -> None:
        self._backend.close()

    def _changed(self, batch: Batch, result: SeqResult) -> SeqResult:
        return msgspec.structs.replace(result, tokens=[self._change(batch, token) for token in result.tokens])


def a_last_bit_in_company(batch: Batch, token: SampledToken) -> SampledToken:
    assert token.logprob is not None
    if len(batch.seqs) < 3:
        return token
    *others, (token_id, logprob) = token.logprob.top
    top = (*others, (token_id, logprob * (1 + 2.0**-50)))
    return msgspec.structs.replace(token, logprob=msgspec.structs.replace(token.logprob, top=top))


def another_token_beside_a_prompt(batch: Batch, token: SampledToken) -> SampledToken:
    return SampledToken(token.token_id ^ 1, token.logprob) if batch.num_tokens > 30 else token


@pytest.mark.parametrize("change", [a_last_bit_in_company, another_token_beside_a_prompt])
def test_a_schedule_notices_what_depends_on_company(native_library: NativeLibrary, change: Change) -> None:
    with closing(load_native(native_library, "llama")) as backend:
        stories = live(backend)

        with pytest.raises(AssertionError, match="alone "):
            run_schedules(Changed(backend, change), stories, count=NUM_SCHEDULES, seed=0)
