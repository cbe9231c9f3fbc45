"""Ops for linear-attention language models: a folder an op, a module a backend; imports nothing of hybridlm."""

from pallas_kernels.dispatch import auto_means
from pallas_kernels.elementwise import elementwise_recurrence
from pallas_kernels.linear_attention import linear_attention, linear_attention_step
from pallas_kernels.short_conv import short_conv

__all__ = ["auto_means", "elementwise_recurrence", "linear_attention", "linear_attention_step", "short_conv"]
