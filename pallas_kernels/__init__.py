"""Gated linear attention with one op and one backend per module; imports nothing of hybridlm."""

from pallas_kernels.op import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
