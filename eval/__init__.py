"""Recall, memory and state: evaluation of any checkpoint, `python -m eval`, and in the training loop."""
