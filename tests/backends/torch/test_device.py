from __future__ import annotations

import logging
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from brlite.backends.torch import device as device_module
from brlite.backends.torch.device import (
    CardMemory,
    compute_dtype,
    computes_on_cpu,
    describe_device,
    device_memory,
    make_current,
    prepare_environment,
    rules_for,
    select_device,
)
from brlite.errors import ConfigError
from brlite.process.machine import physical_cores
from tests.warm import WarmPython

BRLITE = Path(__file__).parents[3] / "brlite"
ENGINE_ROOMS = [path for room in ("models", "backends/distributed") for path in sorted((BRLITE / room).rglob("*.py"))]
FORBIDDEN = re.compile(r"float16|\.half\(|torch\.jit|torch\.compile|\btorch\.float64|\.item\(\)")
DEVICE_WORDS = re.compile(r"""["'](cpu|cuda|supa|mps)[:"']|\btorch\.cuda|\b(nccl|bccl|sccl|gloo)\b""")


def test_auto_finds_a_device_that_computes() -> None:
    device = select_device("auto")

    assert torch.ones(2, device=device).sum().tolist() == 2
    assert describe_device(device)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "supa:1:2", "auto:1"])
def test_device_that_cannot_be_meant_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"engine.device is {name!r}; allowed are auto, cpu, cuda, supa")):
        select_device(name)


@pytest.mark.parametrize("name", ["cuda:977", "supa:977", "xpu:977", "mps:977"])
def test_device_that_is_not_there_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        select_device(name)

    assert f"device {name} is not there" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_biren_card_without_a_plugin_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError) as refusal:
        select_device("supa")

    assert "torch_supa cannot be imported (No module named 'torch_supa')" in str(refusal.value)
    assert "torch_br cannot be imported (No module named 'torch_br')" in str(refusal.value)


PLUGIN = """
import torch, types
torch.utils.rename_privateuse1_backend("supa")
runtime = types.ModuleType("torch.supa")
runtime.is_available, runtime.device_count = (lambda: True), (lambda: 2)
torch.supa = torch.cuda = runtime
"""


RunWithPlugins = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run_with_plugins() -> Iterator[RunWithPlugins]:
    """The lines that `code` prints, in a process of its own, which can import these plugins of torch."""
    python = WarmPython("import sys\nfrom brlite.backends.torch.device import describe_device, select_device")

    def run(folder: Path, code: str, **plugins: str) -> list[str]:
        for name, source in plugins.items():
            (folder / f"{name}.py").write_text(source)
        done = python.run(f"sys.path.insert(0, sys.argv[1])\n{code}", folder)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield run
    python.close()


def test_the_plugin_of_the_first_cards_serves_where_that_of_the_second_does_not(
    run_with_plugins: RunWithPlugins, tmp_path: Path
) -> None:
    code = "print(select_device('supa')); print(describe_device(select_device('supa', 1)))"

    printed = run_with_plugins(tmp_path, code, torch_supa="raise ImportError('not these cards')", torch_br=PLUGIN)

    assert printed == ["supa:0", "supa:1 (torch_br of unknown version)"]


def test_a_plugin_that_passes_itself_off_as_cuda_is_not_taken_for_it(
    run_with_plugins: RunWithPlugins, tmp_path: Path
) -> None:
    code = "import torch_supa; print(select_device('auto'))"

    assert run_with_plugins(tmp_path, code, torch_supa=PLUGIN) == ["supa:0"]


def test_the_driver_finds_the_environment_that_the_manual_wants(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "biren").mkdir()
    environment = {"BIREN_VISIBLE_DEVICES": "1,2"}

    with caplog.at_level(logging.INFO):
        prepare_environment(environment, tmp_path)
        prepare_environment(environment, tmp_path)

    assert environment["BR_UMD_DEBUG_P2P_ACCESS_CHECK"] == "0"
    assert environment["SUPA_VISIBLE_DEVICES"] == "1,2"
    assert [line.split(" is set")[0] for line in caplog.messages] == [
        "BR_UMD_DEBUG_P2P_ACCESS_CHECK=0",
        "SUPA_VISIBLE_DEVICES=1,2",
    ]


