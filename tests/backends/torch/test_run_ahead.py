"""Steps that are launched before the result of the one before is fetched, with the CPU in the place of a card."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.steps import ComputedStep
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import (
    Batch,
    LogitsProcessor,
    LogitsProcessors,
    SamplingInput,
    ScheduledSeq,
    SeqResult,
    TokenMasks,
    Undrawn,
)
from brlite.engine.outputs import RequestOutput
from brlite.errors import BackendLost
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.engine.conftest import Driver
from tests.load_plans import make_plan
from tests.tiny_models import VOCAB_SIZE, TensorCheckpoint

AHEAD = DeviceRules(runs_ahead=True)
GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(temperature=1.0, top_k=9)
NUM_BLOCKS = 40


def load(*, build_batch: int = 4, num_blocks: int = NUM_BLOCKS) -> TorchBackend:
    """A tiny model whose simple draws are made as on a card."""
    spec = ModelSpec(build_seq=48, build_batch=build_batch, num_blocks=num_blocks)
    engine = EngineConfig(device="cpu", dtype="float32", block_size=4, threads=1)
    loaded = TorchBackend.load(make_plan(TensorCheckpoint.tiny("llama"), spec, engine))
    return TorchBackend(loaded._steps, msgspec.structs.replace(loaded.info, can_run_ahead=True), AHEAD)


def run(seq_id: int, start: int, token_ids: list[int], params: SamplingParams = GREEDY, **more: Any) -> ScheduledSeq:
    sampling = SamplingInput(params, seed=seq_id, position=start)
    return ScheduledSeq(seq_id, start, token_ids, list(range(10 * seq_id, 10 * seq_id + 10)), sampling, **more)


def token_of(result: SeqResult) -> int:
    return result.tokens[0].token_id


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return load()


@pytest.mark.parametrize("params", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_step_takes_the_token_that_the_one_before_draws(backend: TorchBackend, params: SamplingParams) -> None:
    prompts = [[5, 17, 200, 3], [250, 2]]
    alone: list[list[int]] = []
    for seq_id, prompt in enumerate(prompts):
        token = token_of(backend.execute(Batch([run(seq_id, 0, prompt, params)])).seqs[0])
        step = run(seq_id, len(prompt), [token], params)
        alone.append([token, token_of(backend.execute(Batch([step])).seqs[0])])

    first = backend.launch(Batch([run(seq_id, 0, prompt, params) for seq_id, prompt in enumerate(prompts)]))
    ahead = [run(seq_id, len(prompts[seq_id]), [0], params, takes_last_draw=True) for seq_id in (1, 0)]
    second = backend.launch(Batch([*ahead, run(2, 0, [9, 9, 9])]))

    drawn = [[token_of(result) for result in fetch().seqs] for fetch in (first, second)]
    assert drawn[0] == [tokens[0] for tokens in alone]
    assert drawn[1][:2] == [alone[1][1], alone[0][1]]


def test_what_the_host_draws_is_drawn_before_the_next_step_and_counted(backend: TorchBackend) -> None:
    penalised = SamplingParams(temperature=0.0, presence_penalty=2.0)
    counted = {"counted_token_ids": b"\x05\0\0\0", "output_counts": b"\0\0\0\0"}
    start = msgspec.structs.replace(run(0, 0, [5], penalised), sampling=SamplingInput(penalised, 0, 0, **counted))
    follow = msgspec.structs.replace(
        run(0, 1, [0], penalised, takes_last_draw=True), sampling=SamplingInput(penalised, 0, 1, **counted)
    )

    first, second = backend.launch(Batch([start, run(1, 0, [7])])), backend.launch(Batch([follow]))
    results = [first(), second()]

    token = token_of(results[0].seqs[0])
    expected = backend.execute(Batch([follow.with_last_draw(token)])).seqs[0]
    assert token_of(results[1].seqs[0]) == token_of(expected)
    assert [result.num_host_draws for result in results] == [1, 1]


def test_logits_processors_run_on_the_host_and_the_device_draws_for_the_others(backend: TorchBackend) -> None:
    def only_69(output_token_ids: list[int], logits: Any) -> Any:
        logits[:69], logits[70:] = -np.inf, -np.inf
        return logits

    processors = LogitsProcessors([LogitsProcessor("only_69", only_69, 2)], [5, 6])
    alone = backend.execute(Batch([run(1, 0, [7])]))

    result = backend.launch(Batch([run(0, 0, [5, 6]), run(1, 0, [7])], processors={0: processors}))()
    follow = backend.launch(Batch([run(0, 2, [0], takes_last_draw=True)], processors={0: processors}))()

    assert [token_of(seq) for seq in result.seqs] == [69, token_of(alone.seqs[0])]
    assert token_of(follow.seqs[0]) == 69
    assert (result.num_host_draws, alone.num_host_draws) == (1, 0)


def test_a_step_that_draws_nothing_is_waited_for_on_its_device(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else chunks of a prompt would be queued without a limit, and their time would not be known."""
    steps, card, fetched = backend._steps, torch.device("meta"), list[torch.device]()
    forward = steps.forward

    def compute(*arguments: Any) -> ComputedStep:
        computed = forward(*arguments)
        monkeypatch.setattr(steps, "device", card)  # a card's name, once the CPU has computed in its place
        return computed

    monkeypatch.setattr(steps, "forward", compute)
    monkeypatch.setattr("brlite.backends.torch.backend.begin_fetch", lambda drawn: fetched.append(drawn.device))

    backend.launch(Batch([msgspec.structs.replace(run(0, 0, [5, 6]), sampling=None)]))
    backend._before = None

    assert fetched == [card]


