"""How fast torch's path is on a card, against what the card can do and against transformers beside it.

Steps go through `Backend.execute`, draws included. Shares are of what `limits.py` measures there: the bytes that a
step must read over the rate of a copy, its multiply-adds over the rate of a large product. What matters most comes
first, and every row is said and kept at once: a run that is cut short has the rows until then.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import msgspec
import shapes
import torch
from cards import limits, models
from cards.peers import Transformers, Vllm
from measuring import steps
from msgspec import Struct

from brlite.backends.torch.backend import TorchBackend
from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.models.precision import PrecisionName
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import load_tokenizer

WARM_UP_RUNS = 2
ENGINE_BENCH = Path(__file__).parents[1] / "engine.py"


class Scale(NamedTuple):
    """What is measured. Decode steps are (rows, context); a load is (streams, prompt tokens, tokens of an answer)."""

    decodes: tuple[tuple[int, int], ...]
    prompts: tuple[int, ...]
    peer_decodes: tuple[tuple[int, int], ...]
    load: tuple[int, int, int]
    served_shape: str
    rounds: int = 3


FULL = Scale(
    decodes=(*((rows, 512) for rows in (1, 8, 32, 64, 128)), *((rows, 2048) for rows in (1, 8, 32, 64))),
    prompts=(1024, 8192),
    peer_decodes=((1, 512), (64, 512), (64, 2048)),
    load=(64, 512, 64),
    served_shape="1b",
)
SHORT = Scale(
    decodes=((1, 64), (4, 64)),
    prompts=(96,),
    peer_decodes=((4, 64),),
    load=(4, 32, 8),
    served_shape="tiny",
    rounds=1,
)


class Row(Struct, frozen=True, kw_only=True):
    """One number. Shares are of the device's measured rates; `note` says what else there is to say, or why none is."""

    shape: str
    precision: str
    by: str
    what: str
    tokens_per_second: float | None = None
    seconds: float | None = None
    bandwidth: float | None = None
    peak: float | None = None
    note: str = ""


