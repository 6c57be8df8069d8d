"""What one check of `card.py` found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct


class Finding(Struct, frozen=True):
    """Of what, whether it is as it must be (None: it was not tried), a line about it, and the numbers for a program."""

    subject: str
    is_ok: bool | None
    text: str
    values: Mapping[str, Any] = {}
