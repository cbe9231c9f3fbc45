"""The oracle: the convolution one token at a time, in float32 or, for float64 inputs, float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.short_conv.call import ConvCall


def short_conv(call: ConvCall) -> jax.Array:
    """See `pallas_kernels.short_conv`; a `lax.scan` over the T axis with the last W inputs as its state."""
    dtype = jnp.float64 if call.x.dtype == jnp.float64 else jnp.float32
    batch, _, features = call.x.shape
    kernel = call.kernel.astype(dtype)
    width = kernel.shape[0]
    history = call.history
    if history is None:
        history = jnp.zeros((batch, width - 1, features), dtype)
    window = jnp.concatenate([history.astype(dtype), jnp.zeros((batch, 1, features), dtype)], axis=1)
    back = jnp.arange(width)[None, ::-1, None]  # how far behind the token each place of the window is

    def token(window: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, position = inputs
        window = jnp.concatenate([window[:, :-1], x.astype(dtype)[:, None]], axis=1)
        seen = jnp.where(back <= position[:, None, None], window, 0)
        y = jnp.sum(seen * kernel[None], axis=1)
        return jnp.roll(window, -1, axis=1), jax.nn.silu(y) if call.silu else y

    _, y = jax.lax.scan(token, window, (jnp.moveaxis(call.x, 1, 0), jnp.moveaxis(call.positions, 1, 0)))
    return jnp.moveaxis(y, 0, 1).astype(call.x.dtype)