def test_masks_are_waited_for_when_the_result_is(backend: TorchBackend) -> None:
    masks = TokenMasks(VOCAB_SIZE, {0: 1})
    fetch = backend.launch(Batch([run(0, 0, [5, 6])], masks))

    memoryview(masks.words).cast("i")[2] = 1 << 5  # only token 69
    masks.publish(0)

    assert token_of(fetch().seqs[0]) == 69


def test_a_step_that_fails_does_not_fail_the_one_behind_it(backend: TorchBackend) -> None:
    wrong = backend.launch(Batch([run(0, 0, [5, 6])], TokenMasks(VOCAB_SIZE, {0: 1})))
    masks = wrong.args[0].batch.masks  # type: ignore[attr-defined]
    masks.wait = lambda: (_ for _ in ()).throw(RuntimeError("no masks"))

    right = backend.launch(Batch([run(0, 2, [0], takes_last_draw=True), run(1, 0, [7])]))

    with pytest.raises(RuntimeError, match="no masks"):
        wrong()
    assert len(right().seqs[1].tokens) == 1


def test_a_step_after_one_whose_launch_failed_takes_any_token(backend: TorchBackend) -> None:
    with pytest.raises(IndexError):
        backend.launch(Batch([ScheduledSeq(0, 40, [5], [], SamplingInput(GREEDY, 0, 0))]))

    result = backend.launch(Batch([run(0, 2, [0], takes_last_draw=True)]))()

    assert len(result.seqs[0].tokens) == 1


def test_a_row_that_is_not_finite_ends_its_sequence_and_the_step_behind_it_goes_on() -> None:
    backend = load()
    backend._steps.parameters.named["embedding"][66] = torch.nan

    first = backend.launch(Batch([run(0, 0, [66]), run(1, 0, [7])]))
    second = backend.launch(Batch([run(seq_id, 1, [0], takes_last_draw=True) for seq_id in (0, 1)]))

    assert first().seqs[0] == SeqResult.undrawn(0, Undrawn.NOT_FINITE)
    assert len(second().seqs[1].tokens) == 1


