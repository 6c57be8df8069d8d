"""The backend in torch: one decoder, one paged cache, one device. Runs on every device of torch, CPUs included.

Uses no text and no requests; `engine` decides what to compute. Other rows, chunk borders and cache hits change a row's
result by rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brlite.backends.distributed.messages import RankBatch, RankSeq, drawing_rows
from brlite.backends.guard import BackendGuard
from brlite.backends.pooling import add_states, pooled_result
from brlite.backends.torch.candidates import TorchSampler
from brlite.backends.torch.choose_steps import choose_steps
from brlite.backends.torch.device import (
    DeviceRules,
    begin_fetch,
    compute_dtype,
    describe_device,
    device_errors,
    rules_for,
    select_device,
)
from brlite.backends.torch.draws import can_draw, draw
from brlite.backends.torch.graph_memory import most_rows
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.loading import MemoryNeeds, held_forms, load_model
from brlite.backends.torch.parallel import Group
from brlite.backends.torch.probe import ProbedModel, probe_device
from brlite.backends.torch.steps import ComputedStep, LastDraws, StepLimits, Steps
from brlite.checkpoint.load_plan import LoadPlan, num_cache_blocks
from brlite.engine.backend import (
    MAX_DRAFT_TOKENS,
    BackendInfo,
    Batch,
    SampledToken,
    SamplingInput,
    ScheduledSeq,
    SeqResult,
    StepResult,
    TokenMask,
    Undrawn,
)
from brlite.engine.outputs import TokenLogprob
from brlite.models.config import cache_dtype

MAX_LOGITS = 2**22  # logits of a prompt computed at a time: 16 MiB in float32

QUANTIZED_NOTE = "int8 weights are held dequantized: the numbers of int8, the memory of {dtype}"
FLOAT32_NOTE = "this CPU has no fast bfloat16: weights are rounded to it but held and multiplied in float32"


@dataclass
class QueuedStep:
    """A step that was queued. The tokens of the sequences in `places` are drawn on the device: from that index of
    `drawn` on, `num_draws` of each.

    `wait` returns `drawn` on the host when the step has ended. After that `step` is None and `outcome` is set.
    """

    batch: Batch
    step: ComputedStep | None
    places: dict[int, int]
    drawn: Tensor
    wait: Callable[[], Tensor]
    outcome: StepResult | Exception | None = None

    @property
    def needs_host(self) -> bool:
        """Whether the host must do more than read `drawn`."""
        return any(
            seq.pooling or seq.prompt_targets or (seq.sampling and seq.seq_id not in self.places)
            for seq in self.batch.seqs
        )

    def token_of(self, seq_id: int) -> int:
        """The token that the host drew; 0 if there is none, since any token may be used then."""
        results = [] if self.outcome is None or isinstance(self.outcome, Exception) else self.outcome.seqs
        return next((seq.tokens[-1].token_id for seq in results if seq.seq_id == seq_id and seq.tokens), 0)


class TorchBackend:
    """A `Backend`; on CUDA cards a `CanRunAhead`. `load` allocates weights and cache; steps keep no memory."""

    def __init__(self, steps: Steps, info: BackendInfo, rules: DeviceRules | None = None) -> None:
        """`rules` default to those of the device."""
        self._guard = BackendGuard()
        self._steps = steps
        self._rules = rules or rules_for(steps.device)
        self._info = info
        self._sampler = TorchSampler(info.vocab_size)
        self._before: QueuedStep | None = None

    @classmethod
    def load(cls, plan: LoadPlan, group: Group | None = None) -> TorchBackend:
        """Read the weights and allocate the cache. With a shard these are one rank's, and `group` connects the ranks.

        Sets torch's number of threads, which holds for the whole process. Raises `ConfigError` if memory is too small.
        """
        spec, engine = plan.spec, plan.engine
        device = select_device(engine.device, spec.devices[0])
        torch.set_num_threads(plan.num_threads)
        dtype, rules = compute_dtype(engine.dtype, device), rules_for(device)
        if rules.is_probed:
            kv_dtype = cache_dtype(plan.precision, engine.dtype)
            like = ProbedModel(plan.config, plan.precision, kv_dtype, held_forms(plan, rules), engine.torch_kernels)
            probed = probe_device(device, dtype, like)
            plan = msgspec.structs.replace(plan, notes=(*plan.notes, *probed.notes))
        needs = MemoryNeeds.of(plan, dtype, device, rules)
        with needs.explained("the weights", "choose a smaller precision, a smaller model or more ranks"):
            decoder = load_model(plan, dtype, device, rules, group)
        with needs.explained("the KV cache", "lower build_batch, build_seq or num_blocks"):
            cache = KVCache(
                decoder.config,
                num_blocks=num_cache_blocks(spec, engine.block_size),
                block_size=engine.block_size,
                dtype=cache_dtype(plan.precision, engine.dtype),
                device=device,
            )
        if rules.has_triton:
            plan.report(0.0, "compiling kernels and capturing steps")
        with needs.explained("kernels and graphs", "lower num_blocks or engine.gpu_memory_utilization"):
            limits = StepLimits(most_rows(spec, engine), engine.step_tokens(rules.step_tokens), spec.build_seq)
            steps, notes = choose_steps(decoder, cache, engine.torch_kernels, limits)
        if plan.shard is not None:  # the ranks join the logits of all draws in one call
            rules = rules._replace(runs_ahead=False)
        return cls(steps, _describe(steps, plan, notes), rules)

    @property
    def info(self) -> BackendInfo:
        return self._info

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step. After an exception the cache of other sequences is unchanged."""
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        """Queue a step after the previous one, and return a function that waits for its result.

        If the previous step needs the host (draws that `draws.py` cannot make, logprobs of prompts, pooling), it is
        completed first: the new step may overwrite its logits, and takes its tokens.
        """
        with self._guard.step(), torch.inference_mode(), device_errors():
            before, self._before = self._before, None
            if before is not None and before.needs_host:
                self._settle(before)
            batch, last = _with_last_draws(batch, before)
            step = self._steps.forward(batch.seqs, last)
            places, rows, inputs = dict[int, int](), list[int](), list[SamplingInput]()  # of the device's draws
            for seq, first in zip(batch.seqs, step.first_rows, strict=True):
                on_host = not self._rules.runs_ahead or seq.seq_id in (batch.processors or ())
                if seq.sampling and not on_host and can_draw(seq.sampling, batch.mask_of(seq.seq_id)):
                    places[seq.seq_id] = len(rows)
                    rows += drawing_rows(seq, first)
                    inputs += _draw_inputs(seq, seq.sampling)
            drawn = torch.empty(0, dtype=torch.int64, device=self._steps.device)  # fetched too: that waits for the step
            if rows:
                drawn = draw(self._steps.logits(step, rows), inputs)
            self._before = launched = QueuedStep(batch, step, places, drawn, begin_fetch(drawn))
        return partial(self._fetch, launched)

    def _fetch(self, launched: QueuedStep) -> StepResult:
        with self._guard.step(), torch.inference_mode():
            self._settle(launched)
        if isinstance(launched.outcome, Exception):
            raise launched.outcome
        assert launched.outcome is not None
        return launched.outcome

    def _settle(self, launched: QueuedStep) -> None:
        """Wait for the step and store its result, once. An error is stored too: it must not fail the next step."""
        if launched.step is None:
            return
        try:
            with device_errors():
                launched.outcome = self._result(launched, launched.step)
        except Exception as error:
            launched.outcome = error
        launched.step = None  # frees its hidden states and logits

    def _result(self, launched: QueuedStep, step: ComputedStep) -> StepResult:
        batch, places = launched.batch, launched.places
        tokens = self._draw(batch, step, places)
        num_host_draws = sum(map(len, tokens.values())) if self._rules.runs_ahead else 0
        found = [SampledToken(token) if token >= 0 else Undrawn.NOT_FINITE for token in launched.wait().tolist()]
        for seq in batch.seqs:
            if (place := places.get(seq.seq_id)) is not None:
                tokens[seq.seq_id] = found[place : place + seq.num_draws]
        results = list[SeqResult]()
        for seq, first in zip(batch.seqs, step.first_rows, strict=True):
            if seq.pooling is None:
                logprobs = self._prompt_logprobs(seq, step, first) if seq.prompt_targets else []
                results.append(SeqResult.of_draws(seq, tokens.get(seq.seq_id, ()), logprobs))
            else:
                end = first + len(seq.token_ids)
                states = self._steps.normed(step, list(range(end - seq.pooling.num_tokens, end)))
                # The sum is taken on the host: some cards have no float64.
                total = add_states(seq.pooling, states.cpu().numpy())
                results.append(pooled_result(seq.seq_id, seq.pooling, total))
        return StepResult(results, num_host_draws=num_host_draws)

    def follow(self, work: RankBatch) -> None:
        """Compute this rank's part of a step that rank 0 executes. Draws no tokens."""
        with self._guard.step(), torch.inference_mode():
            step = self._steps.forward(work.seqs)
            first_rows = list(zip(work.seqs, step.first_rows, strict=True))
            drawn = [row for seq, first in first_rows for row in drawing_rows(seq, first)]
            for rows in (drawn, *(rows for seq, first in first_rows for rows in self._target_rows(seq, first))):
                if rows:
                    self._logits(step, rows)

    def last_logits(self, seqs: Sequence[ScheduledSeq]) -> npt.NDArray[np.float32]:
        """Compute a step and return the logits [R, V] after the last token of each sequence. No tokens are drawn."""
        with self._guard.step(), torch.inference_mode():
            step = self._steps.forward(seqs)
            rows = [first + len(seq.token_ids) - 1 for seq, first in zip(seqs, step.first_rows, strict=True)]
            logits: npt.NDArray[np.float32] = self._logits(step, rows).float().cpu().numpy()
        return logits

    def close(self) -> None:
        """Free weights and cache. Waits for a step that another thread computes. May be called twice."""

        def let_go() -> None:
            self.__dict__.pop("_steps", None)
            self._before = None

        self._guard.close(let_go)

    def _draw(
        self, batch: Batch, step: ComputedStep, is_drawn: Container[int]
    ) -> dict[int, list[SampledToken | Undrawn]]:
        """The tokens that the host draws, by `seq_id`: of the sequences with `sampling` that are not in `is_drawn`."""
        seqs, rows, inputs = list[ScheduledSeq](), list[int](), list[SamplingInput]()
        masks: list[TokenMask | None] = []
        for seq, first in zip(batch.seqs, step.first_rows, strict=True):
            if seq.sampling is not None and seq.seq_id not in is_drawn:
                seqs.append(seq)
                rows += drawing_rows(seq, first)
                inputs += _draw_inputs(seq, seq.sampling)
                masks += [batch.mask_of(seq.seq_id, draw) for draw in range(seq.num_draws)]
        if not rows:
            return {}
        logits = self._logits(step, rows)
        if batch.masks is not None:
            batch.masks.wait()
        processors, tokens = batch.processors or {}, dict[int, list[SampledToken | Undrawn]]()
        seq_ids = [seq.seq_id for seq in seqs for _ in range(seq.num_draws)]  # of each row
        for index, seq_id in enumerate(seq_ids):
            if seq_id in processors:
                row = logits[index], inputs[index], masks[index]
                tokens[seq_id] = [self._sampler.sample_processed(*row, processors[seq_id])]
        rest = [index for index, seq_id in enumerate(seq_ids) if seq_id not in processors]
        if rest:
            logits = logits[rest] if processors else logits
            drawn = self._sampler.sample(logits, [inputs[index] for index in rest], [masks[index] for index in rest])
            for index, token in zip(rest, drawn, strict=True):
                tokens.setdefault(seq_ids[index], []).append(token)
        return tokens

    def _prompt_logprobs(self, seq: ScheduledSeq, step: ComputedStep, first: int) -> list[TokenLogprob]:
        """The logprobs of `prompt_targets`. Their hidden states begin at row `first`."""
        found: list[TokenLogprob] = []
        for rows in self._target_rows(seq, first):
            targets = seq.prompt_targets[rows[0] - first : rows[-1] + 1 - first]
            found += self._sampler.token_logprobs(self._logits(step, rows), targets, seq.num_prompt_logprobs)
        return found

    def _target_rows(self, seq: ScheduledSeq | RankSeq, first: int) -> Iterator[list[int]]:
        """The rows of `prompt_targets`, in pieces that have at most `MAX_LOGITS` logits each."""
        step, end = max(1, MAX_LOGITS // self._info.vocab_size), first + len(seq.prompt_targets)
        for start in range(first, end, step):
            yield list(range(start, min(start + step, end)))

    def _logits(self, step: ComputedStep, rows: list[int]) -> Tensor:
        """The logits of some rows, on the device where tokens are drawn from them."""
        logits = self._steps.logits(step, rows)
        return logits if self._rules.samples else logits.cpu()


def _with_last_draws(batch: Batch, before: QueuedStep | None) -> tuple[Batch, LastDraws | None]:
    """The batch with the previous step's tokens that the host has, and where on the device the others are."""
    if not any(seq.takes_last_draw for seq in batch.seqs):
        return batch, None
    seqs, sources = list[ScheduledSeq](), list[int]()
    for seq in batch.seqs:
        source = before.places.get(seq.seq_id, -1) if before is not None and seq.takes_last_draw else -1
        if seq.takes_last_draw and source < 0:
            seq = seq.with_last_draw(0 if before is None else before.token_of(seq.seq_id))
        seqs.append(seq)
        sources.append(source)
    if before is None or max(sources) < 0:
        return msgspec.structs.replace(batch, seqs=seqs), None
    return msgspec.structs.replace(batch, seqs=seqs), LastDraws(before.drawn, sources)


def _draw_inputs(seq: ScheduledSeq, sampling: SamplingInput) -> list[SamplingInput]:
    """The inputs of a run's draws: they differ in their positions."""
    if not seq.num_draft_tokens:
        return [sampling]
    return [msgspec.structs.replace(sampling, position=sampling.position + n) for n in range(seq.num_draws)]


def _describe(steps: Steps, plan: LoadPlan, step_notes: Sequence[str]) -> BackendInfo:
    spec, engine, config, cache = plan.spec, plan.engine, steps.config, steps.cache
    dtype = str(steps.dtype).removeprefix("torch.")
    notes, rules = [*plan.notes, *step_notes], rules_for(steps.device)
    if plan.precision.weights == "int8" and not rules.keeps_int8:
        notes.append(QUANTIZED_NOTE.format(dtype=dtype))
    if engine.dtype == "auto" and dtype == "float32":
        notes.append(FLOAT32_NOTE)
    return BackendInfo(
        name="torch",
        device=describe_device(steps.device),
        dtype=dtype,
        precision=plan.precision_name_of(set(held_forms(plan, rules).values())),
        vocab_size=config.vocab_size,
        max_model_len=spec.build_seq,
        max_num_seqs=spec.build_batch,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        kv_dtype=cache.dtype,
        weight_bytes=steps.parameters.num_bytes,
        kv_bytes=cache.num_bytes,
        sliding_window=config.common_window,
        hidden_size=config.hidden_size,
        pooling=spec.pooling,
        matryoshka_dimensions=spec.matryoshka_dimensions,
        can_generate=plan.model.has_head,
        max_draft_tokens=MAX_DRAFT_TOKENS,
        can_run_ahead=rules.runs_ahead and plan.shard is None,
        runs_logits_processors=True,
        is_batch_invariant=steps.is_batch_invariant,
        step_tokens=rules.step_tokens,
        row_costs=rules.row_costs,
        notes=tuple(notes),
    )
