"""The model: Megatron-Core's GPTModel with explicit positions and attention over a plan."""
