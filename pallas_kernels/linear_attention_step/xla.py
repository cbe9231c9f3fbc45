"""XLA computes one token as the recurrence is written."""

from pallas_kernels.linear_attention_step.reference import linear_attention_step

__all__ = ["linear_attention_step"]
