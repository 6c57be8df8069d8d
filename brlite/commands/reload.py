"""Keeps a running server as its config files say: read again on SIGHUP or when one has changed, all or nothing.

Upstreams, `[proxy]` and the keys change while requests run, and those that run stay; what else differs is named in the
log and waits for a restart. How a config is read is the source's affair.
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
from brlite.config.warnings import config_warnings
from brlite.errors import BrliteError, ConfigError
from brlite.http.keys import ApiKeys
from brlite.process.waiting import on_daemon_thread
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.route_table import RouteTable, upstream_configs
from brlite.server.served_model import ModelTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_SECONDS = 1.0
STAYS = "the config stays as it was: %s"
READ_SECONDS = 15.0  # for all files of a config; one FIFO has 10 s
FORWARDING = ("upstream", "proxy")
LIVE_SECTIONS = (*FORWARDING, "keys", "key")

Stamps = Mapping[Path, "tuple[int, int, int] | None"]


class ConfigSource(NamedTuple):
    """Where a config comes from: the files to watch, and what reads them again or raises `ConfigError`."""

    files: tuple[Path, ...]
    load: Callable[[], Config]


class Reading(NamedTuple):
    """A config as its files say now, with all that had to be read or looked up for it."""

    config: Config
    running: Config  # as much of it as can be had without a restart
    changes: Sequence[Change]
    keys: ApiKeys
    table: RouteTable | None  # None where upstreams and `[proxy]` are as they were
    new_warnings: Sequence[str]


class FileWatch:
    """Tells when files have changed and stay as they are: one that changes may not be written to its end yet."""

    def __init__(self, stamps: Stamps) -> None:
        self._loaded = self._seen = stamps

    def has_settled(self, now: Stamps) -> bool:
        """Whether the files are not those that were loaded, but those of the look before."""
        is_settled = now != self._loaded and now == self._seen
        self._seen = now
        return is_settled

    def loaded(self, stamps: Stamps) -> None:
        """This is what was loaded, or could not be."""
        self._loaded = self._seen = stamps


class Reloader:
    """`async with Reloader(…):` follows the source while inside; `reload` does so at once.

    A SIGHUP that comes because the `terminal` was closed, if one is given, is a SIGTERM, as it is for other commands.
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
        """`config` is what the server runs by now, with these keys, this forwarder and these models."""
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
        if hasattr(signal, "SIGHUP"):  # Windows has none; there, a change of the file remains
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
        """Read the config again and run by it. Where there is anything wrong with it, the old one stays, whole."""
        try:
            self._run_by(self._read())
        except BrliteError as error:
            logger.error(STAYS, error)

    def _read(self) -> Reading:
        """May wait for files; changes nothing that runs."""
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
        """Run by what was read. Reads no file, since it runs on the loop's thread."""
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
            signal.raise_signal(signal.SIGTERM)  # nobody asks for a reload: the terminal was closed
        else:
            self._is_asked.set()

    async def _follow(self) -> None:
        watch = self._watch
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_asked.wait(), self._poll_seconds)
            try:
                before = await self._elsewhere(self._stamps, "the config's files")
                if watch.has_settled(before) or self._is_asked.is_set():
                    self._is_asked.clear()
                    try:
                        self._run_by(await self._elsewhere(self._read, "the config"))
                    except BrliteError as error:
                        logger.error(STAYS, error)
                    # What changed while it was read is seen by the next look; another keys file may have been named.
                    after = await self._elsewhere(self._stamps, "the config's files")
                    watch.loaded({path: before.get(path, stamp) for path, stamp in after.items()})
            except ConfigError as error:
                logger.error(STAYS, error)

    async def _elsewhere(self, work: Callable[[], T], what: str) -> T:
        """Do work on another thread: a FIFO or a lost network drive may block it. Raises `ConfigError` if late."""
        begun = on_daemon_thread(work, "brlite-reload")
        try:
            await asyncio.wait([begun], timeout=READ_SECONDS)
            if not begun.done():
                raise ConfigError(f"{what} could not be read within {READ_SECONDS:g} s")
            return begun.result()
        finally:
            begun.cancel()  # which does nothing if it is done

    def _stamps(self) -> Stamps:
        """What tells that a file has changed, for each that the config was read from."""
        keys_file = self.config.keys.file
        stamps: dict[Path, tuple[int, int, int] | None] = {}
        for path in (*self._source.files, *((Path(keys_file),) if keys_file is not None else ())):
            try:
                found = path.stat()
                stamps[path] = found.st_mtime_ns, found.st_size, found.st_ino
            except OSError:
                stamps[path] = None
        return stamps


def find_terminal() -> int | None:
    """The descriptor of the terminal that the process was started in, if it was."""
    return next((number for number in range(3) if os.isatty(number)), None)
