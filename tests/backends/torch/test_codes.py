"""Quantized files as cards hold them, computed on the CPU: the file's own numbers, whole and in the parts of ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from brlite.backends.native.library import NativeLibrary
from brlite.backends.torch.backend import TorchBackend
from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import RULES, DeviceRules
from brlite.backends.torch.loading import load_model
from brlite.backends.torch.parallel import Group, JoinedHead, SummedLinear
from brlite.backends.torch.parameters import GroupedLinear, Linear
from brlite.backends.torch.probe import ProbedModel, probe_device
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.load_plan import CARD_FORMS, LoadPlan, card_forms, describe_precision
from brlite.config.options import ModelSpec
from brlite.models.config import RopeConfig
from brlite.models.network import weight_bytes
from brlite.models.precision import PRECISIONS
from brlite.models.shards import Shard, shard_slices
from tests.backends.native_models import load_native
from tests.backends.torch.test_parallel import Table, ThreadGroup
from tests.load_plans import make_plan, read_tensors
from tests.models.steps import BLOCK_SIZE, DEVICE, Runner, random_ids
from tests.quantized_files import MIXES, write_quantized
from tests.quantized_folders import CASES, write_folder

RULES_OF_CARDS = DeviceRules(keeps_int8=True, keeps_codes=True)
FOLDERS = ("gptq", "awq")
LENGTH = 24
TABLE = list(range(LENGTH // BLOCK_SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    for mix, types in MIXES.items():
        write_quantized(folder / f"{mix}.gguf", types)
    for name in FOLDERS:
        write_folder(folder / name, CASES[name])
    return folder


@pytest.fixture(params=[*MIXES, *FOLDERS])
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Checkpoint:
    return open_checkpoint(model_path(folder, request.param))


def model_path(folder: Path, name: str) -> Path:
    return folder / name if name in FOLDERS else folder / f"{name}.gguf"


def plan_of(checkpoint: Checkpoint, shard: Shard | None = None) -> LoadPlan:
    return make_plan(checkpoint, ModelSpec(name="m", build_seq=LENGTH), shard=shard)


def load(plan: LoadPlan, group: Group | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(plan, dtype, DEVICE, RULES_OF_CARDS, group)


def weight_of(linear: Linear) -> Tensor:
    own = linear.own if isinstance(linear, SummedLinear | JoinedHead) else linear
    return own.dequantized(slice(None), torch.float32) if isinstance(own, GroupedLinear) else own.weight


def test_weights_are_the_files_numbers_exactly(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint)
    linears = load(plan).parameters.linears
    num_kept = 0
    for name, values in read_tensors(checkpoint).items():
        target, stored_as = plan.model.targets[name], checkpoint.formats()[name]
        if plan.card_forms.get(target.parameter, "int8") == "int8":
            continue
        found = weight_of(linears[target.parameter.removesuffix(".weight")])
        rows = slice(target.start, target.start + len(values))
        is_rounded = stored_as in ("Q4_K", "IQ4_XS")  # their products of scales are rounded to half precision
        torch.testing.assert_close(
            found[rows], torch.from_numpy(values), rtol=2e-3 if is_rounded else 0, atol=1e-4 if is_rounded else 0
        )
        num_kept += 1
    assert num_kept >= 4


def test_logits_are_near_those_of_native_code(checkpoint: Checkpoint, native_library: NativeLibrary) -> None:
    token_ids = random_ids(LENGTH)
    with closing(load_native(native_library, "m", "auto", checkpoint=checkpoint)) as native:
        expected = native.logits(token_ids)

    found = Runner(load(plan_of(checkpoint))).whole(token_ids, TABLE).numpy()

    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    # Native keys, values and activations are bfloat16. A matrix of several formats is int8 on cards only.
    is_mixed = {"Q4_1", "Q8_0", "Q4_0"} <= set(checkpoint.formats().values())
    assert np.median(errors) < (0.03 if is_mixed else 0.015)


def test_bytes_are_told_before_anything_is_read(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint)

    told = weight_bytes(plan.config, 2, plan.card_forms)

    assert told == load(plan, dtype=torch.bfloat16).parameters.num_bytes


def test_two_ranks_hold_the_parts_of_one_and_give_its_logits(checkpoint: Checkpoint) -> None:
    token_ids, table = random_ids(LENGTH), Table(2)
    plan = plan_of(checkpoint)
    whole = load(plan)
    expected = Runner(whole).whole(token_ids, TABLE)

    def run(rank: int) -> tuple[Decoder, Tensor]:
        decoder = load(plan_of(checkpoint, Shard(rank, 2)), ThreadGroup(table, rank))
        return decoder, Runner(decoder).whole(token_ids, TABLE)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(run, range(2)))

    for rank, (decoder, logits) in enumerate(ranks):
        assert (logits - expected).norm() <= 0.01 * expected.norm()  # int8 has other groups in other parts
        for name, (rows, columns) in shard_slices(plan.config, Shard(rank, 2)).items():
            if plan.card_forms.get(name, "int8") != "int8":
                linear = name.removesuffix(".weight")
                part = torch.cat([weight_of(whole.parameters.linears[linear])[each.start : each.stop] for each in rows])
                part = part if columns is None else part[:, columns.start : columns.stop]
                assert torch.equal(weight_of(decoder.parameters.linears[linear])[: len(part)], part)


def test_a_rank_whose_inputs_end_within_a_group_widens_the_matrix(folder: Path) -> None:
    checkpoint = open_checkpoint(model_path(folder, "q4_0"))
    model = plan_of(checkpoint).model
    config = msgspec.structs.replace(
        model.config, num_heads=16, num_kv_heads=16, head_dim=16, rope=RopeConfig(rotary_dim=16)
    )

    forms = card_forms(model._replace(config=config), Shard(0, 16))

    assert "layers.0.o.weight" not in forms
    assert forms["layers.0.gate_up.weight"] == "int4"


def test_what_becomes_of_each_format_is_said(folder: Path) -> None:
    checkpoint = open_checkpoint(model_path(folder, "mixed"))
    model = plan_of(checkpoint).model
    said = describe_precision(model, ModelSpec(name="m"), is_native=False, keeps_forms=True)

    assert said == (
        "the file's own: Q4_0 is rounded to int8 in 6 of 8 matrices, else kept, Q4_1 is rounded to int8, "
        "Q4_K is kept, Q8_0 is rounded to int8, Q5_0 is widened to bfloat16, F16 is rounded to int8 (auto)"
    )


def test_a_card_keeps_codes_and_the_cpu_and_explicit_bf16_widen_them(folder: Path) -> None:
    auto, bf16 = PRECISIONS["bf16"]._replace(weights="stored"), PRECISIONS["bf16"]

    assert RULES["cuda"].keeps_forms(auto)
    assert not RULES["cpu"].keeps_forms(auto)
    checkpoint = open_checkpoint(model_path(folder, "q4_0"))
    plan = plan_of(checkpoint)
    assert {"int4", "int8"} == set(plan.card_forms.values())
    assert plan.precision_name_of(set(plan.card_forms.values())) == "a_bf16_w_int4"
    assert card_forms(plan.model._replace(precision=bf16)) == {}
    backend = TorchBackend.load(plan)
    assert backend.info.precision == "bf16"


@pytest.mark.parametrize("form", sorted({*CARD_FORMS.values()}))
def test_the_probe_has_matrices_in_the_forms_of_the_model(form: str) -> None:
    names = [f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("qkv", "o", "gate_up", "down")]
    like = ProbedModel(precision=PRECISIONS["bf16"]._replace(weights="stored"), forms=dict.fromkeys(names, form))  # type: ignore[arg-type]

    assert probe_device(torch.device("cpu"), torch.bfloat16, like).cosine > 0.999
