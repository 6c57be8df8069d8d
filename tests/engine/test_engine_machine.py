"""Any order of submitting, stepping and aborting, on a cache too small: texts stay right.

So they do with guesses and without, by n-grams and by a draft model, and whether each step waits for the one before or
is decided ahead of its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.config.options import LimitsConfig
from brlite.engine.request import sibling_seed
from tests.engine.conftest import Driver
from tests.fakes import FakeBackend, printable_token, reference_tokens, repeating_token

# Few letters and few shapes, so that prompts share prefixes, evict each other and come back.
prompts = st.builds(
    lambda system, rest: system * 4 + rest,
    st.sampled_from(["", "a", "ab", "abc"]),
    st.text("ab", min_size=1, max_size=9),
)


class Asked(NamedTuple):
    """What a request wants, and so what it is told."""

    prompt: bytes
    max_tokens: int
    n: int
    seed: int
    stop: frozenset[int]

    def reference(self, index: int, next_token: Callable[[Sequence[int], int], int]) -> list[int]:
        seed = sibling_seed(self.seed, index)
        tokens = reference_tokens(self.prompt, self.max_tokens, seed=seed, next_token=next_token)
        end = next((number for number, token in enumerate(tokens, 1) if token in self.stop), self.max_tokens)
        return tokens[:end]


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
            draft_backend=None if draft_token is None else FakeBackend(**draft),
            draft_seconds=0.01,
        )
        self.asked: dict[str, Asked] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 4),
        seed=st.integers(1, 3),
        tenant=st.sampled_from(["", "a", "b"]),
        group=st.sampled_from(["", "body"]),
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
        stop: frozenset[int],
        more: dict[str, Any],
    ) -> None:
        request_id = self.driver.submit(
            prompt,
            max_tokens=max_tokens,
            n=n,
            seed=seed,
            temperature=1.0,
            tenant=tenant,
            group=group,
            stop_token_ids=tuple(stop),
            **more,
        )
        self.asked[request_id] = Asked(prompt.encode(), max_tokens, n, seed, stop)

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
    def abort_while_the_draft_model_guesses(self, data: st.DataObject) -> None:
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
        self.driver.finish()
        assert self.driver.engine.stats.num_used_blocks == 0
        assert not self.driver.errors
        for request_id, asked in self.asked.items():
            assert self.driver.outputs[request_id].finished
            self.check_texts(request_id, asked)

    def check_texts(self, request_id: str, asked: Asked) -> None:
        outputs = {output.index: output.token_ids for output in self.driver.outputs[request_id].outputs}
        assert set(outputs) == set(range(asked.n))
        for index, token_ids in outputs.items():
            expected = asked.reference(index, self.driver.backend.next_token)
            assert token_ids == (expected[: len(token_ids)] if request_id in self.aborted else expected)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
