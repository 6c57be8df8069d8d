"""The one exception tree. Errors say what was wrong, what is allowed and which field; they know nothing of HTTP.

BrliteError
├── ConfigError: MissingExtra, CannotListen
├── ModelError: ModelUnreachable
├── NativeUnavailable
├── EngineError: BackendLost, RankGone
└── RequestError: InvalidRequest (PromptTooLong), Unauthorized, Forbidden (OperatorKeyRequired),
    NotFound (ModelNotFound), MethodNotAllowed, RequestTimeout, BodyTooLarge, UnsupportedMediaType, QueueFull,
    QueueTimeout, RateLimited, NotReady, LoopDetected, UpstreamError (UpstreamUnavailable, UpstreamTimeout)

The HTTP status of each stands in one table, `brlite/dialects/errors.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class BrliteError(Exception):
    """Root of everything brlite raises on purpose. `str(error)` is one line fit for a user."""


class ConfigError(BrliteError):
    """A config file or a command line is wrong."""


class MissingExtra(ConfigError):
    """A package is needed that only an extra of brlite installs; the extra has its name."""

    def __init__(self, needs: str, package: str, error: Exception) -> None:
        reason = " ".join(str(error).split())
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == package
        state = "is not installed" if is_absent else f"cannot be imported ({reason})"
        super().__init__(f"{needs} needs {package}, which {state}: pip install 'brlite[{package}]'")


class CannotListen(ConfigError):
    """The server's address is in use or not there; another start may succeed."""


class ModelError(BrliteError):
    """A model folder, file or download is missing, broken or unsupported."""


class ModelUnreachable(ModelError):
    """A hub cannot be reached, or a download broke off; another start may succeed."""


class NativeUnavailable(BrliteError):
    """The native kernels cannot be built, loaded or trusted on this machine."""


class EngineError(BrliteError):
    """A step of the engine failed."""


class BackendLost(EngineError):
    """A process or device that computed a model's steps is gone: its backend can only be closed, and loaded anew."""


class RankGone(EngineError):
    """A rank cannot continue, because another one is gone. The reason is the other rank's own error or exit status."""


class RequestError(BrliteError):
    """A request is refused. `param` is the field at fault; `retry_after_seconds` is set where waiting helps."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds


class InvalidRequest(RequestError, ValueError):
    """A field is missing, ill-typed or out of range."""


class PromptTooLong(InvalidRequest):
    """The prompt does not fit the context that the server was started with.

    It has at least `num_tokens`, and may have `max_tokens`; 0 where they are not known.
    """

    num_tokens = 0
    max_tokens = 0


class Unauthorized(RequestError):
    """No API key, or a wrong one."""


class Forbidden(RequestError):
    """The API key may not be used for this model, or the web page or host name is not allowed."""


class OperatorKeyRequired(Forbidden):
    """Only an operator's key may be used for this path."""


class NotFound(RequestError):
    """There is nothing at this path."""


class ModelNotFound(NotFound):
    """The model is not served here."""


class MethodNotAllowed(RequestError):
    """The path exists, the method does not; `allowed` lists those that do."""

    def __init__(self, message: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class RequestTimeout(RequestError):
    """The client was too slow to send its request, or the request took longer than its own `timeout`."""


class BodyTooLarge(RequestError):
    """The request body is larger than the server allows."""


class UnsupportedMediaType(RequestError):
    """The request body is not JSON."""


class QueueFull(RequestError):
    """Too many requests wait already."""


class QueueTimeout(RequestError):
    """The request waited in the queue for longer than allowed."""


class NotReady(RequestError):
    """The model is still loading, or the server is stopping."""


class RateLimited(RequestError):
    """The API key has used up its requests or tokens of this minute, or runs as many requests as it may."""


def stopping(retry_after_seconds: int = 5) -> NotReady:
    """The error of new work, and of work that waits, on a server that shuts down."""
    return NotReady("the server is stopping", retry_after_seconds=retry_after_seconds)


class LoopDetected(RequestError):
    """The request was forwarded by this server before, or by too many others."""


class UpstreamError(RequestError):
    """The server that the request was forwarded to broke off, or answered what is no answer."""


class UpstreamUnavailable(UpstreamError):
    """No server that has the model can be reached."""


class UpstreamTimeout(UpstreamError):
    """The server that the request was forwarded to did not answer, or stopped answering, within the limit."""


def without_stop_iteration(work: Callable[[], T]) -> T:
    """Run code of others for a future. Before Python 3.12 one never ends that gets a `StopIteration`.

    Raises `RuntimeError` in its place.
    """
    try:
        return work()
    except StopIteration as error:
        raise RuntimeError("StopIteration was raised") from error
