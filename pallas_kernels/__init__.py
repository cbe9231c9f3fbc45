"""Ops for linear-attention language models: a folder an op, a backend a module in it; nothing of hybridlm."""

from pallas_kernels.dispatch import H100, Choice, Device, auto_means, compiled_for, explain
from pallas_kernels.dplr import dplr
from pallas_kernels.elementwise import elementwise_recurrence
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention_step import linear_attention_step
from pallas_kernels.short_conv import short_conv
from pallas_kernels.softmax_attention import softmax_attention

__all__ = [
    "H100",
    "Choice",
    "Device",
    "auto_means",
    "compiled_for",
    "dplr",
    "elementwise_recurrence",
    "explain",
    "linear_attention",
    "linear_attention_step",
    "short_conv",
    "softmax_attention",
]
