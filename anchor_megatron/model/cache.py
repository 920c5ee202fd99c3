"""Keys and values of a long context, kept on the ranks that computed them, and branches that go on behind it.

A context of six tokens on two ranks, and two questions about it, a and b, as branches:

    filled    rank 0: 0 1 4 5    rank 1: 2 3        each layer's keys and values, where the plan put the rows
    branches  a0 a1 b0 b1 b2                        computed on every rank; first of them at position 6

A branch's row sees the whole context and its own branch up to itself. Every rank attends to the context rows
it holds, the first one also to the branches' rows; the ranks' outputs are then merged by their log-sum-exp.
So one forward pass over a context serves any number of questions, and decoding adds a row a branch.

Legend: T new rows, M rows of branches so far, K context rows of this rank, N query heads, G key/value heads,
H head dim, R = N / G.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["KeyValueCache"]

_SCORES = 1 << 28  # elements of a chunk's fp32 scores: 1 GiB

_Pair = tuple[Tensor, Tensor]


class KeyValueCache:
    """The context's keys and values by layer, then those of the branches."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group` holds the context-parallel ranks; all of them make and use their caches together."""
        self.group = group
        self._context: dict[int, _Pair] = {}
        self._branches: dict[int, _Pair] = {}
        self._branch_M = torch.empty(0, dtype=torch.int64)

    def fill(self, layer: int, k_TGH: Tensor, v_TGH: Tensor) -> None:
        """Keeps this rank's rows of the context, with rotary embedding applied."""
        # values come as a view into queries, keys and values together, which need not live on
        self._context[layer] = (k_TGH.contiguous(), v_TGH.contiguous())

    def new_rows(self, branch_T: Tensor) -> None:
        """Announces the branch (int64 [T]) of every row of the next forward pass."""
        self._branch_M = torch.cat((self._branch_M.to(branch_T.device), branch_T))

    def forget_branches(self) -> None:
        """Leaves the context alone."""
        self._branches, self._branch_M = {}, self._branch_M[:0]

    def attend(self, layer: int, q_TNH: Tensor, k_TGH: Tensor, v_TGH: Tensor, *, scale: float) -> Tensor:
        """Attention of the announced rows, [T, N, H] in q's dtype, equal on all ranks of the group."""
        if layer in self._branches:
            old_k, old_v = self._branches[layer]
            k_TGH, v_TGH = torch.cat((old_k, k_TGH)), torch.cat((old_v, v_TGH))
        self._branches[layer] = (k_TGH.contiguous(), v_TGH.contiguous())
        keys, values = self._context[layer]
        step = max(1, _SCORES // (q_TNH.shape[1] * (keys.shape[0] + k_TGH.shape[0])))
        parts = []
        for start in range(0, q_TNH.shape[0], step):
            rows = slice(start, min(start + step, q_TNH.shape[0]))
            parts.append(self._merged(*self._attend(layer, q_TNH[rows], rows, q_TNH.shape[0], scale)))
        return torch.cat(parts).to(q_TNH.dtype)

    def _attend(
        self, layer: int, q_TNH: Tensor, rows: slice, new: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """This rank's output fp32 [T, N, H] and log-sum-exp fp32 [T, N] for `rows` of the `new` ones."""
        tokens, heads, size = q_TNH.shape
        pairs: list[tuple[_Pair, Tensor | None]] = [(self._context[layer], None)]
        if self.group.rank() == 0:
            pairs.append((self._branches[layer], self._hidden(rows, new)))
        groups = pairs[0][0][0].shape[1]
        q_GTrH = q_TNH.view(tokens, groups, -1, size).transpose(0, 1).reshape(groups, -1, size)
        scores = []
        for (keys, _), hidden_TM in pairs:
            found = _product(q_GTrH, keys.permute(1, 2, 0)) * scale
            if hidden_TM is not None:
                repeated = hidden_TM.repeat_interleave(heads // groups, dim=0)
                found.masked_fill_(repeated, float("-inf"))
            scores.append(found)
        lse = torch.logsumexp(torch.stack([torch.logsumexp(one, dim=-1) for one in scores]), dim=0)
        out = torch.zeros_like(q_GTrH, dtype=torch.float32)
        for found, ((_, values), _) in zip(scores, pairs, strict=True):
            weights = found.sub_(lse[..., None]).exp_().to(q_TNH.dtype)
            out += _product(weights, values.transpose(0, 1))
        return _rows_first(out, tokens), _rows_first(lse[..., None], tokens)

    def _hidden(self, rows: slice, new: int) -> Tensor:
        """Which branch rows the new `rows` do not see: other branches' and later ones, bool [T, M]."""
        branch = self._branch_M
        own = branch.numel() - new + torch.arange(rows.start, rows.stop, device=branch.device)
        later = torch.arange(branch.numel(), device=branch.device)[None, :] > own[:, None]
        return later | (branch[None, :] != branch[own][:, None])

    def _merged(self, out_TNH: Tensor, lse_TN1: Tensor) -> Tensor:
        """The ranks' outputs as one softmax over all keys. No gradient passes through, so no adjoint."""
        if self.group.size() == 1:
            return out_TNH
        both = torch.cat((out_TNH, lse_TN1), dim=-1).contiguous()
        gathered = [torch.empty_like(both) for _ in range(self.group.size())]
        dist.all_gather(gathered, both, group=self.group)
        stacked = torch.stack(gathered)
        weights = torch.softmax(stacked[..., -1:], dim=0)
        return (stacked[..., :-1] * weights).sum(dim=0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product in fp32, whatever the factors' dtype."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


def _rows_first(x_GTrX: Tensor, tokens: int) -> Tensor:
    """[G, T R, X] -> [T, N, X]."""
    return x_GTrX.unflatten(1, (tokens, -1)).transpose(0, 1).flatten(1, 2)
