"""What one key may do: its models, its limits, and what it says about them."""

from __future__ import annotations

import pytest

from brlite.config.options import KeyConfig
from brlite.errors import Forbidden, RateLimited
from brlite.http.api_key import ApiKey, KeyUsage, show_duration


def test_a_key_without_rules_may_do_everything() -> None:
    key = ApiKey()

    for _ in range(1000):
        key.check_model("anything")
        key.begin(0.0, "m")
        key.spend(0.0, 10**6, 10**6)

    assert not key.has_limits
    assert key.headers(0.0) == {}
    assert key.usage == KeyUsage(num_admitted=1000, prompt_tokens=10**9, completion_tokens=10**9)


def test_a_model_that_is_not_its_own_is_refused_with_those_that_are() -> None:
    key = ApiKey(KeyConfig(name="team-a", models=("small", "large")))

    with pytest.raises(Forbidden) as caught:
        key.check_model("secret-model")

    assert str(caught.value) == "This API key may not use the model `secret-model`. It may use: small, large"
    assert caught.value.param == "model"
    assert [key.may_use(model) for model in ("small", "large", "Small", "")] == [True, True, False, False]
    assert key.usage == KeyUsage(num_forbidden=1)


def test_a_long_name_of_a_model_is_cut_in_the_refusal() -> None:
    key = ApiKey(KeyConfig(name="", models=("small",)))

    with pytest.raises(Forbidden) as caught:
        key.check_model("x" * 10**6)

    assert len(str(caught.value)) < 300


def test_requests_beyond_the_minutes_are_refused_until_one_has_come_back() -> None:
    key = ApiKey(KeyConfig(name="", requests_per_minute=2))
    key.begin(0.0, "m")
    key.begin(0.0, "m")

    with pytest.raises(RateLimited, match=r"2 requests a minute \(requests_per_minute\); try again in 20 s") as caught:
        key.begin(10.0, "m")
    key.begin(30.0, "m")

    assert caught.value.retry_after_seconds == 20
    assert key.usage == KeyUsage(num_admitted=3, num_rate_limited=1)


def test_tokens_are_charged_afterwards_and_a_debt_is_waited_for() -> None:
    key = ApiKey(KeyConfig(name="", tokens_per_minute=60))
    key.begin(0.0, "m")
    key.begin(0.0, "m")
    key.spend(0.0, 50, 100)

    with pytest.raises(RateLimited, match=r"60 tokens a minute \(tokens_per_minute\); try again in 91 s") as caught:
        key.begin(0.0, "m")
    key.begin(91.0, "m")

    assert caught.value.retry_after_seconds == 91
    assert (key.usage.prompt_tokens, key.usage.completion_tokens) == (50, 100)


def test_a_place_is_given_back_at_the_end() -> None:
    key = ApiKey(KeyConfig(name="", max_concurrent=2))
    key.begin(0.0, "m")
    key.begin(0.0, "m")

    with pytest.raises(RateLimited, match=r"2 requests at once \(max_concurrent\)") as caught:
        key.begin(0.0, "m")
    key.end()
    key.begin(0.0, "m")

    assert caught.value.retry_after_seconds == 1
    assert key.num_running == 2


def test_a_refused_request_takes_nothing() -> None:
    key = ApiKey(KeyConfig(name="", requests_per_minute=3, max_concurrent=1))
    key.begin(0.0, "m")

    for _ in range(10):
        with pytest.raises(RateLimited, match="max_concurrent"):
            key.begin(0.0, "m")

    assert key.headers(0.0)["x-ratelimit-remaining-requests"] == "2"
    assert key.num_running == 1


def test_the_headers_are_those_of_openai() -> None:
    key = ApiKey(KeyConfig(name="", requests_per_minute=60, tokens_per_minute=6000, max_concurrent=5))
    key.begin(0.0, "m")
    key.spend(0.0, 6000, 1000)

    assert key.headers(0.25) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "750ms",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m9.75s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.999, "999ms"),
        (0.9999, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3661.5, "61m1.5s"),
    ],
)
def test_durations_are_written_as_in_openais_headers(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


def test_the_config_is_taken_as_it_is() -> None:
    config = KeyConfig(
        name="team-a", key="sk", models=("m",), requests_per_minute=7, tokens_per_minute=8, max_concurrent=1
    )

    key = ApiKey(config)
    key.begin(0.0, "m")

    assert (key.name, key.may_use("m"), key.may_use("n")) == ("team-a", True, False)
    headers = key.headers(0.0)
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-limit-tokens"]) == ("7", "8")
    with pytest.raises(RateLimited, match="max_concurrent"):
        key.begin(0.0, "m")
    assert "sk" not in repr(key)
