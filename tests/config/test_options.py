"""Loading TOML: the shipped example, one-line errors, overrides, warnings."""

from __future__ import annotations

import datetime
import os
import re
import runpy
import time
from pathlib import Path

import msgspec
import pytest

from brlite.config.load import load_config
from brlite.config.options import Config, EngineConfig, KeyConfig, KeysConfig, ModelSpec, ServerConfig
from brlite.config.validation import find_problems, make_config, model_override, override
from brlite.config.warnings import check_supported, config_warnings
from brlite.errors import ConfigError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "brlite.toml"
OPTION_TABLES = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["option_tables"]()


def load_text(folder: Path, text: str) -> Config:
    path = folder / "brlite.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def refusal(folder: Path, text: str) -> str:
    """What is said about a bad file, without the file's own path."""
    with pytest.raises(ConfigError) as caught:
        load_text(folder, text)
    return str(caught.value).removeprefix(f"{folder / 'brlite.toml'}: ")


def test_the_example_file_is_the_default_config():
    config = load_config(EXAMPLE)

    assert config == Config()


def test_a_header_with_too_many_or_too_few_brackets_is_shown_as_it_should_be(tmp_path):
    assert refusal(tmp_path, "[model]\nname = 'm'\n").endswith("; its header is [[model]]")
    assert refusal(tmp_path, "[[server]]\nport = 1\n").endswith("; its header is [server]")


def test_ranks_use_the_first_devices_if_none_are_named():
    assert [ModelSpec(tensor_parallel=number).devices for number in (1, 3)] == [(0,), (0, 1, 2)]
    assert ModelSpec(tensor_parallel=2, devices=(3, 1)).devices == (3, 1)


@pytest.mark.parametrize("table", OPTION_TABLES, ids=lambda table: table.name)
def test_every_option_has_a_text_and_a_value_to_show(table):
    for option in table.options:
        assert option.text, option.name
        assert option.default or option.example, option.name


def test_the_example_file_with_all_its_options_is_a_valid_config(tmp_path):
    commented_out = re.compile(r"^# (?=\w+ = |\[)", flags=re.MULTILINE)
    # Options that exclude another; ca_file needs an https:// url.
    either = {"key": {"env"}, "upstream": {"api_key_env", "ca_file"}, "engine": {"name"}}
    lines, section = [], ""
    for line in commented_out.sub("", EXAMPLE.read_text(encoding="utf-8")).splitlines():
        section = match[1] if (match := re.match(r"\[+(\w+)", line)) else section
        if line.partition(" =")[0] not in either.get(section, ()):
            lines.append(line)

    config = load_text(tmp_path, "\n".join(lines))

    assert config.upstream[0].rename == {"my-model": "org/my-model"}
    assert config.key[0].name == "team-a"


def test_an_empty_file_is_the_default_config(tmp_path):
    assert load_text(tmp_path, "") == Config()


def test_options_of_a_file_replace_the_defaults(tmp_path):
    config = load_text(tmp_path, '[server]\nport = 9\n[[model]]\nname = "a"\n[[model]]\nname = "b"\nbuild_seq = 64\n')

    assert config.server == ServerConfig(port=9)
    assert config.model == (ModelSpec(name="a"), ModelSpec(name="b", build_seq=64))


