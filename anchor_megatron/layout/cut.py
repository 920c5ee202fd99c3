"""Cutting one document into shares for several ranks, by area, by tokens, and with little to receive.

Token p of a document sees p + 1 keys, so a document of l tokens costs l (l + 1) / 2 pairs, most of them at its
end. A share is a run of early tokens and a run of late ones, taken from what the shares before it have left:

    24 tokens, 300 pairs, two shares of 150

    pieces of equal area    0-17 | 17-24                 the second rank receives 17 rows
    zigzag                  6-18 | 0-6 and 18-24         12
    least received          10-20 | 0-10 and 20-24       10 and 10

The rank that holds the end must receive whatever it does not hold, so it does well to hold early tokens too:
they cost little area and are rows it needs. A bound R on received rows says how many tokens each share must
have (its end minus R); its area then says how many of them are late ones, by a linear equation.

Ranks fill the room that shares leave with small documents, so area is counted above their price: every token
of a share saves its rank `price` pairs of filling (`price`: pairs a token of the small documents). The price of
tokens 0..x is then x (x + 1) / 2 - price x.
"""

from __future__ import annotations

import math

__all__ = ["Share", "area_of", "cut_shares", "least_received", "peel"]

Share = tuple[int, int, int, int]  # early start, early stop, late start, late stop
Runs = list[tuple[int, int]]

_EVENNESS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


def area_of(runs: Runs) -> int:
    """Visible pairs of the tokens of these runs, counted from their document's first token."""
    return sum(stop * (stop + 1) - start * (start + 1) for start, stop in runs) // 2


def cut_shares(
    length: int, caps: list[float], rooms: list[int], price: float, most_received: int, *, evenness: float
) -> list[Share] | None:
    """Shares of the ranks in turn, outermost first; None where the ranks cannot take them so.

    `caps` are the shares' areas above `price`; the last rank takes what is left. `rooms` are the most tokens
    of each, `most_received` the most rows any of them may receive. `evenness` 0 lets token counts be what
    area asks for, 1 gives every share tokens in proportion to its area (the zigzag, for equal caps).
    """
    first, last = 0, length
    slope = price - 0.5
    total = _priced(length, price)
    shares: list[Share] = []
    for cap, room in zip(caps[:-1], rooms[:-1], strict=True):
        tokens = max(round(evenness * length * cap / total), last - most_received)
        at_end = _priced(last, price)
        square = slope * slope + 2 * (at_end - cap)
        late = round(last - slope - math.sqrt(square)) if square > 0 else last - first
        early = 0
        if late < tokens:
            inner = first + tokens - last
            if inner >= 0:
                return None
            late = round((first + tokens + last + 1) / 2 - price - (cap - at_end + _priced(first, price)) / inner)
            early = tokens - late
            if early < 0 or late < 0:
                return None
        if first + early > last - late or early + late > room:
            return None
        shares.append((first, first + early, last - late, last))
        first, last = first + early, last - late
    if last - first > rooms[-1] or first > most_received:
        return None
    shares.append((last, last, first, last))
    return shares


def least_received(
    length: int, caps: list[float], rooms: list[int], price: float, at_least: int
) -> tuple[int, list[Share]] | None:
    """The smallest bound on received rows, from `at_least` on and to 1/256 of the length, that the ranks can
    keep, and the shares that keep it; token counts as uneven as rooms allow. None where none does.
    """
    shares = cut_shares(length, caps, rooms, price, at_least, evenness=0.0)
    if shares is not None:
        return at_least, shares
    for evenness in _EVENNESS:
        shares = cut_shares(length, caps, rooms, price, length, evenness=evenness)
        if shares is not None:
            break
    else:
        return None
    low, high = min(at_least, length), length
    while high - low > max(1, length // 256):
        middle = (low + high) // 2
        tried = cut_shares(length, caps, rooms, price, middle, evenness=evenness)
        if tried is None:
            low = middle
        else:
            high, shares = middle, tried
    return high, shares


def peel(runs: Runs, tokens: int, area: float) -> tuple[Runs, Runs]:
    """Of a document's `runs`, `tokens` neighbouring ones whose area is nearest to `area`, and the rest."""
    low, high = 0, sum(stop - start for start, stop in runs) - tokens
    while low < high:
        middle = (low + high) // 2
        if area_of(_window(runs, middle, tokens)) < area:
            low = middle + 1
        else:
            high = middle
    if low and area - area_of(_window(runs, low - 1, tokens)) < area_of(_window(runs, low, tokens)) - area:
        low -= 1
    total = sum(stop - start for start, stop in runs)
    rest = _window(runs, 0, low) + _window(runs, low + tokens, total - low - tokens)
    return _window(runs, low, tokens), rest


def _priced(tokens: int, price: float) -> float:
    return tokens * (tokens + 1) / 2 - price * tokens


def _window(runs: Runs, offset: int, tokens: int) -> Runs:
    """`tokens` tokens from the `offset`-th of the runs on."""
    found: Runs = []
    for start, stop in runs:
        begin = start + max(0, offset)
        end = min(stop, begin + tokens)
        offset -= stop - start
        if end > begin:
            found.append((begin, end))
            tokens -= end - begin
    return found
