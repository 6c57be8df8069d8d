"""The manual's JSON: its own examples, its limits, and one-line errors in its own field names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from brlite.config.load import load_config
from brlite.config.options import Config, ModelSpec, ProxyConfig
from brlite.config.warnings import config_warnings
from brlite.errors import ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "manual_configs"
ABSENT = object()


@pytest.fixture
def seed() -> dict[str, object]:
    return json.loads((FIXTURES / "mistral_7b.json").read_text(encoding="utf-8"))


def load(folder: Path, fields: dict[str, object]) -> Config:
    path = folder / "seed.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return load_config(path)


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).removeprefix(f"{path}: ")


# name: vocab_size, build_seq, build_batch, tensor_parallel, devices, output_name
HELD_BY_USERS = {
    "llama2_7b": (32000, 1024, 16, 1, (0,), "9"),
    "llama2_70b_chat": (32000, 1024, 20, 8, (0, 1, 2, 3, 4, 5, 6, 7), "10"),
    "baichuan2_7b": (125696, 1024, 20, 1, (0,), "4267"),
    "chatglm3_6b": (65024, 1024, 16, 1, (0,), "10"),
    "mistral_7b": (32000, 1024, 20, 1, (0,), "10"),
    "qwen1.5_14b_chat": (152064, 1024, 4, 2, (0, 1), "10"),
    "qwen2_72b_instruct": (152064, 1024, 20, 8, (0, 1, 2, 3, 4, 5, 6, 7), "9"),
    "manual_qwen2_72b": (152064, 2048, 8, 4, (0, 1, 2, 3), "9"),
    "manual_qwen1.5_14b": (152064, 2048, 12, 2, (6, 7), "10"),
    "manual_codellama_34b": (32000, 2048, 16, 2, (2, 3), "10"),
}


@pytest.mark.parametrize(("name", "expected"), HELD_BY_USERS.items())
def test_a_config_that_users_hold_is_read(name, expected):
    spec = load_config(FIXTURES / f"{name}.json").model[0]

    assert spec.precision == "a_bf16_w_int8_kv_int8"
    assert spec.input_name == "input_ids.1"
    found = (spec.vocab_size, spec.build_seq, spec.build_batch, spec.tensor_parallel, spec.devices, spec.output_name)
    assert found == expected


def test_every_field_of_the_manual_has_its_place():
    config = load_config(FIXTURES / "manual_qwen2_72b.json")

    spec = ModelSpec(
        name="Qwen/Qwen2-72B",
        path="/models/qwen2-72b/models--Qwen--Qwen2-72B/snapshots/87993795c78576318087f70b43fbf530eb7789e7/",
        precision="a_bf16_w_int8_kv_int8",
        build_seq=2048,
        build_batch=8,
        tensor_parallel=4,
        devices=(0, 1, 2, 3),
        vocab_size=152064,
        model_file="/models/qwen2-72b.pt",
        serialize_file="/root/qwen2_72b",
        input_name="input_ids.1",
        output_name="9",
    )
    assert config == Config(model=(spec,), proxy=ProxyConfig(all_models={"http://host_ip:port": "Qwen/Qwen2-72B"}))


BAD_VALUES = [
    ({"model": ""}, 'model = "": allowed is a non-empty string'),
    ({"model": ABSENT}, "model is missing: allowed is a non-empty string"),
    ({"build_seq": ABSENT}, "build_seq is missing: allowed is a whole number from 1 to 1000000000"),
    ({"build_seq": "1024"}, 'build_seq = "1024": allowed is a whole number from 1 to 1000000000'),
    ({"build_seq": 0}, "build_seq = 0: allowed is a whole number from 1 to 1000000000"),
    ({"build_batch": 0}, "build_batch = 0: allowed is a whole number from 1 to 1000000000"),
    ({"build_batch": 5000}, "model[0].build_batch = 5000: allowed is a whole number from 1 to 4096"),
    ({"vocab_size": 32000.0}, "vocab_size = 32000.0: allowed is a whole number from 1 to 1000000000"),
    ({"cached_dir": None}, "cached_dir = null: allowed is a string"),
    ({"model_precision": "int4"}, 'model_precision = "int4": allowed are a_bf16_w_int8, a_bf16_w_int8_kv_int8, bf16'),
    ({"model_precision": "auto"}, 'model_precision = "auto": allowed are a_bf16_w_int8, a_bf16_w_int8_kv_int8, bf16'),
    ({"distribute_param": [1, 1]}, "distribute_param = [1, 1]: allowed is a list of 3, each a whole number"),
    ({"distribute_param": [1, 1, "1"]}, 'distribute_param[2] = "1": allowed is a whole number from 1'),
    ({"distribute_param": [1, 2, 1]}, "distribute_param = [1, 2, 1]: allowed as PP is 1; "),
    ({"distribute_param": [1, 1, 2]}, "distribute_param = [1, 1, 2]: allowed as DP is 1; "),
    ({"distribute_param": [2, 1, 1]}, "distribute_param = [2, 1, 1]: allowed as TP is the number of devices, here 1"),
    ({"devices": []}, "distribute_param = [1, 1, 1]: allowed as TP is the number of devices, here 0"),
    ({"devices": [0, 0]}, "devices = [0, 0]: allowed is each device once"),
    ({"devices": 0}, "devices = 0: allowed is a list, each a whole number from 0 to 1023"),
    ({"all_models": []}, "all_models = []: allowed is a table, each value a string"),
    ({"model_file": "x" * 300}, f'model_file = "{"x" * 78}…: File name too long'),
    ({"model_file": "~nobody-here/x"}, 'model_file = "~nobody-here/x": Could not determine home directory'),
    ({"tensor_parallel": 2}, "tensor_parallel = 2: no such field; allowed are model, cached_dir, input_name, "),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_a_bad_field_is_one_line_in_the_manuals_own_names(tmp_path, seed, changes, message):
    seed.update(changes)
    path = tmp_path / "seed.json"
    path.write_text(json.dumps({name: value for name, value in seed.items() if value is not ABSENT}), encoding="utf-8")

    line = refusal(path)

    assert line.startswith(message)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "model": "a"\n  "devices": [0]\n}', "not valid JSON: Expecting ',' delimiter: line 3 column 3"),
        ('{"model": "a", "model": "b"}', "not valid JSON: 'model' is given twice in one object"),
        ('{"build_seq": NaN}', "not valid JSON: NaN is not a JSON number"),
        (r'{"model": "\ud800"}', "not valid JSON: 'utf-8' codec can't encode character"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("", "not valid JSON: "),
        ("[1]", "the file = [1]: allowed is a table"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, message):
    path = tmp_path / "seed.json"
    path.write_text(text, encoding="utf-8")

    line = refusal(path)

    assert line.startswith(message)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("cached_dir", "model_file", "expected"),
    [
        ("/models/a", "/models/a.gguf", "/models/a.gguf"),
        ("/models/a", str(FIXTURES), str(FIXTURES)),
        ("/models/a", "/models/a.pt", "/models/a"),
        ("/models/a", "/models/absent", "/models/a"),
        ("", "/models/a.gguf", "/models/a.gguf"),
        ("", str(FIXTURES), str(FIXTURES)),
        ("", "/models/a.pt", None),
        ("", "", None),
    ],
)
def test_weights_come_from_a_readable_model_file_then_from_cached_dir_then_by_name(
    tmp_path, seed, cached_dir, model_file, expected
):
    config = load(tmp_path, {**seed, "cached_dir": cached_dir, "model_file": model_file})

    assert config.model[0].path == expected


def test_addresses_may_be_the_manuals_placeholders(tmp_path, seed):
    all_models = {"http://{主机IP}:{端口号}": seed["model"]}

    config = load(tmp_path, {**seed, "all_models": all_models})

    assert config.proxy.all_models == all_models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": [3]}, "devices [3]: fine here"),
        ({"build_seq": 8193}, "build_seq 8193: fine here"),
        ({"build_batch": 65}, "build_batch 65: fine here"),
        ({"cached_dir": ""}, "model_file /models/mistral_7b.pt is not read: "),
        ({"all_models": {"http://ip:port": "other/model"}}, "http://ip:port is not an address, so "),
    ],
)
def test_a_limit_of_the_manuals_engine_or_of_this_version_is_a_warning(tmp_path, seed, changes, message):
    before = config_warnings(load(tmp_path, seed))

    warnings = config_warnings(load(tmp_path, {**seed, **changes}))

    assert any(message in line for line in warnings)
    assert not any(message in line for line in before)
