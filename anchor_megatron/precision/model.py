"""The measurements inside a transformers model: the embedding taken out of it, ours and others' put in.

transformers turns queries and keys before it calls the attention function. `Probe` gives the model a rotary
module that turns by nothing (cosine 1, sine 0: exact in any precision) and an attention function that turns
them itself, by the implementation and for the positions of the run at hand, and keeps the weights of a few
query rows.

    probe = Probe(model, frequencies, scale_factor=1.0)
    before, after = (probe.run(tokens, rope, positions + d, rows) for d in (16, 100_000))
    [compare(a, b).total for a, b in zip(before, after)]      # D by layer

Legend: T tokens, N query heads, G key/value heads, R query rows, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anchor_megatron.precision.attention import Vectors, attention_weights, compare, spread_rows
from anchor_megatron.precision.experiments import Row, key_profile
from anchor_megatron.precision.rope import Rope

__all__ = ["Probe", "model_shift_test"]

_NAME = "anchor_precision"


class _NoTurn(nn.Module):
    """Cosine 1 and sine 0 for every position."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor, position_ids: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
        """[1, T, H] each, in x's type."""
        ones = x.new_ones(1, x.shape[1], self.head_dim)
        return ones, torch.zeros_like(ones)


@dataclass
class _Run:
    """What one forward pass uses, and what it leaves behind, by layer."""

    rope: Rope
    positions: Tensor
    rows: Tensor
    arithmetic: str
    weights: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


class Probe:
    """A transformers decoder under our embedding and attention. It changes `model` for good."""

    def __init__(self, model: Any, frequencies: Tensor, *, attention_factor: float = 1.0) -> None:
        """`frequencies` fp64 [H/2]; `attention_factor` is YaRN's, which multiplies queries and keys alike."""
        self.model, self.factor = model.eval(), attention_factor**2
        self.frequencies = frequencies.to(model.device)
        model.model.rotary_emb = _NoTurn(2 * frequencies.numel())
        model.config._attn_implementation = _NAME
        self._now: _Run | None = None

    def run(
        self, tokens_T: Tensor, rope: Rope, positions_T: Tensor, rows_R: Tensor, *, arithmetic: str = "fused"
    ) -> list[Tensor]:
        """Attention weights [N, R, T] of every layer."""
        return self._run(tokens_T, rope, positions_T, rows_R, arithmetic).weights

    def vectors(self, tokens_T: Tensor, rope: Rope, *, name: str) -> list[Vectors]:
        """Queries and keys of every layer, at positions from 0, rounded to BF16; named `name`/layer."""
        places = torch.arange(tokens_T.numel(), device=tokens_T.device)
        run = self._run(tokens_T, rope, places, places[-1:], "fused")
        scale = self.model.model.layers[0].self_attn.scaling * self.factor
        return [
            Vectors(f"{name}/{layer}", q.bfloat16(), k.bfloat16(), self.frequencies, scale)
            for layer, (q, k) in enumerate(zip(run.queries, run.keys, strict=True))
        ]

    @torch.no_grad()
    def _run(self, tokens: Tensor, rope: Rope, positions: Tensor, rows: Tensor, arithmetic: str) -> _Run:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[_NAME] = self._attend  # all probes write there
        self.model.to(rope.dtype)
        self._now = _Run(rope, positions, rows, arithmetic)
        self.model.model(input_ids=tokens[None], use_cache=False)
        done, self._now = self._now, None
        assert len(done.weights) == self.model.config.num_hidden_layers, (
            f"{type(self.model).__name__}: {len(done.weights)} layers called the attention function, "
            f"expected {self.model.config.num_hidden_layers}"
        )
        return done

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """transformers' signature: [1, heads, T, H] in, [1, T, N, H] out."""
        run = self._now
        assert run is not None, "the model is run through its probe"
        q_TNH, k_TGH, v_TGH = (x[0].transpose(0, 1) for x in (query, key, value))
        run.queries.append(q_TNH)
        run.keys.append(k_TGH)
        q_TNH, k_TGH = (run.rope(x, run.positions, self.frequencies) for x in (q_TNH, k_TGH))
        every = torch.arange(q_TNH.shape[0], device=q_TNH.device)
        weights_NTT = attention_weights(
            q_TNH, k_TGH, every, scale=options["scaling"] * self.factor, arithmetic=run.arithmetic
        )
        run.weights.append(weights_NTT[:, run.rows])
        v_NTH = v_TGH.transpose(0, 1).repeat_interleave(q_TNH.shape[1] // v_TGH.shape[1], dim=0)
        # weights are rounded to the values' type before the product, as kernels do
        out_NTH = weights_NTT.to(v_NTH.dtype) @ v_NTH
        return out_NTH.transpose(0, 1)[None], None


def model_shift_test(
    probe: Probe,
    tokens_T: Tensor,
    ropes: Sequence[Rope],
    *,
    name: str,
    reference: int,
    shifts: Sequence[int],
    rows: int = 64,
    arithmetic: str = "fused",
) -> list[Row]:
    """`experiments.shift_test` of a whole model: each layer works on what the ones before made of the
    shift.
    """
    places = torch.arange(tokens_T.numel(), device=tokens_T.device)
    chosen = spread_rows(places.numel(), rows, places.device)
    found = []
    for rope in ropes:
        base = probe.run(tokens_T, rope, places + reference, chosen, arithmetic=arithmetic)
        for shift in shifts:
            moved = probe.run(tokens_T, rope, places + shift, chosen, arithmetic=arithmetic)
            for layer, (one, other) in enumerate(zip(base, moved, strict=True)):
                difference = compare(one, other)
                found.append(
                    dict(
                        vectors=name,
                        layer=layer,
                        rope=rope.name,
                        arithmetic=arithmetic,
                        reference=reference,
                        shift=shift,
                        length=places.numel(),
                        difference=difference.total,
                        first_share=difference.first_share,
                        first_attention=float(one[:, :, 0].mean(dtype=torch.float64)),
                        profile=key_profile(difference.per_key),
                    )
                )
    return found
