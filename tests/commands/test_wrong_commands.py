"""What a first user types wrong: each ends in at most three lines that say what to do, with status 2, no traceback.

They run in this process, where a hundred take seconds. Those that need a process of their own stand at the end.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from brlite.commands.cli import EXIT_FAILED, br_api_server, main, model_convert
from tests.checkpoint.hub_server import HubServer
from tests.checkpoint.model_files import write_gguf
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY
from tests.tiny_models import LLAMA, write_model

BAD_INPUT = 2

# Each is a command line, and words that its message has.
FLAGS = [
    ("", "required: COMMAND"),
    ("serv", "did you mean serve?"),
    ("start", "no such command: start"),
    ("--serve", "--serve: the COMMAND comes first"),
    ("server", "did you mean serve?"),
    ("model", "did you mean models?"),
    ("list", "no such command: list"),
    ("serve --model a --model b", "--model is given twice: several models are [[model]] tables of a config file"),
    ("serve --port 1 --port=1", "--port is given twice: allowed is once"),
    ("serve --mod a --model b", "--model is given twice"),
    ("serve --engine toy --engine-option x=1 --engine-option x=2", "NAME=VALUE, each name once"),
    ("serve several.toml --model c", "--model c: allowed is a model of this config, one of a, b"),
    ("serve several.toml --context 64", "2 [[model]] tables: set it there, or choose one of them by --model"),
    ("serve several.toml --draft model", "2 [[model]] tables"),
    ("serve several.toml --alias x", "several [[model]] tables: write it into proxy.aliases"),
    ("chat several.toml --context 64", "2 [[model]] tables"),
    ("chat --url http://127.0.0.1:9 several.toml", "CONFIG is for a model that is loaded here"),
    ("chat --url http://127.0.0.1:9 --context 64", "--context is for a model that is loaded here"),
    ("chat --url http://127.0.0.1:9 --engine-option a=1", "--engine-option is for a model"),
    ("chat --api-key-env KEY", "--api-key-env is for the server at --url"),
    ("proxy --upstream m=http://127.0.0.1:9 --choice prefix --choice sticky", "--choice is given twice"),
    ("generate --seed 1 --seed 2", "--seed is given twice"),
    ("bench --requests 32 --requests 8", "--requests is given twice"),
    ("convert --model_name a --model-name b", "--model-name is given twice"),
    ("serve --prot 8000", "did you mean --port?"),
    ("serve -p 8000", "unknown: -p"),
    ("serve --port eight", "invalid int value: 'eight'"),
    ("serve --port", "expected one argument"),
    ("serve --port 70000", "server.port = 70000"),
    ("serve --port -1", "server.port = -1"),
    ("serve --host", "expected one argument"),
    ("serve --log-level loud", "server.log_level"),
    ("serve --threads 100000", "engine.threads"),
    ("serve --threads -2", "engine.threads"),
    ("serve --context -1", "build_seq"),
    ("serve --context 4k", "invalid int value: '4k'"),
    ("serve --device gpu9", "device"),
    ("serve --engine vllm", "vllm"),
    ("serve --engine-option x", "allowed is NAME=VALUE"),
    ("serve --api-key secret", "--api-key-file FILE"),
    ("serve --api-key-file absent", "absent"),
    ("serve --model", "expected one argument"),
    ("serve --model absent.gguf", "absent.gguf"),
    ("serve --model ./absent", "absent"),
    ("serve --model /proc/absent/model", "/proc/absent/model"),
    ("serve --max-model-len 4096", "did you mean --context?"),
    ("serve -c 4096", "did you mean --context?"),
    ("serve --ctx-size 4096", "did you mean --context?"),
    ("serve -m model.gguf", "did you mean --model?"),
    ("serve -hf org/m", "did you mean --model?"),
    ("serve -ngl 99", "--device takes the whole model to a card"),
    ("serve --n-gpu-layers 99", "--device takes the whole model to a card"),
    ("serve --gpu-memory-utilization 0.9", "it is engine.gpu_memory_utilization"),
    ("serve --swap-space 4", "engine.memory_gib"),
    ("serve --tensor-parallel-size 2", "tensor_parallel of a [[model]]"),
    ("serve -tp 2", "tensor_parallel of a [[model]]"),
    ("serve --served-model-name m", "did you mean --alias?"),
    ("serve --dtype bfloat16", "precision of a [[model]]"),
    ("serve --quantization awq", "precision of a [[model]]"),
    ("serve --kv-cache-dtype fp8", "a_bf16_w_int8_kv_int8"),
    ("serve --max-num-seqs 8", "build_batch of a [[model]]"),
    ("serve -np 4", "build_batch of a [[model]]"),
    ("serve --max-num-batched-tokens 512", "engine.max_num_batched_tokens"),
    ("serve --chat-template x.jinja", "chat_template of a [[model]]"),
    ("serve --trust-remote-code", "no code of a model's folder is ever run"),
    ("serve --enable-prefix-caching", "leave it out"),
    ("serve --jinja", "leave it out"),
    ("serve --revision main", "organisation/model@REVISION"),
    ("serve --hf-file m.gguf", "organisation/model:FILE"),
    ("serve --hf-token x", "HF_TOKEN"),
    ("serve --tool-call-parser hermes", "tool_parser of a [[model]]"),
    ("chat --temperature", "expected one argument"),
    ("chat --temperature hot", "invalid float value"),
    ("chat --temperature -1", "temperature"),
    ("chat -n 5", "did you mean --max-tokens?"),
    ("chat -sys hello", "did you mean --system?"),
    ("chat --url http://127.0.0.1:9", "no model could be found there"),
    ("chat --url localhost:9", "no model could be found there"),
    ("chat --url http://", "a URL is needed such as http://127.0.0.1:8000"),
    ("chat --url http://[::1", "a URL is needed"),
    ("chat --url http://a..b", "a URL is needed"),
    ("bench --url ftp://127.0.0.1", "a URL is needed"),
    ("chat --url=", "--url: it is empty"),
    ("run --device=", "--device: it is empty"),
    ("serve --model=", "--model: it is empty"),
    ("serve --engine=", "--engine: it is empty"),
    ("serve --engine 'a b'", 'BRLITE_ENGINE, or --engine: "a b": allowed is a name without spaces'),
    ("serve --model ' '", "--model: it is empty"),
    ("serve ' '", "CONFIG: it is empty"),
    ("tune ''", "NAME|PATH: it is empty"),
    ("generate --input ''", "--input: it is empty"),
    ("generate --output ''", "--output: it is empty"),
    ("serve --api-key-file ''", "--api-key-file: it is empty"),
    ("serve --host ''", 'server.host = "": allowed is a non-empty string'),
    ("serve --host http://127.0.0.1:8000", "allowed is a host name or an address alone"),
    ("chat --url http://127.0.0.1:9 --api-key-env ''", "--api-key-env: it is empty"),
    ("chat --url http://127.0.0.1:9 --api-key-env NOT_SET", "the environment variable NOT_SET is not set, or empty"),
    ("bench --url http://127.0.0.1:9 --api-key-env NOT_SET", "the environment variable NOT_SET is not set, or empty"),
    ("inspect ''", "PATH: it is empty"),
    ("check ''", "FILE: it is empty"),
    ("serve --host a..b", "allowed is a host name or an address alone"),
    (f"serve --host {'x' * 5000}", "allowed is a host name or an address alone"),
    (f"proxy --port 0 --upstream m=http://{'x' * 64}:1", "NAME=URL"),
    ("proxy --port 0 --upstream m=http://a..b:1", "NAME=URL"),
    (f"pull {'x' * 300}", "is not a model name"),
    ("chat --url ftp://127.0.0.1", "127.0.0.1"),
    ("generate --input absent.txt", "absent.txt"),
    ("generate --top-k many", "invalid int value"),
    ("generate --top-p 2", "top_p"),
    ("generate --n 0", "n must be"),
    ("generate --max-tokens 0", "max_tokens"),
    ("verify --max-tokens x", "invalid int value"),
    ("verify --prompts absent.txt --engine toy --model toy", "absent.txt"),
    ("engine-check --engine absent", "absent"),
    ("pull", "required: NAME"),
    ("pull ../../etc/passwd", "is not a model name"),
    ("pull org/model:Q9", "no .gguf file is Q9"),
    ("pull org/absent", "there is no org/absent"),
    ("pull org/model@v9", "has no such revision"),
    ("pull ollama:llama3", "was not found"),
    ("pull https://huggingface.co/org/model", "is not a model name"),
    ("models delete", "no such command: delete"),
    ("models rm", "required: NAME"),
    ("models rm org/absent", "is not on this machine"),
    ("models show org/absent", "is not on this machine"),
    ("run org/absent", "there is no org/absent"),
    ("run --port x", "invalid int value"),
    ("run --temperature -1", "temperature"),
    ("inspect", "required: PATH"),
    ("inspect absent.gguf", "absent.gguf"),
    ("inspect notes.txt", "notes.txt"),
    ("inspect empty", "empty"),
    ("convert", "required"),
    ("convert --model_name a --model_dir absent --output_dir out", "absent"),
    ("convert --model_name a --model_dir model --output_dir out --precision int3", "int3"),
    ("convert --model_name ../a --model_dir model --output_dir out", "is not a model name"),
    ("check", "name a FILE to check"),
    ("check absent.toml", "absent.toml"),
    ("check notes.txt", "ends in .toml or .json"),
    ("verify --against absent", "absent: cannot be read"),
    ("verify --against notes.txt", "did not write this file"),
    ("check m.gguf", "brlite tune m.gguf"),
    ("check model", "brlite tune model"),
    ("check broken.toml", "broken.toml"),
    ("check wrong.toml", "did you mean server?"),
    ("serve absent.toml", "absent.toml"),
    ("serve broken.json", "broken.json"),
    ("serve org/model", "a model is given by --model org/model"),
    ("serve m.gguf", "a model is given by --model m.gguf"),
    ("serve sha256-0a1b", "a model is given by --model sha256-0a1b"),
    ("serve model", "a model is given by --model model"),
    ("proxy --upstream http://127.0.0.1:9", "NAME=URL"),
    ("proxy --upstream m=127.0.0.1:9", "NAME=URL, with a URL such as http://HOST:PORT"),
    ("proxy", "upstream"),
    ("proxy absent.toml", "absent.toml"),
    ("-m model", "-m: the COMMAND comes first, as in brlite serve --model NAME"),
    ("-hf org/m", "-hf: the COMMAND comes first"),
    ("--model=org/m serve", "--model=org/m: the COMMAND comes first"),
    ("create m -f Modelfile", "did you mean convert?"),
    ("serve --model /", "--model /: this is the root folder, and no model"),
    ("tune /", "--model /: this is the root folder, and no model"),
    ("engine-check --model /", "--model /: this is the root folder, and no model"),
    ("serve --alias= --engine toy --model toy", "--alias: it is empty"),
    ("serve --config x.toml", "the config file is given without a flag"),
    ("serve --verbose", "--log-level debug shows more"),
    ("serve llama3.2", "a model is given by --model llama3.2"),
    ("chat llama3", "a model is given by --model llama3"),
    ("generate hello", "hello is no config file"),
    ("generate --prompt hello", "prompts are lines of --input FILE, or of standard input"),
    ("doctor --verbose", "unknown: --verbose"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("first hour")
    write_model(folder / "model", LLAMA)
    write_gguf(folder / "m.gguf")
    write_gguf(folder / "sha256-0a1b")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("notes")
    (folder / "broken.toml").write_text("[server\n")
    (folder / "broken.json").write_text("{")
    (folder / "several.toml").write_text(
        '[[model]]\nname = "a"\npath = "model"\n[[model]]\nname = "b"\npath = "m.gguf"\n'
    )
    (folder / "wrong.toml").write_text("[sever]\nport = 1\n")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer({"m-Q8_0.gguf": b"x" * 2000}).running() as server:
        yield server


@pytest.fixture(autouse=True)
def elsewhere(folder: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in that folder, with empty caches and a hub on loopback."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BRLITE_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", PATIENCE_SECONDS)


def status_of(run: object, arguments: list[str]) -> int:
    """What a command's process would end with."""
    try:
        return run(arguments)  # type: ignore[operator, no-any-return]
    except SystemExit as left:
        return int(left.code or 0)


