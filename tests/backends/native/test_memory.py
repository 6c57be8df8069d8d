"""Memory of the native library, and what is said where it is short."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.backends.native.memory import NativeMemory
from brlite.errors import ConfigError

MORE_THAN_ANY_MACHINE_HAS = 2**60


def library_that_gives(address: int | None) -> Any:
    return SimpleNamespace(brlite_allocate=lambda num_bytes: address, brlite_release=lambda address, num_bytes: None)


def test_more_than_is_free_is_a_warning_where_the_system_gives_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        NativeMemory(library_that_gives(4096), MORE_THAN_ANY_MACHINE_HAS, "the KV cache").close()

    [message] = caplog.messages
    assert message.startswith("the KV cache: 1.15e+06 TB, but ")
    assert message.endswith("; the system may end this process")


def test_what_is_free_is_taken_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        NativeMemory(library_that_gives(4096), 4096, "the KV cache").close()

    assert caplog.messages == []


def test_what_the_system_refuses_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"the KV cache takes 4\.1 kB, which is not there"):
        NativeMemory(library_that_gives(None), 4096, "the KV cache")
