"""Applies changed config files to a running server, on SIGHUP or when a file has changed: all changes or none.

Upstreams, `[proxy]` and the keys are replaced at once, and running requests continue. Other changes are logged and need
a restart. The `ConfigSource` reads the config.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from brlite.config.diff import Change, diff
from brlite.config.options import Config
from brlite.config.proxy_files import upstream_configs
from brlite.config.warnings import config_warnings
from brlite.errors import BrliteError, ConfigError
from brlite.files.cache import expand_home
from brlite.http.keys import ApiKeys
from brlite.process.waiting import on_daemon_thread, within
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.route_table import RouteTable
from brlite.server.served_model import ModelTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 1.0
STAYS = "the config stays as it was: %s"
FAILURES = (BrliteError, OSError)  # the second for a folder that may not be searched, or a drive that is lost
READ_SECONDS = 15.0  # for all files of a config; one FIFO has 10 s
FORWARDING = ("upstream", "proxy")
LIVE_SECTIONS = (*FORWARDING, "keys", "key")

Stamps = Mapping[Path, "tuple[int, int, int] | None"]


class ConfigSource(NamedTuple):
    """The files of a config, which are watched, and `load`, which reads them again or raises `ConfigError`."""

    files: tuple[Path, ...]
    load: Callable[[], Config]


class Reading(NamedTuple):
    """A newly read config, with everything that had to be read or looked up for it."""

    config: Config
    running: Config  # the old config with the changes that need no restart
    changes: Sequence[Change]
    keys: ApiKeys
    table: RouteTable | None  # None if upstreams and `[proxy]` are unchanged
    new_warnings: Sequence[str]


class FileWatch:
    """Detects files that have changed and are stable: a file that still changes may be incomplete."""

    def __init__(self, stamps: Stamps) -> None:
        self._loaded = self._seen = stamps

    def has_settled(self, now: Stamps) -> bool:
        """Whether the files differ from the loaded ones and have not changed since the last check."""
        is_settled = now != self._loaded and now == self._seen
        self._seen = now
        return is_settled

    def loaded(self, stamps: Stamps) -> None:
        """Set the state of the files at the last reload, also of one that failed. Only a later change is detected."""
        self._loaded = self._seen = stamps


class Reloader:
    """Inside `async with Reloader(…):`, changes of the source are applied; `reload` applies them at once.

    With `terminal`, a SIGHUP that is sent because this terminal was closed acts as a SIGTERM, as for other commands.
    """

    _task: asyncio.Task[None]

    def __init__(
        self,
        source: ConfigSource,
        config: Config,
        keys: ApiKeys,
        forwarder: Forwarder,
        models: ModelTable,
        *,
        terminal: int | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """`config` is the server's current config, from which the keys, the forwarder and the models were made."""
        self.config = config
        self._source = source
        self._keys = keys
        self._forwarder = forwarder
        self._models = models
        self._poll_seconds = poll_seconds
        self._is_asked = asyncio.Event()
        self._terminal = terminal
        self._watch = FileWatch(self._stamps())

    async def __aenter__(self) -> Reloader:
        loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):  # Windows has none: there, only a changed file causes a reload
            loop.add_signal_handler(signal.SIGHUP, self._hangup)
        self._task = loop.create_task(self._follow(), name="brlite-reload")
        return self

    async def __aexit__(self, *error: object) -> None:
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def reload(self) -> None:
        """Read the config again and apply it. If it has any error, the whole old one stays."""
        try:
            self._run_by(self._read())
        except FAILURES as error:
            logger.error(STAYS, error)

    def _read(self) -> Reading:
        """Read the config again. May block on files; changes nothing in the server."""
        new = self._source.load()
        live = {section: getattr(new, section) for section in LIVE_SECTIONS}
        running, changes = msgspec.structs.replace(self.config, **live), diff(self.config, new)
        if not running.model and not upstream_configs(running):
            raise ConfigError("no upstream would be left; serving models of its own in their place needs a restart")
        is_forwarded_otherwise = any(change.section in FORWARDING for change in changes)
        table = RouteTable(running, self._forwarder.table) if is_forwarded_otherwise else None
        warnings = set(config_warnings(self.config))
        new_warnings = [line for line in config_warnings(running) if line not in warnings]
        return Reading(new, running, changes, ApiKeys.from_config(running), table, new_warnings)

    def _run_by(self, reading: Reading) -> None:
        """Apply what was read. Reads no file, since it runs on the loop's thread."""
        running = reading.running
        if reading.table is not None:
            self._forwarder.replace(running, reading.table)
        has_other_keys = self._keys.replace(reading.keys)
        self._models.take_names(running.proxy)
        self.config = running
        for change in reading.changes:
            if change.section in LIVE_SECTIONS:
                logger.info("config: %s", change.text)
            else:
                logger.warning("config: %s (needs a restart)", change.text)
        if has_other_keys:
            logger.info("config: other API keys are accepted now")
        if not reading.changes and not has_other_keys:
            logger.info("config: nothing has changed")
        for line in reading.new_warnings:
            logger.warning("%s", line)

    def _hangup(self) -> None:
        if self._terminal is not None and not os.isatty(self._terminal):
            signal.raise_signal(signal.SIGTERM)  # no request for a reload: the terminal was closed
        else:
            self._is_asked.set()

    async def _follow(self) -> None:
        while True:
            with suppress(asyncio.TimeoutError):
                await within(self._poll_seconds, self._is_asked.wait())
            try:
                before = await self._elsewhere(self._stamps, "the config's files")
                if self._watch.has_settled(before) or self._is_asked.is_set():
                    self._is_asked.clear()
                    try:
                        self._run_by(await self._elsewhere(self._read, "the config"))
                    except FAILURES as error:
                        logger.error(STAYS, error)
                    # The next check finds changes made during the read. The new config may name another keys file.
                    after = await self._elsewhere(self._stamps, "the config's files")
                    self._watch.loaded({path: before.get(path, stamp) for path, stamp in after.items()})
            except ConfigError as error:
                logger.error(STAYS, error)

    async def _elsewhere(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on a thread: a FIFO or a lost drive may block it. Raises `ConfigError` after `READ_SECONDS`."""
        begun = on_daemon_thread(work, "brlite-reload")
        try:
            await asyncio.wait([begun], timeout=READ_SECONDS)
            if not begun.done():
                raise ConfigError(f"{what} could not be read within {READ_SECONDS:g} s")
            return begun.result()
        finally:
            begun.cancel()  # which does nothing if it is done

    def _stamps(self) -> Stamps:
        """Time, size and inode of each file that the config was read from. None for a missing file."""
        files, keys_file = [*self._source.files], self.config.keys.file
        if keys_file is not None:
            with suppress(OSError):  # `~user`, and users cannot be looked up now: reading the config reports it
                files.append(expand_home(keys_file))
        stamps: dict[Path, tuple[int, int, int] | None] = {}
        for path in files:
            try:
                found = path.stat()
                stamps[path] = found.st_mtime_ns, found.st_size, found.st_ino
            except OSError:
                stamps[path] = None
        return stamps


def find_terminal() -> int | None:
    """The descriptor of the terminal that the process was started in. None without one."""
    return next((number for number in range(3) if os.isatty(number)), None)
