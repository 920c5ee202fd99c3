"""Imported where ranks are forked from (see `ranks.py`): readies the process for Megatron-Core and loads it.

Importing this changes the process: without a GPU it is one where Megatron-Core takes the CPU for its device.
"""

import gc

import torch

from anchor_megatron import cpu

if not torch.cuda.is_available():
    cpu.install()

import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

gc.collect()
gc.freeze()  # what lives by now is shared by all ranks and never garbage: no rank need look through it
