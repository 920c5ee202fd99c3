"""Text on disk to packed windows: preprocessing, Megatron's indexed format, packing, who reads what."""
