"""The other ranks of a model, for rank 0: processes that it starts here, or that `torchrun` has started.

Starts and ends ranks and detects lost ones; computes nothing. The end of a rank's process closes its channel, which
rank 0 sees within milliseconds. The end of rank 0 closes all channels, and so ends all other ranks.
"""

from __future__ import annotations

import logging
import math
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from brlite.backends.distributed.messages import Channel, ChannelClosed, Failed, Joined, Loaded, Message, Stop, frame
from brlite.errors import BackendLost, ConfigError, EngineError
from brlite.process.children import child_environment, python_module

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
OnLost = Callable[[BackendLost], None]

STOP_SECONDS = 5.0  # for a rank to exit before it is killed
CAUSE_SECONDS = 5.0  # to wait for the first cause, after a rank ended because another one was lost


@dataclass(frozen=True)
class Member:
    """Another rank. `process` is None if `torchrun` has started it."""

    rank: int
    channel: Channel
    process: subprocess.Popen[bytes] | None = None

    def describe_end(self) -> str:
        """Describe how a rank ended whose channel is closed."""
        if self.process is None:
            return f"rank {self.rank} is gone"
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return f"rank {self.rank} closed its channel"
        return f"rank {self.rank} died of signal {-status}" if status < 0 else f"rank {self.rank} ended ({status})"


class Ranks:
    """Rank 0's connections to the other ranks. Only the callback of `watch` runs on another thread."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        self._watching: _Watch | None = None

    def send_each(self, message_for: Callable[[int], Message]) -> None:
        """Send each rank its own message. Raises `ChannelClosed` if a rank is gone."""
        for member in self._members:
            member.channel.send(message_for(member.rank))

    def send(self, message: Message) -> None:
        """Send all ranks the same message, encoded once. Raises `ChannelClosed` if a rank is gone."""
        data = frame(message)
        for member in self._members:
            member.channel.send_frame(data)

    def receive(self, kind: type[M]) -> list[M]:
        """Receive one message of this kind from each rank. Raises a rank's error, or `BackendLost` if a rank ended."""
        return [self._receive(member, kind) for member in self._members]

    def find_loss(self, beside: Member | None = None) -> BackendLost | ConfigError | None:
        """During loading: why a rank other than `beside` ends within `CAUSE_SECONDS`. None if none does."""
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                if member is not beside:
                    selector.register(member.channel.stream, selectors.EVENT_READ, member)
            return _wait_for_loss(selector, CAUSE_SECONDS)

    def watch(self, on_lost: OnLost) -> None:
        """Call `on_lost` once, on another thread, when a rank ends. After this call ranks send only `Failed`.

        If other ranks end because of the first, it gets the first one's reason.
        """
        self._watching = _Watch(self._members, on_lost)

    def kill(self) -> None:
        """Kill all ranks. Any thread may call it. `close` must still be called."""
        for member in self._members:
            if member.process is not None:
                member.process.kill()
            member.channel.shut()

    def close(self, *, at_once: bool = False) -> None:
        """End all ranks by a `Stop`, and kill those that take too long, or all if `at_once`. May be called twice."""
        if self._watching is not None:
            self._watching.stop()
        if at_once:
            self.kill()
        for member in self._members:
            with suppress(ChannelClosed):  # it is gone
                member.channel.send(Stop())
        for member in self._members:
            if member.process is not None:
                try:
                    member.process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    member.process.kill()
                    member.process.wait()
            member.channel.close()

    def _receive(self, member: Member, kind: type[M]) -> M:
        try:
            message = member.channel.receive()
        except ChannelClosed as error:
            raise BackendLost(f"{member.describe_end()} while it was loading") from error
        if isinstance(message, kind):
            return message
        loss = _loss_of(member, message)
        if isinstance(message, Failed) and message.is_consequence:
            loss = self.find_loss(beside=member) or loss
        raise loss


class _Watch:
    """A thread that waits for the first rank to end."""

    def __init__(self, members: Sequence[Member], on_lost: OnLost) -> None:
        self._on_lost = on_lost
        self._wake, wait = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(wait, selectors.EVENT_READ, None)
        self._wait = wait
        for member in members:
            self._selector.register(member.channel.stream, selectors.EVENT_READ, member)
        self._thread = threading.Thread(target=self._run, name="brlite-ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. May be called twice, and by `on_lost`."""
        self._wake.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            loss = _wait_for_loss(self._selector)
            if loss is not None:
                self._on_lost(loss if isinstance(loss, BackendLost) else BackendLost(str(loss)))
        finally:
            self._selector.close()
            self._wait.close()


def start_local(size: int, pass_fds: Sequence[int] = ()) -> Ranks:
    """Start ranks 1 to `size` - 1 as processes on this machine. They wait for their `Setup`.

    They are not forked, since this process has threads. Each has its own session, so that only rank 0 gets Ctrl-C.
    """
    members: list[Member] = []
    try:
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            with theirs:
                level = logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()
                command = [*python_module("brlite"), "worker", "--channel", str(theirs.fileno())]
                process = subprocess.Popen(
                    [*command, "--log-level", level],
                    env=child_environment(),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *pass_fds),
                    start_new_session=True,
                )
            logger.debug("rank %d is process %d", rank, process.pid)
            members.append(Member(rank, Channel(ours), process))
    except OSError as error:
        Ranks(members).close()
        raise EngineError(f"rank {len(members) + 1} cannot be started: {error.strerror}") from error
    return Ranks(members)


def _wait_for_loss(selector: selectors.BaseSelector, seconds: float | None = None) -> BackendLost | ConfigError | None:
    """Why the first rank ends. None if none does within `seconds`, or if a socket without a member is readable.

    A rank that ends because another one is lost counts only if no other reason is found within `CAUSE_SECONDS`.
    """
    consequence: BackendLost | ConfigError | None = None
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    while events := selector.select(None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
        for key, _ in events:
            member: Member | None = key.data
            if member is None:
                return None
            try:
                message = member.channel.receive()
            except ChannelClosed:
                return BackendLost(member.describe_end())
            if isinstance(message, (Loaded, Joined)):  # during loading: no loss
                continue
            loss = _loss_of(member, message)
            if not isinstance(message, Failed) or not message.is_consequence:
                return loss
            selector.unregister(key.fileobj)
            consequence = consequence or loss
            deadline = min(deadline, time.monotonic() + CAUSE_SECONDS)
    return consequence


def _loss_of(member: Member, message: Message) -> BackendLost | ConfigError:
    """The error for a rank's last message."""
    if isinstance(message, Failed) and message.is_foreseen and not message.is_consequence:
        return ConfigError(f"rank {member.rank}: {message.message}")
    return BackendLost(f"rank {member.rank}: {getattr(message, 'message', 'it sent an unexpected message')}")
