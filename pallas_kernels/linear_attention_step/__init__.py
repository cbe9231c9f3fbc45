"""One token of linear attention, for decoding: `op` checks a call, one module a backend computes it."""

from pallas_kernels.linear_attention_step.op import linear_attention_step

__all__ = ["linear_attention_step"]
