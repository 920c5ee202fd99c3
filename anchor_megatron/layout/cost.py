"""What a placement costs, in seconds: attention at measured rates, rows on their way at measured bandwidths.

A *machine* is what one rank's device and links do, a *shape* what a layer asks of them. A kernel works on
whole tiles of query rows, and a row costs something whatever it sees, as much as some hundred pairs:

    1,000 tokens see themselves, 32 heads of 128, at 665 TFLOP/s and 520 pairs a row
    500,500 pairs, and 24 rows that pad the last tile and see 1,000 keys      524,500
    1,024 rows of 520 pairs                                                   532,480
    (524,500 + 532,480) * 4 * 32 * 128 FLOP                                   26 us forward

All ranks wait for each other's rows in every layer, so a placement costs what its slowest rank does. The
rates of another machine are measured with `tools/profile_cp.py --measure`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

__all__ = ["CostModel", "LayerShape", "Machine", "read_machine", "tiled"]


@dataclass(frozen=True)
class Machine:
    """Rates of one rank; the values are an H200's, bf16, flash-attn 4, NVLink and one 400 Gbit/s card.

    forward_tflops, backward_tflops        attention of very long documents; 4 and 10 FLOP a pair, head and
                                           head dim
    forward_row_pairs, backward_row_pairs  what a query row costs beside its pairs, in pairs
    tile, tiles_at_once                    query rows of a tile; tiles that the device works on at once
    inside_gb_per_s, between_gb_per_s      one way, to all ranks of the node and to those of other nodes
    latency_us                             of one collective, to its start and from its end
    memory_gb_per_s                        packing, gathering and summing of rows
    merge_gb_per_s                         ring: adding a round's outputs and gradients, 8 bytes a value
    heads_gb_per_s                         ulysses: what a rank receives, rearranged and sent inside the node
    contention                             share of a transfer by which attention above it grows longer
    """

    forward_tflops: float = 665.0
    backward_tflops: float = 600.0
    forward_row_pairs: float = 520.0
    backward_row_pairs: float = 435.0
    tile: int = 128
    tiles_at_once: int = 132
    inside_gb_per_s: float = 314.0
    between_gb_per_s: float = 45.0
    latency_us: float = 30.0
    memory_gb_per_s: float = 2000.0
    merge_gb_per_s: float = 890.0
    heads_gb_per_s: float = 176.0
    contention: float = 0.3


@dataclass(frozen=True)
class LayerShape:
    """Heads of one rank: query heads, key/value heads, head dim, bytes a value."""

    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    bytes_per_value: int = 2

    @property
    def row_bytes(self) -> int:
        """Keys and values of one token; their gradients take as many."""
        return 2 * self.groups * self.head_dim * self.bytes_per_value


@dataclass(frozen=True)
class CostModel:
    """A layer on ranks of a machine, `ranks_per_node` neighbours to a node; None: all on one."""

    machine: Machine = field(default_factory=Machine)
    shape: LayerShape = field(default_factory=LayerShape)
    ranks_per_node: int | None = None

    def forward_seconds(self, queries: np.ndarray, keys: np.ndarray, *, causal: bool = True) -> np.ndarray:
        """Seconds float64 [P] of each piece; `queries` and `keys` int64 [P] are its rows, and the keys that
        the last of them sees. Not `causal`: that all of them see.
        """
        pairs, rows = tiled(queries, keys, self.machine.tile, causal=causal)
        heads = self.shape.heads * self.shape.head_dim
        return (pairs + self.machine.forward_row_pairs * rows) * (
            4 * heads / self.machine.forward_tflops / 1e12
        )

    def backward_seconds(self, queries: np.ndarray, keys: np.ndarray, *, causal: bool = True) -> np.ndarray:
        """As `forward_seconds`, of the backward pass."""
        pairs, rows = tiled(queries, keys, self.machine.tile, causal=causal)
        heads = self.shape.heads * self.shape.head_dim
        return (pairs + self.machine.backward_row_pairs * rows) * (
            10 * heads / self.machine.backward_tflops / 1e12
        )

    def attention_seconds(
        self, queries: np.ndarray, keys: np.ndarray, rank: np.ndarray, ranks: int
    ) -> np.ndarray:
        """Seconds float64 [ranks] of attention, forward and backward; `rank` int64 [P] holds each piece."""
        both = self.forward_seconds(queries, keys) + self.backward_seconds(queries, keys)
        return np.bincount(rank, weights=both, minlength=ranks)

    def transfer_seconds(self, rows: float | np.ndarray, crossing: float | np.ndarray = 0) -> np.ndarray:
        """Seconds that `rows` take one way, of which `crossing` come from other nodes. Both links work at
        the same time.
        """
        machine, row_bytes = self.machine, self.shape.row_bytes
        inside = np.subtract(rows, crossing) / machine.inside_gb_per_s
        between = np.divide(crossing, machine.between_gb_per_s)
        return np.maximum(inside, between) * row_bytes / 1e9

    def added_seconds(self, received: float, crossing: float = 0) -> float:
        """Seconds that receiving rows adds to a layer: what attention loses to the transfers above it, there
        and back, and what packing, gathering and summing the rows take.
        """
        moved = 4 * received * self.shape.row_bytes / self.machine.memory_gb_per_s / 1e9
        return float(2 * self.machine.contention * self.transfer_seconds(received, crossing) + moved)


def tiled(queries: np.ndarray, keys: np.ndarray, tile: int, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pairs and rows of pieces whose last tile of query rows is filled up."""
    rows = -(-queries // tile) * tile
    hidden = queries * (queries - 1) / 2 if causal else 0
    return rows * keys - hidden, rows


def read_machine(path: str | Path) -> Machine:
    """The machine in a JSON file that `tools/profile_cp.py --measure` wrote, or that has some of `Machine`'s
    fields under "machine". ValueError where there is none, or an unknown field or value.
    """
    try:
        found = dict(json.loads(Path(path).read_text())["machine"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file with an entry machine, got {error!r}") from error
    known = [one.name for one in fields(Machine)]
    for name, value in found.items():
        if name not in known:
            raise ValueError(f"{path}: machine.{name}: expected one of {', '.join(known)}")
        if not isinstance(value, (int, float)) or value < 0 or (value == 0 and not name.endswith(_MAY_BE_0)):
            raise ValueError(f"{path}: machine.{name}: got {value!r}, expected a number above 0")
    return Machine(**found)


_MAY_BE_0 = ("row_pairs", "latency_us", "contention")