def test_an_environment_of_the_users_own_stays(tmp_path: Path) -> None:
    (tmp_path / "biren").mkdir()
    own = {"BR_UMD_DEBUG_P2P_ACCESS_CHECK": "1", "BIREN_VISIBLE_DEVICES": "1", "SUPA_VISIBLE_DEVICES": "0"}
    environment = dict(own)

    prepare_environment(environment, tmp_path)

    assert environment == own


def test_without_biren_cards_the_environment_is_left_alone(tmp_path: Path) -> None:
    environment: dict[str, str] = {}

    prepare_environment(environment, tmp_path)

    assert environment == {}


def test_the_cpu_is_trusted_and_has_rules_of_its_own() -> None:
    rules = rules_for(torch.device("cpu"))

    assert rules.packs_matrices
    assert not rules.is_probed
    assert not rules.keeps_int8


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_device_that_was_never_run_is_taken_by_name_alone_under_the_rules_of_the_emulated_card(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    runtime = types.SimpleNamespace(device_count=lambda: 1)  # as torch.mps was at first: no is_available, no set_device
    monkeypatch.setattr(torch, kind, runtime)

    device = select_device(kind)
    make_current(device)

    assert device == torch.device(kind, 0)
    assert select_device("auto").type != kind
    assert rules_for(device) == device_module.RULES["supa"]
    with pytest.raises(ConfigError, match=f"device {kind}:1 is not there: 1 found"):
        select_device(kind, 1)


def test_a_number_in_the_name_goes_before_the_index() -> None:
    with pytest.raises(ConfigError, match="cuda:977"):
        select_device("cuda:977", 0)
    with pytest.raises(ConfigError, match="cuda:978"):
        select_device("cuda", 978)


def test_compute_dtype_is_the_one_asked_for_and_never_half_precision() -> None:
    device = select_device("cpu")

    assert compute_dtype("float32", device) is torch.float32
    assert compute_dtype("bfloat16", device) is torch.bfloat16
    assert compute_dtype("auto", device) in (torch.float32, torch.bfloat16)


def test_where_the_cpu_computes_is_known_without_asking_torch() -> None:
    assert computes_on_cpu("cpu")
    assert computes_on_cpu("auto") == (select_device("auto").type == "cpu")


def test_cores_are_no_more_than_the_processors_this_process_may_use() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("path", ENGINE_ROOMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_engine_code_uses_nothing_that_a_supported_device_lacks(path: Path) -> None:
    assert not FORBIDDEN.findall(path.read_text().replace("bfloat16", ""))


@pytest.mark.parametrize("path", ENGINE_ROOMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_the_device_module_names_a_device(path: Path) -> None:
    names_one = bool(DEVICE_WORDS.search(path.read_text()))

    assert names_one == (path.name == "device.py")


def test_memory_that_torch_keeps_after_a_model_was_unloaded_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"mem_get_info": (20, 80), "memory_reserved": 50, "memory_allocated": 10}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)

    assert device_memory(torch.device("cuda:1")) == CardMemory(total=80, free=60)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update it"


def make_driver_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError(f"{TOO_OLD}\nor install an older torch")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)


def test_a_driver_that_is_too_old_is_the_reason_that_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make_driver_too_old(monkeypatch)

    with pytest.raises(ConfigError) as refusal:
        select_device("cuda")

    assert str(refusal.value) == f"device cuda:0 is not there: none found; {TOO_OLD}"


def test_a_card_that_auto_cannot_use_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_driver_too_old(monkeypatch)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device_module, "NODES", tmp_path)

    assert select_device("auto").type == "cpu"
    assert f"the CPU computes, although there may be a card: {TOO_OLD}" in caplog.messages
