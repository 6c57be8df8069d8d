"""The headers that name the client's address, as `proxy.forwarded` sets them.

`X-Forwarded-For`, `Forwarded` (RFC 7239) and `X-Real-IP`. A client's own values are dropped, except with "append",
which is for a proxy behind another one that is trusted.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from brlite.config.options import Forwarded

MAX_CLAIM_BYTES = 1024  # of a chain that is appended to; a longer one is dropped


def forwarded_lines(mode: Forwarded, peer: str | None, fields: Mapping[bytes, bytes]) -> bytes:
    """The header lines for a request from this peer with these header fields; none if the peer has no IP address."""
    address = _address(peer)
    if mode == "off" or address is None:
        return b""
    node = f'"[{address}]"' if address.version == 6 else str(address)
    values = {b"X-Forwarded-For": str(address).encode(), b"Forwarded": f"for={node}".encode()}
    real_ip = str(address).encode()
    if mode == "append":
        for name, value in values.items():
            claimed = fields.get(name.lower(), b"")
            if 0 < len(claimed) <= MAX_CLAIM_BYTES:
                values[name] = b"%b, %b" % (claimed, value)
        claimed_ip = _address(fields.get(b"x-real-ip", b"").decode("latin-1"))
        real_ip = real_ip if claimed_ip is None else str(claimed_ip).encode()
    values[b"X-Real-IP"] = real_ip
    return b"".join(b"%b: %b\r\n" % item for item in values.items())


def _address(text: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    # The form of IPv4 peers on a dual-stack socket.
    return getattr(address, "ipv4_mapped", None) or address
