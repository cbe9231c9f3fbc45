"""Gated linear attention with one op and one backend per module; imports nothing of hybridlm."""

from pallas_kernels.conv import short_conv
from pallas_kernels.dispatch import auto_means
from pallas_kernels.op import linear_attention, linear_attention_step

__all__ = ["auto_means", "linear_attention", "linear_attention_step", "short_conv"]
