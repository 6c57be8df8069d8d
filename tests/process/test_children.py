"""Programs that brlite starts: never from the current folder, without keys, and gone when brlite is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from brlite.backends.native.build import find_compiler
from brlite.checkpoint.wheel import pip_download
from brlite.errors import ModelError
from brlite.process.children import ChildGroup, absolute_folders, child_environment, python_module, read_secret
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, free_port, running, wait_until_it_answers
from tests.tiny_models import LLAMA, write_byte_tokenizer, write_model


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a repository with packages and programs of the names that brlite starts."""
    folder = tmp_path / "repository"
    marker = f"open({str(folder / 'was run')!r}, 'w').close()\n"
    for package in ("pip", "brlite", "runpy", "site", "signal"):
        (folder / package).mkdir(parents=True)
        for name in ("__init__.py", "__main__.py"):
            (folder / package / name).write_text(marker)
    for program in ("g++", "c++"):
        (folder / program).write_text(f"#!/bin/sh\ntouch '{folder}/was run'\n")
        (folder / program).chmod(0o755)
    monkeypatch.chdir(folder)
    return folder


def was_run(folder: Path) -> bool:
    return (folder / "was run").exists()


def test_python_itself_would_run_the_folders_code(hostile):
    subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)

    assert was_run(hostile)


@pytest.mark.parametrize("version", [sys.version_info, (3, 10)])
def test_an_installed_module_is_run(version, hostile, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)

    done = subprocess.run([*python_module("pip"), "--version"], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("pip ")
    assert not was_run(hostile)


def test_pip_is_the_installations(hostile, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(ModelError, match="No matching distribution"):
        pip_download("absent==1.0", tmp_path)

    assert not was_run(hostile)


def test_ranks_are_the_installations(hostile):
    from brlite.backends.distributed.processes import start_local

    start_local(2).close()

    assert not was_run(hostile)


def test_no_compiler_of_the_current_folder_is_taken(hostile):
    programs = {"PATH": os.pathsep.join(["", ".", "bin", os.environ["PATH"]])}

    assert find_compiler({**programs, "PATH": f".:{hostile.parent}:{os.environ['PATH']}"})[0] != "./g++"
    assert Path(find_compiler(programs)[0]).is_absolute()
    assert Path(find_compiler(programs)[0]).parent != hostile


def test_relative_folders_are_no_place_to_look_for_programs():
    assert absolute_folders(os.pathsep.join(["", ".", "bin", "/usr/bin", "../x", "/bin"])) == "/usr/bin:/bin"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BRLITE_API_KEY", "k"),
        ("AWS_SECRET_ACCESS_KEY", "k"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("HF_TOKEN", "k"),
        ("HUGGING_FACE_HUB_TOKEN", "k"),
        ("PGPASSWORD", "k"),
        ("MYSQL_PWD", "k"),
        ("GITHUB_PAT", "k"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/k.json"),
        ("DATABASE_URL", "postgres://me:secret@host/db"),
    ],
)
def test_a_child_gets_no_secret(name, value, monkeypatch):
    monkeypatch.setenv(name, value)

    assert name not in child_environment()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HTTPS_PROXY", "http://me:secret@proxy:8080"),
        ("PIP_INDEX_URL", "https://me:secret@index.example/simple"),
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("KEYBOARD", "de"),
        ("OLDPWD", "/home/me"),
        ("HF_HOME", "/data/hf"),
    ],
)
def test_a_child_gets_what_it_needs(name, value, monkeypatch):
    monkeypatch.setenv(name, value)

    assert child_environment()[name] == value


def test_a_variable_that_a_key_was_read_from_is_kept_from_children_whatever_its_name(monkeypatch):
    monkeypatch.setenv("TEAM_A", " k ")

    assert read_secret("TEAM_A") == "k"
    assert "TEAM_A" not in child_environment()


def test_a_rank_starts_without_the_servers_keys(monkeypatch):
    from brlite.backends.distributed.processes import start_local

    monkeypatch.setenv("BRLITE_API_KEY", "k")
    ranks = start_local(2)
    try:
        (member,) = ranks._members
        environment = Path(f"/proc/{member.process.pid}/environ").read_bytes()
    finally:
        ranks.close()

    assert b"BRLITE_API_KEY" not in environment


