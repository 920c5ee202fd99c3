"""Long-context training with AnchorAttention (arXiv 2411.13476) on unmodified Megatron-Core."""

__version__ = "0.1.0"
