"""Temporary files: none is left for good, none of a live process is removed, none is written through a link."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from brlite.files import temporary
from brlite.files.new_file import NewFile, write_whole
from brlite.files.temporary import create_temporary, sweep, temporary_folder

HOLDS = """
import sys
from pathlib import Path
from brlite.files.temporary import create_temporary, temporary_folder
handle, path = create_temporary(Path(sys.argv[1]) / "weights.brlite")
with temporary_folder(Path(sys.argv[1]), ".build") as folder:
    (folder / "a.o").touch()
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that works on a temporary file and a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_file_that_a_process_works_on_is_left_alone(holder, tmp_path):
    before = sorted(tmp_path.iterdir())

    sweep(tmp_path)

    assert sorted(tmp_path.iterdir()) == before
    assert len(before) == 2


def test_what_a_killed_process_left_is_removed_by_the_next(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert len(list(tmp_path.iterdir())) == 2

    sweep(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_of_its_name(holder, tmp_path):
    holder.kill()
    holder.wait()

    with temporary_folder(tmp_path, ".build") as folder:
        assert list(tmp_path.glob(".build.*")) == [folder]


def test_a_file_that_a_daemon_thread_writes_is_removed_by_the_process_that_ends_but_not_by_its_fork(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from brlite.files.new_file import NewFile\n"
        "new = NewFile(Path(sys.argv[1]))\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); print(new.temporary.exists())"
    )

    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True)

    assert (ended.stdout, ended.stderr) == ("True\n", "")
    assert not any(tmp_path.iterdir())


def test_other_names_are_left_alone(tmp_path):
    # A browser names its download `weights.gguf.part`; the last two are of other files of ours.
    names = ["thesis.txt", "weights", "weights.abcd.part", "weights.gguf.part", "weights.0a.0123abcd.part"]
    names = sorted([*names, "other.0123abcd.part"])
    for name in (*names, "weights.0123abcd.part"):
        (tmp_path / name).touch()

    sweep(tmp_path, "weights")

    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_name_as_long_as_the_system_allows_has_temporary_ones(tmp_path):
    target = tmp_path / ("é" * 127)  # 254 bytes

    write_whole(target, b"content")
    handle, temporary = create_temporary(target)
    os.close(handle)
    assert temporary.name.startswith("é" * 120 + ".")  # no half character
    sweep(tmp_path, target.name)

    assert list(tmp_path.iterdir()) == [target]


def test_a_link_that_is_named_like_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "x.0123abcd.part").symlink_to(tmp_path / "thesis.txt")

    sweep(tmp_path)

    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    one, two = create_temporary(tmp_path / "file"), create_temporary(tmp_path / "file")

    assert one[1] != two[1]
    os.close(one[0])
    os.close(two[0])


def test_a_file_that_is_swept_as_it_is_made_is_made_again(tmp_path, monkeypatch):
    lock, sweeping = temporary._lock, list[threading.Thread]()

    def lock_after_a_sweeper(handle: int) -> None:
        if not sweeping:
            path = os.readlink(f"/proc/self/fd/{handle}")
            other = os.open(path, os.O_RDONLY)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweeping.append(threading.Timer(0.1, lambda: (os.unlink(path), os.close(other))))
            sweeping[0].start()
        lock(handle)

    monkeypatch.setattr(temporary, "_lock", lock_after_a_sweeper)
    handle, path = create_temporary(tmp_path / "file")
    sweeping[0].join()

    assert path.exists()
    os.close(handle)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_keeps_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"content")
    finally:
        os.umask(before)

    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_new_file_removes_what_an_earlier_one_left(tmp_path):
    (tmp_path / "file.0011aabb.part").write_bytes(bytes(100))

    with NewFile(tmp_path / "file") as new:
        new.publish()

    assert os.listdir(tmp_path) == ["file"]


def test_a_temporary_folder_is_private_and_gone_at_the_end(tmp_path):
    with temporary_folder(tmp_path, ".build") as folder:
        assert folder.stat().st_mode & 0o077 == 0

    assert list(tmp_path.iterdir()) == []
