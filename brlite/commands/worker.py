"""`brlite worker`: one rank of a model that several processes compute. Rank 0, which serves, is `brlite serve` itself.

Rank 0 starts the ranks of its own machine and gives each an open channel; a launcher such as `torchrun` starts those of
several machines, which find rank 0 by the launcher's environment variables.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket

from brlite.backends.distributed.launcher import RankAddress, find_place, find_rank_0
from brlite.backends.distributed.messages import Channel
from brlite.commands.given_config import given_config
from brlite.errors import ConfigError
from brlite.process.streams import configure_logging

logger = logging.getLogger(__name__)

LAUNCHERS = "start it with torchrun, as in `torchrun --nproc-per-node 2 --no-python brlite worker brlite.toml`"


def run(args: argparse.Namespace) -> int:
    """Run a rank until rank 0 ends, or serve if the launcher made this process rank 0. Returns the exit status."""
    if args.channel is None:
        if launched_place().rank == 0:
            from brlite.commands import serve

            return serve.run(args)
        args.log_level = given_config(args).server.log_level
    configure_logging(args.log_level or "warning")

    # Rank 0 gets these signals too; it lets its streams finish and then ends this rank.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    from brlite.backends.distributed import rank

    has_channel = args.channel is not None
    return rank.run(Channel(socket.socket(fileno=args.channel)) if has_channel else find_rank_0(launched_place()))


def launched_place() -> RankAddress:
    """The launcher's address of this process. Raises `ConfigError` without a launcher."""
    place = find_place(os.environ)
    if place is None:
        raise ConfigError(f"no launcher has started this: WORLD_SIZE is not set or 1; {LAUNCHERS}")
    return place
