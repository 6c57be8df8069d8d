"""What structured output costs, and what it gains.

    python bench/structured.py            # the default model, 32 rows, 9 rounds: some three minutes
    python bench/structured.py --short    # a round of 8 rows, 10 tokens each, for CI

Two questions, each with both sides in turns, so that a busy machine slows both; medians of the rounds are compared:

* a step of many rows that all have a grammar, against the same step without: masks are filled beside the step, by a
  thread that shares the cores with the kernels;
* one stream of JSON, where the tokens that the schema forces are drafts, against one stream of free text.
"""

from __future__ import annotations

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.engine.backend import Backend
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request
from brlite.llm import build_engine
from brlite.sampling_params import SamplingParams, StructuredOutput

PROMPT = "Write down all that you know about the people of this town, one after the other."
TEXTS = {"type": "array", "items": {"type": "string", "minLength": 30}, "minItems": 100}
INVOICE = {
    "type": "object",
    "properties": {
        "invoice_number": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
        "issued_on": {"type": "string", "format": "date"},
        "customer": {
            "type": "object",
            "properties": {"full_name": {"type": "string", "maxLength": 20}, "is_company": {"type": "boolean"}},
            "required": ["full_name", "is_company"],
            "additionalProperties": False,
        },
        "currency": {"enum": ["EUR", "USD", "CHF"]},
        "total_amount": {"type": "integer", "minimum": 1, "maximum": 9999},
        "payment_status": {"enum": ["paid", "unpaid", "overdue"]},
    },
    "required": ["invoice_number", "issued_on", "customer", "currency", "total_amount", "payment_status"],
    "additionalProperties": False,
}


def main() -> None:
    args = parse_args()
    spec = ModelSpec(name=args.model, precision=args.precision, build_seq=512, build_batch=args.rows)
    if args.path:
        spec = ModelSpec(
            name=args.model, path=args.path, precision=args.precision, build_seq=512, build_batch=args.rows
        )
    config = Config(model=(spec,), engine=EngineConfig(threads=args.threads))
    engine, backend = build_engine(config)
    print(f"{spec.name} {spec.precision} on {backend.info.device}; medians of {args.rounds} rounds")
    try:
        bench = Bench(engine, backend, num_tokens=10 if args.short else 40)
        steps_free, steps_guided = [], []
        json_rates, text_rates = [], []
        for _ in range(args.rounds + 1):  # the first is not counted
            steps_free.append(bench.step_milliseconds(args.rows, None))
            steps_guided.append(bench.step_milliseconds(args.rows, StructuredOutput(json_schema=TEXTS)))
            text_rates.append(bench.tokens_per_second(None))
            json_rates.append(bench.tokens_per_second(StructuredOutput(json_schema=INVOICE)))
    finally:
        backend.close()
    free, guided = median(steps_free[1:]), median(steps_guided[1:])
    text, json_ = median(text_rates[1:]), median(json_rates[1:])
    print(f"a step of {args.rows} rows: free {free:.2f} ms, with a grammar {guided:.2f} ms: {guided / free:.3f}x")
    print(f"one stream: free text {text:.0f} tokens/s, JSON {json_:.0f} tokens/s: {json_ / text:.2f}x")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelSpec().name)
    parser.add_argument("--path", help="the model's folder or file")
    parser.add_argument("--precision", default="a_bf16_w_int8")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--short", action="store_true", help="a round of 8 rows, 10 tokens each")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.short else 9)
    args.rows = args.rows or (8 if args.short else 32)
    return args


class Bench:
    """Steps an engine by hand, as its loop does: masks on a thread of their own."""

    def __init__(self, engine: Engine, backend: Backend, *, num_tokens: int) -> None:
        self._engine = engine
        self._backend = backend
        self._num_tokens = num_tokens
        self._ids = itertools.count()
        self._masks = ThreadPoolExecutor(1)

    def step_milliseconds(self, num_rows: int, wish: StructuredOutput | None) -> float:
        """The median time of steps in which all rows draw one token, the deciding included."""
        for row in range(num_rows):
            self._submit(wish, max_tokens=self._num_tokens, temperature=1.0, seed=row, ignore_eos=True)
        return median(
            seconds * 1e3 for seconds, num_tokens, num_seqs in self._run() if num_tokens == num_seqs == num_rows
        )

    def tokens_per_second(self, wish: StructuredOutput | None) -> float:
        """Of one stream, without its first step, which computes the prompt."""
        outputs: list[RequestOutput] = []
        self._submit(wish, outputs, max_tokens=self._num_tokens * 3 // 2, temperature=0.0)
        steps = list(self._run())[1:]
        return (sum(len(output.outputs[0].token_ids) for output in outputs) - 1) / sum(step[0] for step in steps)

    def _submit(self, wish: StructuredOutput | None, outputs: list[Any] | None = None, **params: Any) -> None:
        request = Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=self._engine.tokenizer.encode(PROMPT),
            params=SamplingParams(structured=wish, **params),
            grammar=self._engine.compiler.compile_on_thread(wish),
        )
        self._engine.add_request(request, ([] if outputs is None else outputs).append)

    def _run(self) -> list[tuple[float, int, int]]:
        """Each step until all is done: seconds, tokens and sequences."""
        steps: list[tuple[float, int, int]] = []
        while True:
            start = time.perf_counter()
            batch = self._engine.schedule()
            if batch is None:
                return steps
            if self._engine.guidance is not None:
                self._masks.submit(self._engine.guidance.fill)
            self._engine.update(self._backend.execute(batch))
            steps.append((time.perf_counter() - start, batch.num_tokens, len(batch.seqs)))


if __name__ == "__main__":
    main()
