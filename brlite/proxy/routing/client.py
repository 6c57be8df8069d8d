"""The proxy's own requests to an upstream, for its health, its list of models and its metrics. Forwards nothing.

Each request has a connection of its own, so it also shows whether the upstream accepts new ones. Redirects are not
followed. Whatever the upstream sends or does not send, each request ends within its time limit.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from brlite.errors import UpstreamError, UpstreamTimeout
from brlite.http.access_log import printable
from brlite.process.waiting import within
from brlite.proxy.outcomes import WRONG_KEY
from brlite.proxy.routing.upstream import Upstream
from brlite.proxy.wire.resolving import NameAddresses


class _Resolver(AbstractResolver):
    """aiohttp's view of the addresses that requests to the upstream use."""

    def __init__(self, names: NameAddresses) -> None:
        self._names = names

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._names.addresses()
        ]

    async def close(self) -> None:
        """Do nothing: the upstream's pool owns the addresses."""


class WrongKey(UpstreamError):
    """The upstream answered 401 or 403."""


class UpstreamClient:
    """`async with UpstreamClient(upstream, seconds) as client:`; each request is answered within `seconds` or fails."""

    _session: aiohttp.ClientSession

    def __init__(self, upstream: Upstream, seconds: float) -> None:
        address = upstream.pool.address
        scheme = "https" if address.is_tls else "http"
        self._upstream = upstream
        self._seconds = seconds
        self._address = address
        self._url = f"{scheme}://{address.host_header}"

    async def __aenter__(self) -> UpstreamClient:
        pool = self._upstream.pool
        connector: aiohttp.BaseConnector
        if pool.address.unix_path is not None:
            connector = aiohttp.UnixConnector(pool.address.unix_path, force_close=True)
        else:
            connector = aiohttp.TCPConnector(
                ssl=pool.tls if pool.tls is not None else True,
                force_close=True,
                use_dns_cache=False,
                resolver=_Resolver(pool.names) if pool.names is not None else None,
            )
        own_lines = self._upstream.own_headers.decode("latin-1").splitlines()
        own_headers = dict(line.split(": ", 1) for line in own_lines)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={**own_headers, "Accept-Encoding": "identity", "User-Agent": "brlite"},
            timeout=aiohttp.ClientTimeout(total=None),  # `ask` has a limit that covers everything
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def status(self, path: str) -> int:
        """The status of `GET path`. Raises `UpstreamError`."""
        status, _ = await self.ask(path)
        return status

    async def read(self, path: str, max_bytes: int, method: str = "GET") -> bytes:
        """The body of a 200. Raises `UpstreamError` for another status (`WrongKey`), or a longer body."""
        status, body = await self.ask(path, max_bytes, method)
        if status in WRONG_KEY:
            raise WrongKey(f"answered {status} to {method} {path}: it needs another key")
        if status != 200:
            raise UpstreamError(f"answered {status} to {method} {path}")
        return body

    async def ask(self, path: str, max_bytes: int | None = None, method: str = "GET") -> tuple[int, bytes]:
        """The status and, of a 200, the body; None reads none. Raises `UpstreamError`, also for a longer body."""
        url, what = self._url + self._address.path(path), f"{method} {path}"

        async def get() -> tuple[int, bytes]:
            body = bytearray()
            async with self._session.request(method, url, allow_redirects=False) as response:
                if response.status == 200 and max_bytes is not None:
                    while part := await response.content.readany():
                        body += part
                        if len(body) > max_bytes:
                            raise UpstreamError(f"answered more than {max_bytes} bytes to {what}")
                return response.status, bytes(body)

        # aiohttp's own time limits do not cover a body that it cannot parse: it would wait without end.
        try:
            return await within(self._seconds, get())
        except asyncio.TimeoutError:
            raise UpstreamTimeout(f"did not answer {what} within {self._seconds:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(f"{what} failed: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Why a connection could not be made or was lost. Never empty, although many errors have no text of their own."""
    error = getattr(error, "os_error", error)  # the cause of an error of aiohttp
    if isinstance(error, OSError) and not isinstance(error, aiohttp.ClientError):
        if isinstance(error, ConnectionResetError) and error.errno is None:
            return "it closed the connection in the TLS handshake"  # asyncio's error for that has no text
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {error.verify_message}"
        if not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
            return os.strerror(error.errno or 0)
        return printable(error.strerror or str(error) or type(error).__name__)
    return printable(str(error) or type(error).__name__)
