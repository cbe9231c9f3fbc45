"""What is left of the delta rule's gradients for wide heads once the reverse scan is done."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.hopper.blocks import F32, NORM_K, NORM_Q
from pallas_kernels.linear_attention.hopper.inputs import Chunks, Inputs
from pallas_kernels.linear_attention.hopper.wide_chunks import (
    D_BETA,
    D_LOG,
    OUT_K,
    OUT_Q,
    SLICE,
    wide_chunk_gradients,
)

RUN = 4  # chunks that a block of threads of the chunk kernel takes in turn


def wide_gradients(inputs: Inputs, given: Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `backward_chunks.chunk_gradients`: dq, dk; dlog_decay and dbeta [B, HV, 2, T]."""
    dq, dk, numbers = wide_chunk_gradients(inputs, given, run=RUN)
    total = numbers.sum(2)  # over slices of K
    if inputs.l2norm and inputs.k.shape[3] > SLICE:
        group = dq.shape[2] // inputs.q.shape[2]
        gates = jnp.swapaxes(given.gates, 2, 3).reshape(*given.gates.shape[:2], 8, -1)

        def across(d: jax.Array, x: jax.Array, along: jax.Array, norm: jax.Array) -> jax.Array:
            """d without its part along x; along: x.d, norm: 1 / |x|, both [B, HV, T]."""
            part = jnp.swapaxes(along * norm * norm, 1, 2)[..., None]
            return (d.astype(F32) - jnp.repeat(x, group, axis=2).astype(F32) * part).astype(d.dtype)

        dq = across(dq, inputs.q, total[:, :, OUT_Q], gates[:, :, NORM_Q] / inputs.scale)
        dk = across(dk, inputs.k, total[:, :, OUT_K], gates[:, :, NORM_K])
    return dq, dk, jnp.stack([total[:, :, D_LOG], numbers[:, :, 0, D_BETA]], 2)
