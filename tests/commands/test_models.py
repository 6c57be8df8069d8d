"""Models by name on the command line: pull, models, run, and the flags that take a name. A hub on loopback has them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.commands.cli import EXIT_FAILED, main
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.process.children import ChildGroup
from brlite.sampling_params import SamplingParams
from tests.checkpoint.hub_server import HubServer, files_of
from tests.checkpoint.model_files import write_gguf
from tests.commands.test_terminal import CTRL_C, ENTER, PROMPT, at_terminal
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers
from tests.tiny_models import LLAMA, write_byte_tokenizer, write_model


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a model of safetensors and one GGUF file; the caches are empty."""
    folder = write_model(tmp_path / "repository", LLAMA)
    write_byte_tokenizer(folder)
    write_gguf(folder / "m-Q8_0.gguf")
    monkeypatch.chdir(tmp_path)
    with HubServer(files_of(folder)).running() as server:
        monkeypatch.setenv("BRLITE_CACHE", str(tmp_path / "own"))
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", PATIENCE_SECONDS)
        yield server


def test_pull_prints_where_the_model_is_and_nothing_else(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "org/model"]) == 0

    printed = capsys.readouterr()
    assert (Path(printed.out.strip()) / "model.safetensors").is_file()
    assert printed.err == ""


