"""Addresses of other servers: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`. Opens no connections."""

from __future__ import annotations

import re
from typing import NamedTuple

_HTTP = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*)/?"
)
_UNIX = re.compile(r"unix:(?P<path>/[^\x00\s]+)")
_VERSION = re.compile(r"v[0-9]+(?:(?:alpha|beta)[0-9]*)?")
API = "/v1"  # the prefix of request paths
_LABEL = re.compile(r"[\w-]{1,63}")  # of a host name, RFC 1035; international names have other letters
_IPV4_LOOPBACK = re.compile(r"127(?:\.[0-9]{1,3}){1,3}")  # 127.1 too
MAX_HOST = 253  # characters
_PORTS = {"http": 80, "https": 443}


class Address(NamedTuple):
    """A server's address. `unix_path` is set for a Unix socket. `base_path` goes before the path of every request.

    `api_path` replaces the prefix `/v1` of request paths.
    """

    host: str
    port: int
    is_tls: bool = False
    unix_path: str | None = None
    base_path: str = ""
    api_path: str = API

    def path(self, path: str) -> str:
        """The path on that server for the request path `path`."""
        if path.startswith(API + "/"):
            return self.base_path + self.api_path + path[len(API) :]
        return self.base_path + path

    @property
    def host_header(self) -> str:
        """The value of the `Host` header. The port is included unless it is the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS["https" if self.is_tls else "http"] else f"{host}:{self.port}"


def is_host(text: str) -> bool:
    """Whether it has the form of an IP address, or of a name: labels of 1 to 63 characters, as DNS needs."""
    if ":" in text:
        from ipaddress import IPv6Address

        try:
            return bool(IPv6Address(text))
        except ValueError:
            return False
    return len(text) <= MAX_HOST and all(_LABEL.fullmatch(label) for label in text.removesuffix(".").split("."))


def is_loopback_address(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`, which may have brackets."""
    from ipaddress import ip_address

    name = host.lower().removeprefix("[").removesuffix("]")
    if name == "localhost" or name.endswith(".localhost") or _IPV4_LOOPBACK.fullmatch(name):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def parse_address(url: str) -> Address | None:
    """The address of a URL, or None if it has none, such as the manual's placeholders.

    A path with a version, as in clients' base URLs, replaces `/v1` in request paths: `/v1` itself, `/api/paas/v4`,
    `/v1beta/openai`. Any other path goes before `/v1`.
    """
    if unix := _UNIX.fullmatch(url):
        return Address("localhost", _PORTS["http"], unix_path=unix["path"])
    http = _HTTP.fullmatch(url)
    if http is None or not is_host(host := http["host"].strip("[]")):
        return None
    port = int(http["port"] or _PORTS[http["scheme"]])
    if not 0 < port < 65536:
        return None
    segments = http["path"].split("/")
    version = next((index for index, segment in enumerate(segments) if _VERSION.fullmatch(segment)), len(segments))
    base_path, api_path = "/".join(segments[:version]), "".join(f"/{segment}" for segment in segments[version:])
    return Address(host, port, http["scheme"] == "https", base_path=base_path, api_path=api_path or API)
