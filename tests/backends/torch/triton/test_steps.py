"""Whole models by the kernels, against torch's operators in float32; and steps replayed, with the CPU for a card."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from brlite.backends.torch import choose_steps
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.graph_memory import DRIVER_BYTES, graph_bytes, graph_rows
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.loading import load_model
from brlite.backends.torch.steps import EagerSteps, LastDraws, Run, StepLimits, Steps
from brlite.backends.torch.triton.inputs import StepInputs, TableRows, TokenRun, lay_out, lay_out_singles, transfer
from brlite.backends.torch.triton.steps import StepGraph, TritonSteps
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.load_plan import LoadPlan
from brlite.config.options import ModelSpec
from brlite.errors import BackendLost
from brlite.models.config import KVDtype, ModelConfig
from brlite.models.precision import PrecisionName
from tests.load_plans import make_plan
from tests.models.steps import BLOCK_SIZE, DEVICE, LENGTH, random_ids
from tests.quantized_files import MIXES, write_quantized
from tests.tiny_models import CHATGLM, LLAMA, MISTRAL, QWEN3, SMOLLM3, TINY_CONFIGS, TensorCheckpoint, random_tensors

MAX_ERROR = 0.05  # of the logits' length, as the probe of a card allows
NUM_BLOCKS = 48
# Of three sequences the tokens (start, end) of each step: chunks, single tokens, both, and a sequence that waits.
STEPS = [[(0, 5), (0, 1), (0, 2)], [(5, 6), (1, 4)], [(6, 7), (4, 5), (2, 3)]]
TABLES = [[30, 3, 17, 4], [0, 21, 2], [40, 1]]  # scattered
TOKENS = [random_ids(7, seed=seed) for seed in range(3)]


class Model(NamedTuple):
    """A tiny model, what it keeps in int8, and its cache."""

    config: dict[str, Any]
    precision: PrecisionName = "bf16"
    kv_dtype: KVDtype = "bfloat16"

    def plan(self) -> LoadPlan:
        checkpoint = TensorCheckpoint(self.config, random_tensors(self.config))
        return make_plan(checkpoint, ModelSpec(build_seq=LENGTH, precision=self.precision))

    def eager(self) -> EagerSteps:
        """In float32, with the weights that int8 makes of them."""
        decoder = load_model(self.plan(), torch.float32, DEVICE)
        return EagerSteps(decoder, make_cache(decoder.config, "int8" if self.kv_dtype == "int8" else "float32"))

    def load(self) -> Decoder:
        return load_model(self.plan(), torch.bfloat16, DEVICE, DeviceRules(keeps_int8=True))

    def kernels(self) -> TritonSteps:
        decoder = self.load()
        cache = make_cache(decoder.config, self.kv_dtype)
        return TritonSteps(decoder.config, decoder.parameters, cache, max_length=LENGTH)


# Of few heads and layers: a head of a row takes some milliseconds in the interpreter.
NARROW = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
MODELS = {
    "window": Model({**MISTRAL, **NARROW, "sliding_window": 3}),
    "biases, int8": Model({**TINY_CONFIGS["llama-biases"], **NARROW}, "a_bf16_w_int8"),
    "head norms, int8": Model({**QWEN3, "num_hidden_layers": 1}, "a_bf16_w_int8_kv_int8", "int8"),
    "partial turn of neighbours": Model({**CHATGLM, "num_layers": 1}),
    "a layer in which no head turns, tied": Model(
        {**SMOLLM3, **NARROW, "num_hidden_layers": 2, "no_rope_layers": [1, 0], "tie_word_embeddings": True}
    ),
}
PLAIN = Model({**LLAMA, **NARROW})


def make_cache(config: ModelConfig, kv_dtype: KVDtype) -> KVCache:
    return KVCache(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=kv_dtype, device=DEVICE)


def runs_of(step: Sequence[tuple[int, int]]) -> list[TokenRun]:
    return [
        TokenRun(start, ids[start:end], table) for ids, table, (start, end) in zip(TOKENS, TABLES, step, strict=False)
    ]


@torch.inference_mode()
def logits_of(steps: Steps, runs: Sequence[Run]) -> Tensor:
    """The logits of all tokens of a step, run after run."""
    computed = steps.forward(runs)
    rows = [
        first + row for first, run in zip(computed.first_rows, runs, strict=True) for row in range(len(run.token_ids))
    ]
    return steps.logits(computed, rows).clone()


def error(found: Tensor, expected: Tensor) -> float:
    """The greatest of any row, as a part of its length."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_torch_in_float32(model: Model) -> None:
    eager, kernels = model.eager(), model.kernels()

    for step in (*STEPS[:2], STEPS[2][:1]):
        runs = runs_of(step)
        assert error(logits_of(kernels, runs), logits_of(eager, runs)) < MAX_ERROR, step


