"""The hubs that models come from, and how a model gets from there into the cache.

Only configs, tokenizers and weights are fetched, never code. Hugging Face's library gives its settings (endpoint,
token, cache folder, offline mode, time limits); the requests are ours, the same for both hubs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, urlencode

from brlite.checkpoint.folder import CONFIG_FILE, find_weights, read_config
from brlite.checkpoint.hub_http import (
    DEFAULT_RETRIES,
    HubAddress,
    PassingFailure,
    Retries,
    get,
    get_json,
    read_some,
    tried_again,
)
from brlite.checkpoint.model_name import BIN_FILES, ModelName, choose_files
from brlite.checkpoint.progress import OnProgress
from brlite.checkpoint.quantization import read_quantization, without_quantization
from brlite.checkpoint.repository import Repository
from brlite.checkpoint.transfer import HubFile, Transfer, Wanted
from brlite.errors import MissingExtra, ModelError
from brlite.files.cache import default_cache
from brlite.files.quoting import excerpt, reason
from brlite.files.temporary import temporary_folder
from brlite.models.registry import find_family
from brlite.process.waiting import start_daemon

logger = logging.getLogger(__name__)

REACH_VARIABLE = "HF_HUB_ETAG_TIMEOUT"  # the library's own: how long the hub may take to tell what there is
SHORT_REACH_SECONDS = 3.0  # where another source could serve the model, and the variable is not set
HEADER_BYTES = (2**18, 2**22, 2**26)  # of a GGUF file, until its header is whole
MODELSCOPE_MAIN = "master"

T = TypeVar("T")


class NotHere(ModelError):
    """A source does not have the model, and nothing is wrong with it."""


class RepositoryListing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    files: list[HubFile]


class Hub(Protocol):
    """What is needed of a hub."""

    @property
    def title(self) -> str: ...

    @property
    def cache_variable(self) -> str:
        """The environment variable that chooses the cache folder."""
        ...

    def cache(self) -> Path:
        """The folder of its repositories on this machine."""
        ...

    def address(self) -> HubAddress:
        """Where to ask. Raises `ModelError` where the hub must not be asked."""
        ...

    def list_files(self, address: HubAddress, name: ModelName) -> RepositoryListing: ...

    def file_url(self, address: HubAddress, name: ModelName, commit: str, file: str) -> str: ...


class HuggingFaceHub:
    """Implements `Hub` for huggingface.co, and for mirrors named by HF_ENDPOINT."""

    title = "the Hugging Face hub"
    cache_variable = "HF_HOME"

    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def address(self) -> HubAddress:
        from huggingface_hub import constants, get_token

        check_online()
        token = "" if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token() or ""
        return HubAddress(self.title, constants.ENDPOINT, token, "HF_TOKEN", float(constants.HF_HUB_DOWNLOAD_TIMEOUT))

    def list_files(self, address: HubAddress, name: ModelName) -> RepositoryListing:
        revision = f"/revision/{quote(name.revision, safe='')}" if name.revision else ""
        url = f"{address.endpoint}/api/models/{name.repository}{revision}?blobs=true"
        info = get_json(address, url, name.repository)
        with _shape_checked(address):
            siblings = [
                (file["rfilename"], file.get("size"), file.get("lfs") or {}, file.get("blobId"))
                for file in info["siblings"]
            ]
            files = [
                HubFile(str(path), int(size or lfs.get("size") or 0), lfs.get("sha256"), None if lfs else blob)
                for path, size, lfs, blob in siblings
            ]
            if not isinstance(info["sha"], str) or not info["sha"].isalnum():
                raise ValueError(info["sha"])
            return RepositoryListing(info["sha"], files)

    def file_url(self, address: HubAddress, name: ModelName, commit: str, file: str) -> str:
        return f"{address.endpoint}/{name.repository}/resolve/{commit}/{quote(file)}"


class ModelScopeHub:
    """Implements `Hub` for modelscope.cn or what MODELSCOPE_DOMAIN names. Its models are in brlite's own cache."""

    title = "ModelScope"
    cache_variable = "BRLITE_CACHE"

    def cache(self) -> Path:
        return default_cache() / "modelscope"

    def address(self) -> HubAddress:
        from huggingface_hub import constants

        check_online()
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        endpoint = domain if "://" in domain else f"https://{domain}"
        variable = "MODELSCOPE_API_TOKEN"
        seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        return HubAddress(self.title, endpoint.rstrip("/"), os.environ.get(variable, ""), variable, seconds)

    def list_files(self, address: HubAddress, name: ModelName) -> RepositoryListing:
        query = urlencode({"Revision": name.revision or MODELSCOPE_MAIN, "Recursive": "true"})
        answer = get_json(
            address, f"{address.endpoint}/api/v1/models/{name.repository}/repo/files?{query}", name.repository
        )
        with _shape_checked(address):
            if answer.get("Code", 200) != 200:
                raise ModelError(f"{address.title} answers: {excerpt(answer.get('Message'))}")
            entries = [entry for entry in answer["Data"]["Files"] if entry["Type"] != "tree"]
            files = [HubFile(str(file["Path"]), int(file["Size"]), file.get("Sha256") or None) for file in entries]
        # It names no commit of the whole: what the files are names it.
        digest = hashlib.sha256(repr(sorted((file.name, file.key) for file in files)).encode())
        return RepositoryListing(digest.hexdigest()[:40], files)

    def file_url(self, address: HubAddress, name: ModelName, commit: str, file: str) -> str:
        query = urlencode({"Revision": name.revision or MODELSCOPE_MAIN, "FilePath": file})
        return f"{address.endpoint}/api/v1/models/{name.repository}/repo?{query}"


