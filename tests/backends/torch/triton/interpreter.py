"""What differs between Triton's interpreter and a card: it rounds to bfloat16 toward zero, a card to the nearest."""

from __future__ import annotations

import torch
from torch import Tensor

BFLOAT16_STEP = 2**-7  # how much smaller than a number the interpreter's bfloat16 may be, as a part of it


def to_bfloat16(values: Tensor) -> Tensor:
    """float32 numbers without the bits that bfloat16 does not have, still in float32."""
    return (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
