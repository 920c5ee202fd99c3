"""Two forms of one checkpoint, compared by what they compute: transformers' model and ours, in fp32, on
random tokens.

Small models are built whole. A model of more than `WHOLE_BYTES` is compared a layer at a time: embedding,
that one layer, final norm and output, in both forms, so memory is that of a one-layer model however deep the
checkpoint is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from anchor_megatron.config import Config, ModelConfig, TrainConfig
from anchor_megatron.convert.exporting import checkpoint_folder, read_checkpoint_model
from anchor_megatron.convert.hf_config import read_hf_config, write_hf_config
from anchor_megatron.convert.rows import Rows
from anchor_megatron.convert.safetensors_writer import SafetensorsWriter, TensorInfo
from anchor_megatron.convert.sources import Source, open_source
from anchor_megatron.data.window import Window
from anchor_megatron.model.builder import build_model, rank_device
from anchor_megatron.model.core_attention import PlannedSeqParams
from anchor_megatron.model.gpt import AnchorGPT
from anchor_megatron.training.batch import plan_batch
from anchor_megatron.training.setup import initialize_ranks

__all__ = ["BOUND", "Verified", "verify"]

BOUND = 1e-4  # of the largest logit
WHOLE_BYTES = 2 * 10**9  # of weights in fp32
_TOKENS = 128
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Verified:
    """The largest difference of logits, and the largest logit it is measured by."""

    difference: float
    largest: float
    tokens: int
    by_layer: bool

    @property
    def ok(self) -> bool:
        """Whether the difference (not a NaN) is within BOUND."""
        return self.difference <= BOUND * self.largest


def verify(hf: Path, megatron: Path, *, overridden: bool = False, allow_pickle: bool = False) -> Verified:
    """Compares the Hugging Face folder `hf` with the Megatron-Core checkpoint `megatron`.

    overridden: `megatron` was imported from `hf`, perhaps for another context: its own rotary settings hold
    for both. Needs a process that has no process group yet, or a group of one rank.
    """
    step = checkpoint_folder(megatron)
    model, longest = read_checkpoint_model(step)
    description = read_hf_config(hf / "config.json")
    if overridden:
        description = write_hf_config(model, description, torch_dtype="", longest=longest, token_ids={})
    source = open_source(hf, allow_pickle=allow_pickle)
    try:
        values = sum(math.prod(rows.shape) for rows in source.tensors.values())
        layers = model.num_layers if 4 * values <= WHOLE_BYTES else 1
        tokens = np.random.default_rng(0).integers(0, model.vocab_size or 0, min(_TOKENS, longest))
        difference = largest = 0.0
        for first in range(0, model.num_layers, layers):
            theirs = _their_logits(source, description, tokens, first, layers)
            ours = _our_logits(step, model, tokens, first, layers)
            # NaN on either side must not pass: max() would forget it
            difference = float(np.maximum(difference, (ours - theirs).abs().max().item()))
            largest = max(largest, theirs.abs().max().item())
        return Verified(difference, largest, len(tokens), layers < model.num_layers)
    finally:
        source.close()


def _their_logits(
    source: Source, description: dict[str, Any], tokens: np.ndarray, first: int, layers: int
) -> Tensor:
    """transformers' logits [T, vocabulary] with layers [first, first + layers) alone."""
    from transformers import AutoModelForCausalLM  # slow to import; a conversion does without
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        folder = Path(name)
        _write_slice(folder, source, description, first, layers)
        peer = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    with torch.no_grad():
        return peer(torch.from_numpy(tokens)[None]).logits[0]


def _write_slice(folder: Path, source: Source, description: dict[str, Any], first: int, layers: int) -> None:
    """A Hugging Face checkpoint of a few of the layers."""
    sliced = description | {"num_hidden_layers": layers}
    if sliced.get("layer_types"):
        sliced["layer_types"] = sliced["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(sliced))
    kept: dict[str, Rows] = {}
    for name, rows in source.tensors.items():
        found = _LAYER.match(name)
        layer = int(found[1]) if found else None
        if layer is not None and not first <= layer < first + layers:
            continue
        kept[name if layer is None else _LAYER.sub(f"model.layers.{layer - first}.", name)] = rows
    writer = SafetensorsWriter(
        folder, {name: TensorInfo(rows.shape, rows.dtype) for name, rows in kept.items()}
    )
    try:
        for name, rows in kept.items():
            writer.write(name, 0, rows, 0, rows.shape[0])
        writer.finish()
    finally:
        writer.close()


def _our_logits(step: Path, model: ModelConfig, tokens: np.ndarray, first: int, layers: int) -> Tensor:
    """Our model's logits [T, vocabulary] with layers [first, first + layers) alone."""
    config = Config(model=dataclasses.replace(model, num_layers=layers), train=TrainConfig(precision="fp32"))
    config.data.seq_length, config.data.mode = len(tokens), "full"
    if not parallel_state.model_parallel_is_initialized():
        initialize_ranks(config)
    gpt = build_model(config)
    _load_layers(gpt, step, first, model.num_layers)
    batch = plan_batch(
        [_window(tokens)], mode="full", placement="document", context_parallel_size=1, context_parallel_rank=0
    ).to(rank_device())
    with torch.no_grad():
        logits = gpt(batch.tokens, batch.positions, None, packed_seq_params=PlannedSeqParams(plan=batch.plan))
    return logits[0, :, : model.vocab_size].cpu()


def _load_layers(gpt: AnchorGPT, step: Path, first: int, num_layers: int) -> None:
    """Fills `gpt` from a checkpoint of `num_layers` layers, the checkpoint's `first` being its layer 0."""
    state = gpt.sharded_state_dict()
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    for part in parts:
        leading = part.prepend_axis_num
        if leading:  # as axes of its own: Megatron-Core takes stacked layers for a whole model's
            part.global_shape = (num_layers, *part.global_shape[1:])
            part.global_offset = (first + part.global_offset[0], *part.global_offset[1:])
            part.axis_fragmentations = (num_layers, *part.axis_fragmentations[1:])
            part.local_shape, part.prepend_axis_num = (1,) * leading + part.local_shape, 0
            part.data = part.data.view(part.local_shape)
    # the parts are views of the model's parameters, and loading is into them
    wanted = {str(number): part for number, part in enumerate(parts)}
    dist_checkpointing.load(wanted, str(step), validate_access_integrity=False)


def _window(tokens: np.ndarray) -> Window:
    """One document."""
    none, one = np.zeros(len(tokens), dtype=bool), np.zeros(1, dtype=np.int64)
    return Window(tokens, np.zeros_like(tokens), none, np.array([0, len(tokens)]), one, one)
