"""HTTP GET from a hub: redirects, time limits, retries after transient failures, and errors by status.

Uses the standard library's client, so that the behaviour does not depend on the version of a hub's library. A token is
sent to the hub's own address only, never to the storage that it redirects to.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import brlite
from brlite.errors import ModelError, ModelUnreachable
from brlite.files.quoting import MAX_EXCERPT, one_line, reason

TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
MAX_JSON_BYTES = 64 * 2**20
MAX_LENGTH_DIGITS = 18  # of a Content-Length
USER_AGENT = f"brlite/{brlite.__version__}"

T = TypeVar("T")


class HubAddress(NamedTuple):
    """Where a hub is, and its name for messages. `token` may be ""; `token_variable` is the variable that sets it."""

    title: str
    endpoint: str
    token: str
    token_variable: str
    read_seconds: float


class Retries(NamedTuple):
    """How many tries a request has, and the waits between them, in seconds."""

    most: int = 5
    first_wait: float = 0.5
    most_wait: float = 8.0
    most_retry_after: float = 60.0


DEFAULT_RETRIES = Retries()


class PassingFailure(Exception):
    """A transient failure. `retry_after` is the server's Retry-After in seconds, if it sent one."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections by http and https, but not from https to http. The token stays at the hub's own address."""

    max_redirections = 8

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        allowed = ("https",) if old.scheme == "https" else ("http", "https")  # urllib follows ftp, too
        if new.scheme not in allowed:
            text = f"and redirects to {new.scheme}; allowed from {old.scheme}: {' and '.join(allowed)}"
            raise urllib.error.HTTPError(req.full_url, code, text, headers, fp)
        is_same = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        kept = {name: value for name, value in req.header_items() if is_same or name.lower() != "authorization"}
        kept.pop("Host", None)
        return urllib.request.Request(newurl, headers=kept)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 has none


def get(hub: HubAddress, url: str, repository: str, *, span: tuple[int, int] | None = None) -> Any:
    """The response to one GET. The caller reads and closes it. `span` asks for bytes [begin, end) of the file only.

    Raises `PassingFailure` or `ModelError`.
    """
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if hub.token:
        headers["Authorization"] = f"Bearer {hub.token}"
    if span is not None:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or "@" in address.netloc:  # not shown: it may have a password
        raise ModelError(f"the address of {hub.title} must begin with http:// or https://, and name no user")
    try:
        opener = urllib.request.build_opener(Redirects())
        return opener.open(urllib.request.Request(url, headers=headers), timeout=hub.read_seconds)
    except urllib.error.HTTPError as error:
        with closing(error):
            raise _explained(error, hub, repository) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise PassingFailure(f"{address.netloc}: {_said(cause)}") from error


def read_some(response: Any, num_bytes: int) -> bytes:
    """Some bytes of a response, b"" at its end. Raises `PassingFailure` for a connection that breaks or stalls."""
    try:
        data: bytes = response.read1(num_bytes)
        return data
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PassingFailure(_said(error)) from error


def get_json(hub: HubAddress, url: str, repository: str) -> Any:
    """The JSON at a URL. Raises `PassingFailure` or `ModelError`."""
    content = bytearray()
    with closing(get(hub, url, repository)) as response:
        while data := read_some(response, 2**20):
            content += data
            if len(content) > MAX_JSON_BYTES:
                raise ModelError(f"{hub.title} lists more than {MAX_JSON_BYTES} bytes of files")
        length = response.headers.get("Content-Length")
    if length is not None and length.isdecimal() and len(content) < int(length[:MAX_LENGTH_DIGITS]):
        raise PassingFailure("the connection was cut")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ModelError(f"{hub.endpoint} does not answer with JSON: is it a hub?") from None


def tried_again(work: Callable[[], T], retries: Retries, *, until: float | None = None) -> T:
    """Call `work`, and again after a `PassingFailure`, until `until`, a time of `time.monotonic`.

    Raises `ModelUnreachable` with the last failure's text.
    """
    for number in range(retries.most):
        try:
            return work()
        except PassingFailure as failure:
            wait = wait_before(number, failure, retries)
            if wait is None or (until is not None and time.monotonic() + wait > until):
                raise ModelUnreachable(str(failure)) from failure
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def wait_before(number: int, failure: PassingFailure, retries: Retries) -> float | None:
    """The seconds to wait after failure `number` in a row, counted from 0. None: do not try again."""
    if number + 1 >= retries.most or (failure.retry_after or 0) > retries.most_retry_after:
        return None
    return max(failure.retry_after or 0.0, min(retries.most_wait, retries.first_wait * 2.0**number))


def _explained(error: urllib.error.HTTPError, hub: HubAddress, repository: str) -> Exception:
    """The exception for an HTTP status. Its text, one line, tells the user what to do."""
    headers = error.headers
    code = headers.get("X-Error-Code", "")
    host, text = urlsplit(error.url).netloc, one_line(headers.get("X-Error-Message") or error.reason or "", MAX_EXCERPT)
    if host != urlsplit(hub.endpoint).netloc and not code and error.code not in TRANSIENT_STATUSES:  # a storage
        return ModelError(f"{host}, to which {hub.title} redirects, answers {error.code} {text}")
    has_token = "the token of" if hub.token else "set"
    if error.code in (401, 403) and code == "GatedRepo":
        return ModelError(
            f"{repository} is gated: accept its terms at {hub.endpoint}/{repository}, then set "
            f"{hub.token_variable} to a token of that account"
        )
    if code == "RevisionNotFound":
        return ModelError(f"{repository} has no such revision")
    if error.code in (401, 403):
        return ModelError(
            f"{repository} is not there, or private ({error.code}): {has_token} {hub.token_variable}"
            + (" may not read it" if hub.token else " to read private and gated models")
        )
    if error.code in (404, 410):
        return ModelError(f"there is no {repository}" if code != "EntryNotFound" else f"{repository} lacks that file")
    if error.code in TRANSIENT_STATUSES:
        value = (headers.get("Retry-After") or "").strip()  # hubs do not send its other form, a date
        retry_after = float(value) if value.isdecimal() and len(value) < 8 else None
        hint = f"; it allows no request for {retry_after:.0f} s" if retry_after else ""
        return PassingFailure(f"{host} answers {error.code} {text}{hint}", retry_after)
    return ModelError(f"{host} answers {error.code} {text}")


def _said(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return reason(error) if isinstance(error, BaseException) else one_line(error)
