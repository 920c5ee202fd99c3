"""Which documents an epoch takes, and in which order: blends of data sets, long documents up-sampled.

Documents fall into groups, and each group goes round its own shuffled documents for ever. An epoch takes a
share of every group and shuffles what it took; the next goes on where this one stopped, so that no document
comes again before all of its group have come. With 4 documents in one group and 6 in another that is taken
half a time an epoch:

    epoch 0    all of the first group, 3 of the second        epoch 1    all of the first, the other 3

An epoch has as many tokens as its documents have together. Shares are of tokens: a data set's is its weight;
inside it every source keeps its own; `long_weight` makes the documents over `long_tokens` come that many
times as often as the shorter ones of their source (per-source up-sampling, arXiv 2402.10171, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anchor_megatron.data.corpus import Corpus
from anchor_megatron.data.seeds import EPOCH, GROUP, generator

__all__ = ["SAMPLERS", "Group", "Recipe", "make_groups"]

SAMPLERS = ("plain", "upsample_long")  # every document once an epoch; long ones more often


@dataclass(frozen=True)
class Group:
    """Documents that are taken alike; `taken` of them an epoch, more than there are if they repeat."""

    documents: np.ndarray
    taken: float


class Recipe:
    """The order of every epoch's documents: a function of (groups, seed, epoch)."""

    def __init__(self, groups: Sequence[Group], *, seed: int) -> None:
        self.groups, self.seed = tuple(groups), seed

    def order(self, epoch: int) -> np.ndarray:
        """Documents of `epoch`, in order."""
        parts = [self._taken(number, epoch) for number in range(len(self.groups))]
        if len(parts) == 1:
            return parts[0]
        return generator(self.seed, EPOCH, epoch).permutation(np.concatenate(parts))

    def _taken(self, number: int, epoch: int) -> np.ndarray:
        group = self.groups[number]
        size = group.documents.size
        begin, end = int(epoch * group.taken), int((epoch + 1) * group.taken)
        parts = [
            generator(self.seed, GROUP, turn, group=number).permutation(group.documents)[
                max(begin - turn * size, 0) : end - turn * size
            ]
            for turn in range(begin // size, max(-(-end // size), begin // size + 1))
        ]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def make_groups(
    corpus: Corpus,
    *,
    weights: Sequence[float],
    splits: Sequence[float] = (1.0, 0.0, 0.0),
    split: str = "train",
    sampler: str = "plain",
    long_tokens: int = 0,
    long_weight: float = 1.0,
) -> list[Group]:
    """The groups of a corpus of data sets with `weights`, of the documents in `split`.

    ValueError where a split or a data set in it holds no tokens.
    """
    chosen = [corpus.split(number, splits, split) for number in range(len(corpus.sets))]
    tokens = [int(corpus.lengths[documents].sum()) for documents in chosen]
    if not all(tokens):
        empty = corpus.sets[tokens.index(0)].prefix
        raise ValueError(f"data.split: got no documents of {empty} for {split} from shares {list(splits)}")
    if len(chosen) == 1 and sampler == "plain":
        return [Group(chosen[0], float(chosen[0].size))]
    groups = []
    for documents, own, weight in zip(chosen, tokens, weights, strict=True):
        times = weight / sum(weights) * sum(tokens) / own  # that this set is gone through in an epoch
        if sampler == "plain":
            groups.append(Group(documents, times * documents.size))
        else:
            groups += _long_and_short(corpus, documents, times, long_tokens, long_weight)
    return groups


def _long_and_short(
    corpus: Corpus, documents: np.ndarray, times: float, long_tokens: int, long_weight: float
) -> list[Group]:
    """Two groups a source, whose tokens together are `times` the source's own."""
    groups = []
    sources, lengths = corpus.sources[documents], corpus.lengths[documents]
    for source in np.unique(sources):
        of_source = sources == source
        is_long = of_source & (lengths > long_tokens)
        is_short = of_source & ~is_long
        long, short = (float(lengths[which].sum()) for which in (is_long, is_short))
        if long + short == 0:
            continue
        scale = times * (long + short) / (long_weight * long + short)
        for which, factor in ((is_long, long_weight), (is_short, 1.0)):
            if which.any():
                groups.append(Group(documents[which], scale * factor * int(which.sum())))
    return groups