def check_message(text: str, said: str) -> None:
    assert said in text
    assert len(text.splitlines()) <= 3, text
    assert "Traceback" not in text
    assert "error: " in text


@pytest.mark.parametrize(("line", "said"), FLAGS, ids=[line for line, _ in FLAGS])
def test_a_wrong_command_says_in_three_lines_what_to_do(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = status_of(main, shlex.split(line))

    printed = capsys.readouterr()
    assert status == BAD_INPUT, printed
    check_message(printed.err, said)


@pytest.mark.parametrize(
    ("run", "line", "said"),
    [
        (br_api_server, "", "required: --config"),
        (br_api_server, "--config absent.json", "absent.json"),
        (br_api_server, "--config a.json --config_path b.json", "--config_path is given twice"),
        (br_api_server, "--config broken.json", "broken.json"),
        (model_convert, "", "required: --model_name"),
        (model_convert, "--model_name m --model_dir absent --output_dir out", "absent"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_manuals_commands_do_as_well(run: object, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = status_of(run, line.split())

    assert status == BAD_INPUT
    check_message(capsys.readouterr().err, said)


def started(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [BRLITE, *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS, **options
    )


def test_a_port_in_use_names_the_flag_that_chooses_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = started("serve", *TOY, "--port", str(taken.getsockname()[1]), "--log-level", "error")

    assert ended.returncode == EXIT_FAILED  # another start may succeed
    check_message(ended.stderr, "--port")


def test_a_hub_that_cannot_be_reached_is_no_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 1)

    assert main(["pull", "org/model"]) == EXIT_FAILED
    check_message(capsys.readouterr().err, "Connection refused")


HTML = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nContent-Type: text/html\r\n\r\n<html>"
LIST = HTML.replace(b"<html>", b"[1, 2]")


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9\r\n", bytes(range(256)), HTML, LIST], ids=["ssh", "bytes", "html", "list"]
)
@pytest.mark.parametrize("command", ["chat", "bench"])
def test_another_program_on_the_port_is_no_server_of_models(
    command: str, greeting: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_SECONDS)

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        status = status_of(main, [command, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"])
        thread.join()

    printed = capsys.readouterr()
    assert status == BAD_INPUT, printed
    check_message(printed.err, "no model could be found there: what answers is no server of models")


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/proc/absent"},
        {"BRLITE_ENGINE": " "},
        {"HOME": ""},
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "xx_YY.nothing"},
        {"TERM": "dumb"},
        {"PATH": ""},
    ],
    ids=str,
)
def test_an_odd_environment_changes_no_message(environment: dict[str, str]) -> None:
    ended = started("serve", "--model", "./modèle", env={**os.environ, **environment})

    assert ended.returncode == BAD_INPUT
    check_message(ended.stderr, "does not exist")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command_with_a_traceback(closed: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", f'exec "$0" check absent.toml {closed}', BRLITE],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )

    assert ended.returncode == BAD_INPUT
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_command_reads_its_input_is_its_status(number: signal.Signals) -> None:
    with subprocess.Popen(
        [BRLITE, "generate", *TOY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write("a line\n" * 20_000)  # more than a pipe holds: it reads
        process.stdin.flush()
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == 128 + number
    assert "Traceback" not in said


def test_ctrl_c_before_a_command_begins_is_130_as_well() -> None:
    code = (
        "import os, signal, sys, brlite.commands.cli as cli\n"
        "cli.leave_process_1 = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(['check', '--schema']))"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )

    assert ended.returncode == 130
    assert ended.stdout + ended.stderr == ""
