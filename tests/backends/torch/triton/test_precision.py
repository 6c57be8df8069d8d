"""What only a card runs of the kernels, instructions written by hand, computed here instruction by instruction."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from brlite.backends.torch.parameters import GroupedLinear
from brlite.backends.torch.triton.multiply import Matrix
from brlite.backends.torch.triton.precision import _SCALE_WORD

LEVELS = torch.arange(-127, 128, dtype=torch.int8)
FACTORS = torch.tensor([1.0, 0.0, 1.2e-3, 3.3e-5, 0.71, 250.0, 1e-38, 1e-40, 2e36]).bfloat16()  # the last ones: limits


def halves(register: Tensor) -> Tensor:
    """The two bfloat16 numbers of each 32-bit register [R], low half first: [R, 2] in float64."""
    return register.to(torch.int32).unsqueeze(-1).view(torch.bfloat16).double()


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.bf16x2: float64 holds products and sums of bfloat16 numbers of like size exactly."""
    found = halves(a) * halves(b) + halves(c)
    return found.float().bfloat16().contiguous().view(torch.int32).squeeze(-1).long()


def run(code: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after the instructions of PTX. A 32-bit register is an int64 tensor of numbers below 2^32 in its
    low half; `$5` is 16 bits."""
    registers = dict(inputs)

    def read(name: str) -> Tensor:
        if name.startswith("{"):
            low, high = (read(each) for each in name.strip("{}").split(", "))
            return low | high << 16
        return torch.tensor(int(name, 16)) if name.startswith("0x") else registers[name]

    for line in re.findall(r"^\s*(\w[^;]*);", code, flags=re.MULTILINE):
        operation, rest = line.split(" ", 1)
        target, *names = re.findall(r"\{[^}]*\}|[$\w]+", rest)
        if target.startswith("{"):
            registers |= {"$" + target[2]: read(names[0]) & 0xFFFF, "$" + target[6]: read(names[0]) >> 16 & 0xFFFF}
            continue
        values = [torch.tensor(int(name)) if name.isdecimal() else read(name) for name in names]
        values = list(torch.broadcast_tensors(*values))
        match operation:
            case "mov.b32":
                found = values[0]
            case "and.b32":
                found = values[0] & values[1]
            case "or.b32":
                found = values[0] | values[1]
            case "xor.b32":
                found = values[0] ^ values[1]
            case "shl.b32":
                found = values[0] << values[1]
            case "shr.u32":
                found = values[0] >> values[1]
            case "fma.rn.bf16x2":
                found = fused(*values)
            case _:
                raise NotImplementedError(line)
        registers[target] = found & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_a_word_of_four_levels_is_scaled_exactly(factor: Tensor) -> None:
    levels = torch.stack([LEVELS.roll(shift) for shift in range(32)], dim=1)  # [255, 32]: each level in each place
    matrix = Matrix.of(GroupedLinear(levels, form="int8", scales=torch.ones((255, 1))), 32)
    words = matrix.values[0].long() & 0xFFFFFFFF  # [255, 8]
    bits = factor.view(torch.int16).long() & 0xFFFF

    registers = run(_SCALE_WORD.value, {"$4": words.flatten(), "$5": bits})

    found = torch.stack([registers[f"${index}"] for index in range(4)], dim=-1).to(torch.uint16).view(torch.bfloat16)
    pairs = found.view(-1, 2, 4, 2, 2)  # of 16 inputs: four words of (i, i + 1) and (i + 8, i + 9)
    assert torch.equal(pairs.movedim(3, 2).reshape(-1, 32), levels.bfloat16() * factor)
