"""What a proxy costs between client and server: brlite's against nginx and two routers, in turns, in front of nothing.

    python bench/proxy.py                                        # all goals: 5 rounds, some 7 minutes
    python bench/proxy.py --proxies brlite,nginx-tuned --works streams --rounds 3
    python bench/proxy.py --short                                # for CI: does every byte come through? a few seconds

The backend computes nothing (`proxies/null_backend.cpp`), the client checks every byte (`proxies/http_load.cpp`); both
have the second core, the proxies the first. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from measuring import this_machine
from measuring.venvs import ToolError
from peers import servers
from peers.servers import Launch, Server
from proxies import launchers, report
from proxies.programs import find_program
from proxies.report import Cell, Idle
from proxies.window import LoadFailed, idle_connection_bytes, run_work
from proxies.works import NAMES, Scale, make_works, small_body

from brlite.errors import NativeUnavailable

DIRECT = "direct"
COMPARED = ("brlite", "nginx-tuned", "nginx", "vllm-router", "sglang-router", DIRECT)
START_SECONDS = 60.0
MAX_FILES = 8192
SHORT = {"rounds": 1, "warm_up": 0.2, "seconds": 0.4, "streams": 32, "idle": 100}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if anything was answered wrongly, 2 if a proxy or a program could not be had."""
    args = _arguments(argv)
    _allow_files()
    machine = this_machine.describe()
    this_machine.warn_if_busy(machine)
    try:
        bench = Bench(args)
        cells, idles = bench.measure()
    except (servers.ServerError, ToolError, NativeUnavailable) as error:
        print(f"proxy: error: {error}", file=sys.stderr)
        return 2
    except LoadFailed as error:
        print(f"proxy: error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"{name}: {value}" for name, value in {**machine, **bench.versions}.items()), end="\n\n")
    print(report.render(cells, idles, bench.works, args.proxies[0], has_goals=not args.short))
    if args.json is not None:
        args.json.write_text(json.dumps(_as_json(args, machine, bench, cells, idles), indent=1) + "\n")
    return 1 if report.find_problems(cells) else 0


class Bench:
    """The proxies, the works, and the two cores they share."""

    def __init__(self, args: argparse.Namespace) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.versions: dict[str, str] = {}
        scale = Scale(args.warm_up, args.seconds, args.streams, args.pace_ms)
        self.works = [work for work in make_works(scale) if work.name in args.works]
        self._args = args
        self._proxy_core, self._client_core = cores[0], cores[-1]
        self._client = find_program("http_load")
        self._backend = find_program("null_backend")

    def measure(self) -> tuple[list[Cell], list[Idle]]:
        """Every cell of every round, the proxies' turns in one order and then in the other."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brlite-bench-")))
            stack.enter_context(_on_core(self._client_core))
            backend = stack.enter_context(servers.start(self._launch_backend(), folder, START_SECONDS))
            idles = self._measure_idle(backend, folder)
            running = [stack.enter_context(self._start(name, backend, folder)) for name in self._args.proxies]
            return list(self._cells(running, folder)), idles

    def _cells(self, running: Sequence[Server], folder: Path) -> Iterator[Cell]:
        for number in range(self._args.rounds):
            for work in self.works:
                for server in running if number % 2 == 0 else running[::-1]:
                    found = run_work(self._client, work, _port(server), _pid(server), folder)
                    yield report.make_cell(server.name, work, number, *found)
            print(f"round {number + 1} of {self._args.rounds}", file=sys.stderr)

    def _measure_idle(self, backend: Server, folder: Path) -> list[Idle]:
        """In processes of their own: memory that a load has used and given back would be there for the connections."""
        idles = []
        for name in self._args.proxies if self._args.idle else ():
            if name == DIRECT:
                continue
            with self._start(name, backend, folder) as server:
                found = idle_connection_bytes(small_body(), _port(server), _pid(server), self._args.idle)
                idles.append(Idle(proxy=name, bytes=found))
        return idles

    @contextmanager
    def _start(self, name: str, backend: Server, folder: Path) -> Iterator[Server]:
        if name == DIRECT:
            yield msgspec.structs.replace(backend, name=DIRECT)
            return
        launch = launchers.LAUNCHERS[name](launchers.Place(_port(backend), folder))
        self.versions[name] = launch.version
        with ExitStack() as stack:
            with _on_core(self._proxy_core):
                server = stack.enter_context(servers.start(launch, folder, START_SECONDS))
            yield server

    def _launch_backend(self) -> Launch:
        port = servers.free_port()
        return Launch(
            name="null_backend",
            version="",
            command=[str(self._backend), str(port), "16", str(self._args.pace_ms)],
            port=port,
            model=launchers.MODEL,
            ready_path="/health",
            fields={},
        )


@contextmanager
def _on_core(core: int) -> Iterator[None]:
    """This process, and those it starts meanwhile for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _allow_files() -> None:
    """A socket is a file, and what is started here inherits how many it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _port(server: Server) -> int:
    return int(server.target.url.rpartition(":")[2])


def _pid(server: Server) -> int:
    assert server.pid is not None  # all were started here
    return server.pid


def _as_json(
    args: argparse.Namespace, machine: dict[str, object], bench: Bench, cells: Sequence[Cell], idles: Sequence[Idle]
) -> dict[str, object]:
    kept = ("proxies", "works", "rounds", "seconds", "streams", "pace_ms", "idle")
    verdicts = report.judge(cells, idles, args.proxies[0])
    return {
        "machine": machine,
        "versions": bench.versions,
        "settings": {name: getattr(args, name) for name in kept},
        "goals": [{**msgspec.to_builtins(each), "holds": each.holds} for each in verdicts],
        "idle": msgspec.to_builtins(idles),
        "cells": msgspec.to_builtins(cells),
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"any of {', '.join((DIRECT, *launchers.LAUNCHERS))}; the first is the one that is judged"
    parser.add_argument("--proxies", default=",".join(COMPARED), metavar="NAME,…", help=names)
    parser.add_argument("--works", default=",".join(NAMES), metavar="WORK,…", help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(5)")
    parser.add_argument("--warm-up", type=float, default=0.5, metavar="S", help="before each load (0.5)")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="S", help="of each load; of streams, twice (1.5)")
    parser.add_argument("--streams", type=int, default=256, metavar="N", help="streams at once (256)")
    parser.add_argument("--pace-ms", type=int, default=25, metavar="MS", help="between two events; 0: none (25)")
    parser.add_argument("--idle", type=int, default=1000, metavar="N", help="idle connections; 0: none (1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    parser.add_argument("--short", action="store_true", help="brlite, and nginx if there is one; one short round")
    args = parser.parse_args(argv)
    if args.short:
        vars(args).update(SHORT, proxies="brlite,nginx-tuned" if launchers.has_nginx() else "brlite")
    args.proxies, args.works = args.proxies.split(","), args.works.split(",")
    for chosen, allowed in ((args.proxies, (DIRECT, *launchers.LAUNCHERS)), (args.works, NAMES)):
        if unknown := set(chosen) - set(allowed):
            parser.error(f"{', '.join(sorted(unknown))}: allowed are {', '.join(allowed)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
