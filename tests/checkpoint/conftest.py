"""Hubs on loopback, each with a cache folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brlite.checkpoint.download import Download
from brlite.checkpoint.hub import HuggingFaceHub, ModelScopeHub
from brlite.checkpoint.hub_http import HubAddress, Retries, get
from brlite.checkpoint.model_name import parse_model_name
from brlite.checkpoint.progress import OnProgress, ignore_progress
from brlite.checkpoint.transfer import OpenSpan
from tests.checkpoint.hub_server import HubServer, files_of
from tests.limits import PATIENCE_SECONDS
from tests.tiny_models import LLAMA, write_byte_tokenizer, write_model

REACH = 60.0  # seconds; no test waits for them
AT_ONCE = Retries(first_wait=0.0)
NAME = parse_model_name("hf:org/model")


class LocalHuggingFace(HuggingFaceHub):
    """Hugging Face's hub on loopback, with a cache folder of its own."""

    def __init__(self, server: HubServer, cache: Path, token: str = "") -> None:
        self.server, self.folder, self.token = server, cache, token

    def cache(self) -> Path:
        return self.folder

    def address(self) -> HubAddress:
        return HubAddress(self.title, self.server.endpoint, self.token, "HF_TOKEN", PATIENCE_SECONDS)


class LocalModelScope(ModelScopeHub):
    """ModelScope on loopback, with a cache folder of its own."""

    def __init__(self, server: HubServer, cache: Path) -> None:
        self.server, self.folder = server, cache

    def cache(self) -> Path:
        return self.folder

    def address(self) -> HubAddress:
        return HubAddress(self.title, self.server.endpoint, "", "MODELSCOPE_API_TOKEN", PATIENCE_SECONDS)


def fetch(
    hub: HuggingFaceHub | ModelScopeHub, name: str = "hf:org/model", on_progress: OnProgress = ignore_progress
) -> Path:
    return Download(hub, parse_model_name(name), on_progress, AT_ONCE).run(REACH)


def opener(hub: LocalHuggingFace) -> OpenSpan:
    """Opens files of the model, without a download around it."""
    address = hub.address()
    commit = hub.list_files(address, NAME).commit
    return lambda file, span: get(address, hub.file_url(address, NAME, commit, file.name), "org/model", span=span)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    folder = write_model(tmp_path / "repository", LLAMA)
    write_byte_tokenizer(folder)
    for name in ("README.md", "modeling_evil.py", "pytorch_model.bin"):
        (folder / name).write_text(name)
    with HubServer(files_of(folder)).running() as server:
        yield server


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> LocalHuggingFace:
    return LocalHuggingFace(server, tmp_path / "cache")
