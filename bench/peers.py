"""The servers that brlite is compared with: how each is installed, given the same model, and started.

Each lives in a venv in the bench's cache folder (BRLITE_BENCH_CACHE, else ~/.cache/brlite/bench), which is made on
first use. Both get the weights of the same GGUF file: llama.cpp as they are, transformers as 16-bit safetensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from servers import HOST, Launch, ServerError, Settings, free_port, launch_brlite

LLAMA_SERVER = Path(__file__).with_name("llama_server.py")
INSTALL_SECONDS = 1800
TOOL_SECONDS = 300
PAGE_SIZE = 256  # tokens in a page of transformers' paged cache, its default

SAVE_TOKENIZER = """
import sys
from transformers import AutoTokenizer
folder, file, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
"""


def launch_llama_cpp(settings: Settings) -> Launch:
    """llama.cpp's server with one slot for each stream."""
    python = _venv("llama.cpp", ["xllamacpp"])
    port = free_port()
    options = {"port": port, "streams": settings.streams, "context": settings.context, "threads": settings.threads}
    return Launch(
        name="llama.cpp",
        version=f"xllamacpp {_version(python, 'xllamacpp')}",
        command=[str(python), str(LLAMA_SERVER), "--model", str(_gguf(settings)), *_flags(options)],
        port=port,
        model=settings.path.stem,
        ready_path="/health",
        fields={"ignore_eos": True, "cache_prompt": settings.prefix_cache},
    )


def launch_transformers(settings: Settings) -> Launch:
    """`transformers serve` with continuous batching and a paged cache of the size that the others have."""
    num_blocks = math.ceil(settings.context / PAGE_SIZE) * settings.streams
    return _transformers(settings, "transformers", {"cb-num-blocks": num_blocks}, ["--continuous-batching"])


def launch_transformers_sequential(settings: Settings) -> Launch:
    """`transformers serve` as it comes: one request after the other."""
    return _transformers(settings, "transformers-sequential", {}, [])


def _transformers(settings: Settings, name: str, options: Mapping[str, object], switches: list[str]) -> Launch:
    python = _venv("transformers", ["transformers[serving]>=5.20,<6", "torch>=2.6,<2.14", "gguf>=0.17"])
    model = str(_hf_folder(_gguf(settings), python))
    port = free_port()
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    command = [str(python.with_name("transformers")), "serve", model, *switches]
    return Launch(
        name=name,
        version=_version(python, "transformers"),
        command=[*command, *_flags({"host": HOST, "port": port, "device": "cpu", **options})],
        port=port,
        model=model,
        ready_path="/health",
        fields={},  # it refuses fields that it does not know; its model folder names no end token instead
        environment={"HF_HUB_OFFLINE": "1", **threads},
    )


LAUNCHERS: dict[str, Callable[[Settings], Launch]] = {
    "brlite": launch_brlite,
    "llama.cpp": launch_llama_cpp,
    "transformers": launch_transformers,
    "transformers-sequential": launch_transformers_sequential,
}


def cache_folder() -> Path:
    return Path(os.environ.get("BRLITE_BENCH_CACHE") or "~/.cache/brlite/bench").expanduser()


def _venv(name: str, requirements: list[str]) -> Path:
    """The Python of a venv that has `requirements`; made, or made anew when they change."""
    folder = cache_folder() / "venvs" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    text = "\n".join(requirements)
    if not (stamp.exists() and stamp.read_text() == text):
        print(f"installing {', '.join(requirements)} into {folder} …", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], TOOL_SECONDS)
        _run([str(python), "-m", "pip", "install", "--quiet", *requirements], INSTALL_SECONDS)
        stamp.write_text(text)
    return python


def _hf_folder(gguf: Path, python: Path) -> Path:
    """The GGUF file's model as a Hugging Face folder: 16-bit weights, tokenizer, and no token that ends an answer."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.exists():
        print(f"writing {gguf.name} as safetensors to {folder} …", file=sys.stderr)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        unfinished.mkdir(parents=True)
        _write_weights(gguf, unfinished)
        _run([str(python), "-c", SAVE_TOKENIZER, str(gguf.parent), gguf.name, str(unfinished)], TOOL_SECONDS)
        unfinished.rename(folder)
    return folder


def _write_weights(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from brlite.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf)
    try:
        config = {**checkpoint.config, "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}
        tensors = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in checkpoint.tensors()}
    finally:
        checkpoint.close()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "pad_token_id": 0}))


def _gguf(settings: Settings) -> Path:
    if settings.path.suffix != ".gguf":
        raise ServerError(f"{settings.path}: the peers need the model as a .gguf file")
    return settings.path


def _version(python: Path, package: str) -> str:
    return _run([str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"], TOOL_SECONDS)


def _flags(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _run(command: list[str], timeout_seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=True)
    except subprocess.CalledProcessError as error:
        raise ServerError(f"{' '.join(command[:4])} … failed:\n{error.stderr[-2000:]}") from None
    except subprocess.TimeoutExpired:
        raise ServerError(f"{' '.join(command[:4])} … took longer than {timeout_seconds:g} s") from None
    return done.stdout.strip()
