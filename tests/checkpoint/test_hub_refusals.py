"""What a hub refuses, or answers wrongly: each is an error of one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import pytest

from brlite.checkpoint.download import Download
from brlite.checkpoint.hub import HuggingFaceHub, reach_limit
from brlite.checkpoint.hub_http import HubAddress, PassingFailure, Redirects
from brlite.checkpoint.progress import ignore_progress
from brlite.errors import ModelError
from tests.checkpoint.conftest import NAME, LocalHuggingFace, LocalModelScope, fetch
from tests.checkpoint.hub_server import HubServer


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), r"is gated: accept its terms at http://.*/org/model, then set HF_TOKEN"),
        ((403, {"X-Error-Code": "GatedRepo"}), r"is gated: accept its terms at http://.*/org/model, then set HF_TOKEN"),
        ((401, {}), r"org/model is not there, or private \(401\): set HF_TOKEN to read private and gated models"),
        ((403, {}), r"org/model is not there, or private \(403\): set HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), r"there is no org/model"),
        ((429, {"Retry-After": "3600"}), r"answers 429 Too Many Requests; it allows no request for 3600 s"),
        ((503, {}), "answers 503 Service Unavailable"),
        ((418, {"X-Error-Message": "I am a teapot"}), "answers 418 I am a teapot"),
    ],
)
def test_a_refusal_says_in_a_line_what_to_do(
    refusal: tuple[int, dict[str, str]], said: str, hub: LocalHuggingFace
) -> None:
    hub.server.refusal = refusal

    with pytest.raises(ModelError, match=said) as error:
        fetch(hub)

    assert "\n" not in str(error.value)


def test_a_token_that_may_not_read_the_model_is_said(hub: LocalHuggingFace) -> None:
    hub.token, hub.server.refusal = "hf_other", (403, {})

    with pytest.raises(ModelError, match="the token of HF_TOKEN may not read it") as error:
        fetch(hub)

    assert "hf_other" not in str(error.value)


def test_a_hub_that_speaks_otherwise_is_named(hub: LocalHuggingFace, server: HubServer, tmp_path: Path) -> None:
    server.files = {"api": b"x"}
    odd = LocalModelScope(server, tmp_path / "odd")
    odd.list_files = lambda address, name: LocalHuggingFace.list_files(
        hub,
        address._replace(  # type: ignore[method-assign]
            endpoint=f"{address.endpoint}/api/v1/models/org/model/repo/files?x="
        ),
        name,
    )

    with pytest.raises(ModelError, match="unexpected JSON: is it a hub"):
        fetch(odd, "modelscope:org/model")


def test_a_silent_hub_is_given_up(hub: LocalHuggingFace) -> None:
    gate = threading.Event()

    class SilentHub(LocalHuggingFace):
        def list_files(self, address: HubAddress, name: object) -> object:  # type: ignore[override]
            gate.wait()
            raise ModelError("late")

    try:
        with pytest.raises(ModelError, match=r"no answer within 0\.01 s \(HF_HUB_ETAG_TIMEOUT"):
            Download(SilentHub(hub.server, hub.cache()), NAME, ignore_progress).run(0.01)
    finally:
        gate.set()


def test_a_hub_that_is_not_there_is_said_in_a_line(hub: LocalHuggingFace, server: HubServer) -> None:
    server.endpoint = "http://127.0.0.1:9"

    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9: Connection refused") as error:
        fetch(hub)

    assert "\n" not in str(error.value)


def test_a_token_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\x84")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))

    with pytest.raises(ModelError, match=r"the token in .*/token cannot be read"):
        HuggingFaceHub().address()


@pytest.mark.parametrize("method", ["cache", "address"])
def test_a_wrong_variable_of_the_library_is_a_line(method: str) -> None:
    """The library reads its variables once, so that this takes a process of its own."""
    code = f"from brlite.checkpoint.hub import HuggingFaceHub; HuggingFaceHub().{method}()"
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "abc"}

    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stderr

    wrong = "a variable of Hugging Face's library, HF_HUB_…, has a wrong value: invalid literal"
    assert said.splitlines()[-1].startswith(f"brlite.errors.ConfigError: {wrong}")


@pytest.mark.parametrize(("is_told", "has_other_source", "seconds"), [(0, 0, 10), (0, 1, 3), (1, 1, 10), (1, 0, 10)])
def test_only_where_another_source_could_serve_is_the_wait_short(
    is_told: int, has_other_source: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    if is_told:
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "10")

    assert reach_limit(has_other_source=bool(has_other_source)) == seconds


@pytest.mark.parametrize(
    ("body", "length", "reason"),
    [
        (b"[" * 100_000, None, "does not answer with JSON"),
        (b"{}", "x", "unexpected JSON"),
        (b"{}", "9" * 5000, "the connection was cut"),
        (b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "size": 1e400}]}', None, "unexpected JSON"),
        (b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "size": -1}]}', None, "unexpected JSON"),
        (b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "blobId": 5}]}', None, "unexpected JSON"),
        (b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "lfs": {"sha256": [1]}}]}', None, "unexpected JSON"),
    ],
)
def test_a_list_that_no_hub_would_send_is_refused_in_a_line(
    hub: LocalHuggingFace, monkeypatch: pytest.MonkeyPatch, body: bytes, length: str | None, reason: str
) -> None:
    class Answer(io.BytesIO):
        headers = {} if length is None else {"Content-Length": length}

    monkeypatch.setattr("brlite.checkpoint.hub_http.get", lambda *_: Answer(body))

    with pytest.raises((ModelError, PassingFailure), match=reason):
        hub.list_files(hub.address(), NAME)


def test_a_redirection_to_another_protocol_is_not_followed(hub: LocalHuggingFace) -> None:
    hub.server.refusal = 302, {"Location": "ftp://127.0.0.1:1/api"}

    with pytest.raises(ModelError, match="answers 302 and redirects to ftp; allowed from http: http and https"):
        fetch(hub)


def test_a_redirection_from_https_to_http_is_not_followed(hub: LocalHuggingFace) -> None:
    sent = urllib.request.Request("https://hub.example/api")

    with pytest.raises(urllib.error.HTTPError, match="redirects to http; allowed from https: https"):
        Redirects().redirect_request(sent, io.BytesIO(), 302, "", Message(), f"{hub.server.endpoint}/api")


@pytest.mark.parametrize("address", ["http://user:s3cret@127.0.0.1", "user:s3cret@127.0.0.1", "http://u:s3cret@host:8"])
def test_the_password_in_a_hubs_address_is_not_shown(hub: LocalHuggingFace, address: str) -> None:
    hub.server.endpoint = address

    with pytest.raises(ModelError, match="must begin with http:// or https://, and name no user") as error:
        fetch(hub)

    assert "s3cret" not in str(error.value)
