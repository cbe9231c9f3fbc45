"""The causal depthwise short convolution in front of a recurrence."""

from pallas_kernels.short_conv.op import WHOLE, short_conv

__all__ = ["WHOLE", "short_conv"]
