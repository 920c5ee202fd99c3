"""What a placement costs, in seconds: attention pairs at a measured rate, received rows at a measured one.

    a rank with 80 M visible pairs and 17,000 received rows, at the rates below
    80e6 / 1.05e10 = 7.6 ms of attention, 17,000 / 2.6e7 = 0.65 ms of transfer, 30 % of it seen: 7.8 ms

All ranks wait for each other's rows in every layer, so a placement costs what its slowest rank does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["CostModel"]


@dataclass(frozen=True)
class CostModel:
    """Rates of one layer, forward and backward together.

    The values are those of an H200: 32 query and 8 KV heads of 128, bf16; 57 kFLOP a pair at 600 TFLOP/s; 12
    kB a row (keys and values in, their gradients back in FP32) at 314 GB/s.
    """

    pairs_per_second: float = 1.05e10
    rows_per_second: float = 2.6e7
    exposed: float = 0.3  # share of the transfer that attention does not hide
    tile: int = 128  # query rows a kernel works on at once; a piece pays for whole tiles

    def attention_seconds(
        self, queries: np.ndarray, keys: np.ndarray, rank: np.ndarray, ranks: int
    ) -> np.ndarray:
        """Seconds float64 [ranks] of attention; `queries`, `keys`, `rank` int64 [P] are each piece's rows,
        the keys that its last row sees, and who holds it.
        """
        rows = -(-queries // self.tile) * self.tile
        pairs = queries * (keys - queries) + queries * (queries + 1) / 2 + (rows - queries) * keys
        return np.bincount(rank, weights=pairs, minlength=ranks) / self.pairs_per_second

    def transfer_seconds(self, received: int) -> float:
        """Seconds that receiving this many rows adds."""
        return self.exposed * received / self.rows_per_second