def hub_of(name: ModelName) -> Hub:
    """The hub that a name means."""
    return ModelScopeHub() if name.hub == "modelscope" else HuggingFaceHub()


def check_online() -> None:
    """Raise `ModelError` in the offline mode of Hugging Face's library, which counts for all hubs."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelError("not asked: offline by HF_HUB_OFFLINE")


def reach_limit(*, has_other_source: bool) -> float:
    """Seconds to wait for the hub's first answer: by HF_HUB_ETAG_TIMEOUT, else 10, or 3 with another source."""
    from huggingface_hub import constants

    is_told = REACH_VARIABLE in os.environ
    return SHORT_REACH_SECONDS if has_other_source and not is_told else float(constants.HF_HUB_ETAG_TIMEOUT)


def find_cached(hub: Hub, name: ModelName, *, is_last_resort: bool = False) -> Path:
    """A model that is in the hub's cache folder already: its folder or GGUF file. Raises `ModelError` if none is.

    A name without a quantization is the GGUF file that the hub's list made of it. As the last resort, where the hub
    cannot be asked, it is whatever GGUF file is there.
    """
    repository = Repository(hub.cache(), name.repository)
    snapshot = repository.snapshot(name.revision)
    if snapshot is None:
        raise NotHere("no complete snapshot on this machine")
    try:
        found = model_in(snapshot, name.quantization)
    except ModelError as error:
        raise NotHere(str(error)) from None
    if found != snapshot and name.quantization is None and not is_last_resort:
        choice = repository.choice(name.revision)
        if choice is None or not (snapshot / choice).is_file():
            raise NotHere("which of its GGUF files is meant, only the hub can tell")
        found = snapshot / choice
    find_weights(found)
    return found


def model_in(snapshot: Path, quantization: str | None) -> Path:
    """The model in a snapshot's folder: the folder, or one GGUF file of it. Raises `ModelError` if there is none."""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    chosen = choose_files(names, quantization)
    return snapshot / chosen[0] if chosen[0].lower().endswith(".gguf") else snapshot


def download(
    hub: Hub,
    name: ModelName,
    on_progress: OnProgress,
    reach_seconds: float,
    retries: Retries = DEFAULT_RETRIES,
    *,
    is_for_plugin: bool = False,
) -> Path:
    """Fetch a model into the hub's cache folder and return its folder or GGUF file.

    A hub that does not tell its files within `reach_seconds` counts as unreachable; the download itself may take its
    time. Refuses an architecture that cannot be served before its weights are fetched, unless the model is for an
    engine plugin, which may know others. Raises `ModelError`.
    """
    address = hub.address()
    until = time.monotonic() + reach_seconds

    def list_files() -> RepositoryListing:
        return tried_again(lambda: hub.list_files(address, name), retries, until=until)

    listing = _within(reach_seconds, list_files)
    by_name = {file.name: file for file in listing.files}
    wanted = [by_name[file] for file in choose_files(list(by_name), name.quantization)]
    if any(Path(file.name).is_absolute() or ".." in Path(file.name).parts for file in wanted):
        raise ModelError(f"{hub.title} lists a file outside of the repository")
    repository = Repository(hub.cache(), name.repository)

    def open_span(file: HubFile, span: tuple[int, int] | None) -> Any:
        return get(address, hub.file_url(address, name, listing.commit, file.name), name.repository, span=span)

    def fetch(files: Sequence[HubFile]) -> None:
        missing = {
            file.key: Wanted(file, repository.blob(file.key)) for file in files if not _is_there(repository, file)
        }
        Transfer(open_span, f"downloading {name}", on_progress, retries=retries).fetch(list(missing.values()))

    def say_waiting() -> None:
        logger.warning("another process downloads %s: waiting for it", name.repository)
        on_progress(f"waiting for another process that downloads {name.repository}", 0.0)

    try:
        with repository.locked(say_waiting):
            missing_bytes = sum(file.num_bytes for file in wanted if not _is_there(repository, file))
            repository.check_space(missing_bytes, hub.cache_variable)
            if not is_for_plugin:
                _check_architecture(wanted, repository, fetch, open_span, retries)
            fetch(wanted)
            folder = repository.publish(listing.commit, name.revision, {file.name: file.key for file in wanted})
            if wanted[0].name.lower().endswith(".gguf") and name.quantization is None:
                repository.set_choice(name.revision, wanted[0].name)
    except OSError as error:
        raise ModelError(f"cannot write to {repository.folder}: {reason(error)}") from error
    found = folder / wanted[0].name if wanted[0].name.lower().endswith(".gguf") else folder
    find_weights(found)
    return found