def test_pull_brings_a_model_up_to_date(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pull", "org/model"])
    server.files["tokenizer_config.json"] = b'{"new": true}'

    main(["pull", "org/model"])

    assert (Path(capsys.readouterr().out.splitlines()[-1]) / "tokenizer_config.json").is_file()


def test_pull_without_the_hub_says_so_and_names_what_is_here(
    server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pull", "org/model"])
    server.refusal = (503, {"Retry-After": "3600"})

    assert main(["pull", "org/model"]) == 0
    printed = capsys.readouterr()
    assert len(set(printed.out.splitlines())) == 1
    assert printed.err.startswith("brlite: not brought up to date: model org/model was not found: the Hugging Face")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms at"),
        ((403, {"X-Error-Code": "GatedRepo"}), "set HF_TOKEN"),
        ((404, {"X-Error-Code": "RepoNotFound"}), "there is no org/model"),
        ((429, {"Retry-After": "3600"}), "allows no request for 3600 s"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line_and_status_2_or_1_if_it_may_pass(
    refusal: tuple[int, dict[str, str]], said: str, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = refusal

    assert main(["pull", "org/model"]) == (1 if refusal[0] == 429 else 2)

    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.count("the Hugging Face hub") == 1


def test_a_disk_without_room_is_status_1(
    server: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brlite.checkpoint.repository.shutil.disk_usage", lambda _: SimpleNamespace(free=0))

    assert main(["pull", "org/model"]) == EXIT_FAILED

    assert "are needed at" in capsys.readouterr().err


def test_models_lists_what_is_here_with_size_and_memory(
    server: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["models"])
    assert "no models are here yet; `brlite pull NAME` fetches one" in capsys.readouterr().out
    for name in ("org/model", "org/model:q8_0", "modelscope:org/model"):
        main(["pull", name])
    capsys.readouterr()

    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["models", "list", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}

    assert [line.split()[0] for line in lines] == ["NAME", "org/model:Q8_0", "org/model", "modelscope:org/model"]
    assert all(line.endswith("today") for line in lines[1:])
    assert found["org/model:Q8_0"]["disk_bytes"] == len(server.files["m-Q8_0.gguf"])
    assert found["org/model"]["architecture"] == "LlamaForCausalLM"
    assert found["org/model"]["memory_bytes"] > 0


@pytest.mark.parametrize("spoil", [lambda weights: weights.symlink_to("absent"), Path.mkdir], ids=["link", "folder"])
def test_a_folder_without_a_file_of_its_weights_is_listed_with_its_problem_and_removed(
    spoil: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own" / "org--model"
    folder.mkdir(parents=True)
    spoil(folder / "model.safetensors")
    monkeypatch.setenv("BRLITE_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert main(["models"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert main(["models", "rm", "org/model", "--yes"]) == 0

    assert line.startswith("org/model  0 B")
    assert "config.json: the file is missing" in line
    assert not folder.exists()


def test_models_show_knows_a_name_whatever_its_letters_and_the_nearest_one(
    server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pull", "org/model:Q8_0"])
    capsys.readouterr()

    assert main(["models", "show", "Org/Model"]) == 0
    assert "architecture  LlamaForCausalLM" in capsys.readouterr().out
    assert main(["models", "show", "org/modle:Q8_0"]) == 2
    assert "did you mean org/model:Q8_0?" in capsys.readouterr().err


def test_models_rm_asks_and_removes_one_file_or_all(
    server: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["pull", "org/model"])
    main(["pull", "org/model:Q8_0"])
    capsys.readouterr()

    assert main(["models", "rm", "org/model:Q8_0"]) == 2
    assert "add --yes where nobody can be asked" in capsys.readouterr().err
    assert main(["models", "rm", "org/model:Q8_0", "--yes"]) == 0
    main(["models"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["org/model"]
    assert main(["models", "rm", "org/model", "--yes"]) == 0

    assert [path.name for path in (tmp_path / "hub").iterdir() if path.name != ".locks"] == []


def test_a_split_gguf_is_one_model_until_all_its_parts_are_removed(
    server: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m-Q4_0.gguf", part_tensors=5)
    parts = {path.name: path.read_bytes() for path in tmp_path.glob("m-Q4_0-*")}
    server.files |= parts
    for name in ("org/model", "org/model:Q4_0"):
        main(["pull", name])
    capsys.readouterr()

    assert main(["models", "list", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert main(["models", "rm", "org/model:Q4_0", "--yes"]) == 0

    assert len(parts) == 3
    assert found.keys() == {"org/model", "org/model:Q4_0"}
    assert found["org/model:Q4_0"]["disk_bytes"] == sum(map(len, parts.values()))
    assert list(tmp_path.rglob("hub/*/snapshots/*/*.gguf")) == []
    main(["models"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["org/model"]


def test_a_split_gguf_that_lacks_a_part_is_removed_whole(
    server: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m-Q4_0.gguf", part_tensors=5)
    server.files |= {path.name: path.read_bytes() for path in tmp_path.glob("m-Q4_0-*")}
    for name in ("org/model", "org/model:Q4_0"):
        main(["pull", name])
    next(tmp_path.rglob("hub/*/snapshots/*/*-00002-of-00003.gguf")).unlink()

    assert main(["models", "rm", "org/model:Q4_0", "--yes"]) == 0

    assert list(tmp_path.rglob("hub/*/snapshots/*/*.gguf")) == []


def test_an_interrupted_download_is_listed_as_one(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.cut_after, server.cuts_left = {"model.safetensors": 100}, 1
    server.failures = []
    main(["pull", "org/model@v3"])
    blobs = Path("hub/models--org--model/blobs")
    blobs.mkdir(parents=True)
    (blobs / "abc.brlite-part").write_bytes(b"x")
    capsys.readouterr()

    main(["models"])

    assert "org/model" in (line := capsys.readouterr().out.splitlines()[1])
    assert "its download was interrupted: `brlite pull` resumes it" in line


def test_inspect_and_convert_take_a_name(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/model:Q8_0"]) == 0
    assert "GGUF file" in capsys.readouterr().out

    assert main(["convert", "--model_name", "mine", "--model_dir", "org/model", "--output_dir", "out"]) == 0
    assert Path("out/mine").is_dir()


def test_the_path_of_a_toml_may_be_a_name(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pull", "org/model:Q8_0"])
    Path("config.toml").write_text('[[model]]\nname = "mine"\npath = "org/model:Q8_0"\n')
    Path("brlite.toml").unlink(missing_ok=True)

    main(["inspect", "org/model:Q8_0"])
    status = main(["check", "config.toml"])

    printed = capsys.readouterr()
    assert "m-Q8_0.gguf" in printed.out
    assert "Traceback" not in printed.err
    assert status in (0, 2)  # the file of this test has no vocabulary, which check says


def test_weights_of_a_path_that_is_a_name_are_packed_into_the_cache(server: HubServer, tmp_path: Path) -> None:
    spec = ModelSpec(name="mine", path="org/model", build_batch=1)

    with LLM(config=Config(model=(spec,), engine=EngineConfig(backend="native"))) as llm:
        (output,) = llm.generate("hello", SamplingParams(max_tokens=2, ignore_eos=True))

    assert len(output.outputs[0].token_ids) == 2
    assert [path.name for path in (tmp_path / "own" / "packed").iterdir()] == ["mine.bf16.brlite"]


def environment(server: HubServer, folder: Path) -> dict[str, str]:
    folders = {"HF_HOME": str(folder / "hf"), "BRLITE_CACHE": str(folder / "own"), "HF_ENDPOINT": server.endpoint}
    return {**os.environ, **folders, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}


def test_at_a_terminal_a_bar_shows_the_rate_and_the_time_left(server: HubServer, tmp_path: Path) -> None:
    server.chunk_seconds = 0.002
    with at_terminal([BRLITE, "pull", "org/model"], env=environment(server, tmp_path)) as terminal:
        terminal.until("downloading org/model: ")
        shown = terminal.until("B/s]")

        assert terminal.status() == 0
    assert "<" in shown


def test_ctrl_c_during_a_download_leaves_with_130_and_no_traceback(server: HubServer, tmp_path: Path) -> None:
    server.gate.clear()
    with at_terminal([BRLITE, "pull", "org/model"], env=environment(server, tmp_path)) as terminal:
        assert server.started.wait(PATIENCE_SECONDS)
        terminal.type(CTRL_C)

        assert terminal.status() == 130
    assert "Traceback" not in terminal.seen


def test_run_serves_and_chats_and_ends_both(tmp_path: Path) -> None:
    command = [BRLITE, "run", "toy", "--engine", "toy", "--max-tokens", "3"]
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # not for loopback
    settings = {**os.environ, **proxy, "TMPDIR": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    killed = tmp_path / "brlite-run.00000000.part"
    killed.mkdir()  # what a run leaves whose terminal was closed
    with at_terminal(command, env=settings) as terminal:
        terminal.until("serving at http://127.0.0.1:")
        port = terminal.until(" until this chat ends")
        terminal.until(PROMPT)
        terminal.type(f"hello there{ENTER}")
        terminal.until("[3 tokens")
        terminal.until(PROMPT)
        terminal.type(CTRL_C)

        assert terminal.status() == 130
    assert "Traceback" not in terminal.seen
    asked = subprocess.run([BRLITE, "chat", "--url", f"localhost:{port}"], input="", capture_output=True, text=True)
    assert asked.returncode == 2  # nothing listens there any more
    assert not any(tmp_path.iterdir())


def test_the_server_of_run_has_the_caches_of_this_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server starts in another folder: there a relative cache is empty, and the model would be fetched again."""
    started: list[dict[str, str]] = []

    class Group(ChildGroup):
        def start(self, command: Sequence[str], *, env: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
            started.append({**env})
            return super().start(["false"], env=env)

    monkeypatch.setattr("brlite.commands.run.ChildGroup", Group)
    monkeypatch.chdir(tmp_path)
    for name, folder in (("HF_HOME", "hf"), ("BRLITE_CACHE", "../own"), ("XDG_CACHE_HOME", "~/x")):
        monkeypatch.setenv(name, folder)

    assert main(["run", "toy", "--engine", "toy"]) == 2

    assert {name: started[0][name] for name in ("HF_HOME", "BRLITE_CACHE", "XDG_CACHE_HOME")} == {
        "HF_HOME": str(tmp_path / "hf"),
        "BRLITE_CACHE": str(tmp_path.parent / "own"),
        "XDG_CACHE_HOME": "~/x",
    }


def test_run_does_not_chat_with_the_server_that_has_its_port() -> None:
    port = free_port()
    with running([BRLITE, "serve", *TOY, "--port", str(port)], stderr=subprocess.DEVNULL):
        wait_until_it_answers(port)

        command = [BRLITE, "run", "other", "--engine", "toy", "--port", str(port)]
        ended = subprocess.run(command, input="hello", capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stdout) == (EXIT_FAILED, "")
    assert (
        ended.stderr
        == f"brlite: error: cannot listen on 127.0.0.1:{port}: Address already in use; --port takes another one\n"
    )


@pytest.mark.parametrize(("flag", "value"), [("port", "99999"), ("device", "no device")])
def test_run_says_in_a_line_why_the_server_ended(flag: str, value: str, tmp_path: Path) -> None:
    (tmp_path / value).touch()  # the value is no path, whatever files there are
    command = [BRLITE, "run", "toy", f"--{flag}={value}"]
    settings = {**os.environ, "BRLITE_ENGINE": "toy"}

    ended = subprocess.run(command, input="", capture_output=True, text=True, check=False, cwd=tmp_path, env=settings)

    assert ended.returncode == 2
    assert flag in ended.stderr
    assert str(tmp_path) not in ended.stderr
    assert ended.stderr.count("\n") == 1
