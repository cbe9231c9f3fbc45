"""What one_pass*.py reads of log-decays that are not bf16, and of documents: made by XLA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper import channel_math
from pallas_kernels.linear_attention.hopper.blocks import F32, LOG2E
from pallas_kernels.linear_attention.hopper.inputs import Inputs

BF16, F16 = jnp.bfloat16, jnp.float16


def as_read(inputs: Inputs) -> Inputs:
    """inputs with log-decays in bf16 as they were, or others in base 2 and float16: as many bits as the
    other kernels take of them."""
    log_decay: Any = inputs.log_decay
    if log_decay.dtype == BF16:
        return inputs
    return dataclasses.replace(inputs, log_decay=channel_math.steps(log_decay))


def made(inputs: Inputs) -> jax.Array | None:
    """Of inputs of `as_read`, the log-decays that it made."""
    return inputs.log_decay if half(inputs) else None


def half(inputs: Inputs) -> bool:
    """Whether log-decays are those that `as_read` made."""
    return inputs.log_decay is not None and inputs.log_decay.dtype == F16


def in_bf16(inputs: Inputs) -> Any:
    """The log-decays; float16 ones as the bits of bf16, in whose buffers they lie."""
    log_decay: Any = inputs.log_decay
    return lax.bitcast_convert_type(log_decay, BF16) if half(inputs) else log_decay


def natural(inputs: Inputs) -> Inputs:
    """What `as_read` was given, for the other kernels, whose steps are the same then."""
    log_decay: Any = inputs.log_decay
    if log_decay.dtype == BF16:
        return inputs
    return dataclasses.replace(inputs, log_decay=log_decay.astype(F32) * (1.0 / LOG2E))


def starts(inputs: Inputs, size: int) -> jax.Array | None:
    """How many documents start in a token's block of `size`, up to it, [B, T] float32."""
    ids = inputs.segment
    if ids is None:
        return None
    changes = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    return jnp.cumsum(changes.astype(F32).reshape(len(ids), -1, size), -1).reshape(ids.shape)
