"""The system's CA certificates, read when a TLS connection first needs them."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _WithoutCertificates(ssl.SSLContext):
    """A context that has yet to read the system's certificates. Its first connection makes it an ordinary context."""

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return self._with_certificates().wrap_bio(*args, **options)

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        return self._with_certificates().wrap_socket(*args, **options)

    def _with_certificates(self) -> ssl.SSLContext:
        self.set_default_verify_paths()  # first: another thread must not use the context without certificates
        self.__class__ = ssl.SSLContext  # type: ignore[assignment]
        return self


@contextmanager
def certificates_read_late() -> Iterator[None]:
    """In the `with` block, contexts that want the system's certificates read them at their first connection.

    For the import of aiohttp, which makes two contexts for clients: to read the certificates for both takes 0.1 s and
    2 MB, and few servers have a client that uses them.
    """

    def read_late(context: ssl.SSLContext) -> None:
        context.__class__ = _WithoutCertificates

    ssl.SSLContext.set_default_verify_paths = read_late  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del ssl.SSLContext.set_default_verify_paths  # then it is the base class's again