def test_steps_that_are_let_go_free_their_tensors_at_once() -> None:
    kernels = MODELS["head norms, int8"].kernels()
    held = [weakref.ref(each) for each in (*kernels.parameters.named.values(), kernels.cache._values)]

    gc.collect()
    gc.disable()
    try:
        del kernels
        left = sum(each() is not None for each in held)
    finally:
        gc.enable()

    assert left == 0


def test_logits_of_a_quantized_file_are_those_of_torch_in_float32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_quantized(tmp_path / "m.gguf", MIXES["q4_k_m"]))
    plan = make_plan(checkpoint, ModelSpec(build_seq=LENGTH))
    rules = DeviceRules(keeps_int8=True, keeps_codes=True)
    eager, ours = (load_model(plan, dtype, DEVICE, rules) for dtype in (torch.float32, torch.bfloat16))
    expected = EagerSteps(eager, make_cache(eager.config, "float32"))
    kernels = TritonSteps(ours.config, ours.parameters, make_cache(ours.config, "bfloat16"), max_length=LENGTH)

    runs = runs_of([(0, 2), (0, 1)])
    assert error(logits_of(kernels, runs), logits_of(expected, runs)) < MAX_ERROR


def test_what_the_head_reads_is_that_of_torch_in_float32() -> None:
    runs = runs_of(STEPS[0])
    found, expected = (
        steps.normed(computed, [computed.first_rows[0] + 4, computed.first_rows[2]])
        for steps in (PLAIN.kernels(), PLAIN.eager())
        for computed in [steps.forward(runs)]
    )

    assert found.dtype == torch.float32
    assert error(found, expected) < MAX_ERROR


def test_a_card_that_can_has_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PLAIN.load()
    monkeypatch.setattr(choose_steps, "compute_capability", lambda _: (8, 0))

    assert choose_steps.find_obstacle(decoder, make_cache(decoder.config, "bfloat16")) is None


def test_int8_weights_are_laid_out_anew_and_not_kept_twice() -> None:
    model = PLAIN._replace(precision="a_bf16_w_int8")
    loaded = model.load().parameters

    kept = model.kernels().parameters

    assert kept.linears == {}
    assert kept.named.keys() == loaded.named.keys()
    assert kept.num_bytes == loaded.num_bytes


@dataclass
class CalledGraph:
    """In the place of a graph, which only a card can capture: computes the step when it is replayed."""

    steps: TritonSteps
    inputs: StepInputs
    hidden: Tensor
    logits: Tensor

    def replay(self) -> None:
        decoder = self.steps._decoder
        self.hidden.copy_(decoder.forward(self.inputs))
        self.logits.copy_(decoder.logits(self.hidden))


def give_graph(steps: TritonSteps, num_rows: int) -> StepGraph:
    """Have steps of up to `num_rows` single tokens replayed, with inputs as `capture` has them."""
    tables = TableRows(num_rows, steps._table_width)
    layout = lay_out_singles([steps._filler] * num_rows, BLOCK_SIZE, tables)
    array = torch.from_numpy(layout.array)
    inputs = layout.on(array)._replace(max_context=LENGTH)
    hidden = torch.full((num_rows, steps.config.hidden_size), torch.nan)
    logits = torch.full((num_rows, steps.config.vocab_size), torch.nan)
    called: Any = CalledGraph(steps, inputs, hidden, logits)
    graph = StepGraph(called, tables, array, inputs, hidden, logits)
    steps._graphs[num_rows] = graph
    return graph


