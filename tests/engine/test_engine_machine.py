"""Any order of submitting, stepping and aborting, with guesses or without, on a cache too small: texts stay right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from brlite.config.options import LimitsConfig
from brlite.engine.request import sibling_seed
from tests.engine.conftest import Driver
from tests.fakes import printable_token, reference_tokens, repeating_token

# Few letters and few shapes, so that prompts share prefixes, evict each other and come back.
prompts = st.builds(
    lambda system, rest: system * 4 + rest,
    st.sampled_from(["", "a", "ab", "abc"]),
    st.text("ab", min_size=1, max_size=9),
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        next_token=st.sampled_from([printable_token, repeating_token]),
        max_draft_tokens=st.sampled_from([0, 7]),
    )
    def start(self, next_token: Callable[[Sequence[int], int], int], max_draft_tokens: int) -> None:
        self.driver = Driver(
            budget=7,
            num_blocks=12,
            max_num_seqs=3,
            max_model_len=40,
            limits=LimitsConfig(max_waiting=1000, max_wait_seconds=1e6),
            next_token=next_token,
            max_draft_tokens=max_draft_tokens,
        )
        self.asked: dict[str, tuple[bytes, int, int, int]] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 4),
        seed=st.integers(1, 3),
        tenant=st.sampled_from(["", "a", "b"]),
        group=st.sampled_from(["", "body"]),
    )
    def submit(self, prompt: str, max_tokens: int, n: int, seed: int, tenant: str, group: str) -> None:
        request_id = self.driver.submit(
            prompt, max_tokens=max_tokens, n=n, seed=seed, temperature=1.0, tenant=tenant, group=group
        )
        self.asked[request_id] = (prompt.encode(), max_tokens, n, seed)

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
        batch = self.driver.engine.schedule()
        self.abort(data)
        if batch is not None:
            self.driver.engine.update(self.driver.backend.execute(batch))

    @invariant()
    def no_block_is_lost(self) -> None:
        self.driver.engine.check_integrity()

    def teardown(self) -> None:
        self.driver.finish()
        assert self.driver.engine.stats.num_used_blocks == 0
        assert not self.driver.errors
        for request_id, (prompt, max_tokens, n, seed) in self.asked.items():
            assert self.driver.outputs[request_id].finished
            self.check_texts(request_id, prompt, max_tokens, n, seed)

    def check_texts(self, request_id: str, prompt: bytes, max_tokens: int, n: int, seed: int) -> None:
        outputs = {output.index: output.token_ids for output in self.driver.outputs[request_id].outputs}
        assert set(outputs) == set(range(n))
        for index, token_ids in outputs.items():
            expected = reference_tokens(
                prompt, max_tokens, seed=sibling_seed(seed, index), next_token=self.driver.backend.next_token
            )
            assert token_ids == (expected[: len(token_ids)] if request_id in self.aborted else expected)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
