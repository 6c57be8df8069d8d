"""Fills a decoder's parameters from a checkpoint, tensor by tensor. The readers of file formats are in `checkpoint`.

All names and shapes are checked before any data is read (`checked_model.py`). Peak memory: the model and one tensor.
"""

from __future__ import annotations

import torch

from brlite.backends.torch.decoder import Decoder
from brlite.backends.torch.device import DeviceRules
from brlite.backends.torch.packing import can_pack, pack_linears
from brlite.backends.torch.parallel import Group, shard_parameters
from brlite.backends.torch.parameters import NO_FORMS, allocate_parameters
from brlite.backends.torch.quantize import ROWS_AT_A_TIME, quantize_linears_, store_codes_, store_rows_
from brlite.checkpoint.placing import LoadPlan, placing
from brlite.errors import ConfigError
from brlite.models.network import weight_bytes
from brlite.models.shards import parameter_parts, shard_config

PLAIN = DeviceRules()


def load_model(
    plan: LoadPlan, dtype: torch.dtype, device: torch.device, rules: DeviceRules = PLAIN, group: Group | None = None
) -> Decoder:
    """The decoder that the plan's checkpoint holds, in its precision, computing in `dtype` on `device`.

    `rules` choose the form of the matrices. With a shard these are one rank's parameters, and `group` connects the
    ranks. Raises `ConfigError` if there is not enough memory.
    """
    config = plan.config if plan.shard is None else shard_config(plan.config, plan.shard)
    forms = plan.card_forms if rules.keeps_forms(plan.precision) else NO_FORMS
    try:
        parameters = allocate_parameters(config, dtype, device, forms)
    except RuntimeError as error:  # torch's class when a CPU is out of memory
        size = weight_bytes(config, dtype.itemsize, forms) / 2**30
        raise ConfigError(f"the weights take {size:.1f} GiB, which is not there") from error

    for name, held in parameter_parts(plan.config, plan.shard).items() if plan.shard else ():
        if sum(map(len, held.rows)) < len(parameters.named[name]):
            parameters.named[name].zero_()  # padding of a vocabulary, and biases that only rank 0 adds
    for target, tensor in placing(plan):
        if forms.get(target.parameter, "int8") != "int8":
            for first in range(0, target.shape[0], ROWS_AT_A_TIME):
                coded = tensor.part(range(first, min(first + ROWS_AT_A_TIME, target.shape[0]))).coded()
                assert coded is not None, f"{tensor.name} has no codes"  # its form was chosen by its format
                store_codes_(parameters, target.parameter, target.start + first, coded)
            continue
        values = torch.from_numpy(tensor.float32())
        # Every precision starts from bfloat16 weights, held in float32 or not.
        rows = values if target.dtype == "float32" else values.to(torch.bfloat16)
        store_rows_(parameters, target.parameter, target.start, rows)
        del values, rows  # before the next one is read

    if plan.precision.weights == "int8":
        quantize_linears_(parameters)
    if rules.packs_matrices and can_pack(parameters):
        parameters = pack_linears(parameters)
    if plan.shard is not None and group is not None:
        parameters = shard_parameters(parameters, plan.config, plan.shard, group)
    return Decoder(config, parameters, max_length=plan.spec.build_seq)
