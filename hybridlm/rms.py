"""Division by the root of the mean square, and its gradient in two passes over memory."""

import functools

import jax
import jax.numpy as jnp


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scaled_rms(x: jax.Array, scale: jax.Array, gate: jax.Array | None, eps: float) -> jax.Array:
    """rms(x) * scale * gate, computed in float32, in x's dtype. scale: of x's last axes.

    The gradient reads what it is given twice, for the sums over a row, then for what needs them. XLA's own
    reads it up to four times, and twice for what is added up over tokens.
    """
    own = x.shape
    if (jax.sharding.get_abstract_mesh().size or 1) == 1:  # else axes may be cut over devices
        # One axis of rows: XLA tries every tiling of a norm with each of its neighbours, four times as many
        # where 8 rows are an axis of their own, for the same kernel.
        flat = (-1, *scale.shape)
        x, gate = x.reshape(flat), None if gate is None else gate.reshape(flat)
    y = rms(x, eps) * scale
    return (y if gate is None else y * gate).astype(x.dtype).reshape(own)


def _scaled_rms_backward(eps: float, kept: tuple, y_bar: jax.Array) -> tuple[jax.Array | None, ...]:
    x_own, scale, gate = kept
    x, y_bar = x_own.astype(jnp.float32), y_bar.astype(jnp.float32)
    slope = y_bar * scale if gate is None else y_bar * scale * gate  # of rms(x)
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    along = jnp.mean(slope * x, axis=-1, keepdims=True)
    x_bar = r * slope - (r**3 * along) * x
    normed = x * r
    gate_bar = None if gate is None else y_bar * scale * normed
    scale_bar = y_bar * normed if gate is None else y_bar * gate * normed
    tokens = tuple(range(x.ndim - scale.ndim))
    # Not summed over heads in the same go: then its shape would not be that of the sums beside it.
    scale_bar = jax.lax.optimization_barrier(jnp.sum(scale_bar, tokens))
    return x_bar.astype(x_own.dtype), scale_bar, gate_bar


scaled_rms.defvjp(
    lambda x, scale, gate, eps: (scaled_rms(x, scale, gate, eps), (x, scale, gate)), _scaled_rms_backward
)
