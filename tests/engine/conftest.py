"""A driver that steps an engine by hand and reads what its requests were given."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.backend import Batch, StepResult
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request, Sequence
from brlite.engine.scheduler import Scheduler
from brlite.errors import BrliteError
from brlite.sampling_params import PoolingParams, SamplingParams, StructuredOutput
from tests.fakes import ByteTokenizer, FakeBackend

PATIENT = LimitsConfig(max_waiting=1000, max_wait_seconds=1e6)


def next_to_replace(scheduler: Scheduler) -> tuple[Sequence, str, str | None] | None:
    """`Scheduler._next_to_replace` without an index: it groups the running sequences anew."""

    def grouped(seqs: Iterable[Sequence], name: str) -> dict[str, list[Sequence]]:
        groups: dict[str, list[Sequence]] = {}
        for seq in seqs:
            groups.setdefault(getattr(seq.state.request, name), []).append(seq)
        return groups

    running, waiting = scheduler.running, scheduler.waiting
    if not running or not waiting.has_turns or waiting.next is None:
        return None
    priority, latest = waiting.next.state.priority, max(reversed(running), key=lambda seq: seq.state.priority)
    if latest.state.priority > priority and scheduler._match_next() is None:
        return latest, next(iter(waiting.tenants)), None
    tenants = grouped((seq for seq in running if seq.state.priority == priority), "tenant")
    if len(running) < scheduler._max_num_seqs or not tenants:
        return None
    newcomer = next((tenant for tenant in waiting.tenants if tenant not in tenants), None)
    if newcomer is not None:
        most = max(tenants.values(), key=len)
        return (most[-1], newcomer, None) if len(most) > 1 else None
    for tenant in waiting.tenants:
        groups = grouped(tenants[tenant], "group")
        most = max(groups.values(), key=len)
        new_group = next((group for group in waiting.groups(tenant) if group not in groups), None)
        if len(most) > 1 and new_group is not None:
            return most[-1], tenant, new_group
    return None


class Driver:
    """An engine on a fake backend with a clock that moves by `step_seconds`, one second unless said otherwise.

    The steps of a draft model take `draft_seconds` each. A `backend` is used in place of the fake one.
    Where the backend `can_run_ahead`, each step is launched before the result of the one before is fetched.
    """

    def __init__(
        self,
        *,
        budget: int = 16,
        engine: Mapping[str, Any] | None = None,
        limits: LimitsConfig | None = None,
        step_seconds: Callable[[Batch], float] = lambda batch: 1.0,
        draft_backend: FakeBackend | None = None,
        draft_seconds: float = 0.1,
        backend: Any = None,
        **backend_options: Any,
    ):
        self.backend = backend or FakeBackend(**backend_options)
        self.now = 0.0
        self._step_seconds = step_seconds
        self._draft_seconds = draft_seconds
        config = EngineConfig(**{"max_num_batched_tokens": budget, "max_step_seconds": 0.0, **(engine or {})})
        self.engine = Engine(
            self.backend.info,
            ByteTokenizer(),  # type: ignore[arg-type]
            config,
            limits or LimitsConfig(),
            clock=lambda: self.now,
            draft_backend=draft_backend,
        )
        self.outputs: dict[str, RequestOutput] = {}
        self.errors: dict[str, BrliteError] = {}
        self.finished: list[str] = []
        self.num_submitted = 0
        self._begun: deque[tuple[Batch, Callable[[], StepResult]]] = deque()
        self._ids = (f"request-{number}" for number in itertools.count())

    def submit(
        self,
        prompt: list[int] | str,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        is_exempt_from_queue_timeout: bool = False,
        tenant: str = "",
        group: str = "",
        weight: int = 1,
        priority: int = 0,
        structured: StructuredOutput | None = None,
        pooling: PoolingParams | None = None,
        **params: Any,
    ) -> str:
        token_ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": 8, "structured": structured, **params})
        request = Request(
            request_id=request_id or next(self._ids),
            prompt_token_ids=token_ids,
            params=sampling,
            cache_salt=cache_salt,
            is_exempt_from_queue_timeout=is_exempt_from_queue_timeout,
            tenant=tenant,
            group=group,
            weight=weight,
            priority=priority,
            grammar=None if structured is None else self.engine.compiler.compile(structured),
            pooling=pooling,
            bad_words=self.engine.encode_bad_words(sampling),
            processors=self.engine.processor_maker.make(sampling),
        )
        self.engine.add_request(request, lambda output: self._receive(request.request_id, output))
        self.num_submitted += 1
        return request.request_id

    def step(self) -> Batch | None:
        """Take in the result of one step. Returns its batch, as it was decided."""
        self.begin()
        batch = self.end()
        self.engine.check_integrity()
        scheduler = self.engine._scheduler
        assert scheduler._next_to_replace() == next_to_replace(scheduler)
        return batch

    def begin(self) -> None:
        """Decide a step if none is under way, and the one after it if that can be."""
        if not self._begun:
            self._draft()
            self._launch(self.engine.schedule())
        if len(self._begun) == 1 and self.backend.info.can_run_ahead:
            self._launch(self.engine.schedule_ahead())

    def end(self) -> Batch | None:
        """Take in the result of the first step under way, if there is one."""
        batch, fetch = self._begun.popleft() if self._begun else (None, None)
        self.now += 1.0 if batch is None else self._step_seconds(batch)
        if fetch is not None:
            try:
                result = fetch()
            except RuntimeError as error:
                self.engine.fail(error)
            else:
                self.engine.update(result)
        return batch

    def _draft(self) -> None:
        model, plan = self.engine.draft_model, self.engine.plan_drafts()
        if model is None or plan is None:
            return
        num_before = len(model.backend.batches)  # type: ignore[attr-defined]
        drafts = model.run(plan)
        self.now += self._draft_seconds * (len(model.backend.batches) - num_before)  # type: ignore[attr-defined]
        self.engine.take_drafts(plan, drafts)

    def _launch(self, batch: Batch | None) -> None:
        if batch is None:
            return
        if self.engine.guidance is not None:
            self.engine.guidance.fill()
        can_run_ahead = self.backend.info.can_run_ahead
        fetch = self.backend.launch(batch) if can_run_ahead else partial(self.backend.execute, batch)
        self._begun.append((batch, fetch))

    def finish(self) -> list[Batch]:
        batches = list(itertools.takewhile(lambda batch: batch is not None, (self.step() for _ in range(10_000))))
        assert not self.engine.has_work
        return [batch for batch in batches if batch is not None]

    def text(self, request_id: str, index: int = 0) -> str:
        return next(output.text for output in self.outputs[request_id].outputs if output.index == index)

    def token_ids(self, request_id: str, index: int = 0) -> list[int]:
        return next(output.token_ids for output in self.outputs[request_id].outputs if output.index == index)

    def _receive(self, request_id: str, output: RequestOutput | BrliteError) -> None:
        if isinstance(output, BrliteError) or output.finished:
            self.finished.append(request_id)
        assert request_id not in self.errors, "an error is the last thing a request hears"
        if isinstance(output, BrliteError):
            self.errors[request_id] = output
        elif request_id in self.outputs:
            assert not self.outputs[request_id].finished, "a finished request hears nothing more"
            self.outputs[request_id].merge(output)
        else:
            self.outputs[request_id] = output


MakeDriver = Callable[..., Driver]


@pytest.fixture
def make_driver() -> MakeDriver:
    return Driver
