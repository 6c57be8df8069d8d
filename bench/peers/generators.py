"""The engines that `engine.py` compares with: how each is installed, given the model in 8 bits, and run.

Each computes in a process and a venv of its own, by a script that reads prompts from stdin and writes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from measuring.venvs import INSTALL_SECONDS, ToolError, cache_folder, find_venv, run_tool
from msgspec import Struct
from peers import gguf_q8
from peers.launchers import hf_folder

CONVERTING = ("torch>=2.6,<2.15", "transformers>=5.20,<6", "gguf>=0.17")  # the packages that both converters need


class Peer(Struct, frozen=True, kw_only=True):
    """An engine. `prepare` writes the model for it, once, and returns its path."""

    requirements: tuple[str, ...]
    script: str
    prepare: Callable[[Path, Path], Path]


class Generator:
    """A peer with a model, that computes for as long as `stack` is open."""

    def __init__(self, name: str, model: Path, threads: int, streams: int, stack: ExitStack) -> None:
        if model.suffix != ".gguf":
            raise ToolError(f"{model}: {name} needs the model as a .gguf file")
        self._name, peer = name, PEERS[name]
        python = find_venv(name, peer.requirements)
        script = Path(__file__).with_name(peer.script)
        command = [str(python), str(script), str(peer.prepare(model, python)), str(threads), str(streams)]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self._process.kill)

    def rate(self, asked: Sequence[str], max_tokens: int) -> float:
        """Output tokens a second for the prompts, each answered with `max_tokens`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps([list(asked), max_tokens]), file=self._process.stdin, flush=True)
            return len(asked) * max_tokens / float(self._process.stdout.readline())
        except (OSError, ValueError):
            raise ToolError(f"{self._name} ended; what it said is above") from None


def _q8_gguf(gguf: Path, python: Path) -> Path:
    return gguf if ".Q8_0" in gguf.suffixes else gguf_q8.find_q8_file(gguf)


def _ctranslate2_folder(gguf: Path, python: Path) -> Path:
    """CTranslate2's folder, with int8 weights, a scale for each row, and the tokenizer."""
    module = ["-m", "ctranslate2.converters.transformers", "--quantization", "int8"]
    return _converted(
        gguf, python, "ctranslate2", [*module, "--copy_files", "tokenizer.json"], "--model", "--output_dir"
    )


def _onnx_folder(gguf: Path, python: Path) -> Path:
    """ONNX Runtime GenAI's folder, with int8 weights in blocks of 32."""
    cache = str(cache_folder() / "models")
    module = ["-m", "onnxruntime_genai.models.builder", "--precision", "int8", "--execution_provider", "cpu"]
    return _converted(gguf, python, "onnx-genai", [*module, "--cache_dir", cache], "--input", "--output")


def _converted(gguf: Path, python: Path, name: str, command: Sequence[str], source: str, target: str) -> Path:
    folder = hf_folder(gguf, python)
    converted = folder.with_name(f"{folder.name}-{name}")
    if not converted.exists():
        print(f"converting {gguf.name} for {name} …", file=sys.stderr)
        unfinished = converted.with_name(f"{converted.name}.{os.getpid()}.part")
        run_tool([str(python), *command, source, str(folder), target, str(unfinished)], INSTALL_SECONDS)
        unfinished.rename(converted)
    return converted


PEERS = {
    "openvino": Peer(requirements=("openvino-genai",), script="openvino_generate.py", prepare=_q8_gguf),
    "ctranslate2": Peer(
        requirements=("ctranslate2", *CONVERTING), script="ctranslate2_generate.py", prepare=_ctranslate2_folder
    ),
    "onnx-genai": Peer(
        requirements=("onnxruntime-genai", "onnx-ir", *CONVERTING), script="onnx_generate.py", prepare=_onnx_folder
    ),
}