BAD_FIELDS = [
    ('engine.dtype = "fp8"', 'engine.dtype = "fp8": allowed are auto, bfloat16, float32'),
    ("engine.block_size = 24", "engine.block_size = 24: allowed are 8, 16, 32, 64, 128, 256"),
    ("engine.threads = -1", "engine.threads = -1: allowed is a whole number from 0 to 1024"),
    ('server.port = "80"', 'server.port = "80": allowed is a whole number from 0 to 65535'),
    ("server.port = 65536", "server.port = 65536: allowed is a whole number from 0 to 65535"),
    ("server.port = 80.0", "server.port = 80.0: allowed is a whole number from 0 to 65535"),
    ("server.access_log = 1", "server.access_log = 1: allowed is true or false"),
    ("server.cors_origins = ['*', '']", 'server.cors_origins[1] = "": allowed is a non-empty string without spaces'),
    ("limits.max_n = 0", "limits.max_n = 0: allowed is a whole number from 1 to 1000000000"),
    (
        "limits.max_n = 9999999999999999999",
        "limits.max_n = 9999999999999999999: allowed is a whole number from 1 to 100",
    ),
    ("limits.body_seconds = 0", "limits.body_seconds = 0: allowed is a number above 0, at most 1000000"),
    ("limits.body_seconds = nan", "limits.body_seconds = NaN: allowed is a number above 0, at most 1000000"),
    ("limits.body_seconds = inf", "limits.body_seconds = Infinity: allowed is a number above 0, at most 1000000"),
    (
        "limits.max_body_bytes = 40_000_000",
        "limits.max_body_bytes_in_flight = 67108864: must be at least twice limits.max_body_bytes, which is 40000000",
    ),
    ('keys.file = " "', 'keys.file = " ": allowed is a non-empty string'),
    ("port = 8000", "port = 8000: no such field; it belongs to [server]; allowed are server, engine, "),
    ("server.temperature = 1", "server.temperature = 1: no such field; allowed are host"),
    ("engine.build_seq = 1", "engine.build_seq = 1: no such field; it belongs to [[model]]; allowed are name, "),
    ("proxy.models = []", "proxy.models = []: no such field; it belongs to [[upstream]] or [[key]]; allowed are "),
    ("keys.file = 3", "keys.file = 3: allowed is a non-empty string"),
    ("model = 3", "model = 3: allowed is a list, each a table"),
    ("server = 3", "server = 3: allowed is a table"),
    ("model = []", "model = []: at least one [[model]]"),
    ("model = [{ build_batch = 0 }]", "model[0].build_batch = 0: allowed is a whole number from 1 to 4096"),
    ("model = [{ build_seq = -1 }]", "model[0].build_seq = -1: allowed is a whole number from 0 to 1000000000"),
    ("model = [{ devices = [-1] }]", "model[0].devices[0] = -1: allowed is a whole number from 0 to 1023"),
    ('model = [{ serialize_file = "a\\u0000" }]', 'model[0].serialize_file = "a\\u0000": allowed is a path without'),
    ("model = [{ devices = [0, 0] }]", "model[0].devices = [0, 0]: allowed is each device once"),
    ("model = [{ devices = [0, 1] }]", "model[0].tensor_parallel = 1: allowed is the number of devices, here 2"),
    ("model = [{}, {}]", "model[1].name = "),
    ('model = [{ path = "/models/a" }]', "model[0].name is missing: "),
    ("proxy.all_models = { a = 1 }", 'proxy.all_models = {"a": 1}: allowed is a table, each value a string'),
    ('"x` - at `$.server" = 1', "Object contains unknown field `x`"),
    ('server = { "x` - at `$.y" = 1 }', "server.x` - at `$.y = 1: no such field; allowed are host, port, "),
    *(
        (
            f'server.host = "{host}"',
            f'server.host = "{host}": allowed is a host name or an address alone, such as localhost, 0.0.0.0 or ::1; '
            "the port is server.port (--port)",
        )
        for host in (
            "http://127.0.0.1",
            "http://localhost:8000/v1",
            "localhost:8000",
            "[::1]",
            "[::1]:8000",
            "*",
            "a..b",
            "a/b",
            "::1::",
        )
    ),
    ("server.prot = 1", "server.prot = 1: no such field; did you mean port? allowed are host, port, cors_origins, "),
    (
        'servers = "x"',
        'servers = "x": no such field; did you mean server? allowed are '
        "server, engine, model, upstream, limits, grammar, keys, key, proxy",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD_FIELDS)
def test_a_bad_field_is_one_line_with_field_value_and_what_is_allowed(tmp_path, text, message):
    line = refusal(tmp_path, text)

    assert line.startswith(message)
    assert "\n" not in line


def test_a_bad_key_is_refused_without_being_shown(tmp_path):
    line = refusal(tmp_path, 'keys.keys = ["open sesame"]')

    assert line == "keys.keys[0] = …: allowed is a non-empty string without spaces"


def test_keys_are_masked_when_a_config_is_printed():
    assert "sesame" not in repr(Config(keys=KeysConfig(keys=("sesame",))))


def test_broken_toml_names_the_line(tmp_path):
    line = refusal(tmp_path, "[server]\nport = = 1\n")

    assert line.startswith("not valid TOML: ")
    assert "line 2" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.toml", None, "cannot be read: No such file or directory"),
        ("absent.json", None, "cannot be read: No such file or directory"),
        ("config.yaml", b"", "a config file ends in .toml or .json"),
        ("binary.toml", b"a = '\xff'", "byte 5 is not UTF-8"),
        ("deep.toml", b"a = " + b"[" * 100_000, "not valid TOML: "),
        ("dots.toml", b"a." * 3000 + b"a = 1", "a = {'a': {'a': {…}}}: no such field"),
        ("digits.toml", b"a = " + b"9" * 5000, "not valid TOML: "),
        (
            "options.toml",
            b"[engine.options]\na = 0x" + b"f" * 5000,
            "engine.options = {'a': a number of 6021 digits}: ",
        ),
        ("hexadecimal.toml", b"[server]\nport = 0x" + b"f" * 5000, "server.port = a number of 6021 digits: allowed is"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_config_that_is_nested_too_deeply_to_be_copied_has_no_list_of_problems(tmp_path):
    data = nested = {}
    for _ in range(3000):
        nested["a"] = nested = {}

    assert find_problems(data) == []


def test_an_override_replaces_one_field_and_leaves_the_config_alone():
    config = Config()

    changed = override(config, {"server.port": 9000, "model[0].build_seq": 64})

    assert changed == Config(server=ServerConfig(port=9000), model=(ModelSpec(build_seq=64),))
    assert config == Config()


def test_an_override_is_checked_like_a_file():
    with pytest.raises(ConfigError, match=r"command line: server\.port = 70000: allowed is a whole number"):
        override(Config(), {"server.port": 70000})


def test_every_default_is_within_its_own_range():
    assert make_config(msgspec.to_builtins(Config()), source="defaults") == Config()


def test_one_model_of_a_server_can_be_on_several_ranks():
    plain, shared, other = (
        ModelSpec(name="a"),
        *(ModelSpec(name=name, tensor_parallel=2, devices=(0, 1)) for name in "bc"),
    )

    check_supported(Config(model=(plain, shared)))
    with pytest.raises(
        ConfigError, match=r"model\[2\]\.tensor_parallel = 2: only one model of a server can use several"
    ):
        check_supported(Config(model=(plain, shared, other)))


def test_the_default_config_gives_no_warning():
    assert config_warnings(Config()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(server=ServerConfig(host="0.0.0.0")), "server.host = 0.0.0.0: any client that can reach this address"),
        (Config(server=ServerConfig(host="127.example")), "server.host = 127.example: any client that can reach"),
        (
            Config(model=(ModelSpec(path="/a", model_file="/b.pt"),)),
            "model[0]: model_file /b.pt is read only if /a has no weights",
        ),
        (Config(model=(ModelSpec(model_file="/b.pt"),)), "model[0]: model_file /b.pt is not read: "),
        (
            Config(engine=EngineConfig(max_num_batched_tokens=8)),
            "engine.max_num_batched_tokens = 8: steps compute up to 16",
        ),
    ],
)
def test_a_doubtful_config_is_warned_about(config, message, monkeypatch):
    monkeypatch.delenv("BRLITE_API_KEY", raising=False)

    warnings = config_warnings(config)

    assert warnings[0].startswith(message)


