"""Judging a model on long inputs: questions about needles, and loss by position."""
