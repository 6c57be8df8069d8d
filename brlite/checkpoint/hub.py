"""The hubs of models: their addresses, their lists of files, and the models that their cache folders hold already.

The settings (endpoint, token, cache folder, offline mode, time limits) come from Hugging Face's library. The requests
are brlite's own, the same for both hubs. `download.py` fetches the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.hub_http import HubAddress, get_json
from brlite.checkpoint.model_name import ModelName, choose_files
from brlite.checkpoint.repository import Repository
from brlite.checkpoint.transfer import HubFile
from brlite.errors import ConfigError, ModelError
from brlite.files.cache import default_cache
from brlite.files.quoting import excerpt, reason

REACH_VARIABLE = "HF_HUB_ETAG_TIMEOUT"  # of Hugging Face's library: seconds that the hub may take to list files
SHORT_REACH_SECONDS = 3.0  # if another source may have the model, and the variable is not set
MODELSCOPE_MAIN = "master"


class NotHere(ModelError):
    """A source does not have the model. This is no failure: the next source is tried."""


class RepositoryListing(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    files: list[HubFile]


class HuggingFaceHub:
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    title = "the Hugging Face hub"
    cache_variable = "HF_HOME"  # the environment variable that chooses the cache folder

    def cache(self) -> Path:
        """The folder of its repositories on this machine."""
        return Path(settings().HF_HUB_CACHE)

    def address(self) -> HubAddress:
        """Where to send requests. Raises `ModelError` in offline mode."""
        check_online()
        constants = settings()
        from huggingface_hub import get_token

        try:
            token = "" if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token() or ""
        except (OSError, ValueError) as error:
            raise ModelError(f"the token in {constants.HF_TOKEN_PATH} cannot be read: {reason(error)}") from None
        return HubAddress(self.title, constants.ENDPOINT, token, "HF_TOKEN", float(constants.HF_HUB_DOWNLOAD_TIMEOUT))

    def list_files(self, address: HubAddress, name: ModelName) -> RepositoryListing:
        revision = f"/revision/{quote(name.revision, safe='')}" if name.revision else ""
        url = f"{address.endpoint}/api/models/{name.repository}{revision}?blobs=true"
        info = get_json(address, url, name.repository)
        with _shape_checked(address):
            files = []
            for file in info["siblings"]:
                lfs = file.get("lfs") or {}
                size = _size(file.get("size") or lfs.get("size") or 0)
                git_hash = None if lfs else _hash(file.get("blobId"))
                files.append(HubFile(str(file["rfilename"]), size, _hash(lfs.get("sha256")), git_hash))
            if not isinstance(info["sha"], str) or not info["sha"].isalnum():
                raise ValueError(info["sha"])
            return RepositoryListing(info["sha"], files)

    def file_url(self, address: HubAddress, name: ModelName, commit: str, file: str) -> str:
        return f"{address.endpoint}/{name.repository}/resolve/{commit}/{quote(file)}"


class ModelScopeHub:
    """modelscope.cn, or MODELSCOPE_DOMAIN, as `HuggingFaceHub` is. Its models are in brlite's own cache."""

    title = "ModelScope"
    cache_variable = "BRLITE_CACHE"

    def cache(self) -> Path:
        return default_cache() / "modelscope"

    def address(self) -> HubAddress:
        check_online()
        domain = os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        endpoint = domain if "://" in domain else f"https://{domain}"
        variable = "MODELSCOPE_API_TOKEN"
        seconds = float(settings().HF_HUB_DOWNLOAD_TIMEOUT)
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
            files = [HubFile(str(file["Path"]), _size(file["Size"]), _hash(file.get("Sha256"))) for file in entries]
        # The list names no commit. A hash of the files' names and contents serves as one.
        digest = hashlib.sha256(repr(sorted((file.name, file.key) for file in files)).encode())
        return RepositoryListing(digest.hexdigest()[:40], files)

    def file_url(self, address: HubAddress, name: ModelName, commit: str, file: str) -> str:
        query = urlencode({"Revision": name.revision or MODELSCOPE_MAIN, "FilePath": file})
        return f"{address.endpoint}/api/v1/models/{name.repository}/repo?{query}"


Hub = HuggingFaceHub | ModelScopeHub


def settings() -> Any:
    """The settings of Hugging Face's library, which it reads from the environment. Raises `ConfigError`."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise ConfigError(
            f"a variable of Hugging Face's library, HF_HUB_…, has a wrong value: {reason(error)}"
        ) from None
    return constants


def hub_of(name: ModelName) -> Hub:
    """The hub of a model's name."""
    return ModelScopeHub() if name.hub == "modelscope" else HuggingFaceHub()


def check_online() -> None:
    """Raise `ModelError` in the offline mode of Hugging Face's library. It applies to all hubs."""
    if settings().HF_HUB_OFFLINE:
        raise ModelError("not asked: HF_HUB_OFFLINE is set")


def reach_limit(*, has_other_source: bool) -> float:
    """Seconds to wait for the hub's list of files: HF_HUB_ETAG_TIMEOUT, else 10, or 3 with another source."""
    is_set = REACH_VARIABLE in os.environ
    return SHORT_REACH_SECONDS if has_other_source and not is_set else float(settings().HF_HUB_ETAG_TIMEOUT)


def find_cached(hub: Hub, name: ModelName, *, is_last_resort: bool = False) -> Path:
    """The folder or GGUF file of a model that is in the hub's cache. Raises `NotHere` or another `ModelError`.

    A name without a quantization means the GGUF file that was chosen from the hub's list when it was downloaded. With
    `is_last_resort` (the hub cannot be reached) it means any GGUF file that is there.
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
            raise NotHere("only the hub's list tells which of its GGUF files the name means")
        found = snapshot / choice
    find_weights(found)
    return found


def model_in(snapshot: Path, quantization: str | None) -> Path:
    """The model in a snapshot: its folder, or one GGUF file of it. Raises `ModelError` if there is none."""
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    chosen = choose_files(names, quantization)
    return snapshot / chosen[0] if chosen[0].lower().endswith(".gguf") else snapshot


def _size(value: Any) -> int:
    """A size in a list. Raises `ValueError` if it is negative: it would hide the size of another file."""
    if int(value) < 0:
        raise ValueError(value)
    return int(value)


def _hash(value: Any) -> str | None:
    """A hash in a list; None without one. Raises `TypeError`."""
    if value and not isinstance(value, str):
        raise TypeError(value)
    return value or None


@contextmanager
def _shape_checked(address: HubAddress) -> Iterator[None]:
    """Raise `ModelError` for the exceptions that reading JSON of an unexpected shape raises."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{address.endpoint} answers with unexpected JSON: is it a hub?") from error
