"""What another user could have written is not used: libraries, packed weights, the config of the current folder."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from brlite.backends.native.library import find_library, load_library
from brlite.backends.native.packer import load_weights
from brlite.checkpoint import open_checkpoint
from brlite.commands.cli import main
from brlite.config.options import ModelSpec
from brlite.errors import NativeUnavailable
from brlite.files.ownership import why_untrusted
from tests.load_plans import make_plan
from tests.tiny_models import write_tiny_model

STRANGER = 54321  # a user id that nobody has
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir(mode=0o755)
    (tmp_path / "folder" / "file").touch(mode=0o644)
    return tmp_path / "folder" / "file"


def test_a_file_of_ones_own_is_trusted(file):
    assert why_untrusted(file) is None


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_a_file_that_everybody_may_write_is_not(mode, file):
    file.chmod(mode)

    assert why_untrusted(file) == f"{file} can be written by every user"


def test_a_file_in_a_folder_that_everybody_may_write_is_not(file):
    file.parent.chmod(0o777)

    assert why_untrusted(file) == f"{file.parent} can be written by every user"


def test_a_sticky_folder_protects_a_file_of_ones_own(file):
    file.parent.chmod(0o777 | stat.S_ISVTX)

    assert why_untrusted(file) is None


@needs_root
def test_a_file_or_a_folder_of_another_user_is_not_trusted(file):
    os.chown(file, STRANGER, -1)
    assert why_untrusted(file) == f"{file} belongs to the user {STRANGER}"
    os.chown(file, 0, -1)
    os.chown(file.parent, STRANGER, -1)
    assert why_untrusted(file) == f"{file.parent} belongs to the user {STRANGER}"


@needs_root
def test_a_group_of_others_is_not_trusted(file):
    os.chown(file, -1, STRANGER)
    file.chmod(0o664)

    assert why_untrusted(file) == f"{file} can be written by its group"


def test_a_file_whose_access_list_lets_another_user_write_is_not_trusted(file):
    rights = ((1, 6, -1), (2, 6, STRANGER), (4, 4, -1), (16, 6, -1), (32, 4, -1))  # user:STRANGER:rw-, of acl(5)
    entries = b"".join(struct.pack("<HHi", *right) for right in rights)
    try:
        os.setxattr(file, "system.posix_acl_access", struct.pack("<I", 2) + entries)
    except (AttributeError, OSError):
        pytest.skip("no access control lists here")

    assert why_untrusted(file) == f"{file} can be written by users of its access control list"


def test_a_link_is_followed_to_where_it_leads(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    file.parent.chmod(0o777)

    assert why_untrusted(tmp_path / "link") == f"{file.parent} can be written by every user"


@needs_root
def test_another_user_trusts_its_own_files_and_roots_and_no_third_ones():
    """In a child that takes on another user's id."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        files = {name: Path(folder, name) for name in ("own", "roots", "thirds")}
        for file, owner in zip(files.values(), (STRANGER, 0, STRANGER + 1), strict=True):
            file.touch(mode=0o644)
            os.chown(file, owner, -1)
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            trusted = [name for name, file in files.items() if why_untrusted(file) is None]
            os._exit(0 if trusted == ["own", "roots"] else 1)

        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def cache(tmp_path: Path, native_library) -> Path:
    """A cache with a library in it."""
    folder = tmp_path / "cache"
    load_library(folder, installed=tmp_path / "none", build=lambda path: copy_library(native_library.path, path))
    return folder


def copy_library(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def test_a_library_that_others_could_have_written_is_not_loaded(cache, tmp_path, caplog):
    (library,) = (cache / "native").iterdir()
    library.unlink()  # it is mapped: to write into it would change code that this process runs
    library.write_bytes(b"would be loaded, and fail")
    library.chmod(0o666)

    with caplog.at_level(logging.WARNING):
        assert find_library(cache, installed=tmp_path / "none") is None

    assert f"{library} can be written by every user" in caplog.text


def test_where_others_write_to_the_cache_the_library_is_built_elsewhere(cache, tmp_path, native_library):
    (cache / "native").chmod(0o777)
    built = []

    def build(path: Path) -> None:
        built.append(path)
        copy_library(native_library.path, path)

    library = load_library(cache, installed=tmp_path / "none", build=build)

    assert library.isa_name
    assert [path.parent == cache / "native" for path in built] == [False]
    assert not built[0].exists()


def test_a_library_is_not_loaded_from_a_folder_that_others_may_write_since_it_was_compiled(tmp_path):
    def build(path: Path) -> None:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"would be loaded, and fail")
        path.parent.chmod(0o777)

    with pytest.raises(NativeUnavailable, match=r"was compiled, but .* can be written by every user"):
        load_library(tmp_path / "cache", installed=tmp_path / "none", build=build)


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_packed_weights_that_others_could_have_written_are_neither_read_nor_replaced(mode, tmp_path, native_library):
    model = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "packed" / "weights.brlite"
    pack(model, image, native_library)
    written = image.read_bytes()
    image.write_bytes(written[:-1] + b"\0")
    image.parent.chmod(mode)
    image.chmod(0o666 if mode == 0o755 else 0o644)

    pack(model, image, native_library)

    assert image.read_bytes() == written[:-1] + b"\0"


