"""Parses command lines. An error is one line that suggests the nearest name, also for other servers' flags."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from brlite.files.quoting import shown

BAD_CHOICE = re.compile(r"argument .*?: invalid choice: '(.*?)'", re.DOTALL)
# Commands of Ollama and others.
OTHER_COMMANDS = {
    **dict.fromkeys(("ls", "list", "ps"), "models"),
    **dict.fromkeys(("start", "api_server"), "serve"),
    "create": "convert",
    "rm": "models rm",
    "show": "models show",
    "help": "--help",
    "version": "--version",
}
# Flags of vLLM, llama.cpp, SGLang and Ollama: our flag, or where it is set, or why it is not needed.
OTHERS = {
    **dict.fromkeys(("-m", "-hf", "-hfr", "--hf-repo", "--model-path", "--tokenizer", "--tokenizer-path"), "--model"),
    **dict.fromkeys(
        ("-c", "--ctx-size", "--max-model-len", "--max_model_len", "--num-ctx", "--context-length"), "--context"
    ),
    **dict.fromkeys(("-t", "--n-threads"), "--threads"),
    **dict.fromkeys(("-n", "--n-predict", "--num-predict", "--max-new-tokens"), "--max-tokens"),
    **dict.fromkeys(("-a", "--served-model-name"), "--alias"),
    **dict.fromkeys(("-sys", "--system-prompt"), "--system"),
    **dict.fromkeys(("--temp",), "--temperature"),
    **dict.fromkeys(("-f", "--file", "-i", "--input-file"), "--input"),
    **dict.fromkeys(("-o", "--output-file"), "--output"),
    **dict.fromkeys(("--allowed-origins", "--cors-origins"), "--cors"),
    **dict.fromkeys(("--served-alias", "--model-alias"), "--alias"),
    **dict.fromkeys(("-hff", "--hf-file"), "it is part of the name: --model organisation/model:FILE"),
    **dict.fromkeys(("--revision",), "it is part of the name: --model organisation/model@REVISION"),
    **dict.fromkeys(("-hft", "--hf-token"), "the variable HF_TOKEN has it"),
    **dict.fromkeys(("--config", "--config-file"), "the config file is given without a flag"),
    **dict.fromkeys(("--prompt",), "prompts are lines of --input FILE, or of standard input"),
    **dict.fromkeys(("-v", "--verbose"), "--log-level debug shows more"),
    **dict.fromkeys(("--download-dir",), "the variable HF_HOME has it"),
    **dict.fromkeys(("--offline",), "the variable HF_HUB_OFFLINE=1 does it"),
    **dict.fromkeys(
        ("-ngl", "--gpu-layers", "--n-gpu-layers", "-mg", "--main-gpu"), "--device takes the whole model to a card"
    ),
    **dict.fromkeys(
        ("--gpu-memory-utilization", "--mem-fraction-static"), "it is engine.gpu_memory_utilization, for cards"
    ),
    **dict.fromkeys(("--swap-space", "--kv-cache-memory-bytes"), "engine.memory_gib of the TOML bounds memory"),
    **dict.fromkeys(
        ("-tp", "--tensor-parallel-size", "--tp-size", "-ts", "--tensor-split"), "it is tensor_parallel of a [[model]]"
    ),
    **dict.fromkeys(("--dtype", "--quantization", "-q"), "it is precision of a [[model]], or engine.dtype"),
    **dict.fromkeys(
        ("--kv-cache-dtype", "-ctk", "-ctv", "--cache-type-k", "--cache-type-v"),
        'precision = "a_bf16_w_int8_kv_int8" of a [[model]] does it',
    ),
    **dict.fromkeys(
        ("--max-num-seqs", "-np", "--parallel", "--max-running-requests"), "it is build_batch of a [[model]]"
    ),
    **dict.fromkeys(
        ("-b", "--batch-size", "-ub", "--ubatch-size", "--max-num-batched-tokens", "--chunked-prefill-size"),
        "it is engine.max_num_batched_tokens",
    ),
    **dict.fromkeys(("--block-size", "--page-size"), "it is engine.block_size"),
    **dict.fromkeys(("--chat-template", "--chat-template-file"), "it is chat_template of a [[model]]"),
    **dict.fromkeys(("--tool-call-parser",), "it is tool_parser of a [[model]]; auto finds it"),
    **dict.fromkeys(
        ("--reasoning-parser", "--reasoning-format"), "it is reasoning_parser of a [[model]]; auto finds it"
    ),
    **dict.fromkeys(("-md", "--model-draft", "--speculative-model", "--speculative-draft-model-path"), "--draft"),
    **dict.fromkeys(("--speculative-config",), "--draft names a draft model; engine.speculation turns guesses off"),
    **dict.fromkeys(("--no-enable-prefix-caching", "--disable-radix-cache"), "it is engine.prefix_caching = false"),
    **dict.fromkeys(
        (
            "--enable-prefix-caching",
            "--enable-chunked-prefill",
            "--enable-auto-tool-choice",
            "--jinja",
            "-fa",
            "--flash-attn",
            "--cont-batching",
            "-cb",
            "--mlock",
            "--no-mmap",
            "--enforce-eager",
        ),
        "leave it out: this is always so, or not needed",
    ),
    **dict.fromkeys(("--trust-remote-code",), "leave it out: no code of a model's folder is ever run"),
    **dict.fromkeys(("--embedding", "--embeddings", "--runner", "--task"), "leave it out: a model serves what it can"),
}
SEVERAL = {"model": "several models are [[model]] tables of a config file (docs/several-models.md)"}


class StoreOnce(argparse.Action):
    """Stores an option's value. An option that is given twice is an error; argparse would silently use the last one."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if option_string is not None:
            if self.dest in parser.given:
                allowed = SEVERAL.get(self.dest, "allowed is once")
                parser.error(f"{option_string} is given twice: {allowed}")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose options may be given once, unless they collect values (`action="append"`).

    Its subcommands report unknown flags themselves, since they have the valid ones.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: set[str] = set()  # the options of this command line so far, for `StoreOnce`
        self.register("action", None, StoreOnce)
        self.register("action", "store", StoreOnce)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.given.clear()
        first = args[0] if args and self._subparsers is not None else ""
        if first.startswith("-") and first.partition("=")[0] not in self._option_string_actions:
            self.error(f"{first}: the COMMAND comes first, as in {self.prog} serve --model NAME")
        # `-hf` would be read as -h and -f.
        words = [word for word in args or () if word in OTHERS and len(word) > 2 and word[1] != "-"]
        if words and self._subparsers is None and words[0] not in self._option_string_actions:
            self.error(f"unknown: {words[0]}{self._hint(words)}")
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unknown: {' '.join(rest)}{self._hint(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and exit with status 2."""
        from difflib import get_close_matches

        if match := BAD_CHOICE.match(message):
            ours = OTHER_COMMANDS.get(match[1], "")
            is_known = ours.startswith("--") or ours.partition(" ")[0] in self._choices()
            near = [ours] if is_known else get_close_matches(match[1], self._choices(), 1)
            names = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(self._choices())}"
            message = f"no such command: {match[1]}; {names}"
        print(shown(f"{self.prog}: error: {message} (see {self.prog} --help)"), file=sys.stderr)
        sys.exit(2)

    def _hint(self, rest: Sequence[str]) -> str:
        from difflib import get_close_matches

        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in (word.partition("=")[0] for word in rest if word.startswith("-")):
            ours = OTHERS.get(word, "")
            if ours and not ours.startswith("--"):
                return f"; {ours}"
            near = [ours.split()[0]] if ours and ours.split()[0] in flags else get_close_matches(word, flags, 1)
            if near:
                return f"; {ours}" if " " in ours else f"; did you mean {near[0]}?"
        return ""

    def _choices(self) -> list[str]:
        return [str(name) for action in self._actions for name in action.choices or ()]
