"""Random generators by what they are for, so that no draw depends on how many were made before it."""

from __future__ import annotations

import numpy as np

__all__ = ["EPOCH", "GROUP", "INTERLEAVE", "REPACK", "SHUFFLE", "generator"]

GROUP, EPOCH, REPACK, INTERLEAVE, SHUFFLE = range(5)


def generator(seed: int, purpose: int, number: int, *, group: int = 0) -> np.random.Generator:
    """The generator of one purpose (see above) and one epoch, group or window, under a run's seed."""
    return np.random.Generator(np.random.Philox(key=[seed, (purpose << 56) + (group << 32) + number]))
