"""The backend end to end on a tiny checkpoint: steps in, tokens out."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from brlite.backends.torch.backend import TorchBackend
from brlite.checkpoint import open_checkpoint
from brlite.config.options import EngineConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq, SeqResult, TokenMasks, Undrawn
from brlite.errors import ConfigError
from brlite.models.precision import PrecisionName
from brlite.sampling_params import SamplingParams
from tests.load_plans import make_plan
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

ENGINE = EngineConfig(device="cpu", dtype="float32", block_size=4, threads=1)
SPEC = ModelSpec(name="tiny", build_seq=40, build_batch=3)
GREEDY = SamplingParams(temperature=0)
PROMPTS = [[5, 17, 200, 3, 3, 90, 41], [250, 2], [9] * 13]


def load(path: Path, spec: ModelSpec = SPEC) -> TorchBackend:
    checkpoint = open_checkpoint(path)
    return TorchBackend.load(make_plan(checkpoint, spec, ENGINE))


def table(seq_id: int) -> list[int]:
    return list(range(10 * seq_id, 10 * seq_id + 10))


def span(
    seq_id: int, start: int, token_ids: list[int], params: SamplingParams | None = GREEDY, **more: object
) -> ScheduledSeq:
    sampling = None if params is None else SamplingInput(params, 0, 0)
    return ScheduledSeq(seq_id, start, token_ids, table(seq_id), sampling, **more)


def run(backend: TorchBackend, *seqs: ScheduledSeq) -> Sequence[SeqResult]:
    return backend.execute(Batch(list(seqs))).seqs


def greedy_reference(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    token_ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


def generate(backend: TorchBackend, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens for all prompts: the first in two chunks, beside the others' prompts and decodes."""
    contexts = [list(prompt) for prompt in prompts]
    run(backend, span(0, 0, contexts[0][:3], None))
    num_computed = [3, *[0] * (len(prompts) - 1)]
    for _ in range(num_tokens):
        work = enumerate(zip(contexts, num_computed, strict=True))
        results = run(backend, *[span(seq_id, done, context[done:]) for seq_id, (context, done) in work])
        num_computed = [len(context) for context in contexts]
        for context, result in zip(contexts, results, strict=True):
            context.append(result.tokens[0].token_id)
    return [context[len(prompt) :] for context, prompt in zip(contexts, prompts, strict=True)]


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def backend(llama_path: Path) -> TorchBackend:
    return load(llama_path)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2"])
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, name)
    expected = [greedy_reference(path, prompt, 8) for prompt in PROMPTS]

    tokens = generate(load(path), PROMPTS, 8)

    assert tokens == expected


@pytest.mark.parametrize("precision", ["a_bf16_w_int8", "a_bf16_w_int8_kv_int8"])
def test_int8_precisions_run_and_say_what_they_hold(precision: PrecisionName, llama_path: Path) -> None:
    spec = ModelSpec(name="tiny", build_seq=40, build_batch=3, precision=precision)

    backend = load(llama_path, spec)

    assert len(generate(backend, PROMPTS, 4)[0]) == 4
    assert backend.info.precision == precision
    assert backend.info.kv_dtype == ("int8" if precision.endswith("kv_int8") else "float32")
    assert any("int8" in note for note in backend.info.notes)


def test_a_step_waits_for_its_masks(backend: TorchBackend) -> None:
    masks = TokenMasks(VOCAB_SIZE, {0: 1})
    seqs = [span(0, 0, PROMPTS[0]), span(1, 0, PROMPTS[1])]
    plain = run(backend, *seqs)
    masks.words[4] = 0b100  # token 34
    late = threading.Timer(0.2, masks.publish, (0,))
    late.start()

    masked = backend.execute(Batch(seqs, masks)).seqs

    assert masked[0].tokens[0].token_id == 34
    assert masked[1] == plain[1]
    late.join()


