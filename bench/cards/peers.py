"""Other engines on the same device, of the same shape: transformers (plain `generate`, a prompt's forward, continuous
batching), and vLLM where it is installed. None is installed for this.
"""

from __future__ import annotations

import gc
import inspect
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cards import limits, models

EXTRA_TOKENS = 16  # a decode step is the sixteenth part of what so many more tokens take


class Transformers:
    """A model with random weights of its own, in bfloat16."""

    def __init__(self, shape: str, device: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self._device = torch.device(device)
        self.version = transformers.__version__
        config = transformers.LlamaConfig(**models.hugging_face_config(shape))
        config.pad_token_id = 0
        with self._device:
            self._model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self._vocab_size = config.vocab_size

    def decode_seconds(self, rows: int, context: int) -> float:
        """Seconds of a step of `generate`, by the difference of two lengths."""
        ids = self._random(rows, context - EXTRA_TOKENS)
        short, long = (self._seconds(lambda n=n: self._generate(ids, n)) for n in (2, 2 + EXTRA_TOKENS))
        return (long - short) / EXTRA_TOKENS

    def prefill_seconds(self, num_tokens: int) -> float:
        ids = self._random(1, num_tokens)

        @torch.inference_mode()
        def forward() -> object:
            return self._model(ids, logits_to_keep=1, use_cache=True)

        return self._seconds(forward)

    def batched_seconds(self, rows: int, num_tokens: int, num_answer: int) -> float:
        """Seconds of continuous batching for so many prompts and answers, after one short run that warms up."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        prompts = self._random(rows, num_tokens).tolist()
        blocks = rows * (-(-(num_tokens + num_answer) // 256) + 1)
        known = inspect.signature(ContinuousBatchingConfig).parameters
        wanted = {"page_size": 256, "block_size": 256, "num_blocks": blocks, "max_batch_tokens": max(2048, rows)}
        config = ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})

        def run(prompts: list[list[int]], num_answer: int) -> float:
            fields = {"max_new_tokens": num_answer, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
            start = time.perf_counter()
            answers = self._model.generate_batch(
                prompts,
                generation_config=GenerationConfig(**fields),
                continuous_batching_config=config,
                progress_bar=False,
            )
            seconds = time.perf_counter() - start
            num_found = sum(len(answer.generated_tokens) for answer in answers.values())
            if num_found != len(prompts) * num_answer:
                raise RuntimeError(f"{num_found} tokens came, {len(prompts) * num_answer} were asked for")
            return seconds

        run(prompts[:4], 4)
        return run(prompts, num_answer)

    def close(self) -> None:
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _random(self, rows: int, num_tokens: int) -> torch.Tensor:
        numbers = random.Random(0)
        ids = [[numbers.randrange(3, self._vocab_size) for _ in range(num_tokens)] for _ in range(rows)]
        return torch.tensor(ids, device=self._device)

    @torch.inference_mode()
    def _generate(self, ids: torch.Tensor, num_tokens: int) -> object:
        fields = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        return self._model.generate(ids, attention_mask=torch.ones_like(ids), **fields)

    def _seconds(self, work: Callable[[], object]) -> float:
        return limits.seconds_of(work, self._device, repeats=2, warm_ups=1)


class Vllm:
    """vLLM with its own dummy weights, in this process. What its version does not take of the options is left out."""

    def __init__(self, shape: str, device: str, *, rows: int, context: int) -> None:
        import vllm

        self.version = vllm.__version__
        self._params = vllm.SamplingParams
        self._folder = tempfile.TemporaryDirectory(prefix="brlite-bench-")
        models.write_folder(shape, Path(self._folder.name), device, has_weights=False)
        self._llm: Any = vllm.LLM(
            model=self._folder.name,
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=context,
            max_num_seqs=rows,
            gpu_memory_utilization=0.8,
        )
        self._vocab_size = models.model_config(shape).vocab_size

    def decode_seconds(self, rows: int, context: int) -> float:
        """Seconds of a step of `rows` tokens, by the difference of two lengths."""
        short, long = (self.batched_seconds(rows, context - EXTRA_TOKENS, n) for n in (2, 2 + EXTRA_TOKENS))
        return (long - short) / EXTRA_TOKENS

    def prefill_seconds(self, num_tokens: int) -> float:
        return self.batched_seconds(1, num_tokens, 1)

    def batched_seconds(self, rows: int, num_tokens: int, num_answer: int) -> float:
        """Seconds of so many prompts and answers at once, after one short run that warms up."""
        numbers = random.Random(0)
        prompts = [
            {"prompt_token_ids": [numbers.randrange(3, self._vocab_size) for _ in range(num_tokens)]}
            for _ in range(rows)
        ]
        for some, length in ((prompts[:2], 2), (prompts, num_answer)):
            params = self._params(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            answers = self._llm.generate(some, params, use_tqdm=False)
            seconds = time.perf_counter() - start
        num_found = sum(len(answer.outputs[0].token_ids) for answer in answers)
        if num_found != rows * num_answer:
            raise RuntimeError(f"{num_found} tokens came, {rows * num_answer} were asked for")
        return seconds

    def close(self) -> None:
        del self._llm
        gc.collect()
        self._folder.cleanup()