class _Bench:
    """The rows so far, the time that is left, and the device's rates."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.scale = SHORT if args.short else FULL
        self.device = torch.device(args.device)
        self.machine = limits.describe(self.device)
        self.copy_rate = limits.copy_rate(self.device)
        self.multiply_rate = limits.multiply_rate(self.device)
        self.rows: list[Row] = []
        self._deadline = time.monotonic() + args.time_limit

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self._deadline

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(_line(row), flush=True)
        if self.args.json is not None:
            rates = {"copy_bytes_per_second": self.copy_rate, "bf16_flops": self.multiply_rate}
            found = {"machine": self.machine, "rates": rates, "rows": msgspec.to_builtins(self.rows)}
            self.args.json.write_text(json.dumps(found, indent=1) + "\n")

    def attempt(self, fields: dict[str, str], measure: Callable[[], dict[str, object]]) -> None:
        """A row of what `measure` gives, or of why it gives nothing. Out of time, nothing is begun."""
        if not self.has_time:
            return
        try:
            values = measure()
        except Exception as error:
            values = {"note": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        self.add(msgspec.convert({**fields, **values}, Row))


def run(args: argparse.Namespace) -> int:
    """Measure until the time is up and print a table. Exit status 1 if a number could not be had."""
    bench = _Bench(args)
    rates = f"copy {bench.copy_rate / 1e9:.0f} GB/s, bf16 {bench.multiply_rate / 1e12:.1f} TFLOP/s"
    print(f"{bench.machine.get('name', args.device)}, torch {bench.machine['torch']}: {rates}", flush=True)
    kernels = args.kernels or models.kernels()
    plans = list(itertools.product(kernels, args.shapes, args.precisions))
    for number, (kernel, shape, precision) in enumerate(plans):
        has_peer = args.peers and precision == "bf16" and kernel == kernels[0]
        if bench.has_time:
            _measure_model(bench, shape, precision, kernel, has_peer=has_peer)
        if number == min(1, len(plans) - 1):
            _measure_server(bench)
    print(f"\n{rates}\n\n" + "\n".join(_table(bench.rows)))
    return 1 if any(row.seconds is None and row.tokens_per_second is None for row in bench.rows) else 0


def _measure_model(bench: _Bench, shape: str, precision: PrecisionName, kernel: str, *, has_peer: bool) -> None:
    scale, by = bench.scale, f"brlite {kernel}".strip()
    fields = {"shape": shape, "precision": precision, "by": by}
    groups = [[steps.prefill_step(n)] for n in scale.prompts]
    for context in sorted({context for _, context in scale.decodes}):
        groups.append([steps.decode_step(rows, at) for rows, at in scale.decodes if at == context])
    most = max(steps.num_blocks(group, models.BLOCK_SIZE) for group in groups)
    rows = max(rows for rows, _ in scale.decodes)
    began = time.perf_counter()
    try:
        backend = models.make_backend(
            shape, precision, bench.args.device, kernel, rows=rows, context=max(*scale.prompts, 2048), num_blocks=most
        )
    except Exception as error:
        bench.add(Row(**fields, what="loading", note=" ".join(f"{type(error).__name__}: {error}".split())[:200]))
        return
    try:
        loaded = {"note": f"{backend.info.weight_bytes / 2**30:.1f} GiB of weights; {'; '.join(backend.info.notes)}"}
        bench.attempt({**fields, "what": "loading"}, lambda: {**loaded, "seconds": time.perf_counter() - began})
        for group in sorted(groups, key=lambda group: group[0].num_tokens > 1):
            _measure_steps(bench, backend, group, fields)
        bench.attempt({**fields, "what": _load_name(scale)}, lambda: _measure_load(bench, backend, shape))
    finally:
        backend.close()
        _give_back(bench)
    if has_peer and bench.has_time:
        _measure_peer(bench, shape, "transformers", lambda: Transformers(shape, bench.args.device))
    if has_peer and bench.has_time and find_spec("vllm") is not None:
        _give_back(bench)
        context = max(*scale.prompts, 2048) + scale.load[2]
        _measure_peer(bench, shape, "vllm", lambda: Vllm(shape, bench.args.device, rows=rows, context=context))


def _measure_steps(bench: _Bench, backend: TorchBackend, group: Sequence[steps.Step], fields: dict[str, str]) -> None:
    """Steps of one group in turns, round after round; what they read has been written before."""
    if not bench.has_time:
        return
    config, scale = models.model_config(fields["shape"]), bench.scale
    is_decode = group[0].num_tokens == 1
    batches = dict(zip(group, steps.make_batches(group, backend.info), strict=True))
    found: dict[steps.Step, list[float]] = {step: [] for step in group}
    errors: dict[steps.Step, str] = {}
    if is_decode:
        steps.fill_cache(backend, group)
    for number, step in itertools.product(range(scale.rounds), group):
        if step in errors or (number and not bench.has_time):
            continue
        try:
            for _ in range(0 if number else WARM_UP_RUNS):
                backend.execute(batches[step])
            found[step] += steps.time_step(backend, batches[step])
        except Exception as error:
            errors[step] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    for step in group:
        if step in errors:
            bench.add(Row(**fields, what=step.name, note=errors[step]))
            continue
        seconds, cost = median(found[step]), steps.step_cost(step, backend.info, config)
        bench.add(
            Row(
                **fields,
                what=step.name,
                tokens_per_second=step.rows * step.num_tokens / seconds,
                seconds=seconds,
                bandwidth=cost.bytes_read / seconds / bench.copy_rate,
                peak=2 * cost.multiply_adds / seconds / bench.multiply_rate,
                note=f"{len(found[step])} runs",
            )
        )


def _measure_peer(bench: _Bench, shape: str, name: str, load: Callable[[], Transformers | Vllm]) -> None:
    scale = bench.scale
    try:
        peer = load()
    except Exception as error:
        bench.add(Row(shape=shape, precision="bf16", by=name, what="loading", note=str(error)[:200]))
        return
    fields = {"shape": shape, "precision": "bf16", "by": f"{name} {peer.version}"}
    for rows, context in scale.peer_decodes:
        what = steps.decode_step(rows, context).name
        bench.attempt({**fields, "what": what}, lambda r=rows, c=context: _rate(r, peer.decode_seconds(r, c)))
    for num_tokens in scale.prompts:
        what = steps.prefill_step(num_tokens).name
        bench.attempt({**fields, "what": what}, lambda n=num_tokens: _rate(n, peer.prefill_seconds(n)))
    streams, num_tokens, num_answer = scale.load
    fields["by"] += " continuous batching" * (name == "transformers")
    bench.attempt(
        {**fields, "what": _load_name(scale)},
        lambda: _rate(streams * num_answer, peer.batched_seconds(streams, num_tokens, num_answer)),
    )
    peer.close()


def _measure_load(bench: _Bench, backend: TorchBackend, shape: str) -> dict[str, object]:
    """All streams ask at once: tokens a second, and how long first tokens and further ones take. Ends the backend."""
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        shapes.write_tokenizer(Path(scratch), backend.info.vocab_size)
        tokenizer = load_tokenizer(Path(scratch))
    return asyncio.run(
        _serve_streams(Engine(backend.info, tokenizer, _engine_config(), LimitsConfig()), backend, bench)
    )


def _engine_config() -> EngineConfig:
    return EngineConfig(backend="torch", prefix_caching=False)


async def _serve_streams(engine: Engine, backend: TorchBackend, bench: _Bench) -> dict[str, object]:
    streams, num_tokens, num_answer = bench.scale.load
    numbers = random.Random(0)
    prompts = [[numbers.randrange(3, backend.info.vocab_size) for _ in range(num_tokens)] for _ in range(streams)]
    params = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
    async with EngineLoop(engine, backend) as loop:

        async def stream(prompt: list[int], params: SamplingParams) -> list[float]:
            times = [time.perf_counter()]
            async for output in loop.generate(prompt, params):
                times += [time.perf_counter()] * sum(len(each.token_ids) for each in output.outputs)
            return times

        brief = msgspec.structs.replace(params, max_tokens=4)
        await asyncio.gather(*(stream(prompt[:32], brief) for prompt in prompts))  # warms up
        start = time.perf_counter()
        found = await asyncio.gather(*(stream(prompt, params) for prompt in prompts))
        seconds = time.perf_counter() - start
    first = sorted(times[1] - times[0] for times in found)
    gaps = [after - before for times in found for before, after in itertools.pairwise(times[1:])]
    middle, p99 = median(gaps) * 1e3, quantiles(gaps, n=100)[98] * 1e3
    ttft = f"TTFT median {median(first):.3f} s, last {first[-1]:.3f} s"
    note = f"{ttft}; ITL median {middle:.1f} ms, p99 {p99:.1f} ms"
    return {"tokens_per_second": streams * num_answer / seconds, "seconds": seconds, "note": note}


def _measure_server(bench: _Bench) -> None:
    """The server's share of the bare engine's rate, by `engine.py` with a model on disk."""
    shape, streams = bench.scale.served_shape, bench.scale.load[0]
    if not bench.has_time:
        return
    fields = {"shape": shape, "precision": "bf16", "by": "brlite serve", "what": f"{streams} streams over HTTP"}
    _give_back(bench)
    bench.attempt(fields, lambda: _engine_share(bench, shape, streams))


def _engine_share(bench: _Bench, shape: str, streams: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        folder, found = Path(scratch) / shape, Path(scratch) / "engine.json"
        models.write_folder(shape, folder, bench.args.device)
        command = [sys.executable, str(ENGINE_BENCH), "--model", str(folder), "--precision", "bf16"]
        command += ["--backend", "torch", "--streams", str(streams), "--requests", "1", "--json", str(found)]
        command += ["--max-tokens", "16" if bench.args.short else "96", "--rounds", "1" if bench.args.short else "3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, bench.seconds_left))
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        rounds = json.loads(found.read_text())["rounds"]
    served = median(each["server"] for each in rounds)
    share = median(each["server"] / each["engine"] for each in rounds)
    return {"tokens_per_second": served, "note": f"{share:.1%} of the engine's rate"}


def _rate(num_tokens: int, seconds: float) -> dict[str, object]:
    return {"tokens_per_second": num_tokens / seconds, "seconds": seconds}


def _give_back(bench: _Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _load_name(scale: Scale) -> str:
    streams, num_tokens, num_answer = scale.load
    return f"{streams} streams, {num_tokens} + {num_answer}"


def _line(row: Row) -> str:
    return "  ".join(filter(None, (row.shape, row.precision, row.by, row.what, *_numbers(row), row.note)))


def _numbers(row: Row) -> tuple[str, str, str, str]:
    return (
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f} tokens/s",
        "" if row.seconds is None else f"{row.seconds * 1e3:.2f} ms",
        "" if row.bandwidth is None else f"{row.bandwidth:.0%} of bandwidth",
        "" if row.peak is None else f"{row.peak:.0%} of peak",
    )


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: a line for each number, and beside it brlite's rate over a peer's of the same shape and work."""
    yield "| shape | precision | by | what | tokens/s | ms | of bandwidth | of bf16 peak | over transformers | |"
    yield "|---|---|---|---|---:|---:|---:|---:|---:|---|"
    peers = {(row.shape, row.what): row.tokens_per_second for row in rows if row.by.startswith("transformers")}
    for row in rows:
        rate, peer = row.tokens_per_second, peers.get((row.shape, row.what))
        over = f"{rate / peer:.2f}" if rate and peer and row.by.startswith("brlite") else ""
        numbers = [text.split(" ")[0] for text in _numbers(row)]
        yield f"| {row.shape} | {row.precision} | {row.by} | {row.what} | {' | '.join(numbers)} | {over} | {row.note} |"