def test_info_says_what_fits(backend: TorchBackend) -> None:
    info = backend.info

    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (VOCAB_SIZE, 40, 3)
    assert (info.num_blocks, info.block_size, info.dtype) == (30, 4, "float32")
    assert info.weight_bytes > 0
    assert info.kv_bytes > 0


def test_num_blocks_of_the_spec_is_taken_as_it_is(llama_path: Path) -> None:
    assert load(llama_path, ModelSpec(name="tiny", build_seq=40, num_blocks=7)).info.num_blocks == 7


def test_results_come_in_the_order_of_the_batch(backend: TorchBackend) -> None:
    seqs = [span(2, 0, PROMPTS[0]), span(0, 0, [7]), span(1, 0, PROMPTS[2])]
    alone = [run(backend, seq)[0] for seq in seqs]

    together = run(backend, *seqs)

    assert together == alone
    assert [result.seq_id for result in together] == [2, 0, 1]


def test_a_prompt_chunk_with_more_to_come_draws_nothing(backend: TorchBackend) -> None:
    results = run(backend, span(0, 0, PROMPTS[0], None), span(1, 0, PROMPTS[1]))

    assert results[0] == SeqResult(0)
    assert len(results[1].tokens) == 1


def test_prompt_logprobs_are_the_log_softmax_of_the_reference(backend: TorchBackend, llama_path: Path) -> None:
    prompt = PROMPTS[0]
    model = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)

    chunk = span(0, 0, prompt[:4], None, prompt_targets=prompt[1:5], num_prompt_logprobs=2)
    rest = span(0, 4, prompt[4:], prompt_targets=prompt[5:], num_prompt_logprobs=2)
    entries = [entry for seq in (chunk, rest) for entry in run(backend, seq)[0].prompt_logprobs]

    assert [entry.token_id for entry in entries] == prompt[1:]
    for row, entry in zip(expected, entries, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=0.05)
        assert entry.top[0][1] == pytest.approx(row.max().item(), abs=0.05)
        assert len(entry.top) == 2


def test_sampled_token_comes_with_its_logprob_if_asked_for(backend: TorchBackend) -> None:
    params = SamplingParams(temperature=1.0, seed=3, logprobs=1)

    token = run(backend, span(0, 0, PROMPTS[0], params))[0].tokens[0]

    assert token.logprob is not None
    assert token.logprob.token_id == token.token_id
    assert math.isfinite(token.logprob.logprob)


def test_a_token_that_makes_nan_fails_its_own_sequence_and_leaves_no_trace(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path)
    healthy = run(load(path), span(1, 0, PROMPTS[2]))[0]
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][66] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    backend = load(path)

    poisoned, beside = run(backend, span(0, 0, [66, 1, 2, 3, 4, 5]), span(1, 0, PROMPTS[2]))
    logprobs = run(backend, span(2, 0, [1, 66, 2], None, prompt_targets=[66, 2]))[0]
    after = run(backend, ScheduledSeq(3, 0, PROMPTS[2], table(0), SamplingInput(GREEDY, 0, 0)))[0]

    assert poisoned == SeqResult.undrawn(0, Undrawn.NOT_FINITE)
    assert logprobs == SeqResult.undrawn(2, Undrawn.NOT_FINITE)
    assert beside == healthy
    assert after.tokens == healthy.tokens


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_closed_backend_frees_its_tensors_at_once(tmp_path: Path, name: str) -> None:
    backend = load(write_tiny_model(tmp_path, name))
    run(backend, span(0, 0, PROMPTS[0]))
    steps = backend._steps
    held = [weakref.ref(each) for each in (*steps.parameters.named.values(), steps.cache._values)]
    del steps

    gc.collect()
    gc.disable()
    try:
        backend.close()
        left = sum(each() is not None for each in held)
    finally:
        gc.enable()

    assert left == 0


def test_a_cache_that_no_memory_holds_is_refused_with_its_size(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too little memory for the KV cache: .* TB"):
        load(llama_path, ModelSpec(name="tiny", build_seq=40, num_blocks=2**42))
