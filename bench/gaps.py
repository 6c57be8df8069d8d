"""How long a running stream waits for its next token while a long prompt is computed beside it.

    python bench/gaps.py                                                  # brlite, a prompt of 7,500 tokens, 3 rounds
    python bench/gaps.py --servers brlite-int8-nospec llama.cpp-q8        # beside llama.cpp, in turns
    python bench/gaps.py --short                                          # 600 tokens, one round: for CI

In a round a stream begins, and after its first texts a prompt comes whose answer has two tokens. Counted are the
stream's gaps that end while the prompt is computed, and how long the prompt takes. The servers that wait are stopped
meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from statistics import median

from measuring import load, prompts, subject
from measuring.venvs import ToolError
from msgspec import Struct
from peers import launchers, servers

from brlite.errors import BrliteError
from brlite.tokenizer import load_tokenizer

HEAD_START = 20  # texts of the stream before the prompt comes; with drafts a text may have several tokens
LOOK_SECONDS = 0.005
ANSWER_TOKENS = 2  # of the long prompt
CONTEXT_STEP = 256
REQUEST_SECONDS = 900.0
SHORT = {"prompt_tokens": 600, "stream_tokens": 200, "rounds": 1}


class RequestFailed(Exception):
    """A request was refused, broke off or came at the wrong time."""


class Round(Struct, frozen=True):
    """Seconds: the stream's gaps beside the prompt, and from the prompt's request to its first token."""

    gaps: Sequence[float]
    prompt: float


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a request failed, or 2 if the model or a server could not be had."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            started = _start(args, stack)
            texts = _long_prompts(args)
            found: dict[str, list[Round]] = {server.name: [] for server in started}
            for number in range(args.rounds):
                for server in started:
                    found[server.name].append(_measure(server, texts[number % len(texts)], number, args.stream_tokens))
    except (BrliteError, servers.ServerError, ToolError) as error:
        print(f"gaps: error: {error}", file=sys.stderr)
        return 2
    except RequestFailed as error:
        print(f"gaps: error: a request failed: {error}", file=sys.stderr)
        return 1
    print(f"a stream beside a prompt of {args.prompt_tokens} tokens, {args.rounds} rounds\n")
    print("| server | gap, median | longest, median of rounds | longest of all | prompt, to its first token |")
    print("|---|---:|---:|---:|---:|")
    for name, rounds in found.items():
        longest = [max(each.gaps) for each in rounds]
        typical = median(gap for each in rounds for gap in each.gaps)
        took = median(each.prompt for each in rounds)
        print(f"| {name} | {typical:.3f} s | {median(longest):.3f} s | {max(longest):.3f} s | {took:.1f} s |")
    return 0


def _start(args: argparse.Namespace, stack: ExitStack) -> list[servers.Server]:
    needed = max(args.prompt_tokens + ANSWER_TOKENS, args.stream_tokens + CONTEXT_STEP)
    context = -(-needed // CONTEXT_STEP) * CONTEXT_STEP + CONTEXT_STEP
    settings = servers.read_settings(args, stack, streams=2, context=context)
    launches = [launcher(settings) for launcher in args.servers]
    return servers.start_paused(launches, settings.folder, args.start_timeout, stack)


def _long_prompts(args: argparse.Namespace) -> list[str]:
    tokenizer = load_tokenizer(subject.find_model(args.model).path)
    return prompts.long_prompts(prompts.read_prompts(prompts.QUALITY_TEXT), args.prompt_tokens, tokenizer)


def _measure(server: servers.Server, text: str, number: int, stream_tokens: int) -> Round:
    server.resume()
    try:
        stream, prompt = asyncio.run(_both(server.target, f"Once upon a time, {number}", text, stream_tokens))
    finally:
        server.pause()
    if not prompt.text_times:
        raise RequestFailed("the answer to the prompt has no text")
    begin, end = prompt.sent_at, prompt.text_times[0]
    gaps = [after - before for before, after in pairwise(stream.text_times) if after > begin and before < end]
    if not gaps:
        raise RequestFailed("the stream had ended before the prompt came (--stream-tokens)")
    print(
        f"round {number + 1}: {server.name}: {len(gaps)} gaps, longest {max(gaps):.3f} s, prompt {end - begin:.1f} s",
        file=sys.stderr,
    )
    return Round(gaps, end - begin)


async def _both(target: load.Target, short: str, long: str, stream_tokens: int) -> tuple[load.Answer, load.Answer]:
    async def answer(prompt: str, max_tokens: int, answers: list[load.Answer]) -> load.Answer:
        await load.run_load(
            target,
            [prompt],
            concurrency=1,
            max_tokens=max_tokens,
            timeout_seconds=REQUEST_SECONDS,
            answers=answers,
        )
        (only,) = answers
        if only.error is not None:
            raise RequestFailed(only.error)
        return only

    await answer("The sea is", ANSWER_TOKENS, [])  # warm-up
    streamed: list[load.Answer] = []
    stream = asyncio.create_task(answer(short, stream_tokens, streamed))
    while not stream.done():
        if streamed and len(streamed[0].text_times) >= HEAD_START:
            break
        await asyncio.sleep(LOOK_SECONDS)
    prompt = await answer(long, ANSWER_TOKENS, [])
    return await stream, prompt


def _launcher(name: str) -> Callable[[servers.Settings], servers.Launch]:
    launcher = launchers.find_launcher(name)
    if launcher is None:
        raise argparse.ArgumentTypeError(f"{name} is not known")
    return launcher


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    subject.add_turns(parser, short="600 tokens, one round")
    parser.add_argument("--servers", nargs="+", type=_launcher, default=[_launcher("brlite")], help="(brlite)")
    parser.add_argument("--prompt-tokens", type=int, default=7500, metavar="N", help="of the long prompt (7500)")
    parser.add_argument("--stream-tokens", type=int, default=600, metavar="N", help="of the stream's answer (600)")
    return subject.parse(parser, argv, SHORT)


if __name__ == "__main__":
    sys.exit(main())
