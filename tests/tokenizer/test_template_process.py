"""Templates that would hang, exhaust or crash whoever runs them, and the process that runs them in our stead."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from brlite.chat.template import ChatTemplate
from brlite.errors import EngineError, InvalidRequest, ModelError
from brlite.process.sandbox import FIXED_ENVIRONMENT, ChildLimits

HELLO = [{"role": "user", "content": "hello"}]
LIMITS = ChildLimits(seconds=0.5, memory_bytes=256 * 1024**2)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GUARD = "{% if messages[0].content == 'hello' %}"  # keeps what follows from being run when it is compiled

# What costs too much, and what the caller is told of it.
HOSTILE = {
    "nested loops": (ENDLESS, "CPU time"),
    "a power": ("{{ (messages | length + 8) ** 999999999 }}", "CPU time"),
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "CPU time",
    ),
    "a macro without an end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "lorem ipsum": ("{{ lipsum(n=messages | length * 100000000) }}", "range too big|CPU time|memory"),
    "an indent": ("{{ messages | tojson(indent=400000000) }}", "memory"),
    "doubling": (
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
        "memory|CPU time",
    ),
    "a width from the arguments": ("{{ '%*d' % (messages | length * 2000000000, 1) }}", "memory|too big"),
    "a format's width": ("{{ '{:>2000000000}'.format(messages) }}", "memory|unsupported"),
    "a product": ("{{ messages[0].content * 1000000000 }}", "memory"),
    "a centred word": ("{{ messages[0].content | center(2000000000) }}", "memory"),
    "a list": ("{{ (messages * 1000000000) | length }}", "memory"),
    "joined": ("{{ (range(99999) | list * 99999) | join('a' * 99999) | length }}", "memory|CPU time"),
    "a long number": ("{{ (messages | length + 9) ** 9999 }}", "4300"),
}


def render(template: str, limits: ChildLimits = LIMITS) -> str:
    compiled = ChatTemplate(template, source="here", special_tokens={}, limits=limits)
    try:
        return compiled.render(HELLO, add_generation_prompt=True)
    finally:
        compiled.close()


@pytest.fixture
def template() -> Iterator[ChatTemplate]:
    compiled = ChatTemplate(
        f"{{% if messages[0].content == 'endless' %}}{ENDLESS}{{% endif %}}{{{{ messages[0].content }}}}",
        source="here",
        special_tokens={},
        limits=LIMITS,
    )
    yield compiled
    compiled.close()


def all_children() -> set[int]:
    return {int(line) for path in Path("/proc/self/task").glob("*/children") for line in path.read_text().split()}


@pytest.fixture(autouse=True)
def children() -> Callable[[], set[int]]:
    """The processes that a test has started and that are still there."""
    before = all_children()
    return lambda: all_children() - before


def run_python(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, **options)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_that_takes_too_much_is_a_bad_request(case: str) -> None:
    source, reason = HOSTILE[case]

    with pytest.raises(InvalidRequest, match=reason) as caught:
        render(f"{GUARD}{source}{{% endif %}}")

    assert caught.value.param == "messages"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9 ** 999999999 }}",
        "{{ 'a' * 4000000000 }}",
        "{{ 9 ** 9999 }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
        "{{ '\\ud800' | upper }}{% for %}",
        "{{ a." + "b." * 100_000 + "c }}",
    ],
    ids=["a power", "a product", "a long number", "parentheses", "loops", "conditions", "half a pair", "attributes"],
)
def test_what_a_template_does_when_it_is_compiled_is_bounded_too(source: str) -> None:
    outcome = ""

    try:
        outcome = render(source)
    except (ModelError, InvalidRequest) as error:
        outcome = str(error)

    assert len(outcome) < 700
    assert "\n" not in outcome


def test_the_next_chat_is_rendered_after_one_that_hung(template: ChatTemplate) -> None:
    with pytest.raises(InvalidRequest, match=r"it takes more than 0\.5 s of CPU time"):
        template.render([{"role": "user", "content": "endless"}], add_generation_prompt=True)

    assert template.render(HELLO, add_generation_prompt=True) == "hello"


def test_a_process_that_was_killed_is_replaced(children: Callable[[], set[int]], template: ChatTemplate) -> None:
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    assert template.render(HELLO, add_generation_prompt=True) == "hello"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_chat_whose_process_others_end_is_rendered_by_another(
    number: signal.Signals, children: Callable[[], set[int]], template: ChatTemplate
) -> None:
    (child,) = children()
    os.kill(child, signal.SIGSTOP)  # so that it has the chat, or will have it, and does not answer

    with ThreadPoolExecutor(1) as pool:
        rendered = pool.submit(template.render, HELLO, add_generation_prompt=True)
        os.kill(child, number)
        with suppress(ProcessLookupError):  # it is gone already
            os.kill(child, signal.SIGCONT)

        assert rendered.result(120) == "hello"


def test_a_chat_whose_processes_are_all_ended_by_others_is_no_bad_request(children: Callable[[], set[int]]) -> None:
    source = f"{GUARD}{ENDLESS}{{% endif %}}"
    template = ChatTemplate(source, source="here", special_tokens={}, limits=ChildLimits(seconds=600))

    with ThreadPoolExecutor(1) as pool:
        rendered = pool.submit(template.render, HELLO, add_generation_prompt=True)
        while not rendered.done():
            for child in children():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)

        with pytest.raises(EngineError, match="ended by signal 9, not by brlite"):
            rendered.result(120)
    assert template.render([{"role": "user", "content": "bye"}], add_generation_prompt=True) == ""
    template.close()


def test_one_process_renders_all_chats_of_many_threads(
    children: Callable[[], set[int]], template: ChatTemplate
) -> None:
    texts: list[str] = []

    def work(number: int) -> None:
        for index in range(20):
            content = f"{number}-{index}" * 1000
            text = template.render([{"role": "user", "content": content}], add_generation_prompt=True)
            texts.append(text if text == content else "another's text")

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(texts)) == 160
    assert "another's text" not in texts
    assert len(children()) == 1


def test_closing_ends_the_process_and_the_chat_that_it_renders(children: Callable[[], set[int]]) -> None:
    compiled = ChatTemplate(f"{GUARD}{ENDLESS}{{% endif %}}", source="here", special_tokens={})
    errors: list[str] = []

    def work() -> None:
        try:
            compiled.render(HELLO, add_generation_prompt=True)
        except InvalidRequest as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    compiled.close()
    thread.join()
    compiled.close()

    assert "the model is being closed" in errors[0]
    assert children() == set()
    with pytest.raises(InvalidRequest, match="the model is being closed"):
        compiled.render(HELLO, add_generation_prompt=True)
    assert children() == set()


def test_a_dropped_template_leaves_no_process_behind(children: Callable[[], set[int]]) -> None:
    compiled = ChatTemplate("{{ messages }}", source="here", special_tokens={})
    assert len(children()) == 1

    del compiled
    gc.collect()

    assert children() == set()


def test_a_broken_template_leaves_no_process_behind(children: Callable[[], set[int]]) -> None:
    with pytest.raises(ModelError):
        ChatTemplate("{% for %}", source="here", special_tokens={})

    assert children() == set()


def test_a_message_that_is_no_plain_data_does_not_cost_the_process(
    children: Callable[[], set[int]], template: ChatTemplate
) -> None:
    before = children()

    with pytest.raises(InvalidRequest):
        template.render([{"role": "user", "content": object()}], add_generation_prompt=True)

    assert template.render(HELLO, add_generation_prompt=True) == "hello"
    assert children() == before


START = (
    "import os, sys; from brlite.chat.template import ChatTemplate;"
    "t = ChatTemplate('{{ messages[0].content }}', source='x', special_tokens={});"
    "say = lambda text: t.render([{'role': 'user', 'content': text}], add_generation_prompt=True);"
)


def test_a_forked_child_renders_in_a_process_of_its_own() -> None:
    script = (
        f"{START}\n"
        "pid = os.fork()\n"
        "texts = [say(f'{pid == 0} {i}' * 5000) == f'{pid == 0} {i}' * 5000 for i in range(50)]\n"
        "if pid == 0:\n    t.close(); os._exit(0 if all(texts) else 3)\n"
        "status = os.waitpid(pid, 0)[1]\n"
        "print(all(texts), status, say('still here'))\n"
    )

    result = run_python(script)

    assert result.stdout == "True 0 still here\n"


def test_it_works_where_there_is_no_main_file_and_no_python_is_named() -> None:
    result = run_python(f"import sys; sys.executable = ''; {START} print(say('hello'))")

    assert (result.stdout, result.stderr) == ("hello\n", "")


def test_nothing_of_the_current_folder_or_the_environment_is_used(tmp_path: Path) -> None:
    evil = "import os; os.write(2, b'run'); raise SystemExit"
    for name in ("jinja2", "json", "markupsafe", "resource", "struct", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(evil)
    script = (
        # Our own process is kept from finding them; its children are what is tested.
        f"import sys; sys.path.remove('')\n{START}\nos.environ['PYTHONPATH'] = os.getcwd()\n"
        "t._child._end(); print(say('hello'))\n"
        "child = t._child._process.pid; print(open(f'/proc/{child}/environ').read().replace(chr(0), ' '))\n"
    )

    result = run_python(script, cwd=tmp_path, env={**os.environ, "SECRET_KEY": "sk-1", "TZ": "UTC"})

    assert result.stderr == ""
    assert result.stdout.splitlines()[0] == "hello"
    fixed = {f"{name}={value}" for name, value in FIXED_ENVIRONMENT.items()}
    assert set(result.stdout.splitlines()[1].split()) <= {"TZ=UTC"} | fixed | {
        f"{name}={value}" for name, value in os.environ.items() if name in ("TZDIR", "LD_LIBRARY_PATH")
    }


def test_the_process_ends_with_its_parent_even_where_a_fork_keeps_its_input_open() -> None:
    script = (
        f"{START}\n"
        "print(t._child._process.pid, flush=True)\n"
        "if os.fork() == 0:\n    os.close(1); sys.stdin.read(); os._exit(0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None

    child = int(process.stdout.readline())
    process.wait()
    deadline = time.monotonic() + 120
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)

    assert not is_running(child)
    process.stdin.close()
    process.stdout.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_well_behaved_templates_share_one_process_for_all_their_chats(
    children: Callable[[], set[int]], template: ChatTemplate
) -> None:
    before = children()

    texts = [template.render([{"role": "user", "content": "x" * n}], add_generation_prompt=True) for n in range(200)]

    assert list(map(len, texts)) == list(range(200))
    assert children() == before
