"""`brlite bench`: a load on a real server, and its figures. `brlite completion`: what shells make of it."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from brlite.commands.bench import TimedAnswer, percentile, summarize
from brlite.commands.cli import main
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers


def test_a_short_load_is_answered_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    load = ["--requests", "5", "--concurrency", "2", "--prompt-words", "4", "--max-tokens", "6", "--json"]
    with running([BRLITE, "serve", *TOY, "--port", str(port)], stderr=subprocess.DEVNULL):
        wait_until_it_answers(port)

        assert main(["bench", "--url", f"localhost:{port}", *load]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["requests"] == 5
    assert report["tokens"] == 5 * 6
    assert report["first token ms, median"] > 0


def test_the_figures_are_those_of_the_answers() -> None:
    report = summarize([TimedAnswer(0.0, 0.1, 1.1, 11), TimedAnswer(0.0, 0.3, 0.3, 1)], 2.0)

    assert report["tokens/s"] == 6.0
    assert report["first token ms, median"] == 100.0
    assert report["first token ms, 95 %"] == 300.0
    assert report["next token ms, median"] == 100.0
    assert percentile([], 50) == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--requests", "0"], "--requests 0: allowed is 1 to 100000"),
        (["--url", "localhost:9"], "no model could be found"),
    ],
)
def test_a_load_that_cannot_be_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2

    assert said in (printed := capsys.readouterr().err)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_of_a_shell_is_code_that_it_reads(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0

    code = capsys.readouterr().out
    assert "--model" in code
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=code, text=True, check=True)


def test_bash_completes_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    if (bash := shutil.which("bash")) is None:
        pytest.skip("there is no bash")
    main(["completion", "bash"])
    code = capsys.readouterr().out
    ask = 'COMP_WORDS=(brlite serve --mod); COMP_CWORD=2; _shtab_brlite; echo "${COMPREPLY[@]}"'

    completed = subprocess.run([bash, "-c", f"{code}\n{ask}"], capture_output=True, text=True, check=True)

    assert "--model" in completed.stdout