@pytest.mark.parametrize(
    "keys",
    [
        {"keys": KeysConfig(keys=("k",))},
        {"keys": KeysConfig(file="keys")},
        {"keys": KeysConfig(env="ONE_KEY")},
        {"key": (KeyConfig(name="a", key="k"),)},
    ],
)
def test_a_key_quiets_the_warning_about_a_public_address(keys, monkeypatch):
    monkeypatch.delenv("BRLITE_API_KEY", raising=False)
    monkeypatch.setenv("ONE_KEY", "k")

    assert config_warnings(Config(server=ServerConfig(host="0.0.0.0"), **keys)) == []


def test_a_variable_of_spaces_is_no_key(monkeypatch):
    monkeypatch.setenv("BRLITE_API_KEY", "  ")

    assert "no API key is set" in config_warnings(Config(server=ServerConfig(host="0.0.0.0")))[0]


def test_an_invalid_value_of_a_required_field_is_one_problem_and_not_a_missing_field_as_well():
    problems = find_problems({"server": {"port": "x"}, "upstream": [{"url": 1, "models": ["m"]}]})

    assert [problem.partition(" = ")[0] for problem in problems] == ["server.port", "upstream[0].url"]


def test_certificates_for_an_upstream_without_tls_are_refused(tmp_path):
    text = "[[upstream]]\nurl = 'http://127.0.0.1:1'\nmodels = ['m']\nca_file = 'ca.pem'\n"

    assert refusal(tmp_path, text) == 'upstream[0].ca_file = "ca.pem": allowed is one beside an https:// url'


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my model", "my model"),
        ("模型/", "模型"),
        ("linked", "linked"),
        ("models--org--a-model/snapshots/0123abcd", "org/a-model"),
        ("m.gguf", "m"),
        ("M-Q8_0.GGUF", "M-Q8_0"),
    ],
)
def test_a_model_is_named_by_its_path(tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("my model", "模型", "models--org--a-model/snapshots/0123abcd"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("m.gguf", "M-Q8_0.GGUF"):
        (tmp_path / file).touch()
    (tmp_path / "linked").symlink_to("models--org--a-model/snapshots/0123abcd")

    assert model_override(path) == {"model[0].name": name, "model[0].path": str(Path(path))}


def test_a_name_is_text_also_where_its_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir(b"a\xff")

    assert model_override(os.fsdecode(b"a\xff"))["model[0].name"] == "a\ufffd"


@pytest.mark.parametrize("table", OPTION_TABLES, ids=lambda table: table.name)
def test_every_option_is_named_where_its_type_or_its_name_is_wrong(table):
    required = {"upstream": {"url": "http://a", "models": ["m"]}, "key": {"name": "k", "key": "s"}}.get(table.name, {})

    def said(**fields):
        row = {"name": "m"} | required | fields if table.is_list else fields
        with pytest.raises(ConfigError) as caught:
            make_config({table.name: [row] if table.is_list else row}, source="f")
        return str(caught.value)

    for option in table.options:
        at = f"f: {table.name}{'[0]' if table.is_list else ''}.{option.name}"
        assert re.match(re.escape(at) + r" = .*: allowed (is|are) ", said(**{option.name: datetime.time(1)}))
        assert f"no such field; did you mean {option.name}? " in said(**{f"{option.name}_": 1})


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert model_override(".")["model[0].name"] == tmp_path.name


def test_many_keys_are_compared_in_time_linear_in_them():
    keys = [{"name": f"team-{number}", "key": f"sk-{number:08}"} for number in range(60_000)]
    began = time.process_time()

    with pytest.raises(ConfigError, match=r'key\[60000\].name = "team-59999": allowed is a name that no other key has'):
        make_config({"key": [*keys, keys[-1]]}, source="x")

    assert time.process_time() < began + 10  # each with all before it took 46 s
