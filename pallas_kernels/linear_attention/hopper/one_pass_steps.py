"""Log-decays as one_pass*.py reads them: bf16 ones as they are, others and documents in float16, in base 2.

Where a document starts the step is that of the token and 2^-152, which is 0 in float32 beside any number in
it: the kernels then separate documents as they separate tokens between which a gate forgets everything.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper import channel_math
from pallas_kernels.linear_attention.hopper.blocks import F32, LOG2E
from pallas_kernels.linear_attention.hopper.inputs import Inputs

F16 = jnp.float16
RESET = -152.0  # half of the least number above 0 in float32 is 2^-150
# Versions of jax on which a GPU has run the tests of the kernels that read float16. None has yet, so calls
# with documents or float32 log-decays are other kernels', but for interpreted ones.
TESTED: tuple[str, ...] = ()


def as_read(inputs: Inputs) -> Inputs:
    """inputs, whose log-decays may now be float16: in base 2, not below -128 plus `RESET` where one starts."""
    if not wanted(inputs):
        return inputs
    log_decay: Any = inputs.log_decay
    steps = channel_math.steps(log_decay.astype(F32))
    if inputs.segment is not None:
        starts = _starts(inputs.segment)[..., None, None]
        steps = jnp.where(starts, steps + jnp.asarray(RESET, F16), steps)
    return dataclasses.replace(inputs, log_decay=steps)


def wanted(inputs: Inputs) -> bool:
    """Whether the kernels are to read the log-decays in float16."""
    assert inputs.log_decay is not None
    return inputs.log_decay.dtype != jnp.bfloat16 or inputs.segment is not None


def natural(inputs: Inputs) -> Inputs:
    """What `as_read` was given, for other kernels: their steps are the same but where documents start."""
    log_decay: Any = inputs.log_decay
    if log_decay.dtype != F16:
        return inputs
    steps = log_decay.astype(F32)
    steps = jnp.where(steps < channel_math.LEAST, steps - RESET, steps)
    return dataclasses.replace(inputs, log_decay=steps * (1.0 / LOG2E))


def resets(segment: jax.Array, size: int) -> jax.Array:
    """Documents that start in a token's block of `size`, up to it, [B, T] float32."""
    starts = _starts(segment).astype(F32).reshape(len(segment), -1, size)
    return jnp.cumsum(starts, -1).reshape(segment.shape)


def _starts(segment: jax.Array) -> jax.Array:
    return jnp.diff(segment, axis=1, prepend=segment[:, :1]) != 0
