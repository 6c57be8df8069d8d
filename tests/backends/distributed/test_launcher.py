"""What a launcher says of a process, and how ranks of several machines find rank 0."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from brlite.backends.distributed.launcher import RankAddress, await_ranks, find_place, find_rank_0
from brlite.backends.distributed.messages import Channel, ChannelClosed, Hello, Join, Stop, frame
from brlite.backends.distributed.secret import proof, read_secret
from brlite.backends.torch.group import open_store
from brlite.errors import ConfigError
from tests.limits import PATIENCE_SECONDS

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
    assert find_place(TORCHRUN) == RankAddress(3, 4, "10.0.0.1", 29500, 1, 2, "2", has_store=True)


def test_other_launchers_say_less() -> None:
    said = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}

    assert find_place(said) == RankAddress(3, 4, "10.0.0.1", 29500)


@pytest.mark.parametrize("environment", [{}, TORCHRUN | {"WORLD_SIZE": "1"}])
def test_a_process_alone_has_no_place(environment: dict[str, str]) -> None:
    assert find_place(environment) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": None}, "WORLD_SIZE is 4, but MASTER_PORT is not set"),
        ({"RANK": "x"}, "RANK is 'x': allowed is a number"),
        ({"RANK": "4"}, "RANK is 4: allowed with WORLD_SIZE = 4 are 0 to 3"),
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


def published(place: RankAddress) -> list[str]:
    """Host, port, nonce and proof, as anybody reads them who reaches the store."""
    value = open_store(place.host, place.port, PATIENCE_SECONDS, is_keeper=False).get("brlite/rank-0/0")
    return str(value.decode()).split("|")


class Gathering:
    """Rank 0 of three ranks, which waits for the others on a thread."""

    def __init__(self, secret: str) -> None:
        port = free_port()
        self.places = [RankAddress(rank, 3, "127.0.0.1", port) for rank in range(3)]
        self.environment = {"BRLITE_RANK_SECRET": secret} if secret else {}
        self.channels: dict[int, Channel] = {}
        self._pool = ThreadPoolExecutor(1)
        self._ranks = self._pool.submit(await_ranks, self.places[0], self.environment)

    def come(self, rank: int) -> None:
        self.channels[rank] = find_rank_0(self.places[rank], self.environment)

    def knock(self, data: bytes) -> None:
        """Say this to rank 0, and be sent away."""
        host, port, *_ = published(self.places[0])
        with closing(Channel(socket.create_connection((host, int(port))))) as stranger:
            stranger.send_frame(data)
            with pytest.raises(ChannelClosed):
                stranger.receive()

    def finish(self) -> list[object]:
        """What the ranks hear of rank 0, in their order, once all are there."""
        ranks = self._ranks.result(PATIENCE_SECONDS)
        ranks.send_each(lambda rank: Join(f"to rank {rank}"))
        heard = [self.channels[rank].receive() for rank in sorted(self.channels)]
        for channel in self.channels.values():
            channel.close()
        ranks.close()
        self._pool.shutdown()
        return heard


@pytest.fixture(params=["", "a secret that all the ranks know"], ids=["no secret", "secret"])
def gathering(request: pytest.FixtureRequest) -> Gathering:
    return Gathering(request.param)


def test_ranks_come_to_rank_0_in_whatever_order(gathering: Gathering) -> None:
    gathering.come(2)
    gathering.come(1)

    assert gathering.finish() == [Join("to rank 1"), Join("to rank 2")]


STRANGERS = {
    "another proof": frame(Hello(1, "not the proof")),
    "a proof that is no ASCII": frame(Hello(1, "\u2028")),
    "another message": frame(Stop()),
    "a long hello": frame(Hello(1, "x" * 1000)),
    "a length of 256 MiB": (2**28).to_bytes(4, "little"),
    "no number": frame(Hello("1", "x")),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_sent_away(gathering: Gathering, name: str, caplog: pytest.LogCaptureFixture) -> None:
    gathering.knock(STRANGERS[name])
    gathering.come(1)
    gathering.come(2)

    assert gathering.finish() == [Join("to rank 1"), Join("to rank 2")]
    assert "a client at 127.0.0.1 is no rank of this model" in caplog.messages


@pytest.mark.parametrize("rank", [-1, 0, 2, 3, 2**40])
def test_a_rank_that_is_not_missing_is_sent_away(
    gathering: Gathering, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    gathering.come(2)
    nonce = published(gathering.places[0])[2]
    secret = gathering.environment.get("BRLITE_RANK_SECRET", "").encode()

    gathering.knock(frame(Hello(rank, proof(secret, nonce, rank))))
    gathering.come(1)

    assert gathering.finish() == [Join("to rank 1"), Join("to rank 2")]
    assert f"a rank at 127.0.0.1 has the number {rank}; missing are [1]" in caplog.messages


def test_what_is_published_does_not_make_a_rank_of_who_does_not_know_the_secret() -> None:
    gathering = Gathering("a secret that all the ranks know")
    _, _, nonce, shown = published(gathering.places[0])

    for claimed in (nonce, shown, proof(b"", nonce, 1)):
        gathering.knock(frame(Hello(1, claimed)))
    gathering.come(1)
    gathering.come(2)

    assert len(gathering.finish()) == 2


@pytest.mark.parametrize("secret", ["", "another secret than that of rank 0"])
def test_who_says_to_be_rank_0_must_know_the_secret(secret: str) -> None:
    gathering = Gathering("a secret that all the ranks know")
    environment = {"BRLITE_RANK_SECRET": secret} if secret else {}

    with pytest.raises(ConfigError, match=r"BRLITE_RANK_SECRET of rank 1 is not that of rank 0 at 127\.0\.0\.1"):
        find_rank_0(gathering.places[1], environment)

    gathering.come(1)
    gathering.come(2)
    gathering.finish()


def test_a_secret_may_come_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"0123456789abcdef\r\n")

    assert read_secret({"BRLITE_RANK_SECRET_FILE": str(file)}) == b"0123456789abcdef"
    assert read_secret({}) == b""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BRLITE_RANK_SECRET": "short"}, "BRLITE_RANK_SECRET: has 5 bytes; allowed are 16 to 4096"),
        (
            {"BRLITE_RANK_SECRET_FILE": "/proc/absent"},
            "BRLITE_RANK_SECRET_FILE: /proc/absent: cannot be read: No such file",
        ),
        ({"BRLITE_RANK_SECRET_FILE": "/dev/null"}, "BRLITE_RANK_SECRET_FILE: /dev/null: has 0 bytes"),
        ({"BRLITE_RANK_SECRET_FILE": "/dev/zero"}, "BRLITE_RANK_SECRET_FILE: /dev/zero: has 4097 bytes"),
    ],
)
def test_a_secret_that_is_none_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_secret(environment)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is 192\.0\.2\.1, which is no address of rank 0's machine"):
        await_ranks(RankAddress(0, 2, "192.0.2.1", free_port()))
