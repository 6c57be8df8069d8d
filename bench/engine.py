"""How much of the engine's rate the server passes on: the same prompts through `LLM.generate` and over HTTP, in turns.

    python bench/engine.py                    # 32 streams, 3 rounds
    python bench/engine.py --engine-only      # no server: the bare loop's rate
    python bench/engine.py --engine-only --peer openvino --precision a_int8_w_int8 --streams 8    # and OpenVINO GenAI's
    python bench/engine.py --engine-only --peer ctranslate2 --streams 8     # or that of CTranslate2, or onnx-genai
    python bench/engine.py --engine-only --peer openvino --streams 1 --requests 4 --prompt-tokens 940 --max-tokens 1
    python bench/engine.py --short            # for CI

The engine runs in this process, the server in its own with the same config, and it is stopped while the engine runs.
A peer runs in a process and a venv of its own, with the weights of a .gguf file in 8 bits (`peers/generators.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
from measuring import load, prompts, subject
from measuring.venvs import ToolError
from msgspec import Struct
from peers import generators, servers

from brlite.errors import BrliteError
from brlite.llm import LLM
from brlite.process.machine import physical_cores
from brlite.sampling_params import SamplingParams
from brlite.tokenizer import load_tokenizer

WARM_UP_TOKENS = 8
CONTEXT = 512
SHORT = {"streams": 4, "rounds": 1, "requests": 1, "max_tokens": 16}


class Round(Struct, frozen=True, kw_only=True):
    """Output tokens a second of one turn of each. Without a server, or a peer, its rate is None."""

    engine: float
    server: float | None
    peer: float | None = None

    @property
    def share(self) -> float | None:
        return None if self.server is None else self.server / self.engine


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a request failed, or 2 if the model or the server could not be had."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            rounds = _measure(args, stack)
    except (BrliteError, servers.ServerError, ToolError) as error:
        print(f"engine: error: {error}", file=sys.stderr)
        return 2
    except _RequestFailed as error:
        print(f"engine: error: {error}", file=sys.stderr)
        return 1
    print(_render(rounds, args))
    if args.json is not None:
        kept = (
            "model",
            "precision",
            "backend",
            "speculation",
            "threads",
            "streams",
            "requests",
            "max_tokens",
            "prompt_tokens",
            "peer",
        )
        settings = {name: getattr(args, name) for name in kept}
        args.json.write_text(json.dumps({"settings": settings, "rounds": msgspec.to_builtins(rounds)}, indent=1) + "\n")
    return 0


class _RequestFailed(Exception):
    """The server refused or broke off what the engine answers."""


def _measure(args: argparse.Namespace, stack: ExitStack) -> list[Round]:
    model = subject.find_model(args.model)
    server = None if args.engine_only else _start_server(args, stack)
    tables = subject.chosen(args)
    tables["engine"]["prefix_caching"] = False
    context = max(CONTEXT, 2 * args.prompt_tokens)
    config = subject.engine_config(model, tables, build_seq=context, build_batch=args.streams)
    engine = stack.enter_context(LLM(config=config))
    peer = None
    if args.peer is not None:
        threads = args.threads or physical_cores()
        peer = generators.Generator(args.peer, model.path, threads, args.streams, stack)
        peer.rate(["Hello"], WARM_UP_TOKENS)
    texts = prompts.read_prompts(prompts.PROMPTS)
    if args.prompt_tokens:
        texts = prompts.long_prompts(texts, args.prompt_tokens, load_tokenizer(model.path))
    asked = [texts[i % len(texts)] for i in range(args.streams * args.requests)]
    _engine_rate(engine, asked[: args.streams], WARM_UP_TOKENS)
    if server is not None:
        _server_rate(server, asked[: args.streams], args.streams, WARM_UP_TOKENS)
    rounds = []
    for number in range(args.rounds):
        rate = _engine_rate(engine, asked, args.max_tokens)
        served = None if server is None else _server_rate(server, asked, args.streams, args.max_tokens)
        rounds.append(
            Round(engine=rate, server=served, peer=None if peer is None else peer.rate(asked, args.max_tokens))
        )
        print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    return rounds


def _start_server(args: argparse.Namespace, stack: ExitStack) -> servers.Server:
    settings = servers.read_settings(args, stack, streams=args.streams, context=CONTEXT)
    launch = servers.launch_brlite(subject.BRLITE, settings)
    server = stack.enter_context(servers.start(launch, settings.folder, args.start_timeout))
    server.pause()
    return server


def _engine_rate(engine: LLM, asked: Sequence[str], max_tokens: int) -> float:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    answers = engine.generate(asked, params)
    return sum(len(answer.outputs[0].token_ids) for answer in answers) / (time.perf_counter() - start)


def _server_rate(server: servers.Server, asked: Sequence[str], streams: int, max_tokens: int) -> float:
    server.resume()
    try:
        done = asyncio.run(
            load.run_load(server.target, asked, concurrency=streams, max_tokens=max_tokens, timeout_seconds=600)
        )
    finally:
        server.pause()
    if error := next((answer.error for answer in done.answers if answer.error), None):
        raise _RequestFailed(f"{error}\n{server.log_tail()}")
    return sum(answer.completion_tokens or 0 for answer in done.answers) / done.seconds


def _render(rounds: Sequence[Round], args: argparse.Namespace) -> str:
    lines = [f"{args.streams} streams, {args.max_tokens} tokens an answer, medians over the rounds ({len(rounds)})", ""]
    lines.append(f"engine: {median(each.engine for each in rounds):.1f} tokens/s")
    served = [each.server for each in rounds if each.server is not None]
    shares = [each.share for each in rounds if each.share is not None]
    if served:
        lines.append(f"server: {median(served):.1f} tokens/s, {median(shares):.1%} of the engine's")
    if peers := [each.peer for each in rounds if each.peer is not None]:
        ratio = median(each.engine / each.peer for each in rounds if each.peer is not None)
        lines.append(f"{args.peer}: {median(peers):.1f} tokens/s; the engine's rate is {ratio:.2f}x")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    subject.add_turns(parser, short="4 streams, one round")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="(32)")
    parser.add_argument("--requests", type=int, default=2, metavar="N", help="of each stream in a round (2)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens of each answer (128)")
    parser.add_argument("--engine-only", action="store_true", help="no server")
    parser.add_argument("--peer", choices=tuple(generators.PEERS), help="what else computes the same prompts")
    parser.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="0: the short prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to FILE")
    return subject.parse(parser, argv, SHORT)


if __name__ == "__main__":
    sys.exit(main())
