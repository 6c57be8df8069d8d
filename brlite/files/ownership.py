"""Checks that only this user can have written a file, before a library, packed weights or a config is used."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # Windows has neither, and no os.geteuid
    import grp
    import pwd


def why_untrusted(path: Path, opened: os.stat_result | None = None) -> str | None:
    """Why other users could have written a file or put it into its folder; None if only this user and root could.

    `opened` is the status of the file that was opened at `path`, where another one may be by now.
    File and folder must belong to one of the two and be writable by no others; for a folder, only itself is checked. A
    group counts as this user if it is the user's own, of the same name and without other members, and no access control
    list (ACL) may add others. A sticky folder, such as /tmp, protects a file by its owner.
    Raises `OSError` if there is no file.
    """
    if not hasattr(os, "geteuid"):
        return None
    real = path.resolve()
    for place in dict.fromkeys((real,) if real.is_dir() else (path.parent, real.parent, real)):
        status = opened if opened is not None and place == real else os.stat(place)
        if status.st_uid not in (0, os.geteuid()):
            try:
                name = pwd.getpwuid(status.st_uid).pw_name
            except KeyError:
                name = str(status.st_uid)
            return f"{place} belongs to the user {name}"
        is_sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_mode & stat.S_IWOTH and not is_sticky:
            return f"{place} can be written by every user"
        if status.st_mode & stat.S_IWGRP and not is_sticky and not _is_own_group(status.st_gid):
            return f"{place} can be written by its group"
        if status.st_mode & stat.S_IWGRP and not is_sticky and _has_acl(place):  # then this bit is that of all it names
            return f"{place} can be written by users of its access control list"
    return None


def forbid_others_to_write(file: Path) -> None:
    """Take the right to write a file from its group and from others, to whom the umask may have given it."""
    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def _has_acl(place: Path) -> bool:
    try:
        return bool(os.getxattr(place, "system.posix_acl_access"))
    except (OSError, AttributeError):  # it has none; no such lists on this file system, or on this system
        return False


def _is_own_group(gid: int) -> bool:
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
