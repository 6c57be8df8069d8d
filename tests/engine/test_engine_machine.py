"""Any order of submitting, stepping, failing and aborting, on a cache too small: texts stay right.

So they do with drafts and without, by n-grams and by a draft model, and whether each step waits for the one before or
is decided ahead of its result. Every request ends, and is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.config.options import LimitsConfig
from brlite.engine.backend import ScheduledSeq
from brlite.engine.request import sibling_seed
from brlite.sampling_params import PoolingParams, StructuredOutput
from tests.engine.conftest import Driver
from tests.fakes import FakeBackend, hidden_state, printable_token, reference_tokens, repeating_token

# Few letters and few shapes, so that prompts share prefixes, evict each other and come back.
prompts = st.builds(
    lambda system, rest: system * 4 + rest,
    st.sampled_from(["", "a", "ab", "abc"]),
    st.text("ab", min_size=1, max_size=9),
)


# Parameters that make a draw depend on more than the tokens before it, or several sequences depend on each other.
SPECIAL: dict[str, dict[str, Any]] = {
    "window": {"repetition_penalty": 1.1, "repeat_last_n": 3},
    "bad words": {"bad_words": ["ab", "x"]},
    "grammar": {"structured": StructuredOutput(choice=["abcabc", "abd", "xyz"])},
    "processors": {"logits_processors": [lambda output, logits: logits]},
    "beams": {"use_beam_search": True, "best_of": 5, "temperature": 0},  # more than places
}


class Asked(NamedTuple):
    """What a request wants, and so what it is told."""

    prompt: bytes
    max_tokens: int
    n: int
    seed: int
    stop: frozenset[int]
    special: str = ""

    def submit(self, driver: Driver, **more: Any) -> str:
        params = {"temperature": 1.0, "stop_token_ids": tuple(self.stop), **SPECIAL.get(self.special, {}), **more}
        return driver.submit(list(self.prompt), max_tokens=self.max_tokens, n=self.n, seed=self.seed, **params)

    def reference(self, index: int, next_token: Callable[[Sequence[int], int], int]) -> list[int]:
        if self.special:
            return alone(self, next_token)[index]
        seed = sibling_seed(self.seed, index)
        tokens = reference_tokens(self.prompt, self.max_tokens, seed=seed, next_token=next_token)
        end = next((number for number, token in enumerate(tokens, 1) if token in self.stop), self.max_tokens)
        return tokens[:end]


@lru_cache(maxsize=4096)
def alone(asked: Asked, next_token: Callable[[Sequence[int], int], int]) -> list[list[int]]:
    """The answers to a request in an engine without others, without drafts, one step after the other."""
    driver = Driver(max_num_seqs=4, max_model_len=40, next_token=next_token)
    request_id = asked.submit(driver)
    driver.finish()
    return [driver.token_ids(request_id, index) for index in range(asked.n)]


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        next_token=st.sampled_from([printable_token, repeating_token]),
        num_blocks=st.sampled_from([12, 24]),
        max_draft_tokens=st.sampled_from([0, 7]),
        max_draft_seqs=st.sampled_from([1, 4]),
        speculation=st.sampled_from(["auto", "on"]),
        can_run_ahead=st.booleans(),
        draft_token=st.sampled_from([None, printable_token, repeating_token]),
        num_draft_blocks=st.sampled_from([4, 12]),
    )
    def start(
        self,
        next_token: Callable[[Sequence[int], int], int],
        num_blocks: int,
        max_draft_tokens: int,
        max_draft_seqs: int,
        speculation: str,
        can_run_ahead: bool,
        draft_token: Callable[[Sequence[int], int], int] | None,
        num_draft_blocks: int,
    ) -> None:
        draft = {"num_blocks": num_draft_blocks, "max_num_seqs": 3, "max_model_len": 40, "next_token": draft_token}
        self.driver = Driver(
            budget=7,
            num_blocks=num_blocks,
            max_num_seqs=3,
            max_model_len=40,
            limits=LimitsConfig(max_waiting=1000, max_wait_seconds=1e6),
            next_token=next_token,
            max_draft_tokens=max_draft_tokens,
            engine={"max_draft_seqs": max_draft_seqs, "speculation": speculation},
            can_run_ahead=can_run_ahead,
            fault=self.fault,
            draft_backend=None if draft_token is None else FakeBackend(**draft),
            draft_seconds=0.01,
        )
        self.asked: dict[str, Asked] = {}
        self.embedded: dict[str, bytes] = {}
        self.aborted: set[str] = set()
        self.next_fault = ""
        self.has_failed = False

    def fault(self, seq: ScheduledSeq) -> str | None:
        """What is wrong with the first sequence of a step that is computed after `next_fault` was set."""
        fault, self.next_fault = self.next_fault, ""
        self.has_failed = self.has_failed or bool(fault)
        if fault == "step":
            raise RuntimeError("the device failed")
        return fault or None

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 4),
        seed=st.integers(1, 3),
        tenant=st.sampled_from(["", "a", "b"]),
        group=st.sampled_from(["", "body"]),
        priority=st.sampled_from([0, 0, 0, 1]),
        stop=st.frozensets(st.sampled_from(b"abcxyz"), max_size=3),
        more=st.sampled_from([{}, {}, {"presence_penalty": 0.5}, {"prompt_logprobs": 1}]),
    )
    def submit(
        self,
        prompt: str,
        max_tokens: int,
        n: int,
        seed: int,
        tenant: str,
        group: str,
        priority: int,
        stop: frozenset[int],
        more: dict[str, Any],
    ) -> None:
        asked = Asked(prompt.encode(), max_tokens, n, seed, stop)
        self.asked[asked.submit(self.driver, tenant=tenant, group=group, priority=priority, **more)] = asked

    @rule(prompt=prompts, max_tokens=st.integers(1, 9), n=st.integers(1, 3), special=st.sampled_from(sorted(SPECIAL)))
    def submit_special(self, prompt: str, max_tokens: int, n: int, special: str) -> None:
        asked = Asked(prompt.encode(), max_tokens, n, 1, frozenset(), special)
        self.asked[asked.submit(self.driver)] = asked

    @rule(prompt=prompts, pooling=st.sampled_from(["last", "mean"]), priority=st.integers(0, 1))
    def embed(self, prompt: str, pooling: Any, priority: int) -> None:
        params = PoolingParams(pooling=pooling, normalize=False)
        request_id = self.driver.submit(prompt, pooling=params, priority=priority)
        if pooling == "last":
            self.embedded[request_id] = prompt.encode()

    @rule(fault=st.sampled_from(["step", "broken"]))
    def fail(self, fault: str) -> None:
        self.next_fault = fault

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.driver.step()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.asked)))
        if not (request_id in self.driver.outputs and self.driver.outputs[request_id].finished):
            self.aborted.add(request_id)
        self.driver.engine.abort(request_id)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort_while_a_step_runs(self, data: st.DataObject) -> None:
        self.driver.begin()
        self.abort(data)
        self.driver.end()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort_while_the_draft_model_drafts(self, data: st.DataObject) -> None:
        engine = self.driver.engine
        plan = engine.plan_drafts()
        self.abort(data)
        if plan is not None and engine.draft_model is not None:
            engine.take_drafts(plan, engine.draft_model.run(plan))
        self.driver.step()

    @invariant()
    def no_block_is_lost(self) -> None:
        self.driver.engine.check_integrity()

    def teardown(self) -> None:
        driver, stats = self.driver, self.driver.engine.stats
        driver.finish()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert sum(stats.finished.values()) == driver.num_submitted
        assert stats.finished["error"] == len(driver.errors)
        assert self.has_failed or not driver.errors
        for request_id, asked in self.asked.items():
            if request_id not in driver.errors:
                assert driver.outputs[request_id].finished
                self.check_texts(request_id, asked)
        for request_id, prompt in self.embedded.items():
            if request_id not in driver.errors:
                embedding = driver.outputs[request_id].embedding
                assert embedding is not None
                assert embedding.tolist() == hidden_state(prompt)

    def check_texts(self, request_id: str, asked: Asked) -> None:
        outputs = {output.index: output.token_ids for output in self.driver.outputs[request_id].outputs}
        assert set(outputs) == set(range(asked.n))
        if request_id in self.aborted and asked.special == "beams":
            return  # the best beams so far need not be the beginnings of the best answers
        for index, token_ids in outputs.items():
            expected = asked.reference(index, self.driver.backend.next_token)
            assert token_ids == (expected[: len(token_ids)] if request_id in self.aborted else expected)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
