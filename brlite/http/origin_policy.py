"""Refuses some requests of browsers: those of other sites' pages, and those for a host name that is not the server's.

Pure, without aiohttp: the decision depends on three headers and on whether a key is needed. A page cannot forge these
headers. Other programs can, but gain nothing: requests without these headers are accepted.

- `Sec-Fetch-Site` and `Origin` show which page sent a request (Fetch Standard; W3C Fetch Metadata). Browsers set them
  themselves, but send `Sec-Fetch-Site` only to https and loopback.
- `Host` is the name that the browser looked up. If `evil.example` resolves to 127.0.0.1 ("DNS rebinding"), its page is
  same-origin for the browser, but cannot send `Host: localhost`. It cannot send an address either, so addresses are
  safe: they are not looked up. A request with a foreign address came through a forwarder (an emulator's 10.0.2.2).
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from brlite.config.address import is_loopback_address
from brlite.errors import Forbidden
from brlite.http.keys import ApiKeys

ANY = "*"
MAX_REMEMBERED = 256  # cached decisions; a client sends the same headers with each request
MAX_SHOWN = 200

# Names of loopback in a usual /etc/hosts, and names by which containers and virtual machines reach their host. Public
# name servers do not resolve .internal.
_LOCAL_NAMES = frozenset(
    {
        *("localhost", "localhost4", "localhost6", "localhost.localdomain", "ip6-localhost", "ip6-loopback"),
        *("host.docker.internal", "gateway.docker.internal", "kubernetes.docker.internal"),
        *("host.containers.internal", "host.lima.internal", "host.minikube.internal", "host.orb.internal"),
        "host.rancher-desktop.internal",
    }
)
_PORT = re.compile(r":[0-9]*\Z")


class OriginPolicy:
    """`allowed_origins`: origins of pages that may use the server. `allowed_hosts`: its names besides local ones.

    Addresses are always allowed. Names are checked if `is_loopback` and no key is needed, and whenever `allowed_hosts`
    is not empty. `*` in either allows all.
    """

    def __init__(
        self,
        allowed_origins: tuple[str, ...] = (),
        allowed_hosts: tuple[str, ...] = (),
        *,
        keys: ApiKeys | None = None,
        is_loopback: bool = False,
    ) -> None:
        self.allowed_origins = frozenset(allowed_origins)
        self._allowed_hosts = frozenset(_host_name(host) for host in allowed_hosts)
        self._keys = keys
        self._is_loopback = is_loopback

        @lru_cache(MAX_REMEMBERED)
        def lets_in(host: str | None, origin: str | None, fetch_site: str | None, is_open: bool) -> bool:
            """Whether `refusal` is None. It depends on `is_open` (no key is needed), which is in the cache's key."""
            return self.refusal(host, origin, fetch_site) is None

        self.lets_in = lets_in

    def refusal(self, host: str | None, origin: str | None, fetch_site: str | None) -> Forbidden | None:
        """The refusal of a request with these headers; None if it is accepted. Join the values of a repeated header."""
        is_checked = self._allowed_hosts or (self._is_loopback and self._keys is not None and self._keys.is_open)
        if (
            is_checked
            and host is not None
            and not is_safe_host(host)
            and self._allowed_hosts.isdisjoint((ANY, _host_name(host)))
        ):
            return Forbidden(
                f"The host name {host[:MAX_SHOWN]!r} is not one of this server's. Local names and addresses are, and "
                "names in server.allowed_hosts.",
                code="host_not_allowed",
            )
        is_cross_site = fetch_site == "cross-site"
        if (origin is None and not is_cross_site) or ANY in self.allowed_origins or origin in self.allowed_origins:
            return None
        if fetch_site == "same-origin":
            return None  # behind a proxy with TLS or another name, only the browser can decide it
        if not is_cross_site and host is not None and origin == f"http://{host.lower().removesuffix(':80')}":
            return None
        whose = "another site" if origin is None else origin[:MAX_SHOWN]
        return Forbidden(
            f"A web page of {whose} may not use this server. Pages of origins in server.cors_origins (--cors) may.",
            code="origin_not_allowed",
        )


@lru_cache(maxsize=64)
def is_safe_host(host: str) -> bool:
    """Whether a `Host` header is an address or a local name, which no DNS server can point to another address."""
    name = _host_name(host)
    if is_loopback_address(name) or name in _LOCAL_NAMES:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _host_name(host: str) -> str:
    """The name without port and trailing dot, in lower case."""
    name = host.lower()
    has_port = name.count(":") == 1 or name.startswith("[")  # else it is an IPv6 address without brackets
    return (_PORT.sub("", name) if has_port else name).removesuffix(".")
