"""API keys: who may ask. Only digests are kept, all of them are compared every time, and no key is ever logged.

It knows no users and no quotas; which resources are open is the caller's list, everything else is closed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from brlite.config import KeysConfig
from brlite.errors import ConfigError, Unauthorized
from brlite.http.resources import Resources


class ApiKeys:
    """The keys that are accepted; with none, everybody is."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        if any(not key.strip() for key in keys):
            raise ConfigError("keys.keys: an API key must not be empty")
        self._digests = tuple({_digest(key) for key in keys})

    @classmethod
    def from_config(cls, config: KeysConfig) -> ApiKeys:
        """The keys of the config, its file and its environment variable together."""
        from_env = os.environ.get(config.env, "").strip()
        from_file = _read_file(config.file) if config.file is not None else ()
        return cls((*config.keys, *from_file, *((from_env,) if from_env else ())))

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)} keys)"

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def accepts(self, key: str) -> bool:
        """Whether it is one of ours, in a time that does not tell how near it came."""
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def keys_middleware(keys: ApiKeys, open_resources: Resources) -> Middleware:
    """Refuse whoever shows no accepted key, but at `open_resources`."""

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not keys.is_open and request not in open_resources:
            _require_key(request.headers, keys)
        return await handler(request)

    return check_key


def _require_key(headers: Mapping[str, str], keys: ApiKeys) -> None:
    key = _shown_key(headers)
    if key is None:
        raise Unauthorized("You didn't provide an API key; send it in the header 'Authorization: Bearer KEY'.")
    if not keys.accepts(key):
        raise Unauthorized("Incorrect API key provided.")


def _shown_key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("X-Api-Key")


def _read_file(path: str) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"keys.file: cannot read {path!r}: {reason}") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        # An empty file must not mean an open server.
        raise ConfigError(f"keys.file: {path!r} holds no key; write one a line")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
