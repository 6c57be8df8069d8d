"""The rules and the usage of one API key: its models, limits and counters. Pure: the caller gives the time, `now`.

The secret is in `keys.py`, not here. Of HTTP only the names of OpenAI's rate limit headers appear. The calls for a
request are, in order: `arrival_refusal`, `begin`, `spend` each time a number of tokens becomes known, `end`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from brlite.config.options import KeyConfig
from brlite.errors import Forbidden, RateLimited
from brlite.http.bucket import Bucket

PLACE_RETRY_SECONDS = 1
MAX_SHOWN_NAME = 200
NO_RULES = KeyConfig(name="")


@dataclass
class KeyUsage:
    """The usage of a key since the server started. The seconds count only requests to local models."""

    num_admitted: int = 0
    num_forbidden: int = 0
    num_rate_limited: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class ApiKey:
    """One key's rules; without rules it may do everything. `name` is for logs and metrics, empty if it has none.

    `tenant` identifies the key in queues, turns and the prefix cache; it is never shown. An operator's key (`is_admin`)
    may see what all keys do. While requests wait, a key gets turns in proportion to its `weight`, after all keys with a
    lower `priority`.
    An accepted request counts even if it fails. Its tokens are known only at its end, so they may exceed the rest of
    the minute's budget. The key's next requests are then refused until the budget has refilled.
    """

    def __init__(self, rules: KeyConfig = NO_RULES, *, tenant: str = "") -> None:
        self.name = rules.name
        self.weight = rules.weight
        self.priority = rules.priority
        self.tenant = tenant
        self.is_admin = rules.admin
        self.usage = KeyUsage()
        self.num_running = 0
        self.num_arriving = 0  # requests whose bodies are being read
        self._models = rules.models
        self._max_concurrent = rules.max_concurrent
        per_minute = {"requests": rules.requests_per_minute, "tokens": rules.tokens_per_minute}
        self._buckets = {noun: Bucket(limit) for noun, limit in per_minute.items() if limit}
        self.has_limits = bool(self._max_concurrent or self._buckets)
        self.has_rules = bool(self.name or self._models or self.has_limits)  # else there is nothing to check or count

    def __repr__(self) -> str:
        return f"ApiKey({self.name!r})"

    def take_rules(self, other: ApiKey) -> None:
        """Replace the rules by the other's. The use of an unchanged limit is kept."""
        self._models, self._max_concurrent, self.is_admin = other._models, other._max_concurrent, other.is_admin
        self.weight, self.priority = other.weight, other.priority
        self._buckets = {
            noun: mine if (mine := self._buckets.get(noun)) and mine.per_minute == bucket.per_minute else bucket
            for noun, bucket in other._buckets.items()
        }
        self.has_limits, self.has_rules = other.has_limits, other.has_rules

    def may_use(self, model: str) -> bool:
        """Whether the key's rules allow the model."""
        return not self._models or model in self._models

    def check_model(self, model: str, sent: str | None = None) -> None:
        """Raise `Forbidden` for a model that the key may not use, whether the model exists or not.

        `sent` is the name in the request, if it may differ from `model` (an alias, or "" for a request that names no
        model). The message shows only `sent`, so that the client cannot find out `model`.
        """
        if self._models and model not in self._models:
            self.usage.num_forbidden += 1
            shown = model if sent is None else sent
            named = f"the model `{shown[:MAX_SHOWN_NAME]}`" if shown else "the model of a request that names none"
            allowed = ", ".join(self._models)
            raise Forbidden(f"This API key may not use {named}. It may use: {allowed}", param="model")

    def allowed_priority(self, wanted: int | None) -> tuple[int, tuple[str, ...]]:
        """The `priority` for a request that asks for `wanted`, and a warning if that is not allowed."""
        if wanted is None or wanted >= self.priority:
            return self.priority if wanted is None else wanted, ()
        return self.priority, (f"priority {wanted} was raised to {self.priority}, the lowest that this key may have",)

    def arrival_refusal(self, now: float) -> RateLimited | None:
        """The refusal of a request whose body has not been read, if it exceeds a limit of the key; else None."""
        return next(self._refusals(now, self.num_arriving), None) if self.has_limits else None

    def begin(self, now: float, model: str, sent: str | None = None) -> None:
        """Count a request against the limits by the minute and of concurrent requests. `end` must follow, once.

        `sent` is the name in the request, as in `check_model`.
        Raises `Forbidden` for a model that the key may not use, and `RateLimited`; then nothing is counted.
        """
        if self._models:
            self.check_model(model, sent)
        if self.has_limits:
            for refusal in self._refusals(now, 0):
                self.usage.num_rate_limited += 1
                raise refusal
            self._take("requests", now, 1)
        self.num_running += 1
        self.usage.num_admitted += 1

    def spend(self, now: float, prompt_tokens: int, completion_tokens: int, *, num_reserved: int = 0) -> None:
        """Count the tokens that a request has used. `num_reserved` of them were already taken by `reserve`."""
        self.usage.prompt_tokens += prompt_tokens
        self.usage.completion_tokens += completion_tokens
        self._take("tokens", now, prompt_tokens + completion_tokens - num_reserved)

    def reserve(self, now: float, tokens: int) -> None:
        """Take an estimate from the minute's token budget. `spend` with the real number must follow."""
        self._take("tokens", now, tokens)

    def end(self) -> None:
        """End a request that `begin` counted. Raises `RuntimeError` without a `begin`."""
        if not self.num_running:
            raise RuntimeError(f"key {self.name!r}: a request ended that had not begun")
        self.num_running -= 1

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for the limits by the minute."""
        headers = {}
        for noun, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{noun}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{noun}"] = str(bucket.remaining(now))
            headers[f"x-ratelimit-reset-{noun}"] = show_duration(bucket.seconds_until_full(now))
        return headers

    def _refusals(self, now: float, num_before: int) -> Iterator[RateLimited]:
        """A refusal for each limit that does not allow one more request after `num_before` others that begin first."""
        if self._max_concurrent and self.num_running + num_before >= self._max_concurrent:
            yield RateLimited(
                f"This API key allows {self._max_concurrent} requests at once (max_concurrent); "
                "try again when one has ended",
                retry_after_seconds=PLACE_RETRY_SECONDS,
            )
        for noun, bucket in self._buckets.items():
            count = 1 + num_before if noun == "requests" else 1
            seconds = math.ceil(bucket.seconds_until(now, count))
            if seconds:
                yield RateLimited(
                    f"This API key allows {bucket.per_minute} {noun} a minute ({noun}_per_minute); "
                    f"try again in {seconds} s",
                    retry_after_seconds=seconds,
                )

    def _take(self, noun: str, now: float, count: int) -> None:
        bucket = self._buckets.get(noun)
        if bucket is not None:
            bucket.take(now, count)


def show_duration(seconds: float) -> str:
    """A duration as OpenAI's headers write it: `12ms`, `8.64s`, `6m0s`. Rounded up to a millisecond."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes}m{milliseconds / 1000:g}s" if minutes else f"{milliseconds / 1000:g}s"