def test_a_replayed_step_is_filled_up_and_writes_no_other_block() -> None:
    model = PLAIN._replace(kv_dtype="int8")
    plain, replaying = model.kernels(), model.kernels()
    graph = give_graph(replaying, 4)
    for steps in (plain, replaying):
        for step in ([(0, 4), (0, 1)], [(4, 5), (1, 3)]):
            logits_of(steps, runs_of(step))
    assert not graph.logits.isnan().any()  # the second of those steps was a short run and others
    graph.logits.fill_(torch.nan)

    expected, found = (logits_of(steps, runs_of([(5, 6), (3, 4), (0, 1)])) for steps in (plain, replaying))

    assert graph.inputs.token_ids.tolist() == [TOKENS[0][5], TOKENS[1][3], TOKENS[2][0], 0]
    assert graph.inputs.tables[3, 0] == replaying.cache.scratch_block
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    blocks = range(NUM_BLOCKS + 1)  # all but the scratch block
    for ours, theirs in zip(plain.cache.layers, replaying.cache.layers, strict=True):
        for page, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            written = [pages.read(torch.tensor(blocks), torch.float32) for pages in (page, other)]
            torch.testing.assert_close(*written, rtol=1e-2, atol=1e-2)


class FakeGraphs:
    """`torch.cuda` as far as a capture uses it, with the CPU for a card. Notes how each graph is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captures: list[dict[str, Any]] = []
        fakes = {"graph_pool_handle": lambda: "pool", "Stream": lambda device: ("stream", device), "graph": self.graph}
        for name, fake in {**fakes, "synchronize": lambda device: None, "CUDAGraph": object}.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def graph(self, graph: object, **options: Any) -> AbstractContextManager[None]:
        self.captures.append(options)
        return nullcontext()


def test_steps_that_cannot_be_captured_are_launched_and_the_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nwhile a graph was captured")

    monkeypatch.setattr(choose_steps, "compute_capability", lambda _: (8, 0))
    monkeypatch.setattr(choose_steps, "rules_for", lambda _: DeviceRules(has_triton=True))
    FakeGraphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    decoder = PLAIN.load()

    steps, notes = choose_steps.choose_steps(
        decoder, make_cache(decoder.config, "bfloat16"), "auto", StepLimits(rows=1, tokens=4, length=LENGTH)
    )

    assert isinstance(steps, TritonSteps)
    (note,) = notes
    assert note.startswith("steps are not replayed from graphs")
    assert note.endswith("CUDA error: out of memory while a graph was captured")
    assert logits_of(steps, runs_of(STEPS[0])).isfinite().all()


def test_a_capture_is_on_a_stream_of_the_models_card_and_is_not_disturbed_by_other_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs, steps = FakeGraphs(monkeypatch), PLAIN.kernels()
    for name in ("forward", "logits"):
        monkeypatch.setattr(steps._decoder, name, lambda inputs: None)

    assert steps.capture(3) is None

    expected = {"pool": "pool", "stream": ("stream", DEVICE), "capture_error_mode": "thread_local"}
    assert graphs.captures == [expected] * 3
    assert sorted(steps._graphs) == [1, 2, 4]


def test_a_card_that_is_lost_in_a_capture_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    FakeGraphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)

    with pytest.raises(BackendLost, match="illegal memory access"):
        PLAIN.kernels().capture(1)


class AllocatedBytes(TorchDispatchMode):
    """Adds up the memory of the tensors that a step makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty", "embedding", "_to_copy"):
            self.num_bytes += made.nbytes
        return made


@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_memory_reserved_for_graphs_holds_what_a_step_of_one_layer_makes(num_rows: int) -> None:
    steps = PLAIN.kernels()
    layout = lay_out_singles([steps._filler] * num_rows, BLOCK_SIZE, TableRows(num_rows, steps._table_width))
    inputs = layout.on(torch.from_numpy(layout.array))._replace(max_context=LENGTH)

    with AllocatedBytes() as allocated, torch.inference_mode():
        steps._decoder.logits(steps._decoder.forward(inputs))

    reserved = graph_bytes(steps.config, num_rows, LENGTH) - len(graph_rows(num_rows)) * DRIVER_BYTES
    assert reserved / 20 < allocated.num_bytes <= reserved


