from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from brlite.errors import ConfigError
from brlite.worker.cpu import physical_cores
from brlite.worker.device import compute_dtype, computes_on_cpu, describe_device, select_device

BRLITE = Path(__file__).parents[2] / "brlite"
ENGINE_ROOMS = [path for room in ("models", "worker") for path in sorted((BRLITE / room).rglob("*.py"))]
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


@pytest.mark.parametrize("name", ["cuda:977", "supa:977"])
def test_device_that_is_not_there_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        select_device(name)

    assert f"device {name} is not there" in str(refusal.value)
    assert "\n" not in str(refusal.value)


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
