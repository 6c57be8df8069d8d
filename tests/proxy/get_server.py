"""A server that answers each path as it was told, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from aiohttp import web


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})


GOOD = Answer()
NEVER = Answer(status=0)


def model_list(*models: dict[str, object]) -> Answer:
    """What `/v1/models` answers."""
    return Answer(body=json.dumps({"object": "list", "data": models}).encode())


class GetServer:
    """`async with GetServer({"/health": GOOD}) as server:` listens on `server.url`; other paths are a 404.

    `answers` may be changed at any time. At `unix_path`, if that is given.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None, unix_path: str | None = None) -> None:
        self.answers = {"/health": GOOD, **(answers or {})}
        self.asked: list[web.BaseRequest] = []
        self._unix_path = unix_path
        self.port = 0

    async def __aenter__(self) -> GetServer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._is_over = asyncio.Event()
        self._runner = web.ServerRunner(web.Server(self._answer), shutdown_timeout=0)
        await self._runner.setup()
        if self._unix_path is not None:
            await web.UnixSite(self._runner, self._unix_path).start()
            return
        self._sock = socket.create_server(("127.0.0.1", self.port))
        self.port = self._sock.getsockname()[1]
        await web.SockSite(self._runner, self._sock).start()

    async def kill(self) -> None:
        """Be gone; what hangs is cut. May be called twice."""
        self._is_over.set()
        if self._unix_path is None and self._sock.fileno() >= 0:
            # asyncio loses a connection whose listener is closed between accepting it and making its transport.
            asyncio.get_running_loop().remove_reader(self._sock)
            for _ in range(3):
                await asyncio.sleep(0)
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}" if self._unix_path is None else f"unix:{self._unix_path}"

    @property
    def paths(self) -> list[str]:
        """What it was asked for, in order."""
        return [request.path for request in self.asked]

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)
        answer = self.answers.get(request.path, Answer(404))
        if answer is NEVER:
            await self._is_over.wait()
            raise ConnectionResetError
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
