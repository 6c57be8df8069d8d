"""The random numbers of sampling, as a pure function of seed and position, and the choice of a token by one of them.

There is no generator state, so a draw cannot depend on other draws. Does not use torch.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_MANTISSA_BITS = 53


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` and `position` alone, the same on every machine and version."""
    key = seed.to_bytes(16, "little", signed=True) + position.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8, person=b"brlite").digest()
    return float((int.from_bytes(digest, "little") >> (64 - _MANTISSA_BITS)) * 2.0**-_MANTISSA_BITS)


def another(number: float) -> float:
    """A second number in [0, 1), a function of the first: its bits, mixed as in splitmix64 (Steele et al. 2014)."""
    bits = (int.from_bytes(struct.pack("<d", number), "little") + 0x9E3779B97F4A7C15) % 2**64
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) % 2**64
    return float(((bits ^ bits >> 31) >> (64 - _MANTISSA_BITS)) * 2.0**-_MANTISSA_BITS)


def invert_cdf(weights: Floats, targets: Floats) -> tuple[Integers, Floats]:
    """For each row the first index whose cumulative weight exceeds the row's target, and the target's offset within it.

    `weights` [R, N] need not be normalised: targets run from 0 to the row's sum. An index of weight 0 is never
    returned, not even for a target that rounding has pushed to the end.
    """
    cumulative = weights.cumsum(axis=1)
    targets = np.minimum(targets, np.nextafter(cumulative[:, -1], 0.0))
    indices = (cumulative <= targets[:, None]).sum(axis=1)
    before = np.where(indices > 0, np.take_along_axis(cumulative, np.maximum(indices - 1, 0)[:, None], 1)[:, 0], 0.0)
    return indices, targets - before
