"""The conformance kit: what keeps the contract passes, and each check finds the engine that breaks its promise."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from brlite.backends.plugins.conformance.checks import CHECKS, Outcome, run_check, run_checks
from brlite.backends.plugins.conformance.engine_under_test import EngineUnderTest
from brlite.backends.plugins.contract import PluginEngine
from brlite.backends.plugins.toy import ToyEngine
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError
from tests.backends.plugins.toys import BROKEN, CONFIG, SPEC, LooseToy, StiffToy


def check_all(make: type[ToyEngine], spec: ModelSpec = SPEC) -> dict[str, Outcome]:
    subject = EngineUnderTest(make, spec, CONFIG)
    return {outcome.name: outcome for outcome in run_checks(subject, lambda outcome: None)}


class TightToy(LooseToy):
    """Rows of 5 tokens at most."""

    claims: ClassVar[dict[str, Any]] = {**LooseToy.claims, "max_row_tokens": 5}


class HalfToy(LooseToy):
    """Logits in half precision, which promise less."""

    claims: ClassVar[dict[str, Any]] = {
        **LooseToy.claims,
        "logits_dtype": "float16",
        "is_batch_invariant": False,
        "tolerance": 1e-3,
    }

    def step(self, rows):
        return super().step(rows).astype("float16")


@pytest.mark.parametrize("make", [ToyEngine, LooseToy, StiffToy, TightToy, HalfToy])
@pytest.mark.parametrize("build_batch", [1, 2, 7])
def test_an_engine_that_keeps_its_promises_passes(make: type[ToyEngine], build_batch: int) -> None:
    outcomes = check_all(make, ModelSpec(name="toy", build_seq=96, build_batch=build_batch))

    assert [outcome for outcome in outcomes.values() if outcome.result == "failed"] == []


def test_what_is_not_claimed_is_not_tried() -> None:
    outcomes = check_all(ToyEngine)

    assert {name for name, outcome in outcomes.items() if outcome.result == "not tried"} == {
        "the order of rows is free",
        "prompts and decodes mix",
        "prompts come together",
    }


def test_what_is_claimed_is_tried() -> None:
    outcomes = check_all(LooseToy)

    assert {outcome.result for outcome in outcomes.values()} == {"passed"}


@pytest.mark.parametrize(
    ("name", "broken"),
    [(name, broken) for name in CHECKS for broken in BROKEN[name]],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_check_finds_the_engine_that_is_broken(name: str, broken: type[PluginEngine]) -> None:
    subject = EngineUnderTest(broken, SPEC, CONFIG)

    outcome = run_check(subject, name, CHECKS[name])

    assert outcome.result == "failed"
    assert outcome.detail


def test_an_engine_that_raises_fails_that_check_and_the_next_one_is_tried() -> None:
    subject = EngineUnderTest(ToyEngine, SPEC, EngineConfig(name="toy", options={"fail_every": 3}))

    outcomes = run_checks(subject, lambda outcome: None)

    assert len(outcomes) == len(CHECKS)
    assert any("raised EngineError" in outcome.detail for outcome in outcomes)


def test_too_short_a_context_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="build_seq is 16; checking an engine takes 32"):
        EngineUnderTest(ToyEngine, ModelSpec(name="toy", build_seq=16), CONFIG)
