"""Long-context training with AnchorAttention (arXiv 2411.13476) on unmodified Megatron-Core."""

import warnings

__version__ = "0.1.0"

# What Megatron-Core 0.16 says about itself, over and over, and a user of this package cannot change
for _message in (
    "(Transformer Engine and )?Apex (is|are) not installed",
    "full scope is deprecated. Use empty cuda_graph_scope",
    r"`torch\.distributed\.\w+` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
