"""Starts child processes: without secrets in their environment, and ended when brlite ends.

No program is taken from the current folder, which may be another user's repository. Imports only the standard library
and `brlite.errors`: setuptools runs this file before other packages are installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from brlite.errors import EngineError

# Names that hold secrets: AWS_SECRET_ACCESS_KEY, HF_TOKEN, PGPASSWORD, MYSQL_PWD; not TOKENIZERS_PARALLELISM, PWD.
_SECRET_NAME = re.compile(
    r"SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|(^|_)((API|ACCESS|PRIVATE)?KEYS?|TOKENS?)(_|$)|_(PWD|PAT|AUTH)$", re.I
)
_SECRET_VALUE = re.compile(r"://[^/@\s]+:[^/@\s]+@")  # a URL with a password
_NEEDED_NAME = re.compile(r"PIP_.*|.*_PROXY", re.I)  # pip's settings, and proxies of a company's network
_SECRETS_READ: set[str] = set()  # names of variables; global, as the environment is

# Kills its process group, itself included, when its standard input closes, as it does however brlite ends.
_WATCH = "import os, signal, sys; sys.stdin.buffer.read(1); os.killpg(0, signal.SIGKILL)"


def read_secret(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The secret in an environment variable; "" if it is not set. Child processes do not get that variable any more."""
    _SECRETS_READ.add(name)
    return environ.get(name, "").strip()


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child: without secrets, and without relative folders in search paths."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if _NEEDED_NAME.fullmatch(name)
        or not (name in _SECRETS_READ or _SECRET_NAME.search(name) or _SECRET_VALUE.search(value))
    }
    for name in ("PATH", "PYTHONPATH"):
        if name in kept:
            kept[name] = absolute_folders(kept[name])
    return {**kept, **changes}


def absolute_folders(path: str) -> str:
    """A search path such as PATH without its relative and empty entries, which mean the current folder."""
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if os.path.isabs(folder))


def interpreter() -> str:
    """The Python that runs child processes. Raises `EngineError` if there is none.

    `sys.executable` may be another program, in which Python is embedded.
    """
    version = "python{}.{}".format(*sys.version_info)
    candidates = (
        sys.executable,
        str(getattr(sys, "_base_executable", "")),
        *(os.path.join(sys.exec_prefix, "bin", name) for name in (version, "python3")),
    )
    for path in candidates:
        if path and os.path.basename(path).startswith("python") and os.access(path, os.X_OK):
            return path
    raise EngineError(
        f"no Python interpreter was found to start child processes with; looked for {version} in {sys.exec_prefix}"
    )


def python_module(module: str) -> list[str]:
    """The command that runs an installed module. Unlike `python -m` it takes none from the current folder."""
    if sys.version_info >= (3, 11):
        return [interpreter(), "-P", "-m", module]
    # `sys` is built in. Any other module could come from the current folder, which is sys.path[0].
    run = (
        f"import sys; del sys.path[0]; import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [interpreter(), "-c", run]


class ChildGroup:
    """Programs that run in a `with` block, each with all processes that it starts.

    The end of the block kills those that still run. So does any end of this process, even by SIGKILL: a watcher process
    then kills the group. Raises `OSError` if a program cannot be started.
    """

    def __enter__(self) -> ChildGroup:
        command = [interpreter(), "-I", "-S", "-c", _WATCH]
        self._children: list[subprocess.Popen[bytes]] = []
        self._watcher = subprocess.Popen(
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **_group(0),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()
        for child in self._children:
            child.wait()

    def start(self, command: Sequence[str], *, env: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
        """Start a program without standard input; `streams` are Popen's stdout and stderr, `cwd` its folder."""
        child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **streams, **_group(self._watcher.pid))
        self._children.append(child)
        return child


def _group(leader: int) -> dict[str, Any]:
    """Popen's arguments that put a child into the process group of `leader`. 0: a new group."""
    if sys.version_info >= (3, 11):
        return {"process_group": leader}
    return {"preexec_fn": lambda: os.setpgid(0, leader)}
