"""`brlite check`: sizes by arithmetic, refusals, and a config that can be loaded from what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from brlite.backends.sizes import Sizes
from brlite.commands.check import ModelReport, check, describe, inspect_model
from brlite.commands.cli import main
from brlite.config.load import load_config
from brlite.config.options import Config, EngineConfig, KeyConfig, KeysConfig, ModelSpec, ProxyConfig
from brlite.config.render import render
from brlite.errors import ConfigError, ModelError
from tests.tiny_models import VOCAB_SIZE, write_byte_tokenizer, write_tiny_model

FLOAT32 = EngineConfig(device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """No model is on this machine, whatever stands in the real caches."""
    monkeypatch.setenv("BRLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def model(tmp_path) -> Path:
    path = write_tiny_model(tmp_path / "model")
    write_byte_tokenizer(path)
    return path


@pytest.mark.torch
def test_the_default_models_sizes_are_known_before_it_is_fetched():
    report = inspect_model(ModelSpec(), FLOAT32)

    assert report.sizes is not None
    assert report.sizes.num_parameters == 134_515_008
    assert report.sizes.weight_bytes == 4 * 134_515_008
    assert report.sizes.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4
    assert report.sizes.num_blocks == 16 * 2048 // 16


def test_another_model_that_is_not_here_has_no_sizes_and_is_not_fetched():
    report = inspect_model(ModelSpec(name="someone/other"), FLOAT32)

    assert report.sizes is None


@pytest.mark.torch
def test_a_models_folder_gives_its_sizes(model):
    spec = ModelSpec(name="tiny", path=str(model), build_seq=100, build_batch=3)

    sizes = inspect_model(spec, FLOAT32).sizes

    assert sizes is not None
    assert sizes.max_context == 128
    assert sizes.kv_bytes == 3 * 7 * 16 * sizes.kv_bytes_per_token


@pytest.mark.torch
def test_int8_keys_and_values_take_less_memory(model):
    plain = inspect_model(ModelSpec(path=str(model), build_seq=64), FLOAT32).sizes
    int8 = inspect_model(ModelSpec(path=str(model), build_seq=64, precision="a_bf16_w_int8_kv_int8"), FLOAT32).sizes

    assert plain is not None
    assert int8 is not None
    assert int8.kv_bytes < plain.kv_bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build_seq": 129}, "build_seq is 129; .* at most 128"),
        ({"build_seq": 64, "vocab_size": VOCAB_SIZE + 1}, f"vocab_size is {VOCAB_SIZE + 1}; .* {VOCAB_SIZE}"),
    ],
)
def test_a_promise_that_the_model_cannot_keep_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        inspect_model(ModelSpec(name="tiny", path=str(model), **changes), FLOAT32)


def test_a_path_that_leads_nowhere_is_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        inspect_model(ModelSpec(name="tiny", path=str(tmp_path / "absent")), FLOAT32)


SIZES = Sizes(
    num_parameters=1000,
    max_context=64,
    context=64,
    context_reason="the model's own",
    dtype="float32",
    precision="bf16",
    weight_bytes=4000,
    kv_dtype="float32",
    kv_bytes_per_token=10,
    num_blocks=10,
    block_size=10,
)


def test_more_memory_than_is_free_is_a_warning():
    report = ModelReport(spec=ModelSpec(), origin="here", sizes=SIZES)

    enough = list(describe(Config(), [report], 5000))
    too_little = list(describe(Config(), [report], 4999))

    assert enough[-1] == "memory: 5 kB for weights and KV cache; 5 kB are free now"
    assert too_little[-1].startswith("warning: this is more than is free")


def test_the_memory_of_models_on_a_card_is_compared_with_that_of_the_card():
    sizes = msgspec.structs.replace(SIZES, graph_bytes=500, is_on_card=True, free_bytes=6000, runs_ahead=True)
    on_card, on_host = (ModelReport(spec=ModelSpec(devices=(1,)), origin="here", sizes=each) for each in (sizes, SIZES))

    alone = list(describe(Config(), [on_card], 0))
    together = list(describe(Config(), [on_card, on_card, on_host], 5000))
    unknown = msgspec.structs.replace(on_card, sizes=msgspec.structs.replace(sizes, free_bytes=None))
    unreported = list(describe(Config(), [unknown], 0))

    assert "  graphs    500 B at most, for steps without a prompt" in alone
    assert alone[-1] == "memory of card 1: 5.5 kB for weights, KV cache and graphs; 6 kB are free now"
    assert unreported[-1].startswith("memory of card 1: 5.5 kB")
    assert unreported[-1].endswith("; how much is free is not reported")
    assert together[-3:-1] == [
        "memory: 5 kB for weights and KV cache; 5 kB are free now",
        "memory of card 1: 11 kB for weights, KV cache and graphs; 6 kB are free now",
    ]
    assert together[-1].startswith("warning: this is more than is free")


def test_a_card_that_engine_device_names_is_the_one_whose_memory_is_said():
    sizes = msgspec.structs.replace(SIZES, is_on_card=True, free_bytes=6000)
    report = ModelReport(spec=ModelSpec(devices=(0,)), origin="here", sizes=sizes)

    lines = list(describe(Config(engine=EngineConfig(device="cuda:1")), [report], 0))

    assert lines[-1].startswith("memory of card 1: ")


@pytest.mark.parametrize(
    ("speculation", "verifies_drafts", "expected"),
    [
        ("auto", True, 'only tokens that a grammar forces; engine.speculation = "on" drafts text, too'),
        ("auto", False, "only tokens that a grammar forces"),
        ("on", True, "of repeated text"),
        ("off", True, "none: engine.speculation is off"),
    ],
)
def test_what_speculation_chooses_on_a_card_is_said(speculation, verifies_drafts, expected):
    sizes = msgspec.structs.replace(SIZES, runs_ahead=True, verifies_drafts=verifies_drafts)
    report = ModelReport(spec=ModelSpec(), origin="here", sizes=sizes)

    lines = list(describe(Config(engine=EngineConfig(speculation=speculation)), [report], 5000))

    assert f"  drafts    {expected}" in lines


@pytest.mark.torch
def test_drafts_that_the_backend_cannot_verify_are_refused_before_the_start(model):
    engine = EngineConfig(backend="torch", device="cpu", dtype="float32", speculation="on")

    with pytest.raises(ConfigError, match='speculation is "on", but the torch backend cannot verify drafts'):
        inspect_model(ModelSpec(name="tiny", path=str(model)), engine)


def test_a_budget_bounds_what_is_needed_at_once(tmp_path, model, capsys):
    models = "".join(f'[[model]]\nname = "{n}"\npath = "{model}"\nbuild_seq = 64\nload = "on_demand"\n' for n in "ab")
    path = tmp_path / "some.toml"
    path.write_text(f"[engine]\nmemory_gib = 0.001\n{models}")

    status = check(path)

    assert status == 0
    assert "for weights and KV cache, at most 1.07 MB at once;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("load", "memory_gib", "who"),
    [("on_demand", 0.0001, "the model a needs"), ("start", 0.001, 'the models of load = "start" need together')],
)
def test_models_beyond_the_budget_are_refused_with_both_numbers(tmp_path, model, load, memory_gib, who):
    models = "".join(f'[[model]]\nname = "{n}"\npath = "{model}"\nbuild_seq = 64\nload = "{load}"\n' for n in "ab")
    path = tmp_path / "some.toml"
    path.write_text(f"[engine]\nmemory_gib = {memory_gib}\n{models}")

    with pytest.raises(ConfigError, match=rf"engine\.memory_gib = {memory_gib}: {who} 0\.00\d+ GiB"):
        check(path)


def test_what_is_printed_can_be_loaded_again(tmp_path):
    all_models = {'http://{主机IP}:"1"': "a\nb\x7f"}
    options = {"a": float("inf"), "b": 1e30, "c": 2**63 - 1}
    config = Config(
        engine=EngineConfig(options=options),
        model=(ModelSpec(name="a"), ModelSpec(name="b")),
        proxy=ProxyConfig(all_models=all_models),
    )
    path = tmp_path / "printed.toml"

    path.write_text(render(config), encoding="utf-8")

    assert load_config(path) == config


def test_keys_are_masked_where_a_config_is_printed():
    text = render(Config(keys=KeysConfig(keys=("open-sesame", "two")), key=(KeyConfig(name="a", key="sesame-2"),)))

    assert "sesame" not in text
    assert 'keys = ["***", "***"]' in text


def test_the_report_holds_config_model_and_warnings(tmp_path, model, capsys):
    path = tmp_path / "some.toml"
    path.write_text(f'[[model]]\nname = "tiny"\npath = "{model}"\nbuild_seq = 64\nmodel_file = "/b"\n')

    status = check(path)

    printed = capsys.readouterr().out
    assert status == 0
    assert "build_seq = 64\n" in printed
    assert f"model tiny\n  from      {model}\n  context   64 tokens of the 128" in printed
    assert "warning: model[0]: model_file /b is not read" in printed


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_memory_of_each_rank_is_told_and_adds_up(tmp_path, model, capsys, backend):
    path = tmp_path / "some.toml"
    path.write_text(
        f'[engine]\nbackend = "{backend}"\n[[model]]\nname = "tiny"\npath = "{model}"\nbuild_seq = 64\n'
        "tensor_parallel = 2\ndevices = [0, 1]\n"
    )

    check(path)
    spec = load_config(path).model[0]
    sizes = inspect_model(spec, EngineConfig(backend=backend)).sizes

    assert "\n  ranks     0: " in capsys.readouterr().out
    assert sizes.weight_bytes == sum(rank.weight_bytes for rank in sizes.ranks)
    assert max(rank.weight_bytes for rank in sizes.ranks) < 0.6 * sizes.weight_bytes
    assert sizes.kv_bytes_per_token == sum(rank.kv_bytes_per_token for rank in sizes.ranks)


def test_more_ranks_than_heads_are_refused(tmp_path, model):
    path = tmp_path / "some.toml"
    path.write_text(
        f'[[model]]\nname = "tiny"\npath = "{model}"\nbuild_seq = 64\ntensor_parallel = 5\ndevices = [0, 1, 2, 3, 4]\n'
    )

    with pytest.raises(ConfigError, match="tensor_parallel is 5; the model has 4 attention heads, and each rank needs"):
        check(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('[keys]\nfile = "/proc/absent/keys"', "/proc/absent/keys"),
        ('[[key]]\nname = "a"\nenv = "NO_SUCH_KEY"', "NO_SUCH_KEY"),
        ('[keys]\nkeys = ["sk"]\n[[key]]\nname = "a"\nkey = "sk"', "each key needs its own"),
        (
            '[[model]]\nname = "tiny"\npath = "MODEL"\nchat_template = "/proc/absent/chat.jinja"\nbuild_seq = 64',
            "chat.jinja",
        ),
        ('[[model]]\nname = "tiny"\npath = "BROKEN"\nbuild_seq = 64', "model.safetensors"),
        ('[[model]]\nname = "tiny"\npath = "MODEL"\nserialize_file = "~no-user/x"', "serialize_file ~no-user/x: "),
        ('[[model]]\nname = "tiny"\npath = "EMPTY"\nmodel_file = "~no-user/x.pt"', "model_file ~no-user/x.pt: "),
        # Of a model that is not here yet:
        ('[[model]]\nname = "some/one"\nserialize_file = "~no-user/x"', "serialize_file ~no-user/x: "),
        ('[[model]]\nname = "some/one"\nchat_template = "~no-user/x"', "chat template ~no-user/x: "),
        ('[[model]]\nname = "some/one"\nscore_template = "/proc/absent/x"', "score_template /proc/absent/x: "),
        ('[[model]]\nname = "some/one"\ndraft = { path = "/proc/absent" }', "draft: .*/proc/absent"),
    ],
)
def test_what_would_stop_serve_stops_check(tmp_path: Path, model: Path, config: str, words: str) -> None:
    broken = write_tiny_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-10])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_bytes((model / "config.json").read_bytes())
    path = tmp_path / "brlite.toml"
    folders = {"MODEL": model, "BROKEN": broken, "EMPTY": empty}
    path.write_text(re.sub("|".join(folders), lambda word: str(folders[word[0]]), config))

    with pytest.raises((ConfigError, ModelError), match=words):
        check(path)


def test_all_that_is_wrong_with_a_config_is_said(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(
        '[sever]\nport = 1\n[server]\nport = 70000\nhosts = "x"\n[engine]\nblock_size = "16"\n'
        "[[model]]\nbuild_batch = 0\n"
    )

    assert main(["check", str(tmp_path / "config.toml")]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"brlite: error: {tmp_path / 'config.toml'}: ") for line in lines)
    for field in ("sever", "server.port", "server.hosts", "engine.block_size", "model[0].build_batch"):
        assert sum(f"toml: {field} = " in line for line in lines) == 1
    assert len(lines) == 5


def test_contradictions_are_said_together(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(
        '[[model]]\nname = "a"\n[[model]]\nname = "a"\n[proxy.aliases]\nx = "absent"\n'
    )

    assert main(["check", str(tmp_path / "config.toml")]) == 2

    said = capsys.readouterr().err
    assert "model[1].name" in said
    assert "proxy.aliases.x" in said


def test_what_a_config_says_moves_no_cursor(tmp_path, capsys, model):
    (tmp_path / "config.toml").write_text(
        f'[[model]]\nname = "a"\npath = "{model}"\nbuild_seq = 64\nmodel_file = "x\\u001b[2Ky"\n'
    )

    assert main(["check", str(tmp_path / "config.toml")]) == 0

    said = capsys.readouterr().out
    assert "model_file x\\x1b[2Ky is not read" in said
    assert "\x1b" not in said


def test_all_models_that_are_wrong_are_said(tmp_path, capsys):
    (tmp_path / "config.toml").write_text(
        '[[model]]\nname = "a"\npath = "/proc/absent/a"\n[[model]]\nname = "b"\npath = "/proc/absent/b"\n'
        '[keys]\nfile = "/proc/absent/keys"\n'
    )

    assert main(["check", str(tmp_path / "config.toml")]) == 2

    said = capsys.readouterr().err
    assert all(path in said for path in ("/proc/absent/a", "/proc/absent/b", "/proc/absent/keys"))


def test_offline_a_config_of_another_machine_is_checked_by_its_fields(tmp_path, capsys):
    good = (
        '[[model]]\nname = "a"\npath = "/proc/absent/a"\n[keys]\nfile = "/proc/absent/keys"\n'
        '[[upstream]]\nurl = "http://10.0.0.1:1"\nmodels = ["c"]\n'
    )
    (tmp_path / "good.toml").write_text(good)
    (tmp_path / "bad.toml").write_text(good.replace("http:", "htp:"))

    assert main(["check", "--offline", str(tmp_path / "good.toml")]) == 0
    printed = capsys.readouterr().out
    assert main(["check", "--offline", str(tmp_path / "bad.toml")]) == 2

    assert "were not looked at" in printed
    assert "forwarded c" in printed
    assert "upstream[0].url" in capsys.readouterr().err
