"""The probe, with the CPU in the place of a card. A card that is wrong: `test_emulated_card.py`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from brlite.backends.torch import probe
from brlite.backends.torch.choose_steps import choose_steps
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.kv_cache import KVCache
from brlite.backends.torch.parameters import Linear
from brlite.backends.torch.probe import ProbedModel, ProbeReport, draws_right, probe_device, shrunk
from brlite.backends.torch.steps import ComputedStep, EagerSteps, LastDraws, Run
from brlite.errors import ConfigError
from brlite.models.config import KVDtype
from brlite.models.network import list_parameters
from brlite.models.precision import PRECISIONS, PrecisionName
from brlite.models.registry import find_family
from tests.models.test_config import PUBLISHED
from tests.tiny_models import TINY_CONFIGS

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["bf16", "a_bf16_w_int8", "a_bf16_w_int8_kv_int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_that_computes_right_passes(dtype: torch.dtype, precision: PrecisionName) -> None:
    report = probe_device(CPU, dtype, ProbedModel(precision=PRECISIONS[precision], kv_dtype=PRECISIONS[precision].kv))

    assert report.cosine > (0.99999 if dtype == torch.float32 else 0.9995)
    assert report.on_host == ()
    assert report.notes == ()


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_the_cache_of_the_probe_is_of_the_type_that_the_models_will_be(
    kv_dtype: KVDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: set[KVDtype] = set()

    class WatchedCache(KVCache):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            kept.add(self.dtype)

    monkeypatch.setattr(probe, "KVCache", WatchedCache)
    report = probe_device(CPU, torch.float32, ProbedModel(kv_dtype=kv_dtype))

    assert kept == {kv_dtype}
    assert report.cosine > 0.99999


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_architecture_can_be_probed(name: str) -> None:
    config = find_family(TINY_CONFIGS[name]).read_config(TINY_CONFIGS[name])

    assert (
        probe_device(CPU, torch.bfloat16, ProbedModel(config, PRECISIONS["a_bf16_w_int8_kv_int8"], "int8")).cosine
        > 0.999
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tiny_model_has_all_that_the_real_one_has_and_is_tiny(name: str) -> None:
    hf_config, _ = PUBLISHED[name]
    config = find_family(hf_config).read_config(hf_config)

    tiny = shrunk(config)

    kinds = {"layers.0." + shape.split(".", 2)[2] for shape in list_parameters(config) if shape.startswith("layers.")}
    assert kinds <= list_parameters(tiny).keys()
    assert (tiny.head_dim, tiny.group_size, tiny.rope) == (config.head_dim, config.group_size, config.rope)
    assert bool(tiny.nope_layers) == bool(config.nope_layers)
    assert sum(rows * columns for rows, columns in matrices(tiny)) < 2_000_000


def matrices(config) -> list[tuple[int, ...]]:
    return [parameter.shape for parameter in list_parameters(config).values() if len(parameter.shape) == 2]


def test_a_tiny_model_has_a_layer_of_each_kind() -> None:
    mixed, all_slide, none_slides = (
        shrunk(find_family(TINY_CONFIGS[name]).read_config(TINY_CONFIGS[name]))
        for name in ("qwen2-layer-types", "mistral-window", "llama")
    )

    assert (mixed.window(0), mixed.window(1)) == (5, None)
    assert (all_slide.window(0), all_slide.window(1)) == (5, 5)
    assert (none_slides.window(0), none_slides.window(1)) == (None, None)


def test_the_report_tells_what_ran_elsewhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    multiply = Linear.__call__

    def warn_and_multiply(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:  # what is probed, not what it is held against
            warnings.warn("CAUTION: The operator 'aten::mm' ... will fall back to run on the CPU.", stacklevel=1)
            warnings.warn("something else", DeprecationWarning, stacklevel=1)
        return multiply(linear, x)

    monkeypatch.setattr(Linear, "__call__", warn_and_multiply)
    with caplog.at_level(logging.INFO), pytest.warns(DeprecationWarning, match="something else"):
        report = probe_device(CPU, torch.bfloat16)

    assert report.on_host == ("aten::mm",)
    assert "on the CPU instead: aten::mm" in caplog.text
    assert report.notes == ("slow: torch runs aten::mm on the CPU, not on the device",)


def test_what_draws_on_the_device_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    take_best = torch.Tensor.topk
    sizes: list[int] = []

    def take_others_at_first(values: torch.Tensor, size: int, dim: int) -> Any:
        sizes.append(size)
        return take_best(values if len(sizes) > 3 else -values, size, dim=dim)

    monkeypatch.setattr(torch.Tensor, "topk", take_others_at_first)

    with pytest.raises(ConfigError, match="from the same logits it draws other tokens than the CPU does"):
        probe_device(CPU, torch.bfloat16)


def test_draws_that_do_not_wait_for_the_device_are_compared_where_they_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    assert draws_right(logits, ahead=True)
    results = iter(torch.arange(10_000))
    monkeypatch.setattr("brlite.backends.torch.probe.draw", lambda rows, inputs: next(results).repeat(len(rows)))

    assert not draws_right(logits, ahead=True)
    assert draws_right(logits, ahead=False)


def test_tokens_of_the_step_before_are_taken_where_steps_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, taken = EagerSteps.forward, list[list[int]]()

    def note(steps: EagerSteps, runs: Sequence[Run], last: LastDraws | None = None) -> ComputedStep:
        if last is not None:
            taken.append(last.drawn[list(last.sources)].tolist())
        return forward(steps, runs, last)

    monkeypatch.setattr(EagerSteps, "forward", note)
    monkeypatch.setattr(probe, "rules_for", lambda device: DeviceRules(runs_ahead=True))
    probe_device(CPU, torch.float32)

    assert taken == [[18, 10], [18, 10]]  # on the device and on the host


def test_a_report_reads_well() -> None:
    assert str(ProbeReport(0.99987, 0.0142, ())) == "cosine 0.999870, error 1.42% against float32 on the CPU"


def test_a_kernel_that_does_not_fit_the_card_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):
        """As Triton's, of no class of torch."""

    def choose(decoder: Any, cache: Any, kernels: str, limits: Any) -> Any:
        if kernels != "eager":
            raise OutOfResources("out of resource: shared memory, Required: 147456")
        return choose_steps(decoder, cache, "eager", limits)

    monkeypatch.setattr(probe, "choose_steps", choose)
    monkeypatch.setattr(probe, "rules_for", lambda _: DeviceRules(has_triton=True))

    with pytest.raises(ConfigError) as refusal:
        probe_device(CPU, torch.bfloat16)

    assert "cannot compute a tiny model: out of resource: shared memory, Required: 147456" in str(refusal.value)
    assert str(refusal.value).endswith('engine.torch_kernels = "eager" computes without our kernels')
