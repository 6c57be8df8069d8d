"""A running server follows its config files: all or nothing, on SIGHUP or by itself, and says what has changed."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import pty
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from brlite.commands.reload import ConfigSource, FileWatch, Reloader
from brlite.config.load import load_config
from brlite.config.options import Config
from brlite.errors import ConfigError, ModelNotFound, Unauthorized
from brlite.files.cache import expand_home
from brlite.http.keys import ApiKeys
from brlite.proxy.forwarder import Forwarder
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS

QUICK = 0.01
NEVER = 1e6
ONE = '[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = ["a"]\nhealth_path = ""\n'
TWO = ONE + '[[upstream]]\nurl = "http://127.0.0.1:2"\nmodels = ["b"]\nhealth_path = ""\n'


class Running:
    """What a server holds that a reload changes, and the file it came from."""

    def __init__(self, path: Path, text: str, poll_seconds: float) -> None:
        self.path = path
        path.write_text(text)
        config = load_config(path)
        self.keys = ApiKeys.from_config(config)
        self.forwarder = Forwarder(config)
        self.table = ModelTable([ServedModel(spec) for spec in config.model], config.proxy)
        source = ConfigSource((path,), lambda: load_config(path))
        parts = (self.keys, self.forwarder, self.table)
        self.reloader = Reloader(source, config, *parts, poll_seconds=poll_seconds)

    @property
    def config(self) -> Config:
        return self.reloader.config

    @property
    def models(self) -> list[str]:
        return [name for name, _ in self.forwarder.table.names()]

    def reload(self, text: str) -> None:
        self.path.write_text(text)
        self.reloader.reload()


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Running]]:
    """`start(text)` is a server with this config whose file is not watched."""
    monkeypatch.delenv("BRLITE_API_KEY", raising=False)
    made: list[Running] = []

    def make(text: str = ONE, poll_seconds: float = NEVER) -> Running:
        made.append(Running(tmp_path / "brlite.toml", text, poll_seconds))
        return made[-1]

    yield make
    for running in made:
        await running.forwarder.__aexit__()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """`log()` gives the lines so far."""
    caplog.set_level(logging.INFO, logger="brlite.commands.reload")
    return lambda: [record.getMessage() for record in caplog.records]


async def test_a_new_upstream_gets_requests_and_the_old_one_stays_what_it_was(start, log) -> None:
    running = start()
    (kept,) = running.forwarder.table.upstreams

    running.reload(TWO)

    assert running.models == ["a", "b"]
    assert running.forwarder.table.upstreams[0] is kept
    assert log() == [
        'config: + upstream http://127.0.0.1:2: url = "http://127.0.0.1:2", models = ["b"]',
        'upstream http://127.0.0.1:2: health_path = "": no health checks; only failed requests show that it is down',
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server", "not valid TOML"),
        (TWO + "[proxy]\nmax_queued = -1", "proxy.max_queued = -1: allowed is "),
        (TWO + '[[key]]\nname = "team"\nenv = "NOBODY_SET_THIS"', "NOBODY_SET_THIS"),
        (TWO + '[keys]\nfile = "/proc/absent/keys"', "/proc/absent/keys"),
        (TWO + 'api_key_env = "NOBODY_SET_THIS"', "NOBODY_SET_THIS"),
        (TWO.replace("http:", "https:") + 'ca_file = "/proc/absent/ca.pem"', "/proc/absent/ca.pem"),
        ("", "no upstream would be left"),
    ],
)
async def test_a_config_with_anything_wrong_changes_nothing(start, log, text: str, reason: str) -> None:
    running = start()
    config, table = running.config, running.forwarder.table

    running.reload(text)

    assert running.config is config
    assert running.forwarder.table is table
    assert running.keys.is_open
    (line,) = log()
    assert line.startswith("the config stays as it was: ")
    assert reason in line


async def test_a_file_that_cannot_be_looked_at_changes_nothing_and_is_followed_on(start, log, eventually) -> None:
    running = start(poll_seconds=QUICK)
    read = running.reloader._source.load
    failures = [OSError(errno.ESTALE, "Stale file handle", str(running.path))]

    def load() -> Config:
        if failures:
            raise failures.pop()
        return read()

    running.reloader._source = running.reloader._source._replace(load=load)
    async with running.reloader:
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: not failures)
        running.path.write_text(TWO)
        await eventually(lambda: running.models == ["a", "b"])

    assert log()[0].startswith("the config stays as it was: [Errno")


async def test_a_home_that_cannot_be_looked_up_for_a_while_ends_no_following(
    start, log, eventually, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text("sk-one\n")
    running = start(ONE + '[keys]\nfile = "~/keys"\n', poll_seconds=QUICK)
    failures = [OSError(errno.ENOENT, "Could not determine home directory", "~/keys")] * 5

    def look_up(path: str) -> Path:
        if failures:
            raise failures.pop()
        return expand_home(path)

    monkeypatch.setattr("brlite.commands.reload.expand_home", look_up)
    async with running.reloader:
        await eventually(lambda: not failures)
        running.path.write_text(TWO)
        await eventually(lambda: running.models == ["a", "b"])


async def test_keys_change_and_are_not_shown(start, log) -> None:
    running = start(ONE + '[[key]]\nname = "team"\nkey = "sk-old"\n')
    team = running.keys.require("sk-old")

    running.reload(ONE + '[[key]]\nname = "team"\nkey = "sk-new"\nmax_concurrent = 2\n')

    assert running.keys.require("sk-new") is team
    with pytest.raises(Unauthorized):
        running.keys.require("sk-old")
    assert log() == [
        "config: key team.key: another one",
        "config: key team.max_concurrent: 0 -> 2",
        "config: other API keys are accepted now",
    ]


async def test_keys_of_a_file_are_read_again(start, log, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1\n")
    running = start(f'{ONE}[keys]\nfile = "{tmp_path / "keys"}"\n')

    (tmp_path / "keys").write_text("sk-2\n")
    running.reloader.reload()

    assert running.keys.find("sk-1") is None
    assert running.keys.find("sk-2") is not None
    assert log() == ["config: other API keys are accepted now"]


async def test_what_needs_a_restart_is_named_and_stays(start, log) -> None:
    running = start()

    running.reload(TWO + "[server]\nport = 9\n[limits]\nmax_n = 2\n")

    assert running.models == ["a", "b"]
    assert (running.config.server.port, running.config.limits.max_n) == (8000, 128)
    assert [line for line in log() if line.endswith("(needs a restart)")] == [
        "config: server.port: 8000 -> 9 (needs a restart)",
        "config: limits.max_n: 128 -> 2 (needs a restart)",
    ]


async def test_a_model_of_its_own_is_still_served_here_until_the_restart(start) -> None:
    running = start(f'[[model]]\nname = "here"\n{ONE}')

    running.reload(TWO.replace('"b"', '"here", "b"'))

    assert running.models == ["a", "b"]
    assert [spec.name for spec in running.config.model] == ["here"]


async def test_an_alias_of_a_model_of_its_own_comes_and_goes(start) -> None:
    running = start('[[model]]\nname = "here"\n')

    running.reload('[[model]]\nname = "here"\n[proxy.aliases]\nshort = "here"\n')
    found = running.table.find("short").name
    running.reload('[[model]]\nname = "here"\n')

    assert found == "here"
    with pytest.raises(ModelNotFound):
        running.table.find("short")


async def test_upstreams_may_come_to_a_server_that_had_none_and_go_again(start) -> None:
    running = start("")

    running.reload(f"[[model]]\n{ONE}")
    came = running.models
    running.reload("")

    assert (came, running.models) == (["a"], [])


async def test_nothing_new_is_said_too(start, log) -> None:
    running = start()
    table = running.forwarder.table

    running.reload(f"{ONE}# a comment\n")

    assert log() == ["config: nothing has changed"]
    assert running.forwarder.table is table


async def test_sighup_reloads_at_once(start, eventually: Eventually) -> None:
    running = start()

    async with running.reloader:
        running.path.write_text(TWO)
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: running.models == ["a", "b"])

    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize("num_turns", range(8))
async def test_leaving_is_not_lost_when_a_signal_comes_just_before(start, num_turns: int) -> None:
    running = start()
    await running.reloader.__aenter__()
    await asyncio.sleep(QUICK)

    os.kill(os.getpid(), signal.SIGHUP)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    _, still_open = await asyncio.wait([asyncio.create_task(running.reloader.__aexit__())], timeout=PATIENCE_SECONDS)

    assert not still_open


async def test_a_file_that_changes_is_read_without_being_asked(start, log, eventually: Eventually) -> None:
    running = start(poll_seconds=QUICK)

    async with running.reloader:
        running.path.write_text(TWO)
        await eventually(lambda: running.models == ["a", "b"])
        running.path.unlink()
        await eventually(lambda: "cannot be read" in log()[-1])
        running.path.write_text(ONE)
        await eventually(lambda: running.models == ["a"])


async def test_a_keys_file_is_watched_from_when_it_is_named(start, tmp_path: Path, eventually: Eventually) -> None:
    running = start(poll_seconds=QUICK)
    keys = tmp_path / "keys"

    async with running.reloader:
        keys.write_text("sk-1\n")
        running.path.write_text(f'{ONE}[keys]\nfile = "{keys}"\n')
        await eventually(lambda: running.keys.find("sk-1") is not None)
        keys.write_text("sk-long-2\n")
        await eventually(lambda: running.keys.find("sk-long-2") is not None)


def test_a_file_is_left_alone_while_it_is_written() -> None:
    path = Path("brlite.toml")
    looks = [(1, 5, 9), (1, 5, 9), (2, 0, 9), (3, 7, 9), (3, 7, 9), (3, 7, 9)]

    watch = FileWatch({path: looks[0]})
    settled = [watch.has_settled({path: look}) for look in looks]

    assert settled == [False, False, False, False, True, True]


def test_a_file_that_was_loaded_is_left_alone_until_it_changes_again() -> None:
    path = Path("brlite.toml")
    watch = FileWatch({path: (1, 5, 9)})

    watch.loaded({path: None})

    assert [watch.has_settled({path: look}) for look in (None, None, (2, 5, 8), (2, 5, 8))] == [
        False,
        False,
        False,
        True,
    ]


async def test_a_closed_terminal_ends_the_server_in_place_of_a_reload(start, log, eventually: Eventually) -> None:
    main, terminal = pty.openpty()
    running = start()
    stopped: list[int] = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.append, 1)

    try:
        async with Reloader(
            ConfigSource((), Config),
            running.config,
            running.keys,
            running.forwarder,
            running.table,
            terminal=terminal,
        ):
            os.close(main)
            os.kill(os.getpid(), signal.SIGHUP)
            await eventually(lambda: bool(stopped))
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        os.close(terminal)

    assert log() == []


async def test_a_config_that_waits_for_a_writer_keeps_nobody(tmp_path: Path, eventually, caplog) -> None:
    path = tmp_path / "slow.toml"
    path.write_text('[[upstream]]\nurl = "http://127.0.0.1:9"\nmodels = ["a"]\n')
    has_begun, may_end = threading.Event(), threading.Event()

    def load() -> Config:
        has_begun.set()
        may_end.wait(PATIENCE_SECONDS)  # as an open() of a FIFO does
        raise ConfigError("it never came")

    config = load_config(path)
    models = ModelTable([], config.proxy)
    async with Forwarder(config) as forwarder:
        source = ConfigSource((path,), load)
        async with Reloader(source, config, ApiKeys(), forwarder, models, poll_seconds=0.01):
            os.kill(os.getpid(), signal.SIGHUP)
            assert await asyncio.to_thread(has_begun.wait, PATIENCE_SECONDS)  # the loop goes on meanwhile
    may_end.set()

    assert "Traceback" not in caplog.text
