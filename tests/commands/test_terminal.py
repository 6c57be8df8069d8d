"""`brlite chat` at a pseudo-terminal, with the toy, which repeats: what is typed, stopped, saved and shown."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers

SIZE = (24, 100, 0, 0)
CTRL_C, CTRL_D, ENTER, UP, LEFT = "\x03", "\x04", "\r", "\x1b[A", "\x1b[D"
PASTE_BEGIN, PASTE_END = "\x1b[200~", "\x1b[201~"
PASTE_OFF = "\x1b[?2004l"  # which prompt_toolkit writes last when a line is entered
PROMPT = ">"  # and then the cursor is moved
PROMPT_END = "\x02"  # stands for PASTE_OFF
STEERING = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])|\r")


class Terminal:
    """A command at a terminal of its own. `until` waits for text, from where the last call stopped."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._rest = ""
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def until(self, text: str) -> str:
        """What was shown up to `text`, without what moves the cursor."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in self._rest:
            ready, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} never came: {self._rest!r}"
            data = os.read(self._descriptor, 4096).decode(errors="replace")
            self.seen += data
            self._rest = STEERING.sub("", (self._rest + data).replace(PASTE_OFF, PROMPT_END))
        before, _, self._rest = self._rest.partition(text)
        return before

    def close(self) -> None:
        """Close the window. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def status(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


@contextmanager
def at_terminal(
    command: list[str], *, env: dict[str, str], stdout: IO[bytes] | None = None, stderr: IO[bytes] | None = None
) -> Iterator[Terminal]:
    """A command at a terminal that it controls."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE))
    with running(
        command,
        stdin=theirs,
        stdout=stdout or theirs,
        stderr=stderr or theirs,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(theirs)
        terminal = Terminal(process, ours)
        yield terminal
    terminal.close()


@contextmanager
def chatting(*options: str, stdout: IO[bytes] | None = None, engine: tuple[str, ...] = TOY) -> Iterator[Terminal]:
    """`brlite chat` at a terminal, once it shows its prompt."""
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    with at_terminal([BRLITE, "chat", *engine, *options], env=environment, stdout=stdout) as terminal:
        terminal.until("/help shows the commands")
        terminal.until(PROMPT)
        yield terminal


def saved(terminal: Terminal, folder: Path) -> list[tuple[str, str]]:
    """Role and content of what was said so far."""
    terminal.type(f"/save {folder / 'saved.json'}{ENTER}")
    terminal.until("messages are in")
    terminal.until(PROMPT)  # before it Ctrl-D would be the terminal's own, not the program's
    messages = json.loads((folder / "saved.json").read_text())["messages"]
    return [(message["role"], message["content"]) for message in messages]


def questions(terminal: Terminal, folder: Path) -> list[str]:
    return [content for role, content in saved(terminal, folder) if role == "user"]


def test_generate_at_a_terminal_says_that_it_reads_prompts_from_there() -> None:
    with at_terminal([BRLITE, "generate", *TOY, "--max-tokens", "2"], env=dict(os.environ)) as terminal:
        terminal.until("reading prompts from the terminal, one a line; Ctrl-D ends them")
        terminal.type(f"The sea{ENTER}")
        terminal.type(CTRL_D)
        terminal.until('{"prompt": "The sea"')

        assert terminal.status() == 0


def test_ctrl_c_at_the_prompt_leaves_at_once() -> None:
    with chatting() as terminal:
        terminal.type(f"half a question{CTRL_C}")

        assert terminal.status() == 130
    assert "Traceback" not in terminal.seen


def test_an_interrupt_from_outside_leaves_at_once() -> None:
    with chatting() as terminal:
        terminal.process.send_signal(signal.SIGINT)

        assert terminal.status() == 130
    assert "Traceback" not in terminal.seen


def test_ctrl_c_during_an_answer_stops_the_answer_only(tmp_path: Path) -> None:
    with chatting("--engine-option", "tokens_per_second=2") as terminal:
        terminal.type(f"abcdefghijklmnopqrstuvwxyz{ENTER}")
        terminal.until(PROMPT_END)  # what is typed is shown, maybe several times, until here
        terminal.until("a")  # so this is the answer's, and an interrupt is the answer's too
        terminal.type(CTRL_C)
        terminal.until("[stopped]")
        terminal.until(PROMPT)

        said = saved(terminal, tmp_path)
        terminal.type(CTRL_D)

        assert terminal.status() == 0
    assert [role for role, _ in said] == ["user", "assistant"]
    assert len(said[1][1]) < 20


def test_a_line_can_be_edited_and_the_last_one_comes_back(tmp_path: Path) -> None:
    with chatting() as terminal:
        terminal.type(f"helo{LEFT}l{ENTER}")
        terminal.until("tokens")
        terminal.until(PROMPT)
        terminal.type(f"{UP}!{ENTER}")
        terminal.until("tokens")
        terminal.until(PROMPT)

        assert questions(terminal, tmp_path) == ["hello", "hello!"]


def test_pasted_lines_are_one_question_and_an_empty_one_asks_nothing(tmp_path: Path) -> None:
    with chatting() as terminal:
        terminal.type(f"{PASTE_BEGIN}first\rsecond 你好{PASTE_END}{ENTER}")
        terminal.until("tokens")
        terminal.until(PROMPT)
        terminal.type(f"{ENTER}  {ENTER}")

        assert questions(terminal, tmp_path) == ["first\nsecond 你好"]


def test_a_redirected_answer_holds_neither_prompt_nor_numbers(tmp_path: Path) -> None:
    with (tmp_path / "answers").open("wb") as file, chatting(stdout=file) as terminal:
        terminal.type(f"hello{ENTER}")
        terminal.until("tokens")
        terminal.until(PROMPT)
        terminal.type(CTRL_D)

        assert terminal.status() == 0
    answers = (tmp_path / "answers").read_text()
    assert "hello" in answers
    assert not {">", "[", "\x1b"} & set(answers)


def test_the_commands_change_what_is_asked_with(tmp_path: Path) -> None:
    with chatting("--system", "be brief") as terminal:
        for line, answer in [
            ("/sytem x", "did you mean /system?"),
            ("/system", "be brief"),
            ("/system be kind", "the system message is set"),
            ("/set temperatur 1", "did you mean temperature?"),
            ("/set temperature -1", "temperature must be"),
            ("/set max_tokens 4", "max_tokens is 4"),
            ("hello there", "4 tokens"),
            ("/retry", "4 tokens"),
            ("/load nowhere.json", "nowhere.json: cannot be read"),
        ]:
            terminal.type(line + ENTER)
            terminal.until(answer)
            terminal.until(PROMPT)

        said = saved(terminal, tmp_path)
        terminal.type(f"/clear{ENTER}")
        terminal.until("forgotten")
        assert saved(terminal, tmp_path) == [("system", "be kind")]
        terminal.type(f"/exit{ENTER}")

        assert terminal.status() == 0
    assert [role for role, _ in said] == ["system", "user", "assistant"]
    assert said[1] == ("user", "hello there")


def test_a_saved_conversation_is_continued(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text(json.dumps({"messages": [{"role": "user", "content": "before"}]}))
    with chatting() as terminal:
        terminal.type(f"/load {tmp_path / 'before.json'}{ENTER}")
        terminal.until("1 messages are loaded")

        assert questions(terminal, tmp_path) == ["before"]


def test_a_server_is_found_without_its_scheme_and_tells_its_tokens() -> None:
    port = free_port()
    with running([BRLITE, "serve", *TOY, "--port", str(port)], stderr=subprocess.DEVNULL):
        wait_until_it_answers(port)

        with chatting(engine=("--url", f"localhost:{port}")) as terminal:
            terminal.type(f"/set max_tokens 3{ENTER}")
            terminal.until("max_tokens is 3")
            terminal.type(f"hello there{ENTER}")

            terminal.until("[3 tokens: the first after ")


@pytest.mark.parametrize("ignores_hangup", [False, True])
def test_a_terminal_that_is_closed_ends_the_chat_without_a_word(tmp_path: Path, *, ignores_hangup: bool) -> None:
    command = [BRLITE, "chat", *TOY]
    if ignores_hangup:
        command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]
    log = tmp_path / "log"
    with log.open("wb") as stderr, at_terminal(command, env=dict(os.environ), stderr=stderr) as terminal:
        terminal.until(PROMPT)
        before = log.read_text()

        terminal.close()

        assert terminal.status() == (0 if ignores_hangup else 128 + signal.SIGHUP)
    assert log.read_text() == before
