"""A rank that is not rank 0: loads its part of the model, and computes its part of every step until rank 0 stops it.

Its process ends when the connection to rank 0 is lost, also during a step.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from contextlib import suppress
from typing import TypeVar

from brlite.backends.distributed.messages import (
    Channel,
    ChannelClosed,
    Compute,
    Failed,
    Join,
    Joined,
    Loaded,
    Message,
    Setup,
    read_work,
)
from brlite.backends.distributed.parallel import load_rank
from brlite.errors import BrliteError, EngineError, RankGone

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

EXIT_LOST = 3  # rank 0 is gone, or this rank failed; rank 0 logs the reason
HANG_UP = select.POLLHUP | getattr(select, "POLLRDHUP", 0)  # on Linux RDHUP reports the end of a TCP connection


def run(channel: Channel) -> int:
    """Run the rank at this end of a channel until it ends. Returns the exit status."""
    watch = threading.Thread(target=_end_with, args=(channel.stream,), name="brlite-rank-0", daemon=True)
    watch.start()
    try:
        model = load_rank(_receive(channel, Setup))
        info = model.backend.info
        channel.send(Loaded(info.weight_bytes, info.kv_bytes, info.fingerprint))
        model.connection.join(_receive(channel, Join).place)
        channel.send(Joined())
        while isinstance(message := channel.receive(), Compute):
            model.backend.follow(read_work(message))
        model.close()  # not after an error: leaving a broken process group may take for ever
    except ChannelClosed:
        return EXIT_LOST
    except BaseException as error:
        is_foreseen = isinstance(error, BrliteError)
        logger.debug("this rank ends", exc_info=error)
        with suppress(ChannelClosed):
            reason = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
            channel.send(Failed(reason, is_foreseen, is_consequence=isinstance(error, RankGone)))
        return EXIT_LOST
    return 0


def _receive(channel: Channel, kind: type[M]) -> M:
    message = channel.receive()
    if not isinstance(message, kind):
        raise EngineError(f"rank 0 sent {type(message).__name__}; expected is {kind.__name__}")
    return message


def _end_with(stream: socket.socket) -> None:
    """End this process at once when the other side of the channel is closed."""
    poll = select.poll()
    poll.register(stream, HANG_UP)
    with suppress(OSError):
        poll.poll()
    os._exit(EXIT_LOST)
