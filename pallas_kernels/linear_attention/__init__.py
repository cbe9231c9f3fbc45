"""Linear attention with decay, additive or delta rule: `op` checks a call, one module a backend computes it."""

from pallas_kernels.linear_attention.op import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
