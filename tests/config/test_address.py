"""Which server a URL names, and where it has what requests call `/v1/…`."""

from __future__ import annotations

import pytest

from brlite.config.address import is_host, is_loopback_address, parse_address


@pytest.mark.parametrize(
    ("url", "chat", "health"),
    [
        ("http://a", "/v1/chat", "/health"),
        ("http://a/", "/v1/chat", "/health"),
        ("http://a/v1", "/v1/chat", "/health"),
        ("http://a/v1/", "/v1/chat", "/health"),
        ("http://a/models/x", "/models/x/v1/chat", "/models/x/health"),
        ("http://a/models/x/v1", "/models/x/v1/chat", "/models/x/health"),
        ("https://a/api/paas/v4", "/api/paas/v4/chat", "/api/paas/health"),
        ("https://a/api/paas/v4/", "/api/paas/v4/chat", "/api/paas/health"),
        ("https://a/v1beta/openai", "/v1beta/openai/chat", "/health"),
        ("https://a/v1beta/openai/", "/v1beta/openai/chat", "/health"),
        ("https://a/api/v3", "/api/v3/chat", "/api/health"),
        ("https://a/compatible-mode/v1", "/compatible-mode/v1/chat", "/compatible-mode/health"),
        ("https://a/v1alpha1/x", "/v1alpha1/x/chat", "/health"),
        ("http://a/v1ctoria", "/v1ctoria/v1/chat", "/v1ctoria/health"),
        ("http://a/vllm", "/vllm/v1/chat", "/vllm/health"),
        ("unix:/run/v1", "/v1/chat", "/health"),
    ],
)
def test_a_version_in_the_url_stands_in_place_of_v1(url: str, chat: str, health: str) -> None:
    address = parse_address(url)

    assert address is not None
    assert (address.path("/v1/chat"), address.path("/health")) == (chat, health)


def test_two_spellings_of_one_place_are_equal() -> None:
    assert parse_address("http://a:80/v1/") == parse_address("http://a") != parse_address("http://a/v2")


@pytest.mark.parametrize(
    "host", ["localhost", "a.example.", "0.0.0.0", "::", "::1", "fe80::1%eth0", "bücher.example", "a_b"]
)
def test_names_and_addresses_are_hosts(host: str) -> None:
    assert is_host(host)


@pytest.mark.parametrize("url", ["http://[1:2]", "http://[::1::]", f"http://{'x' * 64}"])
def test_a_url_without_a_possible_host_is_no_address(url: str) -> None:
    assert parse_address(url) is None


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("LocalHost", True),
        ("a.localhost", True),
        ("127.example", False),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("gpu-box", False),
        ("10.0.0.1", False),
    ],
)
def test_a_server_on_loopback_is_known_by_its_address(address: str, is_loopback: bool) -> None:
    assert is_loopback_address(address) is is_loopback
