"""The shared secret of ranks on several machines. Each rank and rank 0 prove that they have it; it is never sent.

Rank 0 makes a new nonce for each start and publishes it with its address in the launcher's store. Proofs are HMACs over
both. Without a secret an empty one is used: then any client of the store can make a proof. Nothing is encrypted, and
torch's own connections between the ranks are not authenticated.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from brlite.errors import ConfigError

VARIABLE = "BRLITE_RANK_SECRET"
FILE_VARIABLE = "BRLITE_RANK_SECRET_FILE"
MIN_BYTES, MAX_BYTES = 16, 4096


def read_secret(environment: Mapping[str, str]) -> bytes:
    """The secret from the environment or its file; b"" if none is set. Raises `ConfigError`."""
    name, secret = VARIABLE, environment.get(VARIABLE, "").encode("utf-8", "surrogateescape").strip()
    if not secret:
        path = environment.get(FILE_VARIABLE)
        if not path:
            return b""
        name = f"{FILE_VARIABLE}: {path}"
        try:
            with Path(path).open("rb") as file:
                secret = file.read(MAX_BYTES + 1).strip()
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    if not MIN_BYTES <= len(secret) <= MAX_BYTES:
        raise ConfigError(f"{name}: has {len(secret)} bytes; allowed are {MIN_BYTES} to {MAX_BYTES}")
    return secret


def proof(secret: bytes, *parts: object) -> str:
    """An HMAC over the parts, which proves the knowledge of the secret."""
    return hmac.new(secret, "|".join(map(str, parts)).encode(), "sha256").hexdigest()


def is_proof(claimed: str, secret: bytes, *parts: object) -> bool:
    """Whether `claimed` is the proof for these parts. Takes constant time."""
    return hmac.compare_digest(claimed.encode("utf-8", "surrogatepass"), proof(secret, *parts).encode())
