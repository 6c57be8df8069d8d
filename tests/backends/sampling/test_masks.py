"""Token masks: what they forbid is never drawn, by whichever sampler, and rows without one do not notice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from brlite.backends.native.draws import Drawing, NativeDraws
from brlite.backends.native.library import NativeLibrary, available_isas
from brlite.backends.sampling import reference
from brlite.backends.sampling.rows import NumpyRows
from brlite.backends.torch.candidates import TorchRows
from brlite.engine.backend import (
    Batch,
    SampledToken,
    SamplingInput,
    ScheduledSeq,
    SeqResult,
    TokenMask,
    TokenMasks,
    Undrawn,
)
from brlite.errors import EngineError
from brlite.sampling_params import SamplingParams
from tests.backends.native.test_sampling import Logits, entry, random_entry, random_logits
from tests.backends.native_models import VOCAB_SIZE, load_native, random_ids

Draw = Callable[[Logits, Sequence[SamplingInput], Sequence[TokenMask | None]], list[SampledToken | Undrawn]]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 1e30},
    {"temperature": 1.5, "top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.9999, "top_k": 400},
    {"min_p": 0.5},
    {"repetition_penalty": 0.1, "presence_penalty": -5.0, "counts": {7: 3, 11: 2}},
    {"logit_bias": {7: 100.0}},
]


def mask_of(allowed: Collection[int], vocab_size: int) -> TokenMask:
    """A complete mask."""
    masks = TokenMasks(vocab_size, {0: 1})
    fill(masks, 0, allowed)
    mask = masks.of(0)
    assert mask is not None
    return mask


def fill(masks: TokenMasks, row: int, allowed: Collection[int]) -> None:
    words = np.frombuffer(masks.words, np.uint32).reshape(-1, masks.row_bytes // 4)
    for token_id in allowed:
        words[row, token_id // 32] |= np.uint32(1 << token_id % 32)
    masks.publish(row)


def by_numpy(
    logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None]
) -> list[SampledToken | Undrawn]:
    return reference.sample(NumpyRows(logits.copy()), inputs, masks)


def by_torch(
    logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None]
) -> list[SampledToken | Undrawn]:
    return reference.sample(TorchRows(torch.from_numpy(logits.copy())), inputs, masks)


def by_kernels(library: NativeLibrary, isa: int) -> Draw:
    def draw(
        logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None]
    ) -> list[SampledToken | Undrawn]:
        rows = enumerate(zip(inputs, masks, strict=True))
        drawings = [Drawing(row, each, each.position, mask) for row, (each, mask) in rows]
        draws = NativeDraws(logits.shape[1]).lay_out(drawings)
        functions = library.functions
        assert not functions.brlite_draw_rows(
            isa, draws.draws_address, draws.drawn_address, *logits.shape, logits.ctypes.data
        )
        return draws.tokens()

    return draw


@pytest.fixture(params=["numpy", "torch", "generic", "best"])
def draw(request: pytest.FixtureRequest) -> Draw:
    if request.param in ("numpy", "torch"):
        return by_numpy if request.param == "numpy" else by_torch
    library: NativeLibrary = request.getfixturevalue("native_library")
    isas = available_isas(library.functions)
    return by_kernels(library, min(isas) if request.param == "generic" else library.isa)


@pytest.mark.parametrize("params", WAYS)
@pytest.mark.parametrize("vocab_size", [20, 31, 32, 33, 1000, 5003])
def test_only_tokens_of_the_mask_are_drawn(draw: Draw, vocab_size: int, params: dict[str, Any]) -> None:
    logits = random_logits(20, vocab_size, scale=4.0)
    logits[:, 7] += 50.0  # the best, and forbidden
    allowed = {0, 3, 11, vocab_size - 1}
    inputs = [entry(seed=seed, **params) for seed in range(20)]

    drawn = draw(logits, inputs, [mask_of(allowed, vocab_size)] * 20)

    assert {isinstance(token, SampledToken) and token.token_id for token in drawn} <= allowed


def test_a_mask_is_as_good_as_a_ban_of_the_rest(draw: Draw) -> None:
    logits = random_logits(60, 1000)
    inputs = [random_entry(np.random.default_rng(seed), 1000) for seed in range(60)]
    allowed = [np.random.default_rng(seed).choice(1000, 30, replace=False).tolist() for seed in range(60)]
    banned = [
        tuple({*each.banned_token_ids} | {*range(1000)} - {*ids}) for each, ids in zip(inputs, allowed, strict=True)
    ]
    bans = [msgspec.structs.replace(each, banned_token_ids=ids) for each, ids in zip(inputs, banned, strict=True)]

    masked = draw(logits, inputs, [mask_of(ids, 1000) for ids in allowed])

    assert masked == draw(logits, bans, [None] * 60)


@pytest.mark.parametrize("params", WAYS)
def test_allowed_token_ids_are_a_mask_of_the_request(draw: Draw, params: dict[str, Any]) -> None:
    logits = random_logits(20, 1000, scale=4.0)
    allowed = (1, 7, 11, 500, 999)
    masks = [mask_of({7, 11, 500, 3}, 1000) if seed % 2 else None for seed in range(20)]
    both = [mask_of({7, 11, 500} if seed % 2 else allowed, 1000) for seed in range(20)]

    drawn = draw(logits, [entry(seed=seed, allowed_token_ids=allowed, **params) for seed in range(20)], masks)

    assert drawn == draw(logits, [entry(seed=seed, **params) for seed in range(20)], both)


def test_one_token_left_is_drawn_however_unlikely_and_its_logprob_is_the_models_own(draw: Draw) -> None:
    logits = random_logits(3, 3000)
    logits[:, 2999] = -90.0
    inputs = [entry(temperature=0.0, logprobs=2), entry(logprobs=2), entry(temperature=1e-4, top_p=0.1, logprobs=2)]

    drawn = draw(logits, inputs, [mask_of({2999}, 3000)] * 3)

    expected = reference.token_logprobs(NumpyRows(logits), [2999] * 3, 2)
    for token, own in zip(drawn, expected, strict=True):
        assert isinstance(token, SampledToken)
        assert token.logprob is not None
        assert (token.token_id, token.logprob.logprob) == (2999, pytest.approx(own.logprob, rel=1e-5))
        assert [token_id for token_id, _ in token.logprob.top] == [token_id for token_id, _ in own.top]


def test_rows_without_a_mask_draw_the_same_beside_rows_with_one(draw: Draw) -> None:
    logits = random_logits(30, 3000)
    inputs = [random_entry(np.random.default_rng(seed), 3000) for seed in range(30)]
    masks = [mask_of({1, 2, 3}, 3000) if row % 3 == 0 else None for row in range(30)]

    mixed, plain = draw(logits, inputs, masks), draw(logits, inputs, [None] * 30)

    assert [token for row, token in enumerate(mixed) if row % 3] == [
        token for row, token in enumerate(plain) if row % 3
    ]


def test_a_row_whose_mask_allows_nothing_gives_no_token_and_harms_no_other(draw: Draw) -> None:
    logits = random_logits(2, 300)
    inputs = [entry(), entry()]

    drawn = draw(logits, inputs, [mask_of((), 300), None])

    assert drawn == [Undrawn.NOTHING_ALLOWED, draw(logits, inputs, [None, None])[1]]


def test_a_mask_does_not_hide_that_a_row_is_broken(draw: Draw) -> None:
    logits = random_logits(1, 300)
    logits[0, 17] = np.nan

    assert draw(logits, [entry()], [mask_of({3}, 300)]) == [Undrawn.NOT_FINITE]


# Masks of a step


def masked_seq(seq_id: int, token_ids: list[int], table: list[int], *, num_draft_tokens: int = 0) -> ScheduledSeq:
    sampling = SamplingInput(SamplingParams(temperature=0), seed=0, position=0)
    return ScheduledSeq(seq_id, 0, token_ids, table, sampling, num_draft_tokens=num_draft_tokens)


def test_a_native_step_waits_for_its_masks(native_library: NativeLibrary) -> None:
    masks = TokenMasks(VOCAB_SIZE, {1: 1})
    batch = Batch([masked_seq(1, random_ids(9, seed=1), [0]), masked_seq(2, random_ids(9, seed=2), [1])], masks)
    late = threading.Timer(0.2, fill, (masks, 0, {5, 6}))
    with closing(load_native(native_library, "llama")) as backend:
        plain = backend.execute(Batch(batch.seqs))
        late.start()
        masked = backend.execute(batch)

    assert masked.seqs[0].tokens[0].token_id in {5, 6}
    assert masked.seqs[1] == plain.seqs[1]
    late.join()


def test_each_draft_token_of_a_native_step_has_a_mask_of_its_own(native_library: NativeLibrary) -> None:
    masks = TokenMasks(VOCAB_SIZE, {1: 3})
    for row, allowed in enumerate(({21}, {22}, {23, 24})):
        fill(masks, row, allowed)
    prompt = random_ids(9, seed=1)
    with closing(load_native(native_library, "llama")) as backend:
        right = backend.execute(Batch([masked_seq(1, [*prompt, 21, 22], [0], num_draft_tokens=2)], masks)).seqs[0]
        wrong = backend.execute(Batch([masked_seq(1, [*prompt, 21, 9], [0], num_draft_tokens=2)], masks)).seqs[0]

    assert [token.token_id for token in right.tokens[:2]] == [21, 22]
    assert right.tokens[2].token_id in {23, 24}
    assert [token.token_id for token in wrong.tokens] == [21, 22]


def test_a_row_published_empty_ends_its_sequence_alone(native_library: NativeLibrary) -> None:
    masks = TokenMasks(VOCAB_SIZE, {1: 1})
    masks.publish(0)
    seqs = [masked_seq(1, random_ids(9, seed=1), [0]), masked_seq(2, random_ids(9, seed=2), [1])]
    with closing(load_native(native_library, "llama")) as backend:
        plain = backend.execute(Batch(seqs))
        results = backend.execute(Batch(seqs, masks)).seqs

    assert results[0] == SeqResult.undrawn(1, Undrawn.NOTHING_ALLOWED)
    assert results[1] == plain.seqs[1]


def test_masks_that_never_come_are_an_error() -> None:
    masks = TokenMasks(100, {1: 2})
    masks.publish(1)

    with pytest.raises(EngineError, match="token masks"):
        masks.wait(timeout=0.01)


def test_rows_of_masks_follow_each_other() -> None:
    masks = TokenMasks(33, {4: 1, 9: 3})
    fill(masks, 2, {0, 32})

    mask = masks.of(9, 1)

    assert mask is not None
    assert [token_id for token_id in range(33) if mask.allows(token_id)] == [0, 32]
    assert (masks.row_bytes, masks.first_rows, len(masks.is_filled)) == (8, {4: 0, 9: 1}, 4)
    assert masks.of(5) is None
