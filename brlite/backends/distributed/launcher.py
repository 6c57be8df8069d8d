"""Ranks that `torchrun` or another launcher has started, also on other machines: rank 0 waits for them to connect.

A launcher sets environment variables in each process: its rank, and the address of rank 0.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from brlite.backends.distributed.messages import Channel, ChannelClosed, Hello
from brlite.backends.distributed.processes import Member, Ranks
from brlite.backends.distributed.secret import VARIABLE, is_proof, proof, read_secret
from brlite.backends.torch.device import require_torch
from brlite.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from brlite.backends.torch.group import TCPStore

logger = logging.getLogger(__name__)

GATHERING_SECONDS = 600.0  # for the ranks of all machines to connect
HELLO_SECONDS = 5.0
MAX_HELLO_BYTES = 256  # about twice the size of a Hello
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_DEFAULTS = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ADDRESS_KEY = "brlite/rank-0"


class RankAddress(NamedTuple):
    """The launcher's variables of this process. `local_rank` counts the ranks of this machine, `attempt` the starts."""

    rank: int
    size: int
    host: str
    port: int
    local_rank: int = 0
    local_size: int = 1
    attempt: str = "0"
    has_store: bool = False  # the launcher runs the TCPStore at `host`:`port`; else rank 0 does


def find_place(environment: Mapping[str, str]) -> RankAddress | None:
    """This process's rank and address. None without a launcher. Raises `ConfigError` if variables are missing."""
    missing = [name for name in VARIABLES if name not in environment]
    if "WORLD_SIZE" not in environment or environment["WORLD_SIZE"] == "1":
        return None
    if missing:
        raise ConfigError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set")
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = environment.get(name, LOCAL_DEFAULTS.get(name, ""))
        if not text.isdecimal():
            raise ConfigError(f"{name} is {text!r}: allowed is a number")
        numbers.append(int(text))
    rank, size, port, local_rank, local_size = numbers
    if rank >= size:
        raise ConfigError(f"RANK is {rank}: allowed with WORLD_SIZE = {size} are 0 to {size - 1}")
    return RankAddress(
        rank,
        size,
        environment["MASTER_ADDR"],
        port,
        local_rank,
        local_size,
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def await_ranks(place: RankAddress, environment: Mapping[str, str] = os.environ) -> Ranks:
    """On rank 0: wait until all other ranks have connected. Raises `EngineError` if some do not."""
    secret, nonce = read_secret(environment), secrets.token_hex(16)
    members: dict[int, Member] = {}
    try:
        listening = socket.create_server((place.host, 0), family=socket.getaddrinfo(place.host, None)[0][0])
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR is {place.host}, which is no address of rank 0's machine: {error}") from error
    try:
        with listening as listener:
            store, port = _store(place), listener.getsockname()[1]
            store.set(_key(place), "|".join((place.host, str(port), nonce, proof(secret, place.host, port, nonce))))
            logger.info("waiting for %d ranks at %s", place.size - 1, place.host)
            if not secret:
                logger.warning("any client that can reach %s can join as a rank: %s is not set", place.host, VARIABLE)
            deadline = time.monotonic() + GATHERING_SECONDS
            while missing := set(range(1, place.size)) - members.keys():
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                member = _admit(listener, missing, lambda hello: is_proof(hello.proof, secret, nonce, hello.rank))
                if member is not None:
                    members[member.rank] = member
    except (OSError, RuntimeError) as error:  # torch's store has no narrower class
        Ranks(list(members.values())).close(at_once=True)
        raise EngineError(
            f"{len(members) + 1} of {place.size} ranks are connected, the others did not connect: {error}"
        ) from error
    return Ranks([members[rank] for rank in sorted(members)])


def find_rank_0(place: RankAddress, environment: Mapping[str, str] = os.environ) -> Channel:
    """On another rank: connect to rank 0 once it listens. Raises `EngineError`, or `ConfigError` for another secret."""
    secret = read_secret(environment)
    try:
        host, port, nonce, shown = _store(place).get(_key(place)).decode().split("|")
        if not is_proof(shown, secret, host, port, nonce):
            raise ConfigError(f"{VARIABLE} of rank {place.rank} is not that of rank 0 at {place.host}")
        channel = Channel(_kept_alive(socket.create_connection((host, int(port)), timeout=GATHERING_SECONDS)))
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"rank {place.rank} did not find rank 0 at {place.host}: {error}") from error
    channel.send(Hello(place.rank, proof(secret, nonce, place.rank)))
    return channel


def _admit(listener: socket.socket, missing: Collection[int], is_member: Callable[[Hello], bool]) -> Member | None:
    """Accept one connection. Returns a missing rank that proves the secret, None for any other client."""
    stream, address = listener.accept()
    channel = Channel(_kept_alive(stream))
    time_limit = threading.Timer(HELLO_SECONDS, channel.shut)  # a timeout of the socket would restart with each byte
    time_limit.start()
    try:
        hello = channel.receive(MAX_HELLO_BYTES)
    except ChannelClosed:
        hello = None
    time_limit.cancel()
    time_limit.join()
    if not isinstance(hello, Hello) or not is_member(hello):
        logger.warning("a client at %s is no rank of this model", address[0])
    elif hello.rank not in missing:
        logger.warning("a rank at %s has the number %d; missing are %s", address[0], hello.rank, sorted(missing))
    else:
        return Member(hello.rank, channel)
    channel.close()
    return None


def _kept_alive(stream: socket.socket) -> socket.socket:
    """Set keepalive, which detects a machine without power, and TCP_NODELAY, which sends small messages at once."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not every system has them
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return stream


def _store(place: RankAddress) -> TCPStore:
    require_torch("a model on several machines")
    from brlite.backends.torch.group import open_store

    is_keeper = place.rank == 0 and not place.has_store
    return open_store(place.host, place.port, GATHERING_SECONDS, is_keeper=is_keeper)


def _key(place: RankAddress) -> str:
    return f"{ADDRESS_KEY}/{place.attempt}"
