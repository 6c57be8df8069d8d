"""An upstream's own key: it may come from the config or the environment, and never becomes another header."""

from __future__ import annotations

import pytest

from brlite.config.options import ProxyConfig, UpstreamConfig
from brlite.errors import ConfigError
from brlite.proxy.routing.upstream import Upstream


def test_a_key_from_the_environment_is_shown_without_the_space_around_it() -> None:
    config = UpstreamConfig(url="http://a", models=("m",), api_key_env="KEY")

    upstream = Upstream(config, ProxyConfig(), {"KEY": " sk-own\n"})

    assert upstream.own_headers == b"Host: a\r\nauthorization: Bearer sk-own\r\n"


@pytest.mark.parametrize("key", ["", "sk\r\nX-Evil: 1", "sk own", "sk\0", "ключ"])
def test_what_can_be_no_key_is_an_error_that_does_not_say_it(key) -> None:
    config = UpstreamConfig(url="http://a", models=("m",), api_key_env="KEY")

    with pytest.raises(ConfigError, match="upstream http://a: the variable KEY") as caught:
        Upstream(config, ProxyConfig(), {"KEY": key})

    assert not key or key not in str(caught.value)


def test_a_key_of_the_config_that_is_not_ascii_is_an_error_of_the_config() -> None:
    config = UpstreamConfig(url="http://a", models=("m",), api_key="ключ")

    with pytest.raises(ConfigError, match="upstream http://a: api_key: allowed is"):
        Upstream(config, ProxyConfig(), {})
