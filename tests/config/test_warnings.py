"""What a config that is valid is warned about, where requests are forwarded."""

from __future__ import annotations

import os
from typing import Any

import pytest

from brlite.config.options import (
    Config,
    EngineConfig,
    KeyConfig,
    KeysConfig,
    ModelSpec,
    ProxyConfig,
    ServerConfig,
    UpstreamConfig,
)
from brlite.config.warnings import config_warnings, metrics_notes

LOCAL = (ModelSpec(name="here"),)


def upstream(**fields: Any) -> Config:
    """A proxy with one upstream that has the model `far`."""
    return Config(model=(), upstream=(UpstreamConfig(**{"url": "http://10.0.0.1", "models": ("far",), **fields}),))


def forwarding(**fields: Any) -> Config:
    """A local model, an upstream's and these options of `[proxy]`."""
    there = (UpstreamConfig(url="http://10.0.0.1", models=("far",)),)
    return Config(model=LOCAL, upstream=there, proxy=ProxyConfig(**fields))


@pytest.mark.parametrize(
    "config",
    [
        upstream(),
        upstream(url="https://api.example.com", api_key="k"),
        upstream(url="http://127.0.0.1:1", api_key="k"),
        upstream(url="unix:/run/model.sock", api_key_env="K"),
        forwarding(aliases={"x": "far"}),
        Config(model=LOCAL, proxy=ProxyConfig(all_models={"http://ip1:port1": "here", "http://10.0.0.2": "far"})),
    ],
)
def test_what_is_in_order_is_not_warned_about(config: Config) -> None:
    assert config_warnings(config) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(model=LOCAL, proxy=ProxyConfig(all_models={"http://ip:port": "far", "http://a": "here"})),
            "all_models: http://ip:port is not an address, so far is not forwarded",
        ),
        (
            Config(model=LOCAL, proxy=ProxyConfig(all_models={"http://a": "far"})),
            "all_models: here is served here but not listed",
        ),
        (
            Config(model=LOCAL, proxy=ProxyConfig(all_models={"http://a": "here", "http://b": "here"})),
            "all_models: here is served here, not forwarded: ",
        ),
        (
            forwarding(all_models={"http://10.0.0.1": "other", "http://a": "here"}),
            "all_models: http://10.0.0.1 is also an [[upstream]], and only its models count: other is",
        ),
        (
            Config(model=LOCAL, upstream=(UpstreamConfig(url="http://a", models=("here",), name="gpu"),)),
            "upstream gpu: here is served here, not forwarded",
        ),
        (upstream(api_key="k"), "upstream http://10.0.0.1: its API key is sent unencrypted"),
        (upstream(api_key_env="K"), "upstream http://10.0.0.1: its API key is sent unencrypted"),
        (upstream(api_key_header="x-api-key"), "upstream http://10.0.0.1: api_key_header has no effect"),
        (upstream(health_path=""), 'upstream http://10.0.0.1: health_path = "": no health checks'),
        (
            Config(
                model=LOCAL,
                proxy=ProxyConfig(all_models={"http://a": "here", "http://ip:port": "far"}, aliases={"x": "far"}),
            ),
            "proxy.aliases.x: far has no upstream",
        ),
        (
            forwarding(all_models={"http://10.0.0.1": "other", "http://a": "here"}, aliases={"x": "other"}),
            "proxy.aliases.x: other has no upstream",
        ),
        (forwarding(fallbacks={"here": ("far",)}), "proxy.fallbacks.here: has no effect"),
        (forwarding(fallbacks={"far": ("here",)}), "proxy.fallbacks.far: here has no upstream"),
        (forwarding(fallbacks={"far": ("far",)}), "proxy.fallbacks.far: names itself"),
        (Config(key=(KeyConfig(name="team", key="k", models=("nobodys",)),)), "key team: models: nobodys is neither"),
        (
            Config(
                model=LOCAL,
                upstream=(UpstreamConfig(url="http://a", models=("far",)),),
                proxy=ProxyConfig(aliases={"x": "far"}),
                key=(KeyConfig(name="team", key="k", models=("x",)),),
            ),
            "key team: models: x is an alias; write the model's own name, far",
        ),
        (
            Config(
                model=(), upstream=(UpstreamConfig(url="http://a", models=("far",)),), engine=EngineConfig(threads=1)
            ),
            "engine: has no effect: no model is served here",
        ),
    ],
)
def test_what_means_less_than_it_seems_to_is_warned_about(config: Config, message: str) -> None:
    warnings = config_warnings(config)

    assert any(line.startswith(message) for line in warnings), warnings


@pytest.mark.parametrize(
    "origin",
    [
        *("*", "null", "https://app.example.com", "http://localhost:3000", "http://[::1]:3000", "https://a.example:80"),
        *("file://", "vscode-webview://1f2e", "chrome-extension://abcdef", "tauri://localhost", "app://obsidian.md"),
    ],
)
def test_an_origin_that_browsers_send_is_not_warned_about(origin: str) -> None:
    assert config_warnings(Config(server=ServerConfig(cors_origins=(origin,)))) == []


@pytest.mark.parametrize(
    "origin",
    [
        *("https://app.example.com/", "https://App.example.com", "app.example.com", "https://*.example.com"),
        *(
            "https://app.example.com:443",
            "http://a:80",
            "https://a.example/app",
            "http://localhost:*",
            "https://ü.example",
        ),
    ],
)
def test_an_origin_that_no_browser_sends_is_warned_about(origin: str) -> None:
    (warning,) = config_warnings(Config(server=ServerConfig(cors_origins=(origin,))))

    assert warning.startswith(f"server.cors_origins: no browser sends {origin} as an origin")


@pytest.mark.parametrize(
    ("host", "is_good"),
    [
        *(("*", True), ("API.example", True), ("gpu:8000", True), ("[fd00::2]", True)),
        *(("https://api.example", False), ("api.example/", False), ("*.example", False)),
    ],
)
def test_a_host_that_no_client_sends_is_warned_about(host: str, is_good: bool) -> None:
    warnings = config_warnings(Config(server=ServerConfig(allowed_hosts=(host,))))

    assert [line.partition(" as Host")[0] for line in warnings] == (
        [] if is_good else [f"server.allowed_hosts: no client sends {host}"]
    )


def test_more_threads_than_this_process_may_use_are_warned_about() -> None:
    config = Config(engine=EngineConfig(threads=(os.cpu_count() or 1) + 1))

    (warning,) = config_warnings(config)

    assert warning.startswith(f"engine.threads = {config.engine.threads}: this process may use ")
    assert "0 sets the right number" in warning


def test_threads_of_a_proxy_are_not_counted() -> None:
    config = Config(model=(), upstream=upstream().upstream, engine=EngineConfig(threads=1024))

    assert not any("this process may use" in warning for warning in config_warnings(config))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (Config(), []),
        (Config(keys=KeysConfig(keys=("k",))), ["/metrics needs an API key: "]),
        (Config(key=(KeyConfig(name="a", key="k"),)), ["/metrics needs an operator's API key (admin = true): "]),
        (Config(keys=KeysConfig(keys=("k",)), server=ServerConfig(metrics_need_key=False)), []),
    ],
)
def test_the_start_says_which_key_metrics_need(config: Config, wanted: list[str]) -> None:
    assert [line.split("configure")[0] for line in metrics_notes(config)] == wanted
