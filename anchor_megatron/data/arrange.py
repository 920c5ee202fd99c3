"""Looking ahead: the pieces of some windows of plain packing, packed into as many windows in another way.

A block of windows in plain order holds certain own tokens; arranging moves them among its windows and never
across its ends, so that no token is lost or repeated, and where a window is in the data is still told by its
number alone. Units of 6, 3, 5 and 1 tokens, leads of one slot, two windows of 10 slots:

    plain       6, 2 of 3 | 1 of 3, 5, 1    the unit of 3 is cut
    best_fit    6, 1      | 5, 3            whole where there is room (arXiv 2404.10830); a slot is padding

`balanced` gives each unit, large ones first, to the window with the least attention area so far, then sorts
windows into global batches of like area, in shuffled order. Pieces are shuffled inside each window: a long
document is not always in front. Where a block cannot be arranged without losing a slot too many to leads, it
stays as plain packing has it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from anchor_megatron.data.stream import Pieces

__all__ = ["PACKINGS", "arrange"]

PACKINGS = ("plain", "best_fit", "balanced")


def arrange(
    kind: str,
    pieces: Pieces,
    leads: np.ndarray,
    *,
    batches: Sequence[int],
    seq_length: int,
    most_units: int | None,
    generator: np.random.Generator,
) -> list[Pieces] | None:
    """The windows of a block that holds `pieces`, each led by `leads` int64 slots; None if they do not fit.

    `batches` are the numbers of windows of each global batch in the block. `kind`: best_fit or balanced.
    """
    windows = _Windows(sum(batches), seq_length, len(pieces.unit) if most_units is None else most_units)
    left = windows.fill(np.stack([pieces.start, pieces.stop, leads], axis=1), by_area=kind == "balanced")
    if not windows.cut_into_gaps(left):
        return None
    if kind == "balanced":
        order = _by_area(windows.areas(), batches, generator)
    else:
        order = generator.permutation(sum(batches))
    found = []
    for window in order:
        held = np.array(windows.held[window], dtype=np.int64).reshape(-1, 2)
        held = held[generator.permutation(len(held))]
        which = np.searchsorted(pieces.start, held[:, 0], side="right") - 1
        found.append(Pieces(pieces.unit[which], held[:, 0], held[:, 1]))
    return found


class _Windows:
    """Windows being filled: own tokens (start, stop) `held` by each, its slots without a unit (`padding`) and
    those that one may take (`room`: none where it has as many units as it may).
    """

    def __init__(self, count: int, seq_length: int, most_units: int) -> None:
        self.held: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        self.seq_length, self.most_units = seq_length, most_units
        self.room = np.full(count, seq_length)
        self.padding = np.full(count, seq_length)
        self.area = np.zeros(count)

    def put(self, window: int, start: int, stop: int, lead: int) -> None:
        slots = stop - start + lead
        self.held[window].append((start, stop))
        self.room[window] -= slots
        self.padding[window] -= slots
        self.area[window] += slots * (slots + 1) / 2
        if len(self.held[window]) == self.most_units:
            self.room[window] = 0

    def areas(self) -> np.ndarray:
        """Visible pairs of every window, its padding's too."""
        return self.area + self.padding * (self.padding + 1) / 2

    def fill(self, pieces: np.ndarray, *, by_area: bool) -> list[tuple[int, int, int]]:
        """Puts (start, stop, lead) whole where a window has room, large ones first; what found none.

        What is longer than a window fills windows first.
        """
        whole, empty = [], 0
        for start, stop, lead in pieces.tolist():
            while stop - start + lead > self.seq_length and empty < len(self.held):
                self.put(empty, start, start + self.seq_length - lead, lead)
                start, empty = start + self.seq_length - lead, empty + 1
            whole.append((start, stop, lead))
        whole.sort(key=lambda one: (one[0] - one[1] - one[2], one[0]))
        return self._least_area(whole) if by_area else self._tightest(whole)

    def _tightest(self, whole: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        rooms = sorted((int(room), window) for window, room in enumerate(self.room))
        left = []
        for start, stop, lead in whole:
            at = bisect.bisect_left(rooms, (stop - start + lead, -1))
            if at == len(rooms):
                left.append((start, stop, lead))
                continue
            _, window = rooms.pop(at)
            self.put(window, start, stop, lead)
            bisect.insort(rooms, (int(self.room[window]), window))
        return left

    def _least_area(self, whole: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        left = []
        for start, stop, lead in whole:
            window = int(np.where(self.room >= stop - start + lead, self.area, np.inf).argmin())
            if self.room[window] < stop - start + lead:
                left.append((start, stop, lead))
            else:
                self.put(window, start, stop, lead)
        return left

    def cut_into_gaps(self, left: list[tuple[int, int, int]]) -> bool:
        """Cuts (start, stop, lead) into what room there is, the largest first; whether all found some."""
        for start, stop, lead in left:
            while start < stop:
                window = int(self.room.argmax())
                taken = min(stop - start, int(self.room[window]) - lead)
                if taken < 1:
                    return False
                self.put(window, start, start + taken, lead)
                start += taken
        return True


def _by_area(areas: np.ndarray, batches: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Windows in an order that gives every batch windows of neighbouring areas."""
    ranked = np.argsort(areas, kind="stable")
    first = np.cumsum([0, *batches])
    order = np.empty_like(ranked)
    taken = 0
    for batch in generator.permutation(len(batches)):
        own = ranked[taken : taken + batches[batch]]
        order[first[batch] : first[batch + 1]] = generator.permutation(own)
        taken += batches[batch]
    return order