def test_a_warm_up_computes_steps_of_each_tile_and_writes_to_no_block_of_a_sequence() -> None:
    steps, computed = PLAIN.kernels(), list[int]()
    forward = steps._decoder.forward

    def counted(inputs: StepInputs) -> Tensor:
        """Computes the first only, for all write to the same block."""
        computed.append(inputs.num_rows)
        return (
            forward(inputs) if len(computed) == 1 else torch.zeros(inputs.num_rows, steps.config.hidden_size).bfloat16()
        )

    steps._decoder.forward = counted  # type: ignore[method-assign]
    steps.warm_up(StepLimits(rows=2, tokens=40, length=LENGTH))

    assert computed == [17, 33, 40]
    layer = steps.cache.layers[0]
    for pages in (layer.keys, layer.values):
        assert not pages.read(torch.arange(NUM_BLOCKS + 1), torch.float32).any()


def test_a_run_with_a_draft_is_replayed_as_single_tokens() -> None:
    plain, replaying = PLAIN.kernels(), PLAIN.kernels()
    graph = give_graph(replaying, 4)
    for steps in (plain, replaying):
        logits_of(steps, runs_of([(0, 2), (0, 1)]))
    runs = runs_of([(2, 4), (1, 2)])
    one_by_one = [logits_of(plain, [runs[0]._replace(start=at, token_ids=[TOKENS[0][at]])]) for at in (2, 3)]

    computed = replaying.forward(runs)

    assert list(computed.first_rows) == [0, 2]
    assert graph.inputs.positions.tolist() == [2, 3, 1, 0]
    assert graph.inputs.tables[:2, : len(TABLES[0])].tolist() == [TABLES[0]] * 2
    torch.testing.assert_close(replaying.logits(computed, [0, 1]), torch.cat(one_by_one), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(replaying.logits(computed, [2]), logits_of(plain, runs[1:]), rtol=1e-3, atol=1e-3)


def test_logits_of_a_replayed_step_are_given_for_any_of_its_rows() -> None:
    steps = PLAIN.kernels()
    graph = give_graph(steps, 4)
    runs = [TokenRun(0, [ids[0]], table) for ids, table in zip(TOKENS, TABLES, strict=True)]

    computed = steps.forward(runs)

    assert list(computed.first_rows) == [0, 1, 2]
    assert torch.equal(steps.logits(computed, [2, 0]), graph.logits[[2, 0]])
    assert torch.equal(steps.logits(computed, [0, 1]), graph.logits[:2])
    torch.testing.assert_close(steps.normed(computed, [1]), steps._decoder.normed(graph.hidden)[1:2])


@pytest.mark.parametrize("is_replayed", [False, True], ids=["launched", "replayed"])
def test_a_run_takes_the_token_that_the_step_before_drew(is_replayed: bool) -> None:
    steps = PLAIN.kernels()
    if is_replayed:
        give_graph(steps, 4)
    runs = [TokenRun(0, [ids[0]], table) for ids, table in zip(TOKENS, TABLES, strict=True)]
    if not is_replayed:
        runs[2] = runs[2]._replace(token_ids=TOKENS[2][:3])
    expected = logits_of(steps, runs)
    unknown = [runs[0]._replace(token_ids=[0]), runs[1]._replace(token_ids=[0]), runs[2]]
    drawn = torch.tensor([TOKENS[1][0], 3, 3, TOKENS[0][0]])

    steps.forward(unknown, LastDraws(drawn, [3, 0, -1]))  # of rows in any order
    computed = steps.forward(unknown, LastDraws(drawn, [3, 0, -1]))

    assert torch.equal(steps.logits(computed, list(range(len(expected))))[:2], expected[:2])


def test_a_sequence_that_is_not_a_number_leaves_others_as_they_are() -> None:
    steps, poisoned = PLAIN.kernels(), PLAIN.kernels()
    poisoned.parameters.named["embedding"][TOKENS[0][2]] = torch.nan
    assert TOKENS[0][2] not in TOKENS[1] + TOKENS[2]
    runs = runs_of(STEPS[0])

    expected, found = logits_of(steps, runs), logits_of(poisoned, runs)

    assert found[4].isnan().all()
    assert torch.equal(found[5:], expected[5:])


def test_a_layout_on_the_device_is_of_an_array_of_its_own() -> None:
    layout = lay_out(runs_of(STEPS[0]), BLOCK_SIZE, 2)
    first, second = (transfer(lay_out(runs_of(step), BLOCK_SIZE, 2), DEVICE) for step in STEPS[:2])

    assert first.token_ids.tolist() == layout.array[: layout.num_rows].tolist()
    assert first.token_ids.data_ptr() != second.token_ids.data_ptr()
