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
# Flags of vLLM, llama.cpp, SGLang and Ollama by what to do here: our flag, or where it is set, or why it is not needed.
_FLAGS_BY_HINT = {
    "--model": "-m -hf -hfr --hf-repo --model-path --tokenizer --tokenizer-path",
    "--context": "-c --ctx-size --max-model-len --max_model_len --num-ctx --context-length",
    "--threads": "-t --n-threads",
    "--max-tokens": "-n --n-predict --num-predict --max-new-tokens",
    "--alias": "-a --served-model-name --served-alias --model-alias",
    "--system": "-sys --system-prompt",
    "--temperature": "--temp",
    "--input": "-f --file -i --input-file",
    "--output": "-o --output-file",
    "--cors": "--allowed-origins --cors-origins",
    "--draft": "-md --model-draft --speculative-model --speculative-draft-model-path",
    "--draft names a draft model; engine.speculation turns drafts off": "--speculative-config",
    "it is part of the name: --model organisation/model:FILE": "-hff --hf-file",
    "it is part of the name: --model organisation/model@REVISION": "--revision",
    "the variable HF_TOKEN has it": "-hft --hf-token",
    "the variable HF_HOME has it": "--download-dir",
    "the variable HF_HUB_OFFLINE=1 does it": "--offline",
    "the config file is given without a flag": "--config --config-file",
    "prompts are lines of --input FILE, or of standard input": "--prompt",
    "--log-level debug shows more": "-v --verbose",
    "--device takes the whole model to a card": "-ngl --gpu-layers --n-gpu-layers -mg --main-gpu",
    "it is engine.gpu_memory_utilization, for cards": "--gpu-memory-utilization --mem-fraction-static",
    "engine.memory_gib of the TOML bounds memory": "--swap-space --kv-cache-memory-bytes --models-max",
    "it is tensor_parallel of a [[model]]": (
        "-tp --tensor-parallel-size --tp-size -ts --tensor-split -sm --split-mode"
    ),
    "it is precision of a [[model]], or engine.dtype": "--dtype --quantization -q",
    'precision = "a_bf16_w_int8_kv_int8" of a [[model]] does it': (
        "--kv-cache-dtype -ctk -ctv --cache-type-k --cache-type-v"
    ),
    "it is build_batch of a [[model]]": "--max-num-seqs -np --parallel --max-running-requests",
    "it is idle_unload_seconds of a [[model]]": "--sleep-idle-seconds",
    "it is engine.max_num_batched_tokens": (
        "-b --batch-size -ub --ubatch-size --max-num-batched-tokens --chunked-prefill-size"
    ),
    "it is engine.block_size": "--block-size --page-size",
    "it is limits.max_waiting": "--max-num-queued-reqs --max-queued-requests",
    "it is server.drain_seconds": "--shutdown-timeout",
    "it is chat_template of a [[model]]": "--chat-template --chat-template-file",
    "it is tool_parser of a [[model]]; auto finds it": "--tool-call-parser",
    "it is reasoning_parser of a [[model]]; auto finds it": "--reasoning-parser --reasoning-format",
    "it is engine.prefix_caching = false": "--no-enable-prefix-caching --disable-radix-cache",
    "leave it out: this is always so, or not needed": (
        "--enable-prefix-caching --enable-chunked-prefill --enable-auto-tool-choice --jinja -fa --flash-attn "
        "--cont-batching -cb --mlock --no-mmap --enforce-eager --metrics --scheduling-policy"
    ),
    "leave it out: no code of a model's folder is ever run": "--trust-remote-code",
    "leave it out: a model serves what it can": "--embedding --embeddings --runner --task",
}
OTHERS = {flag: hint for hint, flags in _FLAGS_BY_HINT.items() for flag in flags.split()}
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
