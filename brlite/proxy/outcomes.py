"""How an attempt at an upstream ends, and who caused that: one table.

Only an ending that the upstream caused counts against it. Otherwise a client's requests or the proxy's own limits could
eject a healthy upstream: by a page with status 413, a path that a server does not have, or too few file descriptors.
"""

from __future__ import annotations

import enum
import errno
import socket
from typing import Literal, NamedTuple

# A label of the metrics. "refused": the upstream did nothing and another one was tried; "unknown": the ending shows
# nothing about the upstream.
Outcome = Literal["answered", "refused", "failed", "timeout", "unknown"]

WRONG_KEY = (401, 403)  # statuses: the upstream does not accept the proxy's key, or filters contents


class Owner(enum.Enum):
    """Who caused an ending other than an answer."""

    CLIENT = enum.auto()
    PROXY = enum.auto()
    UPSTREAM = enum.auto()


class Ending(enum.Enum):
    """How an attempt ended."""

    ANSWERED = enum.auto()  # below 500, or a status that is about the request alone
    SERVER_ERROR = enum.auto()  # any other answer from 500 on
    BUSY = enum.auto()  # 429
    UNAVAILABLE = enum.auto()  # 503
    NO_MODEL = enum.auto()  # 404, for the model's name
    DENIED = enum.auto()  # `WRONG_KEY`
    UNREACHABLE = enum.auto()  # no connection could be made
    CONNECT_TIMEOUT = enum.auto()
    BROKEN = enum.auto()  # a malformed or incomplete response
    TIMEOUT = enum.auto()  # the response did not begin, or stopped
    LOST = enum.auto()  # the response stopped, and the upstream fails its health checks
    STALE = enum.auto()  # a reused connection was closed before the request arrived
    OUT_OF_RESOURCES = enum.auto()  # the proxy has no descriptor, port or memory left
    STOPPED = enum.auto()  # the proxy ends
    CLIENT_LEFT = enum.auto()


class OutcomeRule(NamedTuple):
    """`owner` is None for responses. `is_safe`: the upstream has done nothing, so another one may be tried."""

    outcome: Outcome
    owner: Owner | None
    is_safe: bool = False


OUTCOMES: dict[Ending, OutcomeRule] = {
    Ending.ANSWERED: OutcomeRule("answered", None),
    Ending.SERVER_ERROR: OutcomeRule("failed", Owner.UPSTREAM),
    Ending.BUSY: OutcomeRule("refused", None, is_safe=True),
    Ending.UNAVAILABLE: OutcomeRule("refused", Owner.UPSTREAM, is_safe=True),
    Ending.NO_MODEL: OutcomeRule("refused", None, is_safe=True),
    Ending.DENIED: OutcomeRule("refused", None, is_safe=True),
    Ending.UNREACHABLE: OutcomeRule("failed", Owner.UPSTREAM, is_safe=True),
    Ending.CONNECT_TIMEOUT: OutcomeRule("timeout", Owner.UPSTREAM, is_safe=True),
    Ending.BROKEN: OutcomeRule("failed", Owner.UPSTREAM),
    Ending.TIMEOUT: OutcomeRule("timeout", Owner.UPSTREAM),
    Ending.LOST: OutcomeRule("timeout", Owner.UPSTREAM),
    Ending.STALE: OutcomeRule("unknown", Owner.PROXY),
    Ending.OUT_OF_RESOURCES: OutcomeRule("unknown", Owner.PROXY, is_safe=True),
    Ending.STOPPED: OutcomeRule("unknown", Owner.PROXY),
    Ending.CLIENT_LEFT: OutcomeRule("unknown", Owner.CLIENT),
}

ANSWERED = Ending.ANSWERED  # a module name: before Python 3.12, a lookup in the enum takes 0.1 µs
ABOUT_THE_REQUEST = (501, 508)  # not implemented at this path; loop detected
REFUSALS = {429: Ending.BUSY, 503: Ending.UNAVAILABLE}

_OWN_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL)
_OWN_RESOLVER_ERRORS = (socket.EAI_MEMORY, socket.EAI_SYSTEM)


def ending_of(status: int) -> Ending:
    """The ending of an attempt whose response, with this status, is sent to the client."""
    return ANSWERED if status < 500 or status in ABOUT_THE_REQUEST else Ending.SERVER_ERROR


def is_answer(status: int) -> bool:
    """Whether a response with this status shows no failure of the upstream."""
    return ending_of(status) is ANSWERED


def is_own_fault(error: BaseException | None) -> bool:
    """Whether a connection failed because this process lacks descriptors, ports, memory or threads."""
    if isinstance(error, socket.gaierror):
        return error.errno in _OWN_RESOLVER_ERRORS
    if isinstance(error, OSError):
        return error.errno in _OWN_ERRNOS
    return error is not None
