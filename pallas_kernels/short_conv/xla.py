"""The short convolution in plain JAX: one shifted copy of the input a tap, which XLA fuses."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.short_conv.call import ConvCall


def short_conv(call: ConvCall) -> jax.Array:
    """See `pallas_kernels.short_conv`."""
    if call.history is None:
        # Without the checkpoint, the backward pass would keep a float32 copy of the input for every tap.
        y = jax.checkpoint(_taps)(call.x, call.kernel, call.positions)
    else:
        y = _taps(jnp.concatenate([call.history, call.x], axis=1), call.kernel, call.positions)
    return jax.nn.silu(y) if call.silu else y


def _taps(x_BSF: jax.Array, kernel_WF: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """x_BSF: the inputs of positions_BT, after S - T earlier ones."""
    earlier = x_BSF.shape[1] - positions_BT.shape[1]
    y: Any = 0.0
    for back in range(len(kernel_WF)):
        # A shift by padding needs no copy of the input.
        x_BTF = jax.lax.pad(
            x_BSF, jnp.zeros((), x_BSF.dtype), [(0, 0, 0), (back - earlier, -back, 0), (0, 0, 0)]
        )
        tap_11F = kernel_WF[-1 - back][None, None]
        y = y + jnp.where((positions_BT >= back)[..., None], x_BTF.astype(jnp.float32), 0) * tap_11F
    return y.astype(x_BSF.dtype)
