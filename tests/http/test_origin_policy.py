"""Which pages may ask, and by which names: the decision alone, from three headers."""

from __future__ import annotations

import pytest

from brlite.http.keys import ApiKeys
from brlite.http.origin_policy import OriginPolicy

LOCAL = OriginPolicy(keys=ApiKeys(), is_loopback=True)
HOST = "127.0.0.1:8000"


@pytest.mark.parametrize(
    ("origin", "fetch_site"),
    [
        ("https://evil.example", None),
        ("https://evil.example", "cross-site"),
        ("https://evil.example", "same-site"),
        ("https://evil.example", "none"),
        (None, "cross-site"),
        ("null", None),
        ("null", "cross-site"),
        ("http://127.0.0.1:3000", None),
        ("http://127.0.0.1:3000", "same-site"),
        ("http://127.0.0.1", "same-site"),
        ("http://localhost:8000", None),
        ("http://[::1]:8000", None),
        ("https://127.0.0.1:8000", None),
        ("https://127.0.0.1:8000", "cross-site"),
        ("ws://127.0.0.1:8000", None),
        ("file://", None),
        ("chrome-extension://abc", "none"),
        ("http://127.0.0.1:8000.evil.example", None),
        ("http://127.0.0.1:8000, https://evil.example", None),
        ("http://127.0.0.1:8000", "cross-site"),
        ("", None),
    ],
)
def test_a_page_that_is_not_the_servers_own_may_not_ask(origin: str | None, fetch_site: str | None) -> None:
    refusal = LOCAL.refusal(HOST, origin, fetch_site)

    assert refusal is not None
    assert refusal.code == "origin_not_allowed"
    assert "server.cors_origins" in str(refusal)


@pytest.mark.parametrize(
    ("host", "origin", "fetch_site"),
    [
        (HOST, None, None),  # curl, SDKs
        (HOST, None, "none"),  # typed into the address bar
        (HOST, None, "same-origin"),
        (HOST, None, "same-site"),  # a link or an image on another port of this machine: a GET, which changes nothing
        (HOST, "http://127.0.0.1:8000", None),
        (HOST, "http://127.0.0.1:8000", "same-origin"),
        ("localhost:8000", "http://localhost:8000", "same-origin"),
        ("LOCALHOST:80", "http://localhost", None),
        ("[::1]:8000", "http://[::1]:8000", "same-origin"),
        (HOST, "https://chat.example", "same-origin"),  # by a proxy with TLS that calls us by our address
        (HOST, "http://localhost:3000", "same-origin"),  # by a page's development server
        (None, None, None),  # HTTP/1.0
    ],
)
def test_programs_and_the_servers_own_pages_may_ask(
    host: str | None, origin: str | None, fetch_site: str | None
) -> None:
    assert LOCAL.refusal(host, origin, fetch_site) is None


@pytest.mark.parametrize("fetch_site", [None, "cross-site", "same-site"])
def test_a_page_that_is_listed_may_ask(fetch_site: str | None) -> None:
    policy = OriginPolicy(("https://app.example",))

    assert policy.refusal("x", "https://app.example", fetch_site) is None
    assert policy.refusal("x", "https://app.example:8443", fetch_site) is not None
    assert policy.refusal("x", None, "cross-site") is not None


@pytest.mark.parametrize("origin", [None, "null", "https://evil.example"])
def test_with_a_star_every_page_may_ask(origin: str | None) -> None:
    assert OriginPolicy(("*",)).refusal("x", origin, "cross-site") is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1.evil.example",
        "evil.internal",
        "",
        "[::2].evil.example",
        "[::2",
        "127.0.0.1, evil.example",
        "127.0.0.1:8000@evil.example",
        "localhost:8000:8000",
        "\udcff",
    ],
)
def test_on_loopback_without_keys_a_name_that_is_not_local_is_refused(host: str) -> None:
    refusal = LOCAL.refusal(host, None, None)

    assert refusal is not None
    assert refusal.code == "host_not_allowed"
    assert "server.allowed_hosts" in str(refusal)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "app.localhost:1",
        "127.0.0.1",
        "127.8.8.8:9",
        "127.1:8000",
        "[::1]:8000",
        "0.0.0.0:8000",
        "host.docker.internal:8000",
        "ip6-localhost",
        "localhost.localdomain",
        "gateway.docker.internal",
        "host.minikube.internal:8000",
        "10.0.2.2:8000",  # what Android's emulator calls the machine
        "172.17.0.1",  # docker's, by a forwarder
        "[fd00::2]:8000",
        "[::ffff:127.0.0.1]",
    ],
)
def test_local_names_and_addresses_are_good(host: str) -> None:
    assert LOCAL.refusal(host, None, None) is None


@pytest.mark.parametrize("policy", [OriginPolicy(keys=ApiKeys(("k",)), is_loopback=True), OriginPolicy(keys=ApiKeys())])
def test_with_keys_or_off_loopback_any_name_is_good(policy: OriginPolicy) -> None:
    assert policy.refusal("api.example", None, None) is None


@pytest.mark.parametrize("is_loopback", [False, True])
def test_allowed_hosts_add_to_local_names_and_hold_everywhere(is_loopback: bool) -> None:
    policy = OriginPolicy((), ("API.example", "gpu:8000"), keys=ApiKeys(("k",)), is_loopback=is_loopback)

    assert policy.refusal("api.example:443", None, None) is None
    assert policy.refusal("GPU", None, None) is None
    assert policy.refusal("localhost:1", None, None) is None
    assert policy.refusal("evil.example", None, None) is not None


def test_a_star_among_the_hosts_allows_every_name() -> None:
    assert OriginPolicy((), ("*",), keys=ApiKeys(), is_loopback=True).refusal("evil.example", None, None) is None


def test_keys_that_come_by_a_reload_open_the_names() -> None:
    keys = ApiKeys()
    policy = OriginPolicy(keys=keys, is_loopback=True)
    before = policy.refusal("api.example", None, None)

    keys.replace(ApiKeys(("k",)))

    assert before is not None
    assert policy.refusal("api.example", None, None) is None