def _is_there(repository: Repository, file: HubFile) -> bool:
    blob = repository.blob(file.key)
    return blob.is_file() and blob.stat().st_size == file.num_bytes


def _check_architecture(
    wanted: Sequence[HubFile],
    repository: Repository,
    fetch: Callable[[Sequence[HubFile]], None],
    open_span: Callable[[HubFile, tuple[int, int] | None], Any],
    retries: Retries,
) -> None:
    """Raise what makes the model one that cannot be served. Reads config.json, or the header of the GGUF file."""
    if any(file.name in BIN_FILES for file in wanted) and find_spec("torch") is None:
        raise MissingExtra("a model in PyTorch's .bin files", "torch", ModuleNotFoundError(name="torch"))
    gguf = next((file for file in wanted if file.name.lower().endswith(".gguf")), None)
    config_file = next((file for file in wanted if file.name == CONFIG_FILE), None)
    if gguf is None:
        if config_file is None:
            raise ModelError(f"the repository has no {CONFIG_FILE}")
        fetch([config_file])
        with temporary_folder(repository.folder, ".config") as folder:
            (folder / CONFIG_FILE).symlink_to(repository.blob(config_file.key).resolve())
            config = read_config(folder)
        read_quantization(config)
        find_family(config).read_config(without_quantization(config))
    elif not _is_there(repository, gguf):
        with temporary_folder(repository.folder, ".header") as folder:
            _check_gguf(gguf, folder / Path(gguf.name).name, lambda span: open_span(gguf, span), retries)


def _check_gguf(file: HubFile, copy: Path, open_span: Callable[[tuple[int, int]], Any], retries: Retries) -> None:
    """Read as much of a GGUF file as its header takes, and check what it says. `copy` gets it, with a hole behind."""
    from brlite.checkpoint.gguf_checkpoint import checked_tensors
    from brlite.checkpoint.gguf_config import ROPE_FREQS, GgufMetadata, hugging_face_config, hugging_face_name
    from brlite.checkpoint.gguf_header import read_gguf_header

    def read(begin: int, end: int) -> None:
        with closing(open_span((begin, end))) as response, copy.open("r+b") as stream:
            stream.seek(begin if response.status == 206 else 0)
            while stream.tell() < end and (data := read_some(response, end - stream.tell())):
                stream.write(data)
            if stream.tell() < end:
                raise PassingFailure("the connection was cut")

    copy.touch()
    os.truncate(copy, file.num_bytes)
    begin = 0
    for limit in HEADER_BYTES:
        end = min(limit, file.num_bytes)
        tried_again(lambda begin=begin, end=end: read(begin, end), retries)  # type: ignore[misc]
        begin = end
        try:
            header = read_gguf_header(copy)
        except ModelError as error:
            if end < file.num_bytes and limit != HEADER_BYTES[-1]:
                continue
            raise ModelError(str(error).replace(str(copy), file.name)) from None
        if header.data_start <= end:
            break
    shapes = {
        hugging_face_name(tensor): location.shape
        for tensor, location in checked_tensors(header).items()
        if tensor != ROPE_FREQS
    }
    config = hugging_face_config(GgufMetadata(header.metadata), shapes, None)
    find_family(config).read_config(config)


def _within(seconds: float, question: Callable[[], T]) -> T:
    """Wait for an answer, but not for longer: name servers and proxies know time limits of their own only."""
    answer = start_daemon(question, "brlite-hub")
    if not wait([answer], timeout=seconds).done:
        raise ModelError(f"no answer within {seconds:g} s ({REACH_VARIABLE} sets the time)")
    return answer.result()


@contextmanager
def _shape_checked(address: HubAddress) -> Iterator[None]:
    """Turn what a JSON of another shape raises into `ModelError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{address.endpoint} answers with a JSON of another shape: is it a hub?") from error
