"""A parser of command lines whose errors are one line with the nearest name, and that knows other servers' flags."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from brlite.files.quoting import shown

BAD_CHOICE = re.compile(r"argument .*?: invalid choice: '(.*?)'", re.DOTALL)
# Flags of vLLM, llama.cpp and Ollama, and ours.
OTHERS = {
    "-m": "--model",
    "-c": "--context",
    "-t": "--threads",
    "--ctx-size": "--context",
    "--max-model-len": "--context",
    "--max_model_len": "--context",
    "--served-model-name": "--alias",
    "--tokenizer": "--model",
    "--hf-repo": "--model",
    "-hf": "--model",
    "--allowed-origins": "--cors",
    "--n-predict": "--max-tokens",
    "--num-ctx": "--context",
}


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose subcommands report their unknown flags themselves, since they know the right ones."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown: {' '.join(rest)}{self._hint(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave with status 2."""
        if match := BAD_CHOICE.match(message):
            near = get_close_matches(match[1], self._choices(), 1)
            names = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(self._choices())}"
            message = f"no such command: {match[1]}; {names}"
        print(shown(f"{self.prog}: error: {message} (see {self.prog} --help)"), file=sys.stderr)
        sys.exit(2)

    def _hint(self, rest: Sequence[str]) -> str:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in (word.partition("=")[0] for word in rest if word.startswith("-")):
            name = OTHERS.get(word)
            near = [name] if name in flags else get_close_matches(word, flags, 1)
            if near:
                return f"; did you mean {near[0]}?"
        return ""

    def _choices(self) -> list[str]:
        return [str(name) for action in self._actions for name in action.choices or ()]
