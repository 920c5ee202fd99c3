"""Text on disk to packed windows: preprocessing, Megatron's indexed files, packing, who reads which window."""
