"""API keys: which requests are accepted. Only digests are kept; a request's key is compared with all; none is logged.

The rules of a key are in `api_key.py`. The caller lists the resources that need no key. `ApiKeys` and `shown_key` do
not depend on aiohttp: the fast path uses them.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from aiohttp import hdrs, web

from brlite.config.options import Config, KeyConfig
from brlite.errors import ConfigError, Unauthorized
from brlite.files.text_file import TextError, read_text
from brlite.http.api_key import ApiKey
from brlite.process.children import read_secret


class ApiKeys:
    """The accepted API keys. If there are none, requests need no key.

    `plain` keys have no name and no rules. `named` keys are pairs of a secret and its rules.
    """

    def __init__(
        self, plain: Sequence[str] = (), named: Sequence[tuple[str, ApiKey]] = (), *, is_admin: bool = False
    ) -> None:
        """`is_admin`: the plain keys are an operator's keys."""
        if not all(secret.strip() for secret in (*plain, *(secret for secret, _ in named))):
            raise ConfigError("keys.keys, [[key]]: an API key must not be empty")
        self.anybody = ApiKey()  # the key of requests that need none
        self._named = tuple(key for _, key in named)
        rules = KeyConfig(name="", admin=is_admin)
        known = {digest: ApiKey(rules, tenant=f"digest:{digest.hex()}") for digest in map(_digest, plain)}
        for secret, key in named:
            other = known.setdefault(_digest(secret), key)
            if other is not key:
                whose = f"of the key {other.name}" if other.name else "in [keys]"
                raise ConfigError(f"key {key.name}: its secret is also that {whose}; each key needs its own")
        self._known = tuple(known.items())
        self.is_open = not self._known  # whether no key is needed

    @classmethod
    def from_config(cls, config: Config) -> ApiKeys:
        """The keys of `[keys]`, of its file and its environment variable, and of `[[key]]`."""
        named = []
        for index, key in enumerate(config.key):
            secret = key.key or "" if key.env is None else read_secret(key.env)
            if key.env is not None and not secret:
                raise ConfigError(f"key[{index}].env: the environment variable {key.env} is not set, or empty")
            named.append((secret or "", ApiKey(key, tenant=f"name:{key.name}")))
        plain, from_env = list(config.keys.keys), read_secret(config.keys.env)
        if (path := config.keys.file) is not None:
            try:
                text = read_text(Path(path))
            except TextError as error:
                raise ConfigError(f"keys.file: cannot read {path!r}: {error}") from None
            plain += parse_keys(text, f"keys.file: {path!r}")
        return cls([*plain, from_env] if from_env else plain, named, is_admin=config.keys.admin)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._known)} keys)"

    def __iter__(self) -> Iterator[ApiKey]:
        """The named keys."""
        return iter(self._named)

    def replace(self, other: ApiKeys) -> bool:
        """Accept only the keys of `other` from now on. False if they are the same keys.

        A key with an unchanged name keeps its usage, its running requests and the used part of unchanged limits.
        """
        before = self._secrets()
        known_by_name = {key.name: key for key in self._named}
        by_name = {}
        for key in other._named:
            by_name[key.name] = known_by_name.get(key.name, key)
            if by_name[key.name] is not key:
                by_name[key.name].take_rules(key)
        self._named = tuple(by_name.values())
        self._known = tuple((digest, by_name.get(key.name, key)) for digest, key in other._known)
        self.is_open = not self._known
        return self._secrets() != before

    def _secrets(self) -> frozenset[tuple[bytes, str]]:
        return frozenset((digest, key.name) for digest, key in self._known)

    def find(self, shown: str | None) -> ApiKey | None:
        """The accepted key equal to `shown`, or None. The comparison takes the same time for each wrong key."""
        if not self._known:
            return self.anybody
        if shown is None:
            return None
        digest, found = _digest(shown), None
        for known, key in self._known:
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def may_see_all(self, key: ApiKey | None) -> bool:
        """Whether a request with this key, or None, may see data of all keys: if keys have names, only an operator."""
        return not self._named or (key is not None and key.is_admin)

    def require(self, shown: str | None) -> ApiKey:
        """The accepted key equal to `shown`. Raises `Unauthorized` if there is none."""
        key = self.find(shown)
        if key is not None:
            return key
        if shown is None:
            raise Unauthorized("You didn't provide an API key; send it in the header 'Authorization: Bearer KEY'.")
        raise Unauthorized("Incorrect API key provided.")


KEYS = web.AppKey("keys", ApiKeys)
API_KEY = web.RequestKey("api_key", ApiKey)  # the key that let the request in; not set at open resources


def shown_key(authorization: str | None, x_api_key: str | None) -> str | None:
    """The key in a request's two headers. The headers' bytes are decoded as UTF-8 with `surrogateescape`."""
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer":
            return key.strip()
    return x_api_key


def shown_api_key(request: web.Request) -> ApiKey | None:
    """The accepted key in the request, for handlers of open resources. None without an accepted key."""
    headers = request.headers
    return request.app[KEYS].find(shown_key(headers.get(hdrs.AUTHORIZATION), headers.get("X-Api-Key")))


def spend_tokens(request: web.BaseRequest, prompt_tokens: int, completion_tokens: int) -> None:
    """Count the tokens that the request has used under its key."""
    request[API_KEY].spend(time.monotonic(), prompt_tokens, completion_tokens)


def parse_keys(text: str, source: str) -> tuple[str, ...]:
    """The keys in a text, one a line, comments skipped. Raises `ConfigError`, naming `source`, if there is none."""
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        # An empty file must not result in an open server.
        raise ConfigError(f"{source} holds no key; write one a line")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
