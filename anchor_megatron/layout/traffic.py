"""Key/value rows on their way: received and sent by every rank, and those of them that cross nodes.

    one document of 8 tokens in zigzag on four ranks, two a node

    rank          0       1       2       3
    holds         0, 7    1, 6    2, 5    3, 4
    needs up to   8       7       6       5
    receives      6       5       4       3
    crossing      4       4       2       2      from the other node
    sends         3+0     3+1     3+2     3+3    to every rank that needs a later token

A rank needs all of a document up to the last token that it holds of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Traffic", "rows_received", "traffic"]


@dataclass(frozen=True)
class Traffic:
    """Rows int64 [ranks]; those of nodes int64 [nodes].

    received, sent              by every rank
    crossing, crossing_sent     those of them from and to ranks of other nodes
    node_crossing               from other nodes if a row goes to each node once, however many of its ranks
                                need it
    """

    received: np.ndarray
    sent: np.ndarray
    crossing: np.ndarray
    crossing_sent: np.ndarray
    node_crossing: np.ndarray


def rows_received(
    document: np.ndarray, stop: np.ndarray, tokens: np.ndarray, rank: np.ndarray, ranks: int
) -> np.ndarray:
    """Rows int64 [ranks] received: of every document, those up to a rank's last token that it does not hold.

    `document`, `stop` (counted from the document's first token), `tokens`, `rank`: int64 [P] of each piece.
    """
    held_by, which = np.unique(document * ranks + rank, return_inverse=True)
    last = np.zeros(held_by.size, dtype=np.int64)
    np.maximum.at(last, which, stop)
    missing = last - np.bincount(which, weights=tokens, minlength=held_by.size).astype(np.int64)
    return np.bincount(held_by % ranks, weights=missing, minlength=ranks).astype(np.int64)


def traffic(
    document: np.ndarray, stop: np.ndarray, tokens: np.ndarray, node: np.ndarray, rank: np.ndarray, ranks: int
) -> Traffic:
    """The traffic of pieces, all int64 [P]: as in `rows_received`, and the node of each piece's rank."""
    nodes = int(node.max()) + 1
    received = rows_received(document, stop, tokens, rank, ranks)
    # documents that lie on one rank move nothing
    first = np.full(int(document.max()) + 1, -1, dtype=np.int64)
    first[document] = rank
    split = np.zeros(first.size, dtype=bool)
    split[document[first[document] != rank]] = True
    mine = np.flatnonzero(split[document])
    mine = mine[np.lexsort((stop[mine], document[mine]))]
    document, stop, tokens, node, rank = (x[mine] for x in (document, stop, tokens, node, rank))
    sent = _sent(document, stop, tokens, rank, ranks)
    return Traffic(
        received=received,
        sent=sent,
        crossing=_from_elsewhere(document, stop, tokens, node, rank, ranks),
        crossing_sent=sent - _sent(document * nodes + node, stop, tokens, rank, ranks),
        node_crossing=rows_received(document, stop, tokens, node, nodes),
    )


def _last_of(document: np.ndarray, holder: np.ndarray, holders: int) -> np.ndarray:
    """The last piece of every (document, holder), of pieces in token order."""
    key = document * holders + holder
    order = np.argsort(key, kind="stable")
    ends = np.flatnonzero(np.diff(key[order], append=-1))
    return order[ends]


def _sent(
    document: np.ndarray, stop: np.ndarray, tokens: np.ndarray, rank: np.ndarray, ranks: int
) -> np.ndarray:
    """A piece goes to every other rank whose last token of the document is a later one."""
    last = _last_of(document, rank, ranks)
    reach = int(stop.max(initial=0)) + 1
    ends = np.sort(document[last] * reach + stop[last])
    upto = np.searchsorted(ends, (document + 1) * reach)
    later = upto - np.searchsorted(ends, document * reach + stop, side="right")
    held, which = np.unique(document * ranks + rank, return_inverse=True)
    end = np.zeros(held.size, dtype=np.int64)
    np.maximum.at(end, which, stop)
    others = later - (end[which] > stop)
    return np.bincount(rank, weights=tokens * others, minlength=ranks).astype(np.int64)


def _from_elsewhere(
    document: np.ndarray, stop: np.ndarray, tokens: np.ndarray, node: np.ndarray, rank: np.ndarray, ranks: int
) -> np.ndarray:
    """Of what a rank needs of a document, what no rank of its node holds."""
    nodes = int(node.max(initial=0)) + 1
    key = document * nodes + node
    order = np.argsort(key, kind="stable")
    running = np.cumsum(tokens[order])
    begins = np.flatnonzero(np.diff(key[order], prepend=-1))
    counts = np.diff(np.append(begins, key.size))
    held = np.empty(key.size, dtype=np.int64)  # by the node, up to and with this piece
    held[order] = running - np.repeat(running[begins] - tokens[order][begins], counts)
    last = _last_of(document, rank, ranks)
    return np.bincount(rank[last], weights=stop[last] - held[last], minlength=ranks).astype(np.int64)
