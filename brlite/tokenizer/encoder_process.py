"""A third party's tokenizer in a child process: a text that makes it hang, abort or exhaust memory is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from brlite.errors import InvalidRequest, ModelError
from brlite.files.quoting import one_line
from brlite.process.sandbox import ChildLimits, ChildProcess

TABLE_GROWTH = 32  # the most bytes that a library's tables take for each byte of their file


class EncoderProcess:
    """One child with a tokenizer. Thread-safe; texts are encoded one at a time. `description` is its first answer.

    The memory of `limits` is increased by `TABLE_GROWTH` times the tokenizer's size.
    """

    def __init__(self, package: str, setup: dict[str, Any], num_bytes: int, limits: ChildLimits) -> None:
        """`setup` holds the tokenizer, `num_bytes` long. Raises `ModelError` if the package cannot read it."""
        limits = limits._replace(memory_bytes=limits.memory_bytes + TABLE_GROWTH * num_bytes)
        self._child = ChildProcess(Path(__file__).with_name("encoder_worker.py"), (package,), limits)
        self.description = self._child.set_up(setup)
        if "error" in self.description:
            self._child.close()
            raise ModelError(f"the tokenizer cannot be read: {one_line(self.description['error'])}")

    def encode(self, **message: Any) -> list[int]:
        """The ids of a text. Raises `InvalidRequest` if the tokenizer fails on it."""
        answer = self._child.call(message)
        if "error" in answer:
            raise InvalidRequest(f"the model's tokenizer failed on the text: {one_line(answer['error'])}")
        ids: list[int] = answer["ids"]
        return ids

    def close(self) -> None:
        """End the child. May be called twice."""
        self._child.close()
