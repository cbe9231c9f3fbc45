"""Linear attention with decay, additive or delta rule: `op` checks a call, a backend computes it."""

from pallas_kernels.linear_attention.op import linear_attention

__all__ = ["linear_attention"]
