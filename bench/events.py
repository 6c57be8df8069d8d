"""CPU time that the whole server takes for each event of a stream: engine, delivery, dialect, socket.

    python bench/events.py                             # chats, 256, 1,000 and 4,000 streams: half a minute
    python bench/events.py --against ../other          # beside the package of another checkout, in turns
    python bench/events.py --short                     # 64 streams, one round: for CI

The model computes nothing: its tokens come from a table. Each run is a server in a process of its own; another process
holds the connections and drops what it reads. A step with all streams in it makes one event for each. Counted is the
server process's CPU time, kernel included, over the steps in which all streams run. The event loop and the
interpreter's settings are those of `brlite serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

try:
    from uvloop import run
except ImportError:
    from asyncio import run

from ahead import CONTEXT, PROMPT, TimedDevice

from brlite.app import create_app
from brlite.backends.plugins.toy_text import toy_tokenizer
from brlite.commands.serve import GC_THRESHOLDS, SWITCH_INTERVAL_SECONDS
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import Batch, StepResult
from brlite.engine.engine import Engine
from brlite.http.listen import HttpServer

ENDPOINTS: dict[str, tuple[str, dict[str, object]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
    "completions": ("/v1/completions", {"prompt": "hello"}),
}
CONNECTING = 128  # at a time: below the listener's backlog
WAIT_SECONDS = 0.25  # a step, so that the first streams have not ended when the last one begins
LAST_CHUNK = b"\r\n0\r\n\r\n"


class NullModel(TimedDevice):
    """Steps that take no time, once all streams run. `cpu_seconds` has the process's CPU time at each of these."""

    def __init__(self, streams: int) -> None:
        super().__init__(streams, 0.0, can_run_ahead=False)
        self.cpu_seconds: list[float] = []

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        if len(batch.seqs) == self.info.max_num_seqs:
            self.cpu_seconds.append(time.process_time())
        elif not self.cpu_seconds:
            time.sleep(WAIT_SECONDS)
        return super().launch(batch)


class Reader(asyncio.Protocol):
    """Sends one request and drops the response."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request, self._done, self._end = request, done, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._end = (self._end + data)[-len(LAST_CHUNK) :]
        if self._end == LAST_CHUNK and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(error or ConnectionError("the server closed a connection before the end"))


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    if args.client is not None:
        asyncio.run(_read_streams(args.client, args.streams[0], args.endpoint, args.tokens))
        return
    if args.one:
        print(run(_serve(args.streams[0], args.endpoint, args.tokens)))
        return
    packages = {"here": None} if args.against is None else {"here": None, "there": args.against}
    print(f"{args.endpoint}, CPU per event, medians of {args.rounds} rounds")
    for streams in args.streams:
        found: dict[str, list[float]] = {name: [] for name in packages}
        for _ in range(args.rounds):
            for name, path in packages.items():
                found[name].append(_run_one(streams, path, args))
        line = ", ".join(f"{name} {median(each):.1f} µs" for name, each in found.items())
        if args.against is not None:
            line += f", here/there {median(a / b for a, b in zip(found['here'], found['there'], strict=True)):.3f}"
        print(f"{streams} streams: {line}", flush=True)


def _run_one(streams: int, package: Path | None, args: argparse.Namespace) -> float:
    root = Path(__file__).parents[1] if package is None else package
    options = ["--one", "--streams", str(streams), "--endpoint", args.endpoint, "--tokens", str(args.tokens)]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    ran = subprocess.run([sys.executable, __file__, *options], env=environment, stdout=subprocess.PIPE, check=True)
    return float(ran.stdout)


async def _serve(streams: int, endpoint: str, num_tokens: int) -> float:
    """Serve all streams once. Returns microseconds of CPU per event."""
    model = NullModel(streams)
    limits = LimitsConfig(max_waiting=streams, max_connections=2 * streams, max_connections_per_address=2 * streams)
    engine_config = EngineConfig(max_num_batched_tokens=streams * len(PROMPT), prefix_caching=False, max_step_seconds=0)
    config = Config(model=(ModelSpec(name="null", path="x", build_seq=CONTEXT),), engine=engine_config, limits=limits)
    engine = EngineLoop(Engine(model.info, toy_tokenizer(), engine_config, limits), model)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    async with engine, HttpServer(create_app(engine, config), "127.0.0.1", 0, limits) as server:
        options = ["--client", str(server.port), "--streams", str(streams), "--endpoint", endpoint]
        command = [sys.executable, __file__, *options, "--tokens", str(num_tokens)]
        client = await asyncio.create_subprocess_exec(*command)
        if await client.wait():
            sys.exit("the client failed; its message is above")
    seconds = model.cpu_seconds
    if len(seconds) < 3:
        sys.exit("all streams never ran together: give more --tokens")
    return 1e6 * (seconds[-1] - seconds[0]) / (streams * (len(seconds) - 1))


async def _read_streams(port: int, streams: int, endpoint: str, num_tokens: int) -> None:
    path, fields = ENDPOINTS[endpoint]
    body = json.dumps({**fields, "stream": True, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0})
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    loop = asyncio.get_running_loop()
    places, done = asyncio.Semaphore(CONNECTING), [loop.create_future() for _ in range(streams)]

    async def connect(end: asyncio.Future[None]) -> None:
        async with places:
            await loop.create_connection(lambda: Reader(request, end), "127.0.0.1", port)

    await asyncio.gather(*map(connect, done))
    await asyncio.gather(*done)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=_numbers, default=[256, 1000, 4000], help="at once, with commas")
    parser.add_argument("--endpoint", choices=tuple(ENDPOINTS), default="chat")
    parser.add_argument("--tokens", type=int, default=60, help="of each stream (60)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, whose package takes turns")
    parser.add_argument("--short", action="store_true", help="64 streams, one round")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.short:
        args.streams, args.rounds = [64], 1
    return args


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
