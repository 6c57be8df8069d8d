"""The proxies that are compared: how each is installed, told of one backend and started. Nothing is measured here.

None writes an access log, all have one worker on one core, and all but `nginx` keep their connections to the backend.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from measuring.venvs import find_venv, package_version
from msgspec import Struct
from peers.servers import HOST, RUN_BRLITE, Launch, ServerError, free_port

import brlite

MODEL = "m"
WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None"
WITHOUT_FAST_PATH = "from brlite.proxy.fast_path import FastPaths; FastPaths.__call__ = lambda *arguments: None"
VLLM_ROUTER = "vllm-router==0.1.17"
SGLANG_ROUTER = "sglang-router==0.3.2"

NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr error;
{user}
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    gzip on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{server}
}}
"""

# The manual's brvllm.conf around one server.
MANUAL = """
    upstream brvllm_server {{
        server {backend};
    }}
    server {{
        listen {listen};
        location /v1 {{
            proxy_pass http://brvllm_server;
            proxy_set_header Host $host;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
"""

# As somebody sets it up who knows nginx: connections are kept, bodies stay in memory, events are not held back.
TUNED = """
    upstream brvllm_server {{
        server {backend};
        keepalive 512;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {listen};
        keepalive_requests 1000000000;
        client_body_buffer_size 1m;
        location /v1 {{
            proxy_pass http://brvllm_server;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }}
    }}
"""


class Place(Struct, frozen=True):
    """Where a proxy finds the backend (a port of this machine), and a folder for its files."""

    backend: int
    folder: Path


def has_nginx() -> bool:
    return _find_nginx() is not None


def launch_brlite(place: Place) -> Launch:
    """brlite's proxy of the running Python's environment, with uvloop if that is installed."""
    has_uvloop = importlib.util.find_spec("uvloop") is not None
    return _brlite("brlite", "uvloop" if has_uvloop else "asyncio", RUN_BRLITE, place)


def launch_brlite_asyncio(place: Place) -> Launch:
    return _brlite("brlite-asyncio", "asyncio", f"{WITHOUT_UVLOOP}; {RUN_BRLITE}", place)


def launch_brlite_aiohttp(place: Place) -> Launch:
    """All requests through aiohttp and the middleware."""
    return _brlite("brlite-aiohttp", "uvloop, without the fast path", f"{WITHOUT_FAST_PATH}; {RUN_BRLITE}", place)


def _brlite(name: str, loop: str, code: str, place: Place) -> Launch:
    port = free_port()
    config = place.folder / f"{name}.toml"
    lines = [
        "[server]",
        f"host = {json.dumps(HOST)}",
        f"port = {port}",
        "access_log = false",
        'log_level = "warning"',
        "[proxy]",
        "max_in_flight = 4096",  # none of the others has a limit
        "[[upstream]]",
        f"url = {json.dumps(_url(place.backend))}",
        f"models = [{json.dumps(MODEL)}]",
    ]
    config.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-c", code, "proxy", str(config)]
    return _launch(name, f"{brlite.__version__}, {loop}", command, port, "/v1/models")


def launch_nginx(place: Place) -> Launch:
    """nginx as the manual configures it."""
    return _nginx("nginx", MANUAL, place)


def launch_nginx_tuned(place: Place) -> Launch:
    return _nginx("nginx-tuned", TUNED, place)


def _nginx(name: str, server: str, place: Place) -> Launch:
    nginx = _find_nginx()
    if nginx is None:
        raise ServerError("nginx is not installed")
    port, folder = free_port(), place.folder / name
    folder.mkdir(exist_ok=True)
    # As root its workers would change to somebody who cannot read this folder.
    user = f"user {pwd.getpwuid(0).pw_name};" if os.geteuid() == 0 else ""
    served = server.format(backend=f"{HOST}:{place.backend}", listen=f"{HOST}:{port}")
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, user=user, server=served))
    version = (
        subprocess.run([nginx, "-v"], capture_output=True, text=True, check=True).stderr.strip().rpartition("/")[2]
    )
    command = [nginx, "-p", str(folder), "-e", "stderr", "-c", str(config)]
    return _launch(name, version, command, port, "/v1/models")


def _find_nginx() -> str | None:
    return shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin")))


def launch_vllm_router(place: Place) -> Launch:
    """The cheapest policy among several servers: its default keeps a tree of all prompts."""
    return _router("vllm-router", VLLM_ROUTER, [], ["--policy=round_robin"], place)


def launch_vllm_router_default(place: Place) -> Launch:
    return _router("vllm-router-default", VLLM_ROUTER, [], [], place)


def launch_sglang_router(place: Place) -> Launch:
    """Again with the cheapest policy, and again not as it comes."""
    return _router("sglang-router", SGLANG_ROUTER, ["launch"], ["--policy=round_robin"], place)


def launch_sglang_router_default(place: Place) -> Launch:
    return _router("sglang-router-default", SGLANG_ROUTER, ["launch"], [], place)


def _router(name: str, requirement: str, verbs: list[str], options: list[str], place: Place) -> Launch:
    package = requirement.partition("==")[0]
    python = find_venv(package, [requirement])
    port = free_port()
    flags = [
        f"--host={HOST}",
        f"--port={port}",
        f"--worker-urls={_url(place.backend)}",
        f"--prometheus-host={HOST}",
        f"--prometheus-port={free_port()}",
        "--log-level=error",
        "--worker-startup-check-interval=1",
    ]
    command = [str(python.with_name(package)), *verbs, *flags, *options]
    return _launch(name, package_version(python, package), command, port, "/readiness")


def _launch(name: str, version: str, command: list[str], port: int, ready_path: str) -> Launch:
    return Launch(name=name, version=version, command=command, port=port, model=MODEL, ready_path=ready_path, fields={})


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"


LAUNCHERS: dict[str, Callable[[Place], Launch]] = {
    "brlite": launch_brlite,
    "brlite-asyncio": launch_brlite_asyncio,
    "brlite-aiohttp": launch_brlite_aiohttp,
    "nginx": launch_nginx,
    "nginx-tuned": launch_nginx_tuned,
    "vllm-router": launch_vllm_router,
    "vllm-router-default": launch_vllm_router_default,
    "sglang-router": launch_sglang_router,
    "sglang-router-default": launch_sglang_router_default,
}
