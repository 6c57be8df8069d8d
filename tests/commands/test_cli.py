"""The command line: overrides, exit statuses, and how quickly it comes up."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import brlite
from brlite.commands import chat, generate, serve, verify
from brlite.commands.cli import br_api_server, command_parser, main
from brlite.commands.given_config import given_config
from brlite.commands.reload import ConfigSource
from brlite.config.load import load_config, read_toml
from brlite.config.options import Config, ModelSpec
from tests.config.test_manual_json import FIXTURES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Start in an empty folder, where there is no brlite.toml."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def handed_over(monkeypatch) -> SimpleNamespace:
    """What `serve`, `generate`, `chat` and `verify` would have started with; none of them starts."""
    seen = SimpleNamespace()

    def serve_config(config: Config, warnings: list[str], source: ConfigSource) -> int:
        seen.config, seen.warnings, seen.source = config, warnings, source
        return 0

    def complete(config: Config, source: str, target: str, params: dict[str, object], *, is_chat: bool) -> int:
        seen.config, seen.files, seen.params, seen.is_chat = config, (source, target), params, is_chat
        return 0

    async def with_model(config: Config, *options: object) -> None:
        seen.target, seen.options = config, options

    async def with_server(url: str, *options: object) -> None:
        seen.target, seen.options = url, options

    def print_report(config: Config, task: verify.Task, *, as_json: bool) -> int:
        seen.config, seen.task, seen.as_json = config, task, as_json
        return 1

    monkeypatch.setattr(verify, "print_report", print_report)
    monkeypatch.setattr(serve, "serve", serve_config)
    monkeypatch.setattr(generate, "generate", complete)
    monkeypatch.setattr(chat, "chat_with_model", with_model)
    monkeypatch.setattr(chat, "chat_with_server", with_server)
    return seen


def test_serve_without_a_file_takes_the_defaults(handed_over):
    assert main(["serve"]) == 0

    assert handed_over.config == Config()
    assert handed_over.warnings == []


@pytest.mark.parametrize("named", [[], ["brlite.toml"]])
def test_serve_takes_the_file_of_the_folder_it_is_started_in_and_says_so_once(
    named, handed_over, tmp_path, capfd, caplog
):
    (tmp_path / "brlite.toml").write_text("[server]\nport = 9000\n")

    caplog.set_level("INFO")
    main(["serve", *named])

    assert handed_over.config.server.port == 9000
    said = capfd.readouterr().err + "".join(record.getMessage() for record in caplog.records)
    assert said.count("brlite.toml") == 1


def test_a_named_file_wins_over_the_folders_own(handed_over, tmp_path):
    (tmp_path / "brlite.toml").write_text("[server]\nport = 9000\n")
    (tmp_path / "other.toml").write_text("[server]\nport = 9001\n")

    main(["serve", "other.toml"])

    assert handed_over.config.server.port == 9001


def test_the_command_line_wins_over_the_file(handed_over, tmp_path):
    (tmp_path / "brlite.toml").write_text('[server]\nport = 9000\nhost = "::1"\n')

    main(["serve", "--port", "0", "--log-level", "debug", "--device", "cpu", "--threads", "1"])

    config = handed_over.config
    assert (config.server.host, config.server.port, config.server.log_level) == ("::1", 0, "debug")
    assert (config.engine.device, config.engine.threads) == ("cpu", 1)


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        ("org/name-1.5", ModelSpec(name="org/name-1.5")),
        ("tiny-1.5", ModelSpec(name="tiny-1.5", path="tiny-1.5")),
        ("absent/tiny.Q4_1.gguf", ModelSpec(name="tiny.Q4_1", path="absent/tiny.Q4_1.gguf")),
        ("/absent/tiny-1.5/", ModelSpec(name="tiny-1.5", path="/absent/tiny-1.5")),
    ],
)
def test_a_model_is_named_or_given_as_a_path(handed_over, tmp_path, model, spec):
    (tmp_path / "tiny-1.5").mkdir()

    main(["serve", "--model", model])

    assert handed_over.config.model == (spec,)


def test_what_serve_was_started_with_is_read_again_with_its_overrides(handed_over, tmp_path):
    own = tmp_path / "brlite.toml"
    own.write_text("[server]\nport = 9000\n")
    main(["serve", "--host", "::1"])

    own.write_text("[limits]\nmax_n = 2\n")
    config = handed_over.source.load()

    assert [path.name for path in handed_over.source.files] == ["brlite.toml"]
    assert (config.server.host, config.server.port, config.limits.max_n) == ("::1", 8000, 2)


def test_serve_without_a_file_follows_none(handed_over, tmp_path):
    main(["serve"])

    (tmp_path / "brlite.toml").write_text("[server]\nport = 9000\n")

    assert handed_over.source.files == ()


def test_a_proxy_has_no_model_of_its_own(handed_over):
    upstreams = ["--upstream", "org/a=http://h:1", "--upstream", "org/a=http://h:2", "--upstream", "b=unix:/run/b"]

    assert main(["proxy", *upstreams, "--port", "9000", "--choice", "prefix"]) == 0

    config = handed_over.config
    assert config.model == ()
    assert [(upstream.url, upstream.models) for upstream in config.upstream] == [
        ("http://h:1", ("org/a",)),
        ("http://h:2", ("org/a",)),
        ("unix:/run/b", ("b",)),
    ]
    assert (config.server.port, config.proxy.choice) == (9000, "prefix")


def test_a_proxy_takes_files_and_the_command_line_together_and_again(handed_over, tmp_path):
    toml = tmp_path / "own.toml"
    toml.write_text('[[upstream]]\nurl = "http://h:1"\nmodels = ["a"]\n')
    main(["proxy", "own.toml", "--upstream", "b=http://h:2"])

    toml.write_text('[[upstream]]\nurl = "http://h:3"\nmodels = ["c"]\n')
    again = handed_over.source.load()

    assert [upstream.url for upstream in handed_over.config.upstream] == ["http://h:1", "http://h:2"]
    assert [upstream.url for upstream in again.upstream] == ["http://h:3", "http://h:2"]
    assert handed_over.source.files == (Path("own.toml"),)


def test_a_proxy_does_not_take_the_folders_own_file(handed_over, tmp_path, capsys):
    (tmp_path / "brlite.toml").write_text('[[upstream]]\nurl = "http://h:1"\nmodels = ["a"]\n')

    assert main(["proxy"]) == 2

    assert "no upstream" in capsys.readouterr().err


def test_generate_hands_over_files_and_sampling(handed_over):
    main(["generate", "--input", "a.txt", "--temperature", "0", "--stop", "x", "--stop", "y", "--n", "2"])

    assert handed_over.files == ("a.txt", "-")
    assert handed_over.params == {"max_tokens": 256, "temperature": 0.0, "n": 2, "stop": ["x", "y"]}


def test_chat_talks_to_a_server_with_the_key_of_its_variable(handed_over, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")

    main(["chat", "--url", "http://127.0.0.1:8000", "--model", "m", "--api-key-env", "SOME_KEY", "--system", "Hi"])

    assert handed_over.target == "http://127.0.0.1:8000"
    assert handed_over.options == ("m", "secret", "Hi", {"max_tokens": None})


def test_chat_without_a_server_brings_its_own_model(handed_over):
    main(["chat"])

    assert handed_over.target == Config()


def test_verify_hands_over_its_prompts_and_returns_what_was_found(handed_over, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")

    assert main(["verify", "--prompts", "a.txt", "--max-tokens", "8", "--threads", "1", "--json"]) == 1

    assert handed_over.config.engine.threads == 1
    assert (handed_over.task, handed_over.as_json) == (verify.Task(["one", "two"], 8), True)


@pytest.mark.parametrize("option", ["--config", "--config_path"])
def test_the_manuals_command_listens_to_the_network(handed_over, option):
    path = str(FIXTURES / "mistral_7b.json")

    assert br_api_server([option, path, "--port", "9000"]) == 0

    assert (handed_over.config.server.host, handed_over.config.server.port) == ("0.0.0.0", 9000)
    assert handed_over.config.model == load_config(FIXTURES / "mistral_7b.json").model
    assert handed_over.warnings[0].startswith("listening on all addresses (0.0.0.0), as br-vllm-serving does")


@pytest.mark.parametrize(
    ("argv", "host"),
    [
        ([str(FIXTURES / "mistral_7b.json"), "--host", "127.0.0.1"], "127.0.0.1"),
        (["own.toml"], "127.0.0.7"),
        (["own.toml", "--host", "0.0.0.0"], "0.0.0.0"),
        (["bare.toml"], "127.0.0.1"),
    ],
)
def test_the_manuals_command_keeps_to_a_host_that_is_named(handed_over, tmp_path, argv, host):
    (tmp_path / "own.toml").write_text('[server]\nhost = "127.0.0.7"\n')
    (tmp_path / "bare.toml").write_text("")

    br_api_server(["--config", *argv])

    assert handed_over.config.server.host == host
    assert not any("all addresses" in warning for warning in handed_over.warnings)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "absent.toml"], "absent.toml: cannot be read: No such file or directory"),
        (["serve", "--port", "70000"], "command line: server.port = 70000: allowed is a whole number from 0 to 65535"),
        (["serve", "--log-level", "loud"], 'command line: server.log_level = "loud": allowed are debug, '),
        (["worker"], "no launcher has started this: WORLD_SIZE is not set or 1; start it with torchrun, as in "),
        (["proxy"], "proxy: no upstream; give a config "),
        (["proxy", "--upstream", "a"], 'command line: --upstream "a": allowed is NAME=URL'),
        (["proxy", "--upstream", "a=http://h", "--choice", "x"], 'command line: proxy.choice = "x": allowed are '),
        (["proxy", "absent.toml"], "absent.toml: cannot be read: No such file or directory"),
        (["generate", "--top-p", "2"], "top_p must be "),
        (["check", "absent.json"], "absent.json: cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(handed_over, capsys, argv, message):
    status = main(argv)

    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith(f"brlite: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["fly"], ["serve", "--port", "x"]])
def test_a_command_that_cannot_be_parsed_is_status_2(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)

    assert caught.value.code == 2


def test_an_interrupt_is_status_130(handed_over, monkeypatch):
    def interrupted(config: Config, warnings: list[str], source: ConfigSource) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve", interrupted)

    assert main(["serve"]) == 130


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"brlite {brlite.__version__}\n"


def test_help_imports_nothing_that_takes_time():
    run = "from brlite.commands.cli import main\ntry: main(['--help'])"
    code = f"import sys\n{run}\nexcept SystemExit: print(*sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "serve a model over the OpenAI API" in result.stdout
    loaded = result.stdout.splitlines()[-1].split()
    assert {"torch", "aiohttp", "transformers", "asyncio", "msgspec"}.isdisjoint(loaded)


def test_a_reader_that_leaves_early_causes_no_traceback():
    code = "import sys, brlite.commands.cli, brlite.commands.doctor as d; d.run = lambda args: print('x') or 0\n"
    code += "sys.exit(brlite.commands.cli.main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None

    process.stdout.close()
    _, errors = process.communicate()

    assert errors == ""
    assert process.returncode == 0


# Engines


def test_the_command_line_beats_the_environment_which_beats_the_file(handed_over, monkeypatch) -> None:
    Path("c.toml").write_text('[engine]\nname = "in-the-file"\n')
    seen = []
    for variable, arguments in (("", []), ("from-outside", []), ("from-outside", ["--engine", "toy"])):
        monkeypatch.setenv("BRLITE_ENGINE", variable)
        main(["serve", "c.toml", *arguments])
        seen.append(handed_over.config.engine.name)

    assert seen == ["in-the-file", "from-outside", "toy"]


def test_ours_can_be_chosen_over_the_files(handed_over) -> None:
    Path("c.toml").write_text('[engine]\nname = "toy"\n')

    main(["generate", "c.toml", "--engine", "torch"])

    assert (handed_over.config.engine.name, handed_over.config.engine.backend) == (None, "torch")


def test_options_are_those_of_the_file_and_the_command_line(handed_over) -> None:
    Path("c.toml").write_text('[engine]\nname = "toy"\noptions = { fail_every = 7, start_seconds = 1.5 }\n')

    main(["serve", "c.toml", "--engine-option", "fail_every=9", "--engine-option", "path=/a=b"])

    assert handed_over.config.engine.options == {"fail_every": "9", "start_seconds": 1.5, "path": "/a=b"}


def test_the_manuals_command_and_its_json_choose_one_too(handed_over, monkeypatch) -> None:
    monkeypatch.setenv("BRLITE_ENGINE", "toy")

    status = br_api_server(["--config", str(FIXTURES / "qwen2_72b_instruct.json")])

    assert status == 0
    assert handed_over.config.engine.name == "toy"
    assert handed_over.config.model[0].tensor_parallel == 8


def test_serve_takes_a_context_aliases_and_pages_as_flags(handed_over):
    status = main(
        [
            "serve",
            "--context",
            "4096",
            "--alias",
            "gpt-4o",
            "--alias",
            "small",
            "--cors",
            "https://a.example",
            "--cors",
            "*",
        ]
    )

    config = handed_over.config
    assert (status, config.model[0].build_seq, config.server.cors_origins) == (0, 4096, ("https://a.example", "*"))
    assert config.proxy.aliases == dict.fromkeys(["gpt-4o", "small"], config.model[0].name)


def test_a_context_beyond_its_range_is_refused_by_its_setting(capsys):
    assert main(["serve", "--context", "-1"]) == 2
    assert "model[0].build_seq = -1: allowed is a whole number from 0 to" in capsys.readouterr().err


def test_keys_come_from_a_file(handed_over, tmp_path):
    file = tmp_path / "keys"

    assert main(["serve", "--api-key-file", str(file)]) == 0
    assert handed_over.config.keys.file == str(file)


def test_keys_of_standard_input_are_read_once_and_kept(handed_over, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff# ours\r\nsk-1\r\n\r\nsk-2\n"))

    assert main(["serve", "--api-key-file", "-"]) == 0

    assert handed_over.config.keys.keys == ("sk-1", "sk-2")
    assert handed_over.source.load().keys.keys == ("sk-1", "sk-2")


def test_at_a_terminal_the_server_says_that_it_waits_for_keys(handed_over, monkeypatch, capsys):
    terminal = io.StringIO("sk-1\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)

    assert main(["serve", "--api-key-file", "-"]) == 0
    assert capsys.readouterr().err == "brlite: reading API keys from the terminal, one a line; Ctrl-D ends them\n"


@pytest.mark.parametrize(
    ("text", "message"), [("# nothing\n", "standard input holds no key"), ("sk-1\n" * 20_000, "65536 characters")]
)
def test_no_key_or_too_many_on_standard_input_do_not_open_the_server(monkeypatch, capsys, text, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))

    assert main(["serve", "--api-key-file", "-"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve"], ["proxy", "--upstream", "m=http://127.0.0.1:1"]])
def test_a_key_on_the_command_line_is_refused_and_not_repeated(capsys, command):
    assert main([*command, "--api-key", "sk-secret"]) == 2

    error = capsys.readouterr().err
    assert "--api-key-file FILE" in error
    assert "sk-secret" not in error


@pytest.mark.parametrize("flag", [["--context", "64"], ["--alias", "a"], ["--model", "m"]])
def test_a_flag_about_a_model_is_refused_where_none_is_served(tmp_path, capsys, flag):
    config = tmp_path / "proxy.toml"
    config.write_text('[[upstream]]\nurl = "http://127.0.0.1:1"\nmodels = ["m"]\n')

    assert main(["serve", str(config), *flag]) == 2
    assert "this config has no [[model]]" in capsys.readouterr().err


ONE = '[[model]]\nname = "a"\npath = "/a"\nbuild_batch = 2\n'
SEVERAL = f'{ONE}[[model]]\nname = "b"\npath = "/b"\n'


@pytest.mark.parametrize(
    ("text", "arguments", "used", "said"),
    [
        (SEVERAL, ["serve"], ["a", "b"], ""),
        (SEVERAL, ["serve", "--model", "b"], ["b"], "brlite: --model b: the config's other [[model]] are left out\n"),
        (
            SEVERAL,
            ["chat"],
            ["a", "b"],
            "brlite: the config's first [[model]] is used, a; --model NAME chooses another\n",
        ),
        (SEVERAL, ["chat", "--model", "b"], ["b"], "brlite: --model b: the config's other [[model]] are left out\n"),
        (ONE, ["serve", "--model", "a"], ["a"], ""),
        (
            *(ONE, ["serve", "--model", "org/c"], ["org/c"]),
            "brlite: --model org/c keeps the other options of the config's [[model]]: build_batch = 2\n",
        ),
    ],
)
def test_which_models_of_a_config_are_used_is_said(tmp_path, capsys, text, arguments, used, said):
    (tmp_path / "models.toml").write_text(text)
    command, *more = arguments

    config = given_config(command_parser().parse_args([command, str(tmp_path / "models.toml"), *more]))

    assert [spec.name for spec in config.model] == used
    assert config.model[0].path == (None if "/" in used[0] else f"/{used[0]}")
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serv"], "brlite: error: no such command: serv; did you mean serve?"),
        (["list"], "brlite: error: no such command: list; did you mean models?"),
        (["rm", "m"], "brlite: error: no such command: rm; did you mean models rm?"),
        (["version"], "brlite: error: no such command: version; did you mean --version?"),
        (["models", "ls"], "brlite models: error: no such command: ls; did you mean list?"),
        (["banana"], "brlite: error: no such command: banana; allowed are serve, "),
        ([], "brlite: error: the following arguments are required: COMMAND"),
        (["serve", "--modle", "x"], "brlite serve: error: unknown: --modle; did you mean --model?"),
        (["serve", "--max-model-len", "9"], "brlite serve: error: unknown: --max-model-len; did you mean --context?"),
        (["serve", "-m", "x"], "brlite serve: error: unknown: -m; did you mean --model?"),
        (["serve", "--port", "x"], "brlite serve: error: argument --port: invalid int value: 'x'"),
        (["chat", "--zzzzzz"], "brlite chat: error: unknown: --zzzzzz (see brlite chat --help)"),
    ],
)
def test_a_wrong_word_is_one_line_with_the_nearest_one(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1


def test_a_wrong_option_of_a_config_gets_the_nearest_one(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[server]\nprot = 8000\n")

    assert main(["check", str(tmp_path / "c.toml")]) == 2

    assert "server.prot = 8000: no such field; did you mean port? allowed are host, port, " in capsys.readouterr().err


def test_a_check_of_nothing_names_what_it_may_be_given(capsys):
    assert main(["check"]) == 2

    assert "check: name a FILE to check, or give --schema" in capsys.readouterr().err


def test_the_schema_of_the_toml_takes_our_files_and_no_others(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    root = Path(__file__).parent.parent.parent
    assert main(["check", "--schema"]) == 0
    validator = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out))

    for file in (root / "brlite.toml", root / "deploy" / "kubernetes" / "brlite.toml"):
        assert list(validator.iter_errors(read_toml(file))) == []
    assert not validator.is_valid({"server": {"prot": 8000}})
    assert not validator.is_valid({"server": {"port": "8000"}})