def test_a_launch_does_not_wait_for_what_the_device_draws(backend: TorchBackend) -> None:
    first: Any = backend.launch(Batch([run(0, 0, [5, 6])]))
    second: Any = backend.launch(Batch([run(0, 2, [0], takes_last_draw=True)]))

    assert [fetch.args[0].outcome for fetch in (first, second)] == [None, None]
    assert [len(fetch().seqs[0].tokens) for fetch in (first, second)] == [1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_requests_gets_the_same_whether_steps_are_launched_ahead_or_not(seed: int) -> None:
    outputs = []
    for can_run_ahead in (False, True):
        choose = random.Random(seed)
        backend = load(build_batch=choose.choice([2, 4]), num_blocks=choose.choice([14, 40]))
        backend._info = msgspec.structs.replace(backend.info, can_run_ahead=can_run_ahead)
        driver = Driver(budget=choose.choice([5, 9, 32]), backend=backend)
        for number in range(12):
            submit_some(driver, choose, number)
            for _ in range(choose.randrange(4)):
                driver.step()
        driver.finish()
        assert (driver.engine.stats.steps_ahead > 0) == can_run_ahead
        assert not driver.errors
        assert driver.engine.stats.host_draws > 0
        outputs.append({request_id: _by_index(output) for request_id, output in driver.outputs.items()})

    assert outputs[0] == outputs[1]


def prefer_even(output_token_ids: list[int], logits: Any) -> Any:
    logits[::2] += len(output_token_ids)
    return logits


def submit_some(driver: Driver, choose: random.Random, number: int) -> None:
    """A request of any kind; two of three are drawn on the device."""
    more: dict[str, Any] = choose.choice(
        [
            *[{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}, {"n": 2}, {"min_tokens": 4}, {"stop": ["a", "b"]}],
            *[{"logprobs": 1}, {"prompt_logprobs": 2}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.2}],
            *[{"structured": StructuredOutput(regex="[ab]{2,9}")}, {"logits_processors": [prefer_even]}],
        ]
    )
    prompt = choose.choice(["", "abcab"]) + "".join(choose.choices("abc", k=choose.randint(1, 12)))
    driver.submit(prompt, **{"max_tokens": choose.randint(4, 14), "temperature": 1.0, "seed": number, **more})


def _by_index(output: RequestOutput) -> list[Any]:
    return sorted((each.index, each.token_ids, each.text, each.finish_reason) for each in output.outputs)


def card_errors() -> list[tuple[RuntimeError, type[Exception]]]:
    """Errors that torch raises for a card, each with the class that a step raises."""
    illegal = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
    errors: list[tuple[RuntimeError, type[Exception]]] = [
        (RuntimeError(illegal), BackendLost),
        (RuntimeError("CUDA error: out of memory"), RuntimeError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), RuntimeError),
        (RuntimeError("CUDA error: invalid configuration argument"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), torch.OutOfMemoryError),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), RuntimeError),
    ]
    if hasattr(torch, "AcceleratorError"):
        errors.append((torch.AcceleratorError("unspecified launch failure"), BackendLost))
    return errors


@pytest.mark.parametrize("where", ["forward", "logits"])
@pytest.mark.parametrize(("error", "raised"), card_errors(), ids=lambda value: str(value)[:30])
def test_an_error_that_leaves_the_card_unusable_loses_the_backend_and_others_fail_one_step(
    where: str, error: RuntimeError, raised: type[Exception]
) -> None:
    loaded = load()

    class Failing:
        """The model's steps, of which one part raises `error`."""

        def __getattr__(self, name: str) -> Any:
            if name == where:
                raise error
            return getattr(loaded._steps, name)

    broken = TorchBackend(Failing(), loaded.info, AHEAD)

    for part in (GREEDY, SamplingParams(temperature=0.0, logprobs=2)):  # drawn by the device, and by the host
        with pytest.raises(raised) as caught:
            broken.execute(Batch([run(0, 0, [5, 17], part)]))
        assert type(caught.value) is raised
