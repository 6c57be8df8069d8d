"""llama.cpp as a model whose logits can be asked for: a process of its own with a venv of its own.

What it computes is `llama_logits.py`, which runs there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from measuring.venvs import ToolError, find_venv, package_version

SCRIPT = Path(__file__).with_name("llama_logits.py")
PACKAGE = "cyllama"
REQUIREMENT = "cyllama==0.2.18"  # of the wheels with llama.cpp's low-level API, one that old C libraries can load


class LlamaModel:
    """A running process. `close` ends it."""

    def __init__(self, process: subprocess.Popen[bytes], vocab_size: int, log: Path) -> None:
        self._process = process
        self._vocab_size = vocab_size
        self._log = log

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[tokens, vocabulary] float32: what follows each token. Raises `ToolError` if the process gave up."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        shape = len(token_ids), self._vocab_size
        try:
            self._process.stdin.write(json.dumps(token_ids).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error() from None
        data = self._process.stdout.read(shape[0] * shape[1] * 4)
        if len(data) < shape[0] * shape[1] * 4:
            raise self._error()
        return np.frombuffer(data, np.float32).reshape(shape)

    def _error(self) -> ToolError:
        return ToolError(f"llama.cpp gave up:\n{self._log.read_text(errors='replace')[-2000:]}")


@contextmanager
def open_llama(gguf: Path, vocab_size: int, context: int, threads: int, folder: Path) -> Iterator[LlamaModel]:
    """llama.cpp with `gguf`, for texts of `context` tokens; `folder` gets its log."""
    python = find_venv("llama.cpp-logits", [REQUIREMENT])
    log = folder / f"{gguf.stem}.log"
    command = [str(python), str(SCRIPT), f"--model={gguf}", f"--context={context}", f"--threads={threads}"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    try:
        yield LlamaModel(process, vocab_size, log)
    finally:
        process.kill()
        process.communicate()


def llama_version() -> str:
    return f"{PACKAGE} {package_version(find_venv('llama.cpp-logits', [REQUIREMENT]), PACKAGE)}"
