"""A server on loopback that speaks the HTTP of Hugging Face's hub and of ModelScope, and fails as they do.

Large files are redirected to another port, as hubs redirect to their storage; that one must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS_BYTES = 1000  # files of that size and more are large ones


class HubServer:
    """`files` are the repository `org/model`. What it does wrong is set on it; `seen` counts the requests by path."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.wrong_hash: set[str] = set()
        self.sent_instead: dict[str, bytes] = {}  # contents that are not those of the list
        self.storage_refusal: int | None = None
        self.shift = 0  # how much later in the file than asked a range begins
        self.cut_after: dict[str, int] = {}  # of each response, the bytes after which the connection is cut
        self.cuts_left = 0
        self.stalls_left = 0  # responses of weights that stop after some bytes
        self.end = threading.Event()
        self.failures: list[tuple[int, dict[str, str]]] = []  # statuses and headers that the next requests get
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.token: str | None = None
        self.knows_ranges = True
        self.chunk_seconds = 0.0
        self.moved_from: str | None = None  # another name, which is redirected
        self.started = threading.Event()  # weights are on their way
        self.gate = threading.Event()  # weights wait for it
        self.gate.set()
        self.seen: Counter[str] = Counter()
        self.ranges: list[str | None] = []  # of requests for weights
        self.sent_bytes = 0
        self.tokens_at_storage: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            is_storage = False

            def do_GET(self) -> None:
                hub.answer(self, is_storage=self.is_storage)

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        class StorageHandler(Handler):
            is_storage = True

        servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Handler, StorageHandler)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            self.gate.set()
            self.end.set()
            for server in servers:
                server.shutdown()
                server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, is_storage: bool) -> None:
        url = urlsplit(request.path)
        with self._lock:
            self.seen[url.path] += 1
            failure = self.failures.pop(0) if self.failures else None
        if is_storage:
            self.tokens_at_storage += filter(None, [request.headers.get("Authorization")])
            if self.storage_refusal:
                self._send(request, self.storage_refusal, {})
                return
            self._send_file(request, unquote(url.path[1:]))
        elif failure or self.refusal:
            self._send(request, *(failure or self.refusal or (500, {})))
        elif self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            self._send(request, 401, {"X-Error-Code": "GatedRepo"})
        elif self.moved_from and self.moved_from in url.path:
            self._send(request, 307, {"Location": request.path.replace(self.moved_from, "org/model")})
        else:
            self._route(request, url.path, {name: values[0] for name, values in parse_qs(url.query).items()})

    def _route(self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str]) -> None:
        if path in ("/api/models/org/model", "/api/models/org/model/revision/v2"):
            self._send_json(request, {"sha": COMMIT, "siblings": [self._hugging_face(name) for name in self.files]})
        elif path.startswith("/api/models/org/model/revision/"):
            self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
            self._resolve(request, unquote(path.removeprefix(f"/org/model/resolve/{COMMIT}/")))
        elif path == "/api/v1/models/org/model/repo/files":
            tree = {"Name": "sub", "Path": "sub", "Type": "tree", "Size": 0, "Sha256": ""}
            files = [tree, *(self._modelscope(name) for name in self.files)]
            self._send_json(request, {"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True})
        elif path == "/api/v1/models/org/model/repo" and query["Revision"] in ("master", "v2"):
            self._resolve(request, query["FilePath"])
        else:
            self._send(request, 404, {"X-Error-Code": "RepoNotFound"})

    def _resolve(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if len(self.files[name]) >= LFS_BYTES:
            self._send(request, 302, {"Location": f"{self.storage}/{name}?signature=x"})
        else:
            self._send_file(request, name)

    def _sha256(self, name: str) -> str:
        content = self.files[name] + (b"!" if name in self.wrong_hash else b"")
        return hashlib.sha256(content).hexdigest()

    def _hugging_face(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "blobId": blob, "size": len(content)}
        if len(content) >= LFS_BYTES:
            entry["lfs"] = {"sha256": self._sha256(name), "size": len(content), "pointerSize": 130}
        return entry

    def _modelscope(self, name: str) -> dict[str, Any]:
        base = name.rpartition("/")[2]
        sha256 = self._sha256(name)
        return {"Name": base, "Path": name, "Type": "blob", "Size": len(self.files[name]), "Sha256": sha256}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content = self.sent_instead.get(name, self.files[name])
        wanted = request.headers.get("Range")
        if name.endswith((".safetensors", ".gguf")):
            self.ranges.append(wanted)
            self.started.set()
            self.gate.wait(60)
        begin, end = 0, len(content)
        if wanted is not None and self.knows_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first) + self.shift, int(last) + 1
        is_part = wanted is not None and self.knows_ranges
        request.send_response(206 if is_part else 200)
        if is_part:
            request.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        request.send_header("Content-Length", str(end - begin))
        request.end_headers()
        data = content[begin:end]
        with self._lock:
            if self.cuts_left and name in self.cut_after:
                self.cuts_left -= 1
                data = data[: self.cut_after[name]]
            self.sent_bytes += len(data)
            is_stalled = self.stalls_left > 0 and name.endswith(".safetensors")
            self.stalls_left -= is_stalled
        if is_stalled:
            request.wfile.write(data[:5000])
            request.wfile.flush()
            self.end.wait(120)
            return
        for position in range(0, len(data), 1024):
            request.wfile.write(data[position : position + 1024])
            request.wfile.flush()
            time.sleep(self.chunk_seconds)
        request.close_connection = True

    @staticmethod
    def _send_json(request: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            request.send_header(name, value)
        request.end_headers()


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a model's folder, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