@needs_root
def test_packed_weights_that_another_user_puts_there_between_check_and_use_are_not_used(
    tmp_path, native_library, monkeypatch, caplog
):
    model = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "packed" / "weights.brlite"
    pack(model, image, native_library)
    image.rename(tmp_path / "stranger's")
    os.chown(tmp_path / "stranger's", STRANGER, -1)
    image.parent.chmod(0o777 | stat.S_ISVTX)  # as /tmp
    # `sweep` is called between the two.
    monkeypatch.setattr("brlite.backends.native.packer.sweep", lambda *_: (tmp_path / "stranger's").rename(image))

    with caplog.at_level(logging.WARNING):
        pack(model, image, native_library)

    assert f"{image} is not used, since another user could have written it" in caplog.text
    assert image.stat().st_uid == STRANGER


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_packed_weights_keep_the_umask(umask, tmp_path, native_library):
    model = write_tiny_model(tmp_path / "model", "llama")
    before = os.umask(umask)
    try:
        pack(model, tmp_path / "packed" / "weights.brlite", native_library)
    finally:
        os.umask(before)

    assert (tmp_path / "packed" / "weights.brlite").stat().st_mode & 0o777 == 0o666 & ~umask


def test_packed_weights_of_a_crashed_start_are_removed_by_the_next(tmp_path, native_library):
    model = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "packed" / "weights.brlite"
    pack(model, image, native_library)
    (image.parent / f"{image.name}.0123abcd.part").write_bytes(bytes(1000))

    pack(model, image, native_library)

    assert os.listdir(image.parent) == [image.name]


def pack(model: Path, image: Path, native_library) -> None:
    spec = ModelSpec(name="tiny", build_seq=32)
    checkpoint = open_checkpoint(model)
    load_weights(native_library.functions, make_plan(checkpoint, spec, packed_file=image)).close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a config that would be refused if it were used."""
    folder = tmp_path / "here"
    folder.mkdir(mode=0o755)
    (folder / "brlite.toml").write_text("[server]\nport = 'used'\n")
    monkeypatch.chdir(folder)
    return folder / "brlite.toml"


def test_the_current_folders_config_is_used_if_it_is_ones_own(here, capsys):
    assert main(["serve"]) == 2
    assert "server.port = " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "verify"])
def test_the_current_folders_config_is_not_loaded_by_default_if_others_could_have_written_it(command, here, capsys):
    here.parent.chmod(0o777)

    status = main([command])

    said = capsys.readouterr().err
    assert status == 2
    assert "brlite.toml is not loaded by default: " in said
    assert "to use it, give its name as CONFIG" in said
    assert main([command, "brlite.toml"]) == 2
    assert "server.port = " in capsys.readouterr().err


def test_a_config_that_was_found_says_which_it_is_and_what_it_sends_where(here, capsys, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    here.write_text(
        '[server]\nlog_level = "error"\n'
        '[[upstream]]\nurl = "https://collect.example"\nmodels = ["m"]\napi_key_env = "AWS_SECRET_ACCESS_KEY"\n'
    )

    status = main(["serve"])

    said = capsys.readouterr().err
    assert status == 2  # the variable is empty here
    assert f"brlite: using {here}\n" in said
    assert "the value of AWS_SECRET_ACCESS_KEY is sent to https://collect.example" in said


def test_a_config_that_was_found_cannot_hide_what_it_sends(here, capsys):
    here.write_text(
        '[[upstream]]\nurl = "https://collect.example"\nmodels = ["m"]\napi_key_env = "ABSENT\\u001b[2K\\u001b[1A"\n'
    )

    assert main(["serve"]) == 2

    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert r"the value of ABSENT\x1b[2K\x1b[1A is sent to https://collect.example" in said
