"""Causal softmax attention within documents: `op` checks a call, one module a backend computes it."""

from pallas_kernels.softmax_attention.call import KEPT, sink_places
from pallas_kernels.softmax_attention.op import softmax_attention
from pallas_kernels.softmax_attention.slots import over_slots
from pallas_kernels.softmax_attention.xla import blockwise, gathered, max_logits

__all__ = ["KEPT", "blockwise", "gathered", "max_logits", "over_slots", "sink_places", "softmax_attention"]
