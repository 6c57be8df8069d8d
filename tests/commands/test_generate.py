"""`brlite generate` without a model: how prompts are read, and when and in which order answers are written."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from brlite.commands import generate
from brlite.commands.cli import EXIT_FAILED, main
from brlite.commands.generate import Answers
from brlite.config.options import Config, ModelSpec
from brlite.engine.outputs import CompletionOutput, RequestOutput
from brlite.errors import ConfigError, EngineError, InvalidRequest
from brlite.sampling_params import SamplingParams
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE


def finished(number: int) -> RequestOutput:
    completion = CompletionOutput(index=0, text="x", finish_reason="stop")
    return RequestOutput(
        request_id=str(number), prompt=f"prompt {number}", prompt_token_ids=[1], outputs=[completion], finished=True
    )


def prompts_of(text: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in text.splitlines()]


class FakeLLM:
    """Finishes the prompts in the order of `order`, then raises what is there besides."""

    order: tuple[int | BaseException, ...] = ()
    prompts: tuple[str, ...] = ()

    def __init__(self, *, config: Config) -> None:
        pass

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def get_default_sampling_params(self, **given):
        return SamplingParams(**given)

    def check(self, prompt, params):
        if prompt == "refused":
            raise InvalidRequest("the prompt is not liked")

    def generate(self, prompts, params, *, on_finished):
        type(self).prompts = tuple(prompts)
        for step in self.order:
            if isinstance(step, BaseException):
                raise step
            on_finished(step, finished(step))


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    class Fresh(FakeLLM):
        pass

    monkeypatch.setattr(generate, "LLM", Fresh)
    return Fresh


def test_an_answer_is_written_when_those_before_it_are() -> None:
    file = io.StringIO()
    seen = []

    with Answers(file, lambda: None) as answers:
        for number in (1, 0, 3, 2):
            answers.add(number, finished(number))
            seen.append(len(prompts_of(file.getvalue())))

    assert seen == [0, 2, 2, 4]
    assert prompts_of(file.getvalue()) == [f"prompt {number}" for number in range(4)]


@pytest.mark.parametrize("error", [EngineError("a step failed"), KeyboardInterrupt()])
def test_what_was_finished_before_an_error_is_kept(fake_llm, tmp_path: Path, error: BaseException) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("a\nb\nc\n")
    fake_llm.order = (0, 2, error)

    with pytest.raises(type(error)):
        generate.generate(Config(), str(source), str(target), {})

    assert prompts_of(target.read_text()) == ["a", "c"]


def test_a_full_disk_is_a_line_and_status_1(fake_llm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text("a\nb\n")
    fake_llm.order = (0, 1)

    assert main(["generate", "--input", str(tmp_path / "in"), "--output", "/dev/full"]) == EXIT_FAILED

    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "brlite: error: /dev/full: cannot be written: No space left on device"


def test_only_a_line_feed_ends_a_prompt(fake_llm, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes("one\u2028line\r\n\nnext\u0085too".encode())

    generate.generate(Config(), str(source), str(tmp_path / "out"), {})

    assert fake_llm.prompts == ("one\u2028line", "next\u0085too")


def test_an_endless_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_INPUT_BYTES", 1000)

    with pytest.raises(ConfigError, match="/dev/zero: cannot be read: it is larger than 1000 bytes"):
        generate.read_lines("/dev/zero")


def test_a_refused_prompt_is_named_by_its_line_and_costs_no_earlier_answers(
    fake_llm: type[FakeLLM], tmp_path: Path
) -> None:
    source, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_bytes(b"\xef\xbb\xbffine\n\nrefused\n")
    target.write_text("earlier answers")

    with pytest.raises(ConfigError, match=r"line 3: the prompt is not liked"):
        generate.generate(Config(), str(source), str(target), {})

    assert target.read_text() == "earlier answers"


@pytest.mark.parametrize(
    "line", ['{"prompt": "x", "seed": ' + "9" * 5000 + "}", '{"prompt": ' + "[" * 100_000, "{x"], ids=str.__len__
)
def test_a_line_that_is_no_json_is_named(line: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text(f"fine\n{line}\n")

    with pytest.raises(ConfigError, match="line 2 is not JSON: "):
        generate.generate(Config(), str(source), "-", {})


def test_a_field_that_a_line_has_twice_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}')

    with pytest.raises(ConfigError, match="line 1 is not JSON: '1' is given twice in one object"):
        generate.generate(Config(), str(source), "-", {})


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_answers_are_utf_8_in_any_locale(encoding: str) -> None:
    result = subprocess.run(
        [BRLITE, "generate", "--engine", "toy", "--model", "toy"],
        input="你好 😀\nThe sea\n".encode(),
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )

    assert result.returncode == 0, result.stderr
    assert prompts_of(result.stdout.decode()) == ["你好 😀", "The sea"]


@pytest.mark.model
def test_a_chat_frames_the_prompt_and_the_answer_names_it_as_it_was(smollm2_path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("What is the capital of France?\n")
    config = Config(model=(ModelSpec(name="m", path=str(smollm2_path), build_seq=128, build_batch=1),))
    greedy = {"temperature": 0, "max_tokens": 12}

    generate.generate(config, str(tmp_path / "in"), str(tmp_path / "chat"), greedy, is_chat=True)
    generate.generate(config, str(tmp_path / "in"), str(tmp_path / "plain"), greedy)

    chat, plain = (json.loads((tmp_path / name).read_text()) for name in ("chat", "plain"))
    assert chat["prompt"] == plain["prompt"] == "What is the capital of France?"
    assert "Paris" in chat["outputs"][0]["text"]
    assert chat["outputs"] != plain["outputs"]
