"""Where another server is: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`. It connects to nothing."""

from __future__ import annotations

import re
from typing import NamedTuple

_HTTP = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*)/?"
)
_UNIX = re.compile(r"unix:(?P<path>/[^\x00\s]+)")
_PORTS = {"http": 80, "https": 443}


class Address(NamedTuple):
    """A server's place. `unix_path` is set for a Unix socket; `base_path` goes before the path of every request."""

    host: str
    port: int
    is_tls: bool = False
    unix_path: str | None = None
    base_path: str = ""

    @property
    def host_header(self) -> str:
        """What the `Host` header says, the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.is_tls else "http"] else f"{host}:{self.port}"


def parse_address(url: str) -> Address | None:
    """The address that a URL names, or None if it names none, as the manual's placeholders do.

    A final `/v1`, which clients' base URLs have, is left out: the paths of requests begin with it.
    """
    if unix := _UNIX.fullmatch(url):
        return Address("localhost", _PORTS["http"], unix_path=unix["path"])
    http = _HTTP.fullmatch(url)
    if http is None:
        return None
    port = int(http["port"] or _PORTS[http["scheme"]])
    if not 0 < port < 65536:
        return None
    base_path = http["path"].removesuffix("/v1")
    return Address(http["host"].strip("[]"), port, http["scheme"] == "https", base_path=base_path)
