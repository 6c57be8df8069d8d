"""How many files this process may have open. A connection is one, and a forwarded request is a second one."""

from __future__ import annotations

import resource

OWN = 80  # files of the process itself, and the connections beyond `max_connections` that probes may have
MAX_USEFUL = 1024 * 1024  # some programs, started as children, look at every number up to the limit


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _useful(hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    """How many descriptors the process can have once its limit is raised."""
    return _useful(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _useful(limit: int) -> int:
    return MAX_USEFUL if limit == resource.RLIM_INFINITY else min(limit, MAX_USEFUL)
