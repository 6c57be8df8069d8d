"""How long a device waits between two steps, with the next step decided ahead and without.

    python bench/ahead.py             # steps of 2 and 5 ms, 1, 16 and 64 streams: half a minute
    python bench/ahead.py --short     # a few steps: for CI

The device computes nothing: it takes a given time for each step, one after the other in the order of their launches,
and notes when it had none. All else is what serves: the engine's loop, its thread, detokenizing, a reader a stream.
Tokens come from a table, so the time between two steps is the host's alone. It is this machine's, not a card's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from brlite.backends.plugins.toy_text import VOCAB_SIZE, toy_tokenizer
from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import BackendInfo, Batch, SampledToken, SeqResult, StepResult
from brlite.engine.engine import Engine
from brlite.sampling_params import SamplingParams

CONTEXT, BLOCK_SIZE = 1024, 16
PROMPT = list(b"a prompt of a few dozen tokens, for all streams")
TEXT = b"All that is said here comes from a table. "


class Measured(Struct, frozen=True, kw_only=True):
    """One run. `num_waits` are the steps that the device had to wait for, `mean_wait_ms` is over all its steps."""

    streams: int
    step_ms: float
    is_ahead: bool
    num_steps: int
    num_waits: int
    mean_wait_ms: float
    tokens_per_second: float


class TimedDevice:
    """A `Backend` that `CanRunAhead`. Its steps take `step_seconds`; it starts one when the one before has ended."""

    def __init__(self, streams: int, step_seconds: float, *, can_run_ahead: bool) -> None:
        self.info = BackendInfo(
            name="timed",
            device="none",
            dtype="none",
            precision="bf16",
            vocab_size=VOCAB_SIZE,
            max_model_len=CONTEXT,
            max_num_seqs=streams,
            block_size=BLOCK_SIZE,
            num_blocks=streams * CONTEXT // BLOCK_SIZE,
            kv_dtype="none",
            weight_bytes=0,
            kv_bytes=0,
            can_run_ahead=can_run_ahead,
        )
        self.waits: list[float] = []  # before each step but the first
        self._step_seconds = step_seconds
        self._end: float | None = None

    def execute(self, batch: Batch) -> StepResult:
        return self.launch(batch)()

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        now = time.perf_counter()
        if self._end is not None:
            self.waits.append(max(0.0, now - self._end))
        end = self._end = max(now, self._end or now) + self._step_seconds

        def result() -> StepResult:
            time.sleep(max(0.0, end - time.perf_counter()))
            return StepResult(
                [SeqResult(seq.seq_id, [SampledToken(TEXT[seq.start % len(TEXT)])]) for seq in batch.seqs]
            )

        return result

    def close(self) -> None:
        """Nothing is held."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    found = [
        asyncio.run(_measure(streams, step_ms, args.tokens, is_ahead=is_ahead))
        for step_ms in args.step_ms
        for streams in args.streams
        for is_ahead in (False, True)
    ]
    print("| streams | step | decided ahead | steps that the device waited for | wait a step | tokens/s |")
    print("|---|---|---|---|---|---|")
    for each in found:
        waited = f"{each.num_waits} of {each.num_steps}"
        how = "yes" if each.is_ahead else "no"
        rate = f"{each.tokens_per_second:.0f}"
        print(f"| {each.streams} | {each.step_ms:g} ms | {how} | {waited} | {each.mean_wait_ms:.2f} ms | {rate} |")
    if args.json is not None:
        args.json.write_text(json.dumps(msgspec.to_builtins(found), indent=1) + "\n")


async def _measure(streams: int, step_ms: float, num_tokens: int, *, is_ahead: bool) -> Measured:
    device = TimedDevice(streams, step_ms / 1000, can_run_ahead=is_ahead)
    config = EngineConfig(max_num_batched_tokens=streams * len(PROMPT), prefix_caching=False, max_step_seconds=0.0)
    engine = Engine(device.info, toy_tokenizer(), config, LimitsConfig())
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    async with EngineLoop(engine, device) as loop:
        start = time.perf_counter()
        counts = await asyncio.gather(*(_read(loop, params) for _ in range(streams)))
        seconds = time.perf_counter() - start
    return Measured(
        streams=streams,
        step_ms=step_ms,
        is_ahead=is_ahead,
        num_steps=len(device.waits),
        num_waits=sum(wait > 0 for wait in device.waits),
        mean_wait_ms=1000 * sum(device.waits) / len(device.waits),
        tokens_per_second=sum(counts) / seconds,
    )


async def _read(loop: EngineLoop, params: SamplingParams) -> int:
    return sum([len(output.outputs[0].token_ids) async for output in loop.generate(PROMPT, params)])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=_numbers, default=[1, 16, 64], help="at once, with commas")
    parser.add_argument("--step-ms", type=_numbers, default=[2, 5], help="milliseconds of a step, with commas")
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    parser.add_argument("--short", action="store_true", help="16 streams, 20 tokens")
    args = parser.parse_args(argv)
    if args.short:
        args.streams, args.step_ms, args.tokens = [16], [5], 20
    return args


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
