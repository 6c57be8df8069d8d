"""Names of upstreams: their addresses are used in turn, and looked up again; silent ones hold up nobody."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest

from brlite.config.address import Address
from brlite.proxy.wire.connections import ConnectionPool, UpstreamConnection, is_name
from brlite.proxy.wire.resolving import NameAddresses, system_lookup
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import wait_until

NAME = "pods.test"


class Pods:
    """Servers at several addresses of the loopback and one port, and the addresses that their name has now."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.11", "127.0.0.12", "127.0.0.13"]
        self.num_lookups = 0
        self.port = 0
        self.servers: dict[str, asyncio.Server] = {}

    async def start(self) -> None:
        for address in self.addresses:
            self.servers[address] = await asyncio.start_server(self._serve, address, self.port)
            self.port = self.servers[address].sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    def lookup(self, name: str) -> Sequence[str]:
        assert name == NAME
        self.num_lookups += 1
        return list(self.addresses)

    def pool(self, seconds: float = 1000.0) -> ConnectionPool:
        names = NameAddresses(NAME, self.lookup, seconds)
        return ConnectionPool(Address(NAME, self.port), ca_file=None, max_idle=8, idle_seconds=60, names=names)


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    pods = Pods()
    await pods.start()
    yield pods
    for server in pods.servers.values():
        server.close()


@contextmanager
def silent(address: str, port: int) -> Iterator[None]:
    """A listener whose queue is full: the kernel drops what comes, as a firewall does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            with suppress(BlockingIOError):
                filler.connect((address, port))
        yield
        for filler in fillers:
            filler.close()


async def use(pool: ConnectionPool) -> UpstreamConnection:
    """A connection as a request gets one."""
    return pool.take() or await asyncio.wait_for(pool.dial(), PATIENCE_SECONDS)


async def addresses_of(names: NameAddresses) -> Sequence[str]:
    return await names.addresses()


async def test_the_addresses_of_a_name_are_used_in_turn_by_kept_connections_too(pods: Pods) -> None:
    pool = pods.pool()

    used = []
    for _ in range(9):
        connection = await use(pool)
        used.append(connection.address)
        pool.put_back(connection, asyncio.get_running_loop().time())
    num_connections = len(pool.connections)
    pool.close()

    assert sorted(used[3:]) == sorted(pods.addresses * 2)
    assert num_connections == 3


async def test_a_silent_address_is_passed_over_and_tried_last_from_then_on(pods: Pods) -> None:
    pods.servers.pop("127.0.0.11").close()
    pods.addresses = ["127.0.0.11", "127.0.0.12"]
    pool = pods.pool()

    with silent("127.0.0.11", pods.port):
        used = [await use(pool) for _ in range(5)]
    assert pool.names is not None
    last = [pool.names.in_turn()[-1] for _ in range(4)]
    pool.close()

    assert {connection.address for connection in used} == {"127.0.0.12"}
    assert last == ["127.0.0.11"] * 4


async def test_an_address_that_refuses_is_passed_over(pods: Pods) -> None:
    pods.addresses = ["127.0.0.99", "127.0.0.12"]
    pool = pods.pool()

    connection = await pool.dial()
    pool.close()

    assert connection.address == "127.0.0.12"


async def test_where_no_address_can_be_reached_an_error_of_theirs_is_raised(pods: Pods) -> None:
    pods.addresses = ["127.0.0.98", "127.0.0.99"]

    with pytest.raises(ConnectionRefusedError):
        await pods.pool().dial()


async def test_a_dialling_that_is_given_up_leaves_nothing_behind(pods: Pods) -> None:
    pods.servers.pop("127.0.0.11").close()
    pods.addresses = ["127.0.0.11"]
    pool = pods.pool()

    with silent("127.0.0.11", pods.port):
        dialling = asyncio.create_task(pool.dial())
        await asyncio.sleep(0.05)
        dialling.cancel()
        await asyncio.wait([dialling])
        await wait_until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    assert not pool.connections


async def test_names_are_looked_up_again_under_traffic_and_what_is_gone_is_closed(pods: Pods) -> None:
    pods.addresses = ["127.0.0.11"]
    pool = pods.pool(seconds=0.01)
    old = await use(pool)
    pool.put_back(old, asyncio.get_running_loop().time())

    pods.addresses = ["127.0.0.12"]
    used = {""}
    while "127.0.0.12" not in used:
        connection = await use(pool)
        used.add(connection.address)
        pool.put_back(connection, asyncio.get_running_loop().time())
        await asyncio.sleep(0.005)
    is_closed = old.transport.is_closing()
    pool.close()

    assert is_closed
    assert pods.num_lookups >= 2


async def test_a_lookup_that_fails_later_leaves_the_addresses_as_they_were(pods: Pods) -> None:
    has_failed = threading.Event()

    def lookup(name: str) -> Sequence[str]:
        if pods.num_lookups:
            has_failed.set()
            raise socket.gaierror(socket.EAI_AGAIN, "the resolver is away")
        return pods.lookup(name)

    names = NameAddresses(NAME, lookup, seconds=0.0)
    await names.addresses()
    names.refresh()
    assert await asyncio.to_thread(has_failed.wait, PATIENCE_SECONDS)
    await asyncio.sleep(0.05)

    assert await names.addresses() == pods.addresses


async def test_a_name_that_is_not_known_is_an_error_and_is_looked_up_again() -> None:
    answers: list[Sequence[str] | Exception] = [socket.gaierror(socket.EAI_NONAME, "no such name"), ["127.0.0.1"]]

    def lookup(name: str) -> Sequence[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    names = NameAddresses(NAME, lookup)
    with pytest.raises(socket.gaierror):
        await names.addresses()

    assert await names.addresses() == ["127.0.0.1"]


async def test_lookups_that_hang_hold_up_nobody_else() -> None:
    may_end = threading.Event()

    def hang(name: str) -> Sequence[str]:
        may_end.wait(PATIENCE_SECONDS)
        return ["127.0.0.1"]

    waiting = [asyncio.create_task(addresses_of(NameAddresses(f"{number}.test", hang))) for number in range(40)]
    await asyncio.sleep(0)

    assert await asyncio.to_thread(lambda: 5) == 5
    assert await NameAddresses(NAME, lambda name: ["127.0.0.2"]).addresses() == ["127.0.0.2"]
    assert not any(task.done() for task in waiting)
    may_end.set()
    assert await asyncio.gather(*waiting) == [["127.0.0.1"]] * 40


async def test_those_who_wait_for_a_name_share_its_lookup_and_may_leave_it(pods: Pods) -> None:
    names = NameAddresses(NAME, pods.lookup)
    waiting = [asyncio.create_task(addresses_of(names)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()

    results = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [pods.addresses] * 4
    assert pods.num_lookups == 1


@pytest.mark.parametrize(
    ("address", "has_name"),
    [
        (Address("pods.test", 80), True),
        (Address("localhost", 80), True),
        (Address("127.0.0.1", 80), False),
        (Address("::1", 80), False),
        (Address("localhost", 80, unix_path="/run/x"), False),
    ],
)
def test_what_is_no_name_is_not_looked_up(address: Address, has_name: bool) -> None:
    assert is_name(address) is has_name


def test_the_system_knows_this_machine() -> None:
    assert {*system_lookup("localhost")} & {"127.0.0.1", "::1"}
