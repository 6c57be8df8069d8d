"""Which files of a repository are fetched, and what is refused before the weights are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.download import Download
from brlite.checkpoint.hub import NotHere, find_cached
from brlite.checkpoint.hub_http import HubAddress
from brlite.checkpoint.model_name import parse_model_name
from brlite.checkpoint.progress import ignore_progress
from brlite.checkpoint.repository import Repository
from brlite.errors import ModelError
from tests.checkpoint.conftest import AT_ONCE, NAME, REACH, LocalHuggingFace, fetch
from tests.checkpoint.hub_server import HubServer, files_of
from tests.checkpoint.model_files import random_gguf_tensors, write_gguf


def test_a_model_beyond_the_disk_is_refused_before_it_is_fetched(hub: LocalHuggingFace) -> None:
    class HugeHub(LocalHuggingFace):
        def list_files(self, address: HubAddress, name: object) -> object:  # type: ignore[override]
            listing = super().list_files(address, NAME)
            return listing._replace(files=[file._replace(num_bytes=2**60) for file in listing.files])

    with pytest.raises(ModelError, match=r"are needed at .*, where .* are free; HF_HOME chooses another folder"):
        fetch(HugeHub(hub.server, hub.cache()))

    assert hub.server.sent_bytes == 0


def test_a_gguf_repository_gives_the_file_that_the_quantization_names(server: HubServer, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m-Q8_0.gguf")
    server.files = {
        "m-Q8_0.gguf": file.read_bytes(),
        "sub/m-Q4_K_M.gguf": file.read_bytes()[::-1],
        "config.json": b"{}",
    }
    hub = LocalHuggingFace(server, tmp_path / "cache")

    found = fetch(hub, "hf:org/model:q8_0")

    assert found.name == "m-Q8_0.gguf"
    assert found.read_bytes() == file.read_bytes()
    assert find_cached(hub, parse_model_name("hf:org/model:Q8_0")) == found
    assert server.ranges[0] == f"bytes=0-{len(file.read_bytes()) - 1}"  # the header first


def test_a_name_without_quantization_stays_the_file_that_the_hub_made_of_it(server: HubServer, tmp_path: Path) -> None:
    server.files = {f"m-{each}.gguf": write_gguf(tmp_path / f"{each}.gguf").read_bytes() for each in ("Q8_0", "Q4_K_M")}
    hub = LocalHuggingFace(server, tmp_path / "cache")
    other = fetch(hub, "hf:org/model:Q8_0")

    with pytest.raises(ModelError, match="only the hub's list tells which of its GGUF files the name means"):
        find_cached(hub, NAME)
    assert find_cached(hub, NAME, is_last_resort=True) == other
    found = fetch(hub)

    assert found.name == "m-Q4_K_M.gguf"
    assert find_cached(hub, NAME) == found


def test_an_architecture_that_cannot_be_served_is_refused_before_the_weights(hub: LocalHuggingFace) -> None:
    hub.server.files["config.json"] = b'{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}'

    with pytest.raises(ModelError, match="architecture 'MixtralForCausalLM' is not supported"):
        fetch(hub)

    assert hub.server.sent_bytes == len(hub.server.files["config.json"])


def test_an_engine_plugin_may_serve_another_architecture(hub: LocalHuggingFace) -> None:
    hub.server.files["config.json"] = b'{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}'

    folder = Download(hub, NAME, ignore_progress, AT_ONCE).run(REACH, is_for_plugin=True)

    assert (folder / "model.safetensors").is_file()


def test_a_gguf_architecture_is_read_from_the_header_before_the_weights(server: HubServer, tmp_path: Path) -> None:
    names = [f"<token {number:030}>" for number in range(20_000)]
    metadata = {"tokenizer.ggml.tokens": names}
    file = write_gguf(tmp_path / "m-Q4_K_M.gguf", architecture="falcon", metadata=metadata)
    with file.open("ab") as stream:
        stream.write(bytes(8 * 2**20))
    server.files = {"m-Q4_K_M.gguf": file.read_bytes()}

    with pytest.raises(ModelError, match="falcon") as error:
        fetch(LocalHuggingFace(server, tmp_path / "cache"))

    assert str(tmp_path) not in str(error.value)
    assert server.ranges == ["bytes=0-262143", "bytes=262144-4194303"]


def split_gguf(folder: Path) -> dict[str, bytes]:
    """The three parts of a GGUF file, as a repository has them."""
    tensors = random_gguf_tensors()
    write_gguf(folder / "m-Q8_0.gguf", tensors, part_tensors=-(-len(tensors) // 3))
    return {f"Q8_0/{path.name}": path.read_bytes() for path in sorted(folder.glob("m-Q8_0-*"))}


def test_all_parts_of_a_split_gguf_are_fetched(server: HubServer, tmp_path: Path) -> None:
    server.files = {**split_gguf(tmp_path), "m-Q4_0.gguf": b"GGUF"}
    hub = LocalHuggingFace(server, tmp_path / "cache")

    found = fetch(hub, "hf:org/model:q8_0")

    assert found.name == "m-Q8_0-00001-of-00003.gguf"
    assert files_of(found.parent.parent).keys() == server.files.keys() - {"m-Q4_0.gguf"}
    assert len(open_checkpoint(found).shapes()) == len(random_gguf_tensors())
    assert find_cached(hub, parse_model_name("hf:org/model:Q8_0")) == found
    found.with_name("m-Q8_0-00002-of-00003.gguf").unlink()
    with pytest.raises(NotHere, match=r"lacks 'Q8_0/m-Q8_0-00002-of-00003\.gguf'"):
        find_cached(hub, parse_model_name("hf:org/model:Q8_0"))


def test_the_headers_of_all_parts_are_checked_before_the_weights(server: HubServer, tmp_path: Path) -> None:
    server.files = split_gguf(tmp_path)
    _, second, third = server.files
    server.files[second] = server.files[third]
    hub = LocalHuggingFace(server, tmp_path / "cache")

    with pytest.raises(ModelError, match=rf"{second}: a split GGUF: split\.no must be 1"):
        fetch(hub)

    assert not (Repository(hub.cache(), "org/model").folder / "blobs").exists()


@pytest.mark.parametrize("name", ["../m.gguf", "/m.gguf", "a\0.gguf", "\x1b[2J.gguf"])
def test_a_file_outside_of_the_repository_or_with_odd_characters_is_refused_by_name(
    hub: LocalHuggingFace, name: str
) -> None:
    hub.server.files = {name: b"GGUF"}

    with pytest.raises(ModelError, match=rf"lists a file named {re.escape(repr(name))}; allowed are"):
        fetch(hub)
