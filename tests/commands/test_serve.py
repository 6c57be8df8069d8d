"""What `brlite serve` tells a newcomer. The command itself is run by `test_end_to_end.py`."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import threading

import pytest

from brlite.app import FORWARDER, create_app
from brlite.backends import sizes
from brlite.commands import serve
from brlite.commands.reload import ConfigSource, Reloader
from brlite.commands.serve import ModelLoader, curl_line
from brlite.config.options import Config, EngineConfig, ModelSpec, ServerConfig
from brlite.http.keys import KEYS
from brlite.server.model_manager import OnProgress
from brlite.server.served_model import ModelTable, ServedModel
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.server.test_lost_model import Loader


@pytest.mark.parametrize("model", ["org/name-1.5", "it's", 'a "quoted" \\name', "夏天"])
def test_the_line_to_paste_survives_the_shell_and_json(model: str) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", model, is_chat=True, needs_key=False).replace("\\\n", ""))

    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == model
    assert "YOUR_KEY" not in "".join(words)


def test_a_model_without_a_template_is_asked_to_complete() -> None:
    words = shlex.split(curl_line("http://h", "m", is_chat=False, needs_key=True).replace("\\\n", ""))

    assert words[2] == "http://h/v1/completions"
    assert "prompt" in json.loads(words[-1])
    assert "Authorization: Bearer YOUR_KEY" in words


def test_a_disk_that_hangs_keeps_no_server_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, hangs = threading.Event(), threading.Event()

    def known_sizes(*_: object) -> None:
        reads.set()
        hangs.wait()

    async def start_and_stop() -> None:
        measuring = asyncio.create_task(ModelLoader(Config()).known_bytes(ModelSpec(name="m")))
        await asyncio.to_thread(reads.wait)
        measuring.cancel()

    monkeypatch.setattr(sizes, "known_sizes", known_sizes)
    server = threading.Thread(target=asyncio.run, args=(start_and_stop(),), daemon=True)
    server.start()
    server.join(PATIENCE_SECONDS)
    has_ended = not server.is_alive()
    hangs.set()

    assert has_ended


async def test_a_model_that_is_lost_while_another_one_is_downloaded_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    class StallingLoader(Loader):
        async def is_here(self, spec: ModelSpec) -> bool:
            return spec.name != "b"

        async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
            await asyncio.Event().wait()

    config = Config(
        model=tuple(ModelSpec(name=name, build_seq=64) for name in "ab"),
        engine=EngineConfig(on_rank_failure="exit"),
        server=ServerConfig(port=0, drain_seconds=0.1),
    )
    loader, models = StallingLoader(), ModelTable([ServedModel(spec) for spec in config.model])
    app = create_app(models, config, listens_on=config.server.host)
    reloader = Reloader(ConfigSource((), lambda: config), config, app[KEYS], app[FORWARDER], models)
    monkeypatch.setattr(serve, "ModelLoader", lambda _: loader)
    handlers = {number: signal.getsignal(number) for number in serve.STOP_SIGNALS}
    serving = asyncio.create_task(serve._serve(app, reloader))
    try:
        await eventually(lambda: models.find("a").engine is not None)
        loader.backends[0].die()
        status = await asyncio.wait_for(serving, PATIENCE_SECONDS)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    assert status == serve.EXIT_LOST
