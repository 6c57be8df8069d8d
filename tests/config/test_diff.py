"""The diff of two configs: a line for each option, and no key in any of them."""

from __future__ import annotations

import msgspec
import pytest

from brlite.config.diff import Change, diff
from brlite.config.options import Config, KeyConfig, KeysConfig, ModelSpec, ProxyConfig, ServerConfig, UpstreamConfig

A = UpstreamConfig(url="http://a", models=("m",), api_key="sk-old")
B = UpstreamConfig(url="http://b", models=("m",), name="gpu-b")
OLD = Config(
    upstream=(A, B),
    keys=KeysConfig(keys=("sk-old",)),
    key=(KeyConfig(name="team", key="sk-team"),),
)


def changed(**fields: object) -> list[str]:
    return [change.text for change in diff(OLD, msgspec.structs.replace(OLD, **fields))]


def test_equal_configs_have_no_difference() -> None:
    assert diff(OLD, msgspec.structs.replace(OLD)) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"server": ServerConfig(port=9)}, "server.port: 8000 -> 9"),
        ({"proxy": ProxyConfig(aliases={"x": "m"})}, 'proxy.aliases: {} -> {"x": "m"}'),
        ({"upstream": (A,)}, "- upstream gpu-b"),
        ({"upstream": (A, B, UpstreamConfig(url="http://c", models=("n",), weight=2))}, "+ upstream http://c: "),
        ({"upstream": (A, msgspec.structs.replace(B, weight=3))}, "upstream gpu-b.weight: 1 -> 3"),
        ({"upstream": (msgspec.structs.replace(A, api_key="sk-new"), B)}, "upstream http://a.api_key: another one"),
        ({"upstream": (msgspec.structs.replace(A, api_key=None), B)}, 'upstream http://a.api_key: "***" -> null'),
        ({"keys": KeysConfig(keys=("sk-new",))}, "keys.keys: another one"),
        ({"keys": KeysConfig(keys=("sk-old", "sk-new"))}, 'keys.keys: ["***"] -> ["***", "***"]'),
        ({"key": (KeyConfig(name="team", key="sk-new"),)}, "key team.key: another one"),
        ({"key": (*OLD.key, KeyConfig(name="two", key="sk-new", max_concurrent=2))}, '+ key two: key = "***", max_'),
        ({"model": (ModelSpec(build_seq=64),)}, "model HuggingFaceTB/SmolLM2-135M-Instruct.build_seq: 0 -> 64"),
    ],
)
def test_one_change_is_one_line_without_a_key(fields: dict[str, object], line: str) -> None:
    (text,) = changed(**fields)

    assert text.startswith(line)
    assert "sk-" not in text


def test_a_new_entry_is_shown_by_what_is_not_the_default() -> None:
    (text,) = changed(upstream=(A, B, UpstreamConfig(url="http://c", models=("n",), weight=2)))

    assert text == '+ upstream http://c: url = "http://c", models = ["n"], weight = 2'


def test_the_order_of_entries_means_nothing() -> None:
    assert changed(upstream=(B, A)) == []


def test_changes_name_their_section_in_the_order_of_the_config() -> None:
    new = msgspec.structs.replace(OLD, upstream=(A,), proxy=ProxyConfig(max_queued=1), server=ServerConfig(port=9))

    assert [change.section for change in diff(OLD, new)] == ["server", "upstream", "proxy"]
    assert diff(OLD, new)[1] == Change("upstream", "- upstream gpu-b")
