"""Cutting one document into shares for several ranks, by area, by tokens, and with little to receive.

Token p of a document sees p + 1 keys, so a document of l tokens costs l (l + 1) / 2 pairs, most of them at
its end. A share is a run of early tokens and a run of late ones, taken from what the shares before it have
left:

    24 tokens, 300 pairs, two shares of 150

    pieces of equal area    0-17 | 17-24                 the second rank receives 17 rows
    zigzag                  6-18 | 0-6 and 18-24         12
    least received          10-20 | 0-10 and 20-24       10 and 10

The rank that holds the end must receive whatever it does not hold, so it does well to hold early tokens too:
they cost little area and are rows it needs. A bound R on received rows says how many tokens each share must
have (its end minus R); its area then says how many of them are late ones, by a linear equation.

Ranks fill the room that shares leave with small documents, so area is counted above their price: every token
of a share saves its rank `price` pairs of filling (`price`: pairs a token of the small documents). Tokens
0..x then cost x (x + 1) / 2 - price x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Share", "Takers", "area_of", "cut_shares", "least_received", "peel"]

Share = tuple[int, int, int, int]  # early start, early stop, late start, late stop
Runs = list[tuple[int, int]]

# ways to cut, in the order in which they are tried: evenness, and how far outer shares fill up with early
# tokens
_WAYS = ((0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.5, 0.0), (0.9, 0.0), (1.0, 0.0))


def area_of(runs: Runs) -> int:
    """Visible pairs of the tokens of these runs, counted from their document's first token."""
    return sum(stop * (stop + 1) - start * (start + 1) for start, stop in runs) // 2


@dataclass
class Takers:
    """Ranks that are to share a document, those with most area to take first; lists of one entry a rank.

    caps      area, above the price, of its share; they add up to the document's
    rooms     most tokens of its share
    received  rows it receives for other documents
    last      the taker that is to have what the others leave; None: whoever has room for it
    """

    caps: list[float]
    rooms: list[int]
    received: list[int]
    last: int | None = None

    def __post_init__(self) -> None:
        everyone = range(len(self.caps))
        self.outer = [taker for taker in everyone if taker != self.last]
        self.inner = sorted(self.outer, key=lambda taker: -self.caps[taker] / max(1, self.rooms[taker]))


def cut_shares(
    length: int, takers: Takers, price: float, most_received: int, *, evenness: float, filled: float
) -> list[Share] | None:
    """The share of each taker; None where they cannot take the document so.

    `most_received` is how many rows any of them may receive in all. From the end inwards the rank with most
    area to take goes first as long as only early tokens keep it below that; then those with least room for
    their area do, for the later a token, the fewer make up an area. The last one takes what is left.
    `evenness` 0 lets token counts be what area asks for, 1 gives every share tokens in proportion to its
    area (the zigzag, for equal caps). `filled` lets the outermost share have early tokens for that part of
    the room it has left, and those after it as many rows to receive: what is left at the start, where area
    takes most tokens, then needs less room.
    """
    first, last = 0, length
    in_proportion = evenness * length / _priced(length, price)
    most_room = max(takers.rooms)
    more = round(filled * max(0, most_room - max(0, length - most_received)))
    shares: list[Share | None] = [None] * len(takers.caps)
    next_outer = next_inner = 0
    for _ in range(len(shares) - 1):
        while shares[takers.outer[next_outer]]:
            next_outer += 1
        while shares[takers.inner[next_inner]]:
            next_inner += 1
        for taker in (takers.inner[next_inner], takers.outer[next_outer]):
            late = _late_alone(first, last, takers.caps[taker], price)
            wanted = round(in_proportion * takers.caps[taker])
            tokens = last - most_received + takers.received[taker]
            if tokens <= late or tokens <= wanted:
                break
        if more and takers.rooms[taker] == most_room:
            wanted = max(wanted, min(most_room, last - most_received + more))
        tokens = max(tokens, wanted, late)
        if tokens > late:
            if tokens >= last - first:
                return None
            late = _late_of(first, last, tokens, takers.caps[taker], price)
        early = tokens - late
        if min(early, late) < 0 or first + early > last - late or tokens > takers.rooms[taker]:
            return None
        shares[taker] = (first, first + early, last - late, last)
        first, last = first + early, last - late
    taker = shares.index(None)
    if last - first > takers.rooms[taker] or first + takers.received[taker] > most_received:
        return None
    shares[taker] = (last, last, first, last)
    return [share for share in shares if share]


def least_received(
    length: int, takers: Takers, price: float, at_least: int
) -> tuple[int, list[Share]] | None:
    """The smallest bound on received rows, from `at_least` on and to 1/128 of the length, that the ranks can
    keep, and the shares that keep it; token counts as uneven as rooms allow. None where none does.
    """
    shares = _cut_somehow(length, takers, price, at_least)
    if shares is not None:
        return at_least, shares
    low, high = at_least, at_least + length + max(takers.received)
    shares = _cut_somehow(length, takers, price, high)
    if shares is None:
        return None
    while high - low > max(1, length // 128):
        middle = (low + high) // 2
        tried = _cut_somehow(length, takers, price, middle)
        if tried is None:
            low = middle
        else:
            high, shares = middle, tried
    return high, shares


def _cut_somehow(length: int, takers: Takers, price: float, most_received: int) -> list[Share] | None:
    """The least even shares that the ranks can take."""
    for evenness, filled in _WAYS:
        shares = cut_shares(length, takers, price, most_received, evenness=evenness, filled=filled)
        if shares is not None:
            return shares
    return None


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


def _late_alone(first: int, last: int, cap: float, price: float) -> int:
    """How many of the last of tokens [first, last) have an area of `cap` above the price; all, if less."""
    distance = last + 0.5 - price  # its square is twice the priced area of [0, last), but for a constant
    square = distance * distance - 2 * cap
    return round(distance - math.sqrt(square)) if square > 0 else last - first


def _late_of(first: int, last: int, tokens: int, cap: float, price: float) -> int:
    """How many of `tokens` tokens to take from the end of [first, last), if the others come from its
    start, for an area of `cap` above the price. The squares in it cancel.
    """
    given_up = cap - _priced(last, price) + _priced(first, price)
    return round((first + tokens + last + 1) / 2 - price - given_up / (first + tokens - last))


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
