"""What a draft model costs and gains: the same prompts with it and without, in turns, on two engines of this process.

    python bench/drafts.py --model BIG --draft SMALL          # 1 and 4 streams, 3 rounds
    python bench/drafts.py                                    # the default model drafts for itself: what that costs
    python bench/drafts.py --short                            # for CI

A model that drafts for itself is always right and never pays. So the rate then shows what deciding costs: it should be
that without a draft model. Answers are compared, too. One engine runs while the other waits.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from measuring import prompts, subject

from brlite.config.options import DEFAULT_MODEL
from brlite.errors import BrliteError
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams

CONTEXT = 512
STREAMS = (1, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if an answer differs, or 2 if a model could not be had."""
    args = _arguments(argv)
    num_prompts, max_tokens = (4, 16) if args.short else (16, 128)
    asked = prompts.read_prompts(prompts.PROMPTS)[:num_prompts]
    has_failed = False
    try:
        with ExitStack() as stack:
            model, draft = subject.find_model(args.model), subject.find_model(args.draft)
            tables = subject.chosen(args)
            engines = [
                stack.enter_context(
                    LLM(
                        config=subject.engine_config(
                            model, tables, build_seq=CONTEXT, build_batch=max(STREAMS), **fields
                        )
                    )
                )
                for fields in ({}, {"draft": {"path": str(draft.path)}})
            ]
            for num_streams in STREAMS:
                rounds = []
                for _ in range(args.rounds):
                    (plain, expected), (drafted, found) = (
                        _rate(engine, asked, num_streams, max_tokens) for engine in engines
                    )
                    rounds.append((plain, drafted))
                    has_failed |= found != expected
                without, beside = (median(rates) for rates in zip(*rounds, strict=True))
                print(
                    f"{num_streams} streams: {without:.1f} tokens/s without, {beside:.1f} with: {beside / without:.2f}x"
                )
            stats, draft_model = engines[1]._engine.stats, engines[1]._engine.draft_model
            assert draft_model is not None
            right = f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens were right (n-grams' included)"
            cost = draft_model.cost.per_draft_token(1)
            print(f"{right}; a step of the draft model took {cost:.2f} of the served model's")
    except BrliteError as error:
        print(f"drafts: error: {error}", file=sys.stderr)
        return 2
    if has_failed:
        print("drafts: an answer differs with a draft model", file=sys.stderr)
    return int(has_failed)


def _rate(engine: LLM, asked: Sequence[str], num_streams: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, and the answers."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start, answers = time.perf_counter(), list[list[int]]()
    for first in range(0, len(asked), num_streams):
        outputs = engine.generate(asked[first : first + num_streams], params)
        answers += (output.outputs[0].token_ids for output in outputs)
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.add_argument(
        "--draft", default=DEFAULT_MODEL, metavar="NAME|PATH", help="the draft model (the default model)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--short", action="store_true", help="few prompts, one round")
    args = parser.parse_args(argv)
    if args.short:
        args.rounds = 1
    return args


if __name__ == "__main__":
    sys.exit(main())
