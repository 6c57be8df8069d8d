"""What a launcher says of a process, and how ranks of several machines find rank 0."""

from __future__ import annotations

import socket
import threading

import pytest

from brlite.errors import ConfigError
from brlite.worker.channel import Channel, ChannelClosed, Hello, Stop, frame
from brlite.worker.rank_places import RankPlace, await_ranks, find_place, find_rank_0

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def test_torchruns_variables_are_read() -> None:
    assert find_place(TORCHRUN) == RankPlace(3, 4, "10.0.0.1", 29500, 1, 2, "2", has_store=True)


def test_other_launchers_say_less() -> None:
    said = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}

    assert find_place(said) == RankPlace(3, 4, "10.0.0.1", 29500)


@pytest.mark.parametrize("environment", [{}, TORCHRUN | {"WORLD_SIZE": "1"}])
def test_a_process_alone_has_no_place(environment: dict[str, str]) -> None:
    assert find_place(environment) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": None}, "WORLD_SIZE is 4, but MASTER_PORT is not set"),
        ({"RANK": "x"}, "RANK is 'x': allowed is a number"),
        ({"WORLD_SIZE": "-4"}, "WORLD_SIZE is '-4': allowed is a number"),
    ],
)
def test_half_a_place_is_refused(change: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}

    with pytest.raises(ConfigError, match=message):
        find_place(environment)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_ranks_come_to_rank_0_in_whatever_order_and_strangers_are_sent_away() -> None:
    port, size, found = free_port(), 3, list[Channel]()
    places = [RankPlace(rank, size, "127.0.0.1", port) for rank in range(size)]

    def come(rank: int) -> None:
        channel = find_rank_0(places[rank])
        found.append(channel)
        host, own_port = channel.stream.getpeername()
        stranger = Channel(socket.create_connection((host, own_port)))
        stranger.send(Hello(rank, "not the token"))
        with pytest.raises(ChannelClosed):
            stranger.receive()
        stranger.close()

    threads = [threading.Thread(target=come, args=(2,)), threading.Thread(target=come_last, args=(places[1], found))]
    for thread in threads:
        thread.start()
    ranks = await_ranks(places[0])
    for thread in threads:
        thread.join()
    ranks.tell(frame(Stop()))
    heard = [channel.receive() for channel in found]
    for channel in found:
        channel.close()
    ranks.close()

    assert heard == [Stop(), Stop()]
    assert not ranks.are_here


def come_last(place: RankPlace, found: list[Channel]) -> None:
    """After the other rank, whose stranger is looked at meanwhile."""
    while not found:
        threading.Event().wait(0.01)
    found.append(find_rank_0(place))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is 192\.0\.2\.1, which is no address of rank 0's machine"):
        await_ranks(RankPlace(0, 2, "192.0.2.1", free_port()))