def children_of(pid: int) -> list[Path]:
    """The folders in /proc of all processes below one."""
    numbers = [
        int(number) for file in Path(f"/proc/{pid}/task").glob("*/children") for number in file.read_text().split()
    ]
    return [folder for number in numbers for folder in (Path(f"/proc/{number}"), *children_of(number))]


def test_no_key_of_a_running_server_is_in_a_command_line_or_a_childs_environment(tmp_path: Path) -> None:
    folder, port = write_model(tmp_path / "model", LLAMA), free_port()
    write_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")  # a child renders it
    (tmp_path / "keys").write_text("sk-secret-file")
    config = tmp_path / "brlite.toml"
    config.write_text(f"""
        [server]
        drain_seconds = 0.5
        [engine]
        device = "cpu"
        [[model]]
        name = "tiny"
        path = "{folder}"
        tensor_parallel = 2
        devices = [0, 1]
        [keys]
        keys = ["sk-secret-config"]
        file = "{tmp_path / "keys"}"
        [[key]]
        name = "team"
        env = "TEAM"
        [[upstream]]
        url = "http://127.0.0.1:1"
        models = ["other"]
        api_key_env = "OTHER"
        """)
    environment = {**os.environ, "BRLITE_API_KEY": "sk-secret-a", "TEAM": "sk-secret-b", "OTHER": "sk-secret-c"}
    command = [BRLITE, "serve", str(config), "--port", str(port), "--log-level", "debug"]

    with running(command, env=environment, stderr=subprocess.PIPE) as server:
        wait_until_it_answers(port)
        children = children_of(server.pid)
        shown = [(folder / "cmdline").read_bytes() for folder in (Path(f"/proc/{server.pid}"), *children)]
        shown += [(folder / "environ").read_bytes() for folder in children]
        server.terminate()
        shown += [server.communicate(timeout=PATIENCE_SECONDS)[1]]

    assert len(children) >= 2  # a rank, and the template's process
    assert any(b"worker" in text for text in shown)
    assert not any(b"sk-secret" in text for text in shown)


STARTER = """
import os, sys, time
from brlite.process.children import ChildGroup, child_environment
with ChildGroup() as group:
    child = "import os, time; os.fork(); os.write(1, b'%d,' % os.getpid()); time.sleep(1000)"
    command = [sys.executable, "-c", child]
    group.start(command, env=child_environment(), stdout=sys.stdout)
    if sys.argv[1] == "waits":
        time.sleep(1000)
    for _ in range(2):
        sys.stdin.readline()
"""


def read_pids(parent: subprocess.Popen[str]) -> list[int]:
    """The ids of the child and of its own child, each with a comma behind it."""
    said = ""
    while said.count(",") < 2:
        letter = parent.stdout.read(1)
        assert letter, "the children have ended"
        said += letter
    return [int(pid) for pid in said.split(",")[:2]]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_until_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_and_their_children_end_with_a_parent_that_is_killed(number):
    parent = subprocess.Popen([sys.executable, "-c", STARTER, "waits"], stdout=subprocess.PIPE, text=True)
    pids = read_pids(parent)

    parent.send_signal(number)
    parent.wait()

    assert wait_until_gone(pids)
    parent.stdout.close()


def test_children_and_their_children_end_with_the_group():
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTER, "ends"], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    pids = read_pids(parent)

    parent.communicate("\n\n", timeout=PATIENCE_SECONDS)

    assert parent.returncode == 0
    assert wait_until_gone(pids)


def test_a_child_that_ends_by_itself_has_its_status():
    with ChildGroup() as group:
        child = group.start([sys.executable, "-c", "raise SystemExit(3)"], env=child_environment())
        assert child.wait(PATIENCE_SECONDS) == 3


def test_streams_that_were_closed_are_open_in_children_too(tmp_path: Path) -> None:
    code = (
        "from brlite.process.streams import open_closed_streams as o; o(); import subprocess; "
        "subprocess.run(['readlink', '/proc/self/fd/2'], stdout=open('found', 'w'))"
    )
    script = f'exec "{sys.executable}" -c "{code}" <&- >&- 2>&-'

    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, timeout=PATIENCE_SECONDS)

    assert (tmp_path / "found").read_text() == "/dev/null\n"


def test_a_childs_status_is_known_though_the_parent_ignored_it() -> None:
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "from brlite.commands import cli; cli.main(['check', '/dev/null']); "
        "sys.exit(subprocess.run(['false']).returncode)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_SECONDS)

    assert done.returncode == 1
