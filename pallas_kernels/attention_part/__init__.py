"""Softmax attention over some of the keys, to be merged: `op` says which, one module a backend does it."""

from pallas_kernels.attention_part.call import UNSEEN, Merged
from pallas_kernels.attention_part.op import attention_part, attention_part_gradients, merge

__all__ = ["UNSEEN", "Merged", "attention_part", "attention_part_gradients", "merge"]
