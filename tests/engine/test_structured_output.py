"""Answers that must match a schema or an expression: through the scheduler, drafts, preemption and siblings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import pytest

from brlite.engine.backend import Batch, Undrawn
from brlite.errors import EngineError, InvalidRequest
from brlite.sampling_params import StructuredOutput
from tests.engine.conftest import PATIENT, MakeDriver
from tests.fakes import EOS

ROOMY = {"num_blocks": 256, "max_model_len": 1024, "limits": PATIENT}
PERSON = StructuredOutput(
    json_schema={
        "type": "object",
        "properties": {"first_name": {"enum": ["Ada", "Grace"]}, "is_admin": {"type": "boolean"}},
        "required": ["first_name", "is_admin"],
        "additionalProperties": False,
    }
)


def noise(context: Sequence[int], seed: int) -> int:
    """Any token of all, the end of the text among them, as a model that knows nothing would draw."""
    return int.from_bytes(blake2b(repr((list(context), seed)).encode(), digest_size=2).digest(), "little") % (EOS + 1)


def num_drafted(batches: list[Batch]) -> int:
    return sum(seq.num_draft_tokens for batch in batches for seq in batch.seqs)


def test_an_answer_matches_its_schema_and_ends_by_itself(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)

    request_id = driver.submit("who", structured=PERSON, max_tokens=200)
    driver.finish()

    answer = json.loads(driver.text(request_id))
    assert answer["first_name"] in ("Ada", "Grace")
    assert answer["is_admin"] in (True, False)
    assert list(answer) == ["first_name", "is_admin"]
    assert driver.outputs[request_id].outputs[0].finish_reason == "stop"
    assert EOS not in driver.token_ids(request_id)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_forced_tokens_are_drafts_and_change_nothing(make_driver: MakeDriver, temperature: float):
    runs = []
    for max_draft_tokens in (0, 3, 7):
        driver = make_driver(next_token=noise, max_draft_tokens=max_draft_tokens, **ROOMY)
        request_id = driver.submit("who", structured=PERSON, max_tokens=200, temperature=temperature, seed=3, n=3)
        batches = driver.finish()
        texts = [driver.text(request_id, index) for index in range(3)]
        runs.append((texts, [driver.token_ids(request_id, index) for index in range(3)], len(batches)))
        assert (num_drafted(batches) > 0) == (max_draft_tokens > 0)

    assert runs[0][:2] == runs[1][:2] == runs[2][:2]
    assert runs[2][2] < runs[1][2] < runs[0][2] / 2


def test_the_step_that_ends_a_prompt_has_forced_tokens_as_drafts(make_driver: MakeDriver):
    forced = '{"first'  # as many as may be drafted
    prompt = "who is the one that wrote the first program"
    driver = make_driver(next_token=noise, max_draft_tokens=len(forced), budget=32, **ROOMY)

    request_id = driver.submit(prompt, structured=PERSON, max_tokens=200, n=2)
    first, second, *_ = driver.finish()

    assert [len(seq.token_ids) for seq in first.seqs] == [32]  # the budget has no room for the whole prompt
    assert num_drafted([first]) == 0
    assert [seq.token_ids for seq in second.seqs] == [list((prompt[32:] + forced).encode())]
    assert num_drafted([second]) == len(forced)
    assert all(json.loads(driver.text(request_id, index)) for index in range(2))


@pytest.mark.parametrize("rules", [{"prompt_logprobs": 1}, {"max_tokens": 1}, {"presence_penalty": 0.5}])
def test_a_prompt_has_no_forced_tokens_as_drafts_where_they_cannot_be_verified(
    make_driver: MakeDriver, rules: dict[str, Any]
):
    driver = make_driver(next_token=noise, max_draft_tokens=7, budget=64, **ROOMY)

    driver.submit("who", structured=PERSON, **({"max_tokens": 200} | rules))
    batches = driver.finish()

    assert num_drafted(batches[:1]) == 0


def test_forced_tokens_are_drafted_however_many_run(make_driver: MakeDriver):
    driver = make_driver(
        next_token=noise, max_draft_tokens=7, max_num_seqs=8, budget=64, engine={"max_draft_seqs": 1}, **ROOMY
    )

    ids = [driver.submit(f"who {number}", structured=PERSON, max_tokens=200) for number in range(8)]
    batches = driver.finish()

    assert any(sum(seq.num_draft_tokens > 0 for seq in batch.seqs) > 1 for batch in batches)
    assert all(json.loads(driver.text(request_id)) for request_id in ids)


def test_a_batch_of_mixed_requests_draws_as_each_alone(make_driver: MakeDriver):
    free = {"max_tokens": 30, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    wishes = [PERSON, None, StructuredOutput(regex="[a-z]{20}"), None, StructuredOutput(choice=("yes", "no"))]
    together = make_driver(next_token=noise, max_num_seqs=8, budget=64, max_draft_tokens=4, **ROOMY)
    ids = [together.submit(f"p{i}", structured=wish, **free) for i, wish in enumerate(wishes)]
    together.finish()

    for number, (request_id, wish) in enumerate(zip(ids, wishes, strict=True)):
        alone = make_driver(next_token=noise, **ROOMY)
        alone_id = alone.submit(f"p{number}", structured=wish, **free)
        alone.finish()
        assert together.token_ids(request_id) == alone.token_ids(alone_id)


def test_preemption_keeps_the_place_in_the_grammar(make_driver: MakeDriver):
    person = json.loads(PERSON.json_schema or "")
    wish = StructuredOutput(json_schema={"type": "array", "items": person, "minItems": 1, "maxItems": 2})
    driver = make_driver(
        next_token=noise, num_blocks=40, max_num_seqs=4, max_model_len=160, max_draft_tokens=4, limits=PATIENT
    )

    ids = [driver.submit(f"{number}", structured=wish, max_tokens=100) for number in range(4)]
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    for request_id in ids:
        output = driver.outputs[request_id].outputs[0]
        assert output.finish_reason == "length" or 1 <= len(json.loads(output.text)) <= 2


def test_an_answer_cut_by_length_says_so(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)

    request_id = driver.submit("x", structured=PERSON, max_tokens=5)
    driver.finish()

    assert driver.text(request_id) == '{"fir'
    assert driver.outputs[request_id].outputs[0].finish_reason == "length"


def test_a_stop_string_cuts_a_structured_answer(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, max_draft_tokens=7, **ROOMY)

    request_id = driver.submit("x", structured=PERSON, max_tokens=50, stop=["_name"])
    driver.finish()

    output = driver.outputs[request_id].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ('{"first', "stop", "_name")


def test_a_complete_answer_ends_before_min_tokens_and_with_ignore_eos(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)

    request_id = driver.submit(
        "x", structured=StructuredOutput(choice=("yes",)), max_tokens=50, min_tokens=20, ignore_eos=True
    )
    driver.finish()

    assert (driver.text(request_id), driver.outputs[request_id].outputs[0].finish_reason) == ("yes", "stop")


def test_logprobs_come_for_forced_tokens_too(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, max_draft_tokens=7, **ROOMY)

    request_id = driver.submit("x", structured=StructuredOutput(choice=("certainly",)), logprobs=1, max_tokens=50)
    driver.finish()

    output = driver.outputs[request_id].outputs[0]
    assert [entry.token_id for entry in output.logprobs or ()] == output.token_ids == list(b"certainly")


class Failing:
    """A matcher that follows another one until it has taken in so many tokens, and then has an error."""

    def __init__(self, inner: Any, num_tokens: int) -> None:
        self._inner, self._limit = inner, num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fill_masks(self, words: memoryview, draft_token_ids: Sequence[int]) -> None:
        if self._inner.num_tokens >= self._limit:
            self._inner.error = "too complex"
        self._inner.fill_masks(words, draft_token_ids)


def test_a_grammar_that_fails_late_ends_its_own_completion_only(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)
    free_id = driver.submit("free", max_tokens=40, ignore_eos=True)
    driver.step()
    request_id = driver.submit("x", structured=PERSON, max_tokens=100, n=2)
    while not any(seq.index == 1 for seq in driver.engine._scheduler.running):
        driver.step()
    failing = next(seq for seq in driver.engine._scheduler.running if seq.index == 1)
    failing.matcher = Failing(failing.matcher, 9)

    driver.finish()

    first, second = sorted(driver.outputs[request_id].outputs, key=lambda output: output.index)
    assert json.loads(first.text)
    assert first.finish_reason == "stop"
    assert (second.text, second.finish_reason, second.stop_reason) == ('{"first_n', "error", "too complex")
    assert len(driver.token_ids(free_id)) == 40


def test_a_mask_that_raises_does_not_hold_up_the_step(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)
    free_id = driver.submit("free", max_tokens=10, ignore_eos=True)
    request_id = driver.submit("x", structured=PERSON, max_tokens=100)
    driver.step()
    seq = next(seq for seq in driver.engine._scheduler.running if seq.matcher is not None)
    seq.matcher.fill_masks = None  # type: ignore[union-attr,method-assign,assignment]  # calling it raises

    driver.finish()

    assert isinstance(driver.errors[request_id], EngineError)
    assert len(driver.token_ids(free_id)) == 10


def test_a_request_whose_wish_was_not_compiled_is_refused(make_driver: MakeDriver):
    driver = make_driver()
    driver.engine.compiler.compile = lambda wish: None  # type: ignore[method-assign,assignment,return-value]

    with pytest.raises(EngineError, match="was not compiled"):
        driver.submit("x", structured=PERSON)


def test_a_completion_that_no_token_can_follow_ends_alone(make_driver: MakeDriver):
    driver = make_driver(
        next_token=noise,
        fault=lambda seq: Undrawn.NOTHING_ALLOWED.value if seq.sampling and seq.seq_id == 0 else None,
        **ROOMY,
    )

    request_id = driver.submit("who", structured=PERSON, max_tokens=200, n=3)
    driver.finish()

    first, *others = driver.outputs[request_id].outputs
    assert (first.finish_reason, first.stop_reason) == ("error", Undrawn.NOTHING_ALLOWED.value)
    assert [other.finish_reason for other in others] == ["stop", "stop"]


def test_tokens_that_may_not_begin_the_answer_are_refused(make_driver: MakeDriver):
    driver = make_driver(next_token=noise, **ROOMY)

    with pytest.raises(InvalidRequest, match="allowed_token_ids has no token") as caught:
        driver.submit("who", structured=PERSON, allowed_token_ids=[ord("x"), EOS])
    request_id = driver.submit("who", structured=PERSON, allowed_token_ids=[*b'{"first_name":AdaGrceistu,}'])
    driver.finish()

    assert caught.value.param == "allowed_token_ids"
    assert driver.text(request_id).startswith("{")
