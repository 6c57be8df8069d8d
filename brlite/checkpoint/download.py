"""Fetches a model from a hub into the hub's cache folder. Checks the config before it fetches the weights.

Fetches configs, tokenizers and weights, never code. `transfer.py` moves the bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from brlite.checkpoint.folder import CONFIG_FILE, find_weights
from brlite.checkpoint.gguf_config import ROPE_FREQS, hugging_face_config
from brlite.checkpoint.gguf_header import MAX_HEADER_BYTES, GgufHeader, read_gguf_header
from brlite.checkpoint.hub import REACH_VARIABLE, Hub, RepositoryListing
from brlite.checkpoint.hub_http import DEFAULT_RETRIES, PassingFailure, Retries, get, read_some, tried_again
from brlite.checkpoint.model_file import read_json_object
from brlite.checkpoint.model_name import ModelName, choose_files
from brlite.checkpoint.progress import OnProgress
from brlite.checkpoint.quantization import read_quantization, without_quantization
from brlite.checkpoint.repository import Repository
from brlite.checkpoint.transfer import HubFile, Transfer, Wanted
from brlite.errors import MissingExtra, ModelError, ModelUnreachable
from brlite.files.quoting import excerpt, reason
from brlite.files.temporary import temporary_folder
from brlite.models.registry import find_family
from brlite.process.waiting import start_daemon

logger = logging.getLogger(__name__)

HEADER_BYTES = (2**18, 2**22, MAX_HEADER_BYTES)  # how much of a GGUF file is fetched until its header is complete


class Download:
    """The download of one model. Raises `ModelError` in offline mode."""

    def __init__(self, hub: Hub, name: ModelName, on_progress: OnProgress, retries: Retries = DEFAULT_RETRIES) -> None:
        self._hub = hub
        self._name = name
        self._on_progress = on_progress
        self._retries = retries
        self._address = hub.address()
        self._repository = Repository(hub.cache(), name.repository)
        self._commit = ""

    def run(self, reach_seconds: float, *, is_for_plugin: bool = False) -> Path:
        """Fetch what is missing, and return the model's folder or GGUF file.

        A hub that does not list its files within `reach_seconds` counts as unreachable; the download has no such limit.
        An architecture that cannot be served is refused before its weights are fetched, unless the model is for an
        engine plugin, which may support others. Raises `ModelError`.
        """
        name, repository = self._name, self._repository
        listing = self._list_files(reach_seconds)
        self._commit = listing.commit
        by_name = {file.name: file for file in listing.files}
        wanted = [by_name[file] for file in choose_files(list(by_name), name.quantization)]
        for file in wanted:
            path = Path(file.name)
            if path.is_absolute() or ".." in path.parts or not file.name.isprintable():
                problem = f"{self._hub.title} lists a file named {excerpt(file.name)}"
                raise ModelError(f"{problem}; allowed are printable paths inside the repository")

        def say_waiting() -> None:
            logger.warning("another download of %s is under way: waiting for it", name.repository)
            self._on_progress(f"waiting for another download of {name.repository}", 0.0)

        is_gguf = wanted[0].name.lower().endswith(".gguf")
        try:
            with repository.locked(say_waiting):
                missing_bytes = sum(file.num_bytes for file in wanted if not self._is_there(file))
                repository.check_space(missing_bytes, self._hub.cache_variable)
                if not is_for_plugin:
                    self._check_architecture(wanted)
                self._fetch(wanted)
                folder = repository.publish(listing.commit, name.revision, {file.name: file.key for file in wanted})
                if is_gguf and name.quantization is None:
                    repository.set_choice(name.revision, wanted[0].name)
        except OSError as error:
            raise ModelError(f"cannot write to {repository.folder}: {reason(error)}") from error
        found = folder / wanted[0].name if is_gguf else folder
        find_weights(found)
        return found

    def _list_files(self, reach_seconds: float) -> RepositoryListing:
        until = time.monotonic() + reach_seconds
        # On another thread: name servers and proxies have time limits of their own, which can be minutes.
        answer = start_daemon(
            lambda: tried_again(lambda: self._hub.list_files(self._address, self._name), self._retries, until=until),
            "brlite-hub",
        )
        if not wait([answer], timeout=reach_seconds).done:
            raise ModelUnreachable(f"no answer within {reach_seconds:g} s ({REACH_VARIABLE} sets the time)")
        return answer.result()

    def _open_span(self, file: HubFile, span: tuple[int, int] | None) -> Any:
        url = self._hub.file_url(self._address, self._name, self._commit, file.name)
        return get(self._address, url, self._name.repository, span=span)

    def _is_there(self, file: HubFile) -> bool:
        blob = self._repository.blob(file.key)
        return blob.is_file() and blob.stat().st_size == file.num_bytes

    def _fetch(self, files: Sequence[HubFile]) -> None:
        missing = {
            file.key: Wanted(file, self._repository.blob(file.key)) for file in files if not self._is_there(file)
        }
        transfer = Transfer(self._open_span, f"downloading {self._name}", self._on_progress, retries=self._retries)
        transfer.fetch(list(missing.values()))

    def _check_architecture(self, wanted: Sequence[HubFile]) -> None:
        """Raise an error if the model cannot be served. Reads its config.json, or the headers of its GGUF files."""
        if any(file.name.endswith(".bin") for file in wanted) and find_spec("torch") is None:
            raise MissingExtra("a model in PyTorch's .bin files", "torch", ModuleNotFoundError(name="torch"))
        if all(file.name.lower().endswith(".gguf") for file in wanted):
            if not all(self._is_there(file) for file in wanted):
                self._check_gguf(wanted)
            return
        config_file = next((file for file in wanted if file.name == CONFIG_FILE), None)
        if config_file is None:
            raise ModelError(f"the repository has no {CONFIG_FILE}")
        self._fetch([config_file])
        config = read_json_object(self._repository.blob(config_file.key))
        read_quantization(config)
        find_family(config).read_config(without_quantization(config))

    def _check_gguf(self, files: Sequence[HubFile]) -> None:
        """Fetch the headers of a GGUF file, or of all its parts, and check them."""
        from brlite.checkpoint.gguf_checkpoint import read_headers

        headers = {Path(file.name): self._fetch_header(file) for file in files}
        metadata, tensors = read_headers(headers)
        shapes = {name: tensor.shape for name, (_, tensor) in tensors.items() if name != ROPE_FREQS}
        config = hugging_face_config(metadata, shapes, None)
        find_family(config).read_config(config)

    def _fetch_header(self, file: HubFile) -> GgufHeader:
        """The header of a GGUF file, of which no more than that is fetched."""

        def read(begin: int, end: int) -> None:
            with closing(self._open_span(file, (begin, end))) as response, copy.open("r+b") as stream:
                stream.seek(begin if response.status == 206 else 0)
                while stream.tell() < end and (data := read_some(response, end - stream.tell())):
                    stream.write(data)
                if stream.tell() < end:
                    raise PassingFailure("the connection was cut")

        with temporary_folder(self._repository.folder, ".header") as folder:
            copy = folder / Path(file.name).name
            copy.touch()
            os.truncate(copy, file.num_bytes)  # a hole behind the header: the file has the size that the header is for
            ends = sorted({min(limit, file.num_bytes) for limit in HEADER_BYTES})
            for begin, end in pairwise((0, *ends)):
                tried_again(partial(read, begin, end), self._retries)
                try:
                    header = read_gguf_header(copy)
                except ModelError as error:
                    if end == ends[-1]:
                        raise ModelError(str(error).replace(str(copy), file.name)) from None
                else:
                    if header.data_start <= end or end == file.num_bytes:
                        return header
        raise ModelError(f"{file.name}: its header is longer than {HEADER_BYTES[-1]} bytes")
