"""Steps that verify drafts in torch give the tokens of steps of one token each. The CPU is in the place of a card."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.graph_memory import most_rows
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, RowCosts, SampledToken, SamplingInput, ScheduledSeq, TokenMasks
from brlite.engine.stats import EngineStats
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.engine.conftest import Driver
from tests.load_plans import make_plan
from tests.tiny_models import VOCAB_SIZE, TensorCheckpoint

PROMPT = [5, 17, 200, 3]
NUM_DRAWN = 9
FREE_ROWS = RowCosts(1, 0.0, 0.0)  # so tokens are drafted although few are right
PLAIN, AHEAD = DeviceRules(), DeviceRules(runs_ahead=True)
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=1.0, top_p=0.95),
    "drawn by the host": SamplingParams(temperature=1.0, typical_p=0.9),
    "logprobs": SamplingParams(temperature=1.0, logprobs=2),
}


def load(rules: DeviceRules = PLAIN, **spec: Any) -> TorchBackend:
    """A tiny model. In float32 this machine's tokens are the same for every batch; the backend does not promise it."""
    spec = {"build_seq": 64, "build_batch": 4, "num_blocks": 60, **spec}
    engine = EngineConfig(device="cpu", dtype="float32", block_size=4, threads=1)
    loaded = TorchBackend.load(make_plan(TensorCheckpoint.tiny("llama"), ModelSpec(**spec), engine))
    info = msgspec.structs.replace(
        loaded.info, is_batch_invariant=True, can_run_ahead=rules.runs_ahead, row_costs=FREE_ROWS
    )
    return TorchBackend(loaded._steps, info, rules)


@pytest.fixture(scope="module", params=[False, True], ids=["host draws", "device draws"])
def backend(request: pytest.FixtureRequest) -> TorchBackend:
    return load(AHEAD if request.param else PLAIN)


def run(token_ids: list[int], start: int, params: SamplingParams, **more: Any) -> ScheduledSeq:
    num_drafts = more.get("num_draft_tokens", 0)
    position = start + len(token_ids) - num_drafts - len(PROMPT)
    return ScheduledSeq(0, start, token_ids, list(range(10)), SamplingInput(params, 7, position), **more)


def drawn_one_by_one(backend: TorchBackend, params: SamplingParams) -> list[SampledToken]:
    drawn: list[SampledToken] = []
    token_ids, start = PROMPT, 0
    for _ in range(NUM_DRAWN):
        (result,) = backend.execute(Batch([run(token_ids, start, params)])).seqs
        start += len(token_ids)
        drawn += result.tokens
        token_ids = [result.tokens[-1].token_id]
    return drawn


def ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("num_right", [0, 3, 5])
def test_draft_tokens_are_taken_up_to_the_first_wrong_one(
    backend: TorchBackend, params: SamplingParams, num_right: int
) -> None:
    expected = drawn_one_by_one(backend, params)
    backend.execute(Batch([run(PROMPT, 0, params)]))
    draft = ids(expected[1 : 1 + num_right])
    draft += [(token + 1) % VOCAB_SIZE for token in ids(expected[1 + num_right : 6])]  # the rest of five is wrong
    company = ScheduledSeq(9, 0, [250, 2, 9], list(range(20, 30)), SamplingInput(PARAMS["greedy"], 0, 0))

    seq = run([expected[0].token_id, *draft], len(PROMPT), params, num_draft_tokens=len(draft))
    result, other = backend.execute(Batch([seq, company])).seqs

    assert ids(result.tokens) == ids(expected[1 : 2 + num_right])
    assert [token.logprob is None for token in result.tokens] == [params.logprobs is None] * (num_right + 1)
    assert len(other.tokens) == 1


