"""The causal depthwise short convolution in front of a recurrence."""

from pallas_kernels.short_conv.op import short_conv

__all__ = ["short_conv"]
