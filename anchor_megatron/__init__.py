"""Long-context training with AnchorAttention (arXiv 2411.13476) on unmodified Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says so once a module as it is imported; the layer spec that is used says which one runs
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
