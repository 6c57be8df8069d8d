"""Where the ranks of a model are: here, as processes of rank 0, or where `torchrun` or another launcher put them.

A launcher tells each of its processes by environment variables which rank it is and where rank 0 can be found.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from brlite.errors import ConfigError, EngineError
from brlite.worker.channel import Channel, ChannelClosed, Hello
from brlite.worker.ranks import Member, Ranks

if TYPE_CHECKING:
    from brlite.worker.store import TCPStore

logger = logging.getLogger(__name__)

GATHERING_SECONDS = 600.0  # for the ranks of all machines to come
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS_KEY = "brlite/rank-0"


class RankPlace(NamedTuple):
    """What the launcher says of this process. `local_rank` counts the ranks of this machine, `attempt` the starts."""

    rank: int
    size: int
    host: str
    port: int
    local_rank: int = 0
    local_size: int = 1
    attempt: str = "0"
    has_store: bool = False  # the launcher keeps the store, rank 0 need not


def find_place(environment: Mapping[str, str]) -> RankPlace | None:
    """This process's place, or None where no launcher has started several. Raises `ConfigError` for half a place."""
    missing = [name for name in VARIABLES if name not in environment]
    if "WORLD_SIZE" not in environment or environment["WORLD_SIZE"] == "1":
        return None
    if missing:
        raise ConfigError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set")
    rank, size, port, local_rank, local_size = (
        _number(environment, name, default)
        for name, default in (
            *(("RANK", ""), ("WORLD_SIZE", ""), ("MASTER_PORT", "")),
            *(("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")),
        )
    )
    return RankPlace(
        rank,
        size,
        environment["MASTER_ADDR"],
        port,
        local_rank,
        local_size,
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def await_ranks(place: RankPlace) -> Ranks:
    """On rank 0: let the others come. Raises `EngineError` if some do not."""
    token = secrets.token_hex(16)
    members: list[Member] = []
    try:
        with _listen(place) as listener:
            store = _store(place)
            store.set(_key(place), f"{place.host}|{listener.getsockname()[1]}|{token}")
            logger.info("waiting for %d ranks at %s", place.size - 1, place.host)
            deadline = time.monotonic() + GATHERING_SECONDS
            while len(members) < place.size - 1:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                member = _admit(listener, token)
                if member is not None:
                    members.append(member)
    except (OSError, RuntimeError) as error:  # torch's store has no narrower class
        Ranks(members).close(at_once=True)
        raise EngineError(
            f"{len(members) + 1} of {place.size} ranks are here, the rest did not come: {error}"
        ) from error
    return Ranks(sorted(members, key=lambda member: member.rank))


def find_rank_0(place: RankPlace) -> Channel:
    """On another rank: come to rank 0, once it is there."""
    try:
        host, port, token = _store(place).get(_key(place)).decode().split("|")
        channel = Channel(_kept_alive(socket.create_connection((host, int(port)), timeout=GATHERING_SECONDS)))
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"rank {place.rank} did not find rank 0 at {place.host}: {error}") from error
    channel.send(Hello(place.rank, token))
    return channel


def _listen(place: RankPlace) -> socket.socket:
    try:
        return socket.create_server((place.host, 0), family=_family(place.host))
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR is {place.host}, which is no address of rank 0's machine: {error}") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _admit(listener: socket.socket, token: str) -> Member | None:
    """Whoever came, if it is a rank: anybody on the network may knock."""
    stream, address = listener.accept()
    channel = Channel(_kept_alive(stream))
    stream.settimeout(5)
    try:
        hello = channel.receive()
    except ChannelClosed:
        hello = None
    stream.settimeout(None)
    if isinstance(hello, Hello) and secrets.compare_digest(hello.token, token):
        return Member(hello.rank, channel)
    logger.warning("somebody at %s is no rank of this model", address[0])
    channel.close()
    return None


def _kept_alive(stream: socket.socket) -> socket.socket:
    """With probes, so that a machine that lost its power is missed; and small messages are not held back."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every system has them
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return stream


def _store(place: RankPlace) -> TCPStore:
    from brlite.worker.store import open_store  # which needs torch

    is_keeper = place.rank == 0 and not place.has_store
    return open_store(place.host, place.port, GATHERING_SECONDS, is_keeper=is_keeper)


def _key(place: RankPlace) -> str:
    return f"{ADDRESS_KEY}/{place.attempt}"


def _number(environment: Mapping[str, str], name: str, default: str) -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}: allowed is a number")
    return int(text)
