"""Hugging Face checkpoints in and out: `python -m hybridlm.convert import | export | logits`."""
