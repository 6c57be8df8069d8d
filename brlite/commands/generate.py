"""`brlite generate`: completes the prompts of a file and writes JSON lines, in the file's order. Starts no server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from brlite.commands.given_config import ask_for, given_config, given_sampling
from brlite.config.options import Config
from brlite.engine.outputs import RequestOutput
from brlite.errors import ConfigError, InvalidRequest
from brlite.files.text_file import TextError, decode_text, unique_fields
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams

MAX_INPUT_BYTES = 2**30  # all of the prompts are held until they are answered


def run(args: argparse.Namespace) -> int:
    config = given_config(args)
    return generate(config, args.input, args.output, given_sampling(args), is_chat=args.chat)


def generate(config: Config, source: str, target: str, given: Mapping[str, Any], *, is_chat: bool = False) -> int:
    """Complete every prompt of `source` into `target`; "-" is standard input or output. Returns the exit status.

    A line is a prompt, or a JSON object with `prompt` and any sampling fields. Other fields have the values of `given`,
    else the model's defaults. With `is_chat` a prompt becomes a user's message in the model's chat template.
    """
    jobs = [_job(line, number, given) for number, line in read_lines(source)]
    with LLM(config=config) as llm:
        params = [llm.get_default_sampling_params(**job.given) for job in jobs]
        prompts: list[str | list[int]] = []
        for job, each in zip(jobs, params, strict=True):  # before the target is opened: an error keeps its content
            try:
                message = {"role": "user", "content": job.prompt}
                prompts.append(llm.tokenizer.encode_chat([message]) if is_chat else job.prompt)
                llm.check(prompts[-1], each)
            except InvalidRequest as error:
                raise ConfigError(f"line {job.line}: {error}") from None
        bar = tqdm(total=len(jobs), disable=None, unit="prompt")
        with _opened(target) as file, bar, Answers(file, bar.update) as answers:

            def add(number: int, output: RequestOutput) -> None:
                output.prompt = jobs[number].prompt  # without the chat template
                answers.add(number, output)

            llm.generate(prompts, params, on_finished=add)
    return 0


class PromptJob(NamedTuple):
    """A line of the source: its number from 1, its prompt and the sampling parameters that were given for it."""

    line: int
    prompt: str
    given: Mapping[str, Any]


class Answers:
    """Writes answers in the order of their prompts. On exit, also after an error, it writes those still held."""

    def __init__(self, file: TextIO, on_written: Callable[[], object]) -> None:
        self._file = file
        self._on_written = on_written
        self._held: dict[int, str] = {}
        self._next = 0

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None:
        for number in sorted(self._held):
            self._write(number)

    def add(self, number: int, output: RequestOutput) -> None:
        outputs = [{"text": each.text, "finish_reason": each.finish_reason} for each in output.outputs]
        answer: dict[str, object] = {"prompt": output.prompt, "outputs": outputs}
        if output.warnings:
            answer["warnings"] = output.warnings
        self._held[number] = json.dumps(answer, ensure_ascii=False)
        while self._next in self._held:
            self._write(self._next)
            self._next += 1

    def _write(self, number: int) -> None:
        self._file.write(self._held.pop(number) + "\n")
        self._file.flush()
        self._on_written()


def read_lines(source: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1. Raises `ConfigError` if they cannot be read."""
    if source == "-":
        ask_for("prompts")
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as stream:
            data = stream.read(MAX_INPUT_BYTES + 1)
        if len(data) > MAX_INPUT_BYTES:
            raise TextError(f"it is larger than {MAX_INPUT_BYTES} bytes")
        text = decode_text(data)
    except (OSError, TextError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{'standard input' if source == '-' else source}: cannot be read: {reason}") from None
    # Not splitlines(), which also splits at U+2028 and similar characters.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _job(line: str, number: int, given: Mapping[str, Any]) -> PromptJob:
    """The prompt and parameters of a line. Raises `ConfigError` that names the line."""
    if not line.lstrip().startswith("{"):
        return PromptJob(number, line, given)
    try:
        fields: dict[str, Any] = json.loads(line, object_pairs_hook=unique_fields)
        prompt = fields.pop("prompt")
        if not isinstance(prompt, str):
            raise InvalidRequest("prompt must be a string")
        SamplingParams(**{**given, **fields})  # raises for what is out of range, before a model is loaded
        return PromptJob(number, prompt, {**given, **fields})
    except KeyError:
        raise ConfigError(f"line {number} has no prompt") from None
    except (TypeError, InvalidRequest) as error:
        raise ConfigError(f"line {number}: {error}") from None
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
        raise ConfigError(f"line {number} is not JSON: {error}") from None


@contextmanager
def _opened(target: str) -> Iterator[TextIO]:
    try:
        if target == "-":
            yield sys.stdout
        else:
            with Path(target).open("w", encoding="utf-8") as file:
                yield file
    except BrokenPipeError:
        raise  # the reader closed the pipe: no error
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from error
