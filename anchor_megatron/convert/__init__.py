"""Hugging Face checkpoints in and out, tensor by tensor, one mapping table per family."""