def test_each_draft_token_has_a_mask_of_its_own(backend: TorchBackend) -> None:
    params = PARAMS["greedy"]
    masks = TokenMasks(VOCAB_SIZE, {0: 3})
    for row, token_id in enumerate((69, 70, 71)):
        memoryview(masks.words).cast("i")[row * masks.row_bytes // 4 + token_id // 32] = 1 << token_id % 32
        masks.publish(row)

    (result,) = backend.execute(Batch([run([*PROMPT, 69, 70], 0, params, num_draft_tokens=2)], masks)).seqs

    assert ids(result.tokens) == [69, 70, 71]


def test_masks_after_a_wrong_draft_token_may_allow_nothing(backend: TorchBackend) -> None:
    masks = TokenMasks(VOCAB_SIZE, {0: 3})
    memoryview(masks.words).cast("i")[69 // 32] = 1 << 69 % 32
    for row in range(3):
        masks.publish(row)

    seq = run([*PROMPT, 68, 70], 0, PARAMS["greedy"], num_draft_tokens=2)
    (result,) = backend.execute(Batch([seq], masks)).seqs

    assert result.error is None
    assert ids(result.tokens) == [69]


def answers(kind: str) -> tuple[dict[str, Any], EngineStats]:
    """Of some requests on a cache too small, one of them aborted, with drafts or without."""
    choose = random.Random(3)
    draft: Any = load() if kind == "draft model" else None
    if draft is not None:
        draft.batches = []  # so the driver's clock does not count its steps
    driver = Driver(
        budget=24,
        backend=load(AHEAD, build_batch=3, num_blocks=20),
        engine={"speculation": "off" if kind == "none" else "on", "max_draft_seqs": 3},
        draft_backend=draft,
    )
    engine: Any = driver.engine
    engine._scheduler.speculation.wait_cost.cost = 0.0
    if draft is not None:
        engine.draft_model.cost.per_draft_token = lambda num_seqs: 0.0
    for number in range(10):
        more: dict[str, Any] = choose.choice(
            [{}, {"temperature": 1.0, "seed": number}, {"n": 2, "temperature": 1.0, "seed": 4}, {"logprobs": 1}]
        )
        driver.submit("abcab" * 3, max_tokens=choose.randint(12, 30), **more)
        for _ in range(choose.randrange(4)):
            driver.step()
    aborted = driver.submit("abcab" * 3, max_tokens=30)
    driver.step()
    driver.begin()
    driver.engine.abort(aborted)
    driver.end()
    driver.finish()
    assert not driver.errors
    assert driver.outputs.pop(aborted).outputs[0].finish_reason == "abort"
    found = {
        request_id: sorted((each.index, each.token_ids, each.finish_reason) for each in output.outputs)
        for request_id, output in driver.outputs.items()
    }
    return found, driver.engine.stats


@pytest.mark.parametrize("kind", ["n-grams", "draft model"])
def test_an_engine_gives_the_same_answers_with_drafts_and_without(kind: str) -> None:
    expected, plain = answers("none")

    found, stats = answers(kind)

    assert found == expected
    assert plain.draft_tokens == 0
    assert min(stats.preemptions, stats.draft_tokens, plain.steps_ahead) > 0
    if kind == "draft model":  # the text does not repeat itself
        assert stats.accepted_tokens > 50


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_tokens_that_a_grammar_forces_are_verified_in_any_case(is_batch_invariant: bool) -> None:
    wish = StructuredOutput(regex="[ab](a long text that is given)[ab]")
    backend = load()
    backend._info = msgspec.structs.replace(backend.info, is_batch_invariant=is_batch_invariant)
    driver, plain = (Driver(budget=64, backend=backend, engine={"speculation": each}) for each in ("auto", "off"))

    for each in (driver, plain):
        each.submit("hello", max_tokens=60, structured=wish)
    num_steps, num_plain = len(driver.finish()), len(plain.finish())

    assert driver.text("request-0") == plain.text("request-0")
    assert len(driver.text("request-0")) == 27
    assert num_plain == 27
    assert num_steps < 10


@pytest.mark.parametrize(
    ("build_batch", "engine", "expected"),
    [
        (1, {}, 8),  # a token and a draft of seven
        (3, {"max_draft_tokens": 2}, 9),
        (64, {}, 64),
        (64, {"max_draft_seqs": 16}, 128),
        (3, {"speculation": "off"}, 3),
    ],
)
def test_graphs_are_captured_for_as_many_rows_as_drafts_need(
    build_batch: int, engine: dict[str, Any], expected: int
) -> None:
    assert most_rows(ModelSpec(build_batch=build_batch), EngineConfig(**engine)) == expected
