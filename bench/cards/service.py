"""The checks of `card.py` that start brlite's own commands: streams over HTTP, `verify`, and memory that is not there.

A model with too much weight is a sparse file: its sizes are read, its zeros never are. On a CPU the address space is
limited, since a system that promises more memory than it has would let it load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from cards.finding import Finding
from measuring import tiny_models
from peers import servers

from brlite.models.registry import find_family

COMMAND = (sys.executable, "-c", servers.RUN_BRLITE)
COMMAND_SECONDS = 120.0
CPU_ADDRESS_SPACE = 24 * 2**30
CONTEXT = 512
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# 200 GiB in bfloat16: 16 layers of 6.4 billion weights.
HUGE = {**tiny_models.LLAMA, "hidden_size": 2**15, "intermediate_size": 2**15, "num_hidden_layers": 16}
HUGE |= {"num_attention_heads": 256, "num_key_value_heads": 256, "head_dim": 128}
HUGE_BLOCKS = 10**9  # 5.7 TiB of KV cache for the tiny model
LEFT_FREE = 2**30 * 3 // 2  # of the card's memory, by the process that takes the rest: a CUDA context and little more
HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info(sys.argv[1])
held = torch.empty(max(0, free - int(sys.argv[2])), dtype=torch.int8, device=sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def http(args: argparse.Namespace) -> Iterator[Finding]:
    """A chat streamed alone, then two at once from the same server."""
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        folder = Path(scratch)
        settings = servers.Settings(
            model="model",
            path=_model(args, folder),
            streams=4,
            context=CONTEXT,
            threads=0,
            prefix_cache=True,
            folder=folder,
            tables={"engine": {"backend": "torch", "device": args.device}, "model": {}},
        )
        start = time.perf_counter()
        with servers.start(servers.launch_brlite("brlite", settings), folder, COMMAND_SECONDS) as server:
            ready = time.perf_counter() - start
            alone, one, other = asyncio.run(_chats(server.target.url))
    for name, answer in (("alone", alone), ("two at once, first", one), ("two at once, second", other)):
        yield Finding(name, answer["is_complete"], _describe(answer, ready), answer)
    overlap = min(one["end"], other["end"]) > max(one["first"], other["first"])
    yield Finding("both streams ran together", overlap, f"same text as alone: {one['text'] == alone['text']}")


def verify(args: argparse.Namespace) -> Iterator[Finding]:
    """`brlite verify`: equal, or different where the backend promises nothing."""
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        fields = {"build_batch": 16, "build_seq": 160 if args.short else CONTEXT}
        config = _write_config(Path(scratch), _model(args, Path(scratch)), args.device, fields)
        tokens = "2" if args.short else "8"
        done = _run("verify", str(config), "--max-tokens", tokens, device=args.device)
    lines = done.stdout.splitlines()
    promises = not any("does not promise" in line for line in lines)
    concluded = next((line for line in lines if line.startswith(("equal:", "different:"))), "")
    is_ok = done.returncode == 0 or (done.returncode == 1 and bool(concluded) and not promises)
    text = concluded or _last_line(done.stderr)
    yield Finding("verify", is_ok, text, {"status": done.returncode, "lines": lines, "stderr": done.stderr[-2000:]})


def memory(args: argparse.Namespace) -> Iterator[Finding]:
    """A KV cache and weights that do not fit: one line, status 2."""
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        folder = Path(scratch)
        model = tiny_models.write_model(folder / "tiny", tiny_models.LLAMA)
        tiny_models.write_byte_tokenizer(model)
        yield _refused("KV cache too large", folder, model, args.device, {"num_blocks": HUGE_BLOCKS})
        huge = _write_sparse(folder / "huge")
        yield _refused("weights too large", folder, huge, args.device, {"num_blocks": 8})


def second(args: argparse.Namespace) -> Iterator[Finding]:
    """Another process has taken most of the card."""
    if args.device == "cpu":
        yield Finding("second process", None, "only on a card")
        return
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        folder = Path(scratch)
        model = tiny_models.write_model(folder / "tiny", tiny_models.LLAMA)
        tiny_models.write_byte_tokenizer(model)
        four_gib = {"num_blocks": 2**32 // (2 * 3 * 2 * 16 * 2 * 16)}
        for name, left in (("second process, KV cache", LEFT_FREE), ("second process, all", 2**27)):
            with _holding(args.device, left):
                yield _refused(name, folder, model, args.device, four_gib)


def _refused(name: str, folder: Path, model: Path, device: str, fields: Mapping[str, Any]) -> Finding:
    config = _write_config(folder, model, device, {"build_seq": 64, "build_batch": 1, **fields})
    (folder / "prompts.txt").write_text("a\n")
    prompts = ("--input", str(folder / "prompts.txt"), "--max-tokens", "2", "--output", str(folder / "answers.txt"))
    done = _run("generate", str(config), *prompts, device=device)
    last = _last_line(done.stderr)
    is_one_line = last.startswith("brlite: error:") and "Traceback" not in done.stderr
    is_ok = done.returncode == 2 and is_one_line and ("GiB" in last or "memory" in last)
    return Finding(name, is_ok, f"status {done.returncode}: {last}", {"stderr": done.stderr[-2000:]})


def _run(*arguments: str, device: str) -> subprocess.CompletedProcess[str]:
    limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (CPU_ADDRESS_SPACE,) * 2)) if device == "cpu" else None
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        stdin=subprocess.DEVNULL,
        preexec_fn=limit,
    )


@contextmanager
def _holding(device: str, left_free: int) -> Iterator[None]:
    command = [sys.executable, "-c", HOLD, device, str(left_free)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "held":
                raise RuntimeError("the card's memory could not be taken")
            yield
        finally:
            process.kill()


def _model(args: argparse.Namespace, folder: Path) -> Path:
    """The real model, or a tiny one that has a tokenizer and a chat template."""
    if args.model is not None:
        return Path(args.model).resolve()
    path = tiny_models.write_model(folder / "tiny", {**tiny_models.LLAMA, "max_position_embeddings": 1024})
    tiny_models.write_byte_tokenizer(path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path


def _write_config(folder: Path, model: Path, device: str, fields: Mapping[str, Any]) -> Path:
    table = {"name": "model", "path": str(model), "build_seq": CONTEXT, **fields}
    lines = ["[engine]", 'backend = "torch"', f"device = {json.dumps(device)}", "[[model]]"]
    path = folder / "brlite.toml"
    path.write_text("\n".join([*lines, *(f"{name} = {json.dumps(value)}" for name, value in table.items()), ""]))
    return path


def _write_sparse(folder: Path) -> Path:
    """A model of the shape `HUGE` whose weights are a hole in a file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HUGE))
    family = find_family(HUGE)
    header: dict[str, Any] = {}
    end = 0
    for name, target in family.weight_targets(family.read_config(HUGE)).items():
        size = 2
        for length in target.shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(target.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    tiny_models.write_byte_tokenizer(folder)
    return folder


async def _chats(url: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    timeout = aiohttp.ClientTimeout(total=COMMAND_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        alone = await _chat(session, url, "Name three ships.")
        one, other = await asyncio.gather(
            _chat(session, url, "Name three ships."), _chat(session, url, "Name three winds.")
        )
        return alone, one, other


async def _chat(session: aiohttp.ClientSession, url: str, text: str) -> dict[str, Any]:
    """One streamed answer of 32 tokens: its text, and when its first and last chunks came."""
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 32}
    body |= {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    chunks, tokens, is_complete, times = [], 0, False, [0.0]
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            return {"is_complete": False, "text": (await response.text())[:300], "tokens": 0, "first": 0.0, "end": 0.0}
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                is_complete = True
            elif data.startswith("{"):
                event = json.loads(data)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if event.get("choices") and event["choices"][0]["delta"].get("content"):
                    chunks.append(event["choices"][0]["delta"]["content"])
                    times.append(time.perf_counter())
    is_complete = is_complete and tokens == 32 and bool(chunks)
    return {
        "is_complete": is_complete,
        "text": "".join(chunks),
        "tokens": tokens,
        "first": times[min(1, len(times) - 1)],
        "end": times[-1],
    }


def _describe(answer: Mapping[str, Any], ready: float) -> str:
    seconds = answer["end"] - answer["first"]
    rate = f", {(answer['tokens'] - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
    return f"ready after {ready:.1f} s, {answer['tokens']} tokens{rate}: {answer['text'][:60]!r}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(no output)"])[-1][:400]
