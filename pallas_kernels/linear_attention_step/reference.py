"""The recurrence of one token: what every other path of linear attention is held against."""

import jax

from pallas_kernels.linear_attention.reference import update
from pallas_kernels.linear_attention_step.call import StepCall


def linear_attention_step(call: StepCall) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.linear_attention_step`."""
    return update(*call.arrays, scale=call.scale, qk_l2norm=call.qk_l2norm)
