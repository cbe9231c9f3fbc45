"""Division by the root of the mean square, and its gradient in two passes over memory."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

STREAM = (
    "stream"  # name of what is kept of the residual stream: between a block's halves, and its norms' factors
)


def rms(x: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * _factor(x, eps)


def _factor(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scaled_rms(x: jax.Array, scale: jax.Array, gate: jax.Array | None, eps: float) -> jax.Array:
    """rms(x) * scale * gate, computed in float32, in x's dtype. scale: of x's last axes.

    The gradient reads what it is given twice, for the sums over a row, then for what needs them. XLA's own
    reads it up to four times, and twice for what is added up over tokens.
    """
    y = rms(x, eps) * scale
    return (y if gate is None else y * gate).astype(x.dtype)


def _scaled_rms_backward(eps: float, kept: tuple, y_bar: jax.Array) -> tuple[jax.Array | None, ...]:
    x, scale, gate = kept
    r = _factor(x.astype(jnp.float32), eps)
    return _gradients(x, scale, gate, y_bar, r)


def _gradients(
    x_own: jax.Array,
    scale: jax.Array,
    gate: jax.Array | None,
    y_bar: jax.Array,
    r: jax.Array,
    along: jax.Array | None = None,
) -> tuple[jax.Array | None, ...]:
    """Those of x, scale and gate. r: what rms multiplies x by. along: the sums over a row of y's gradient
    times y, where they are known."""
    x, y_bar = x_own.astype(jnp.float32), y_bar.astype(jnp.float32)
    slope = y_bar * scale if gate is None else y_bar * scale * gate  # of rms(x)
    normed = x * r
    if along is None:  # in the same pass as r
        along = r * jnp.sum(slope * x, axis=-1, keepdims=True)
    x_bar = r * slope - (r * r * (along / x.shape[-1])) * x
    gate_bar = None if gate is None else y_bar * scale * normed
    scale_bar = y_bar * normed if gate is None else y_bar * gate * normed
    tokens = tuple(range(x.ndim - scale.ndim))
    # Not summed over heads in the same go: then its shape would not be that of the sums beside it.
    scale_bar = jax.lax.optimization_barrier(jnp.sum(scale_bar, tokens))
    return x_bar.astype(x_own.dtype), scale_bar, gate_bar


scaled_rms.defvjp(
    lambda x, scale, gate, eps: (scaled_rms(x, scale, gate, eps), (x, scale, gate)), _scaled_rms_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def told_rms(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(`scaled_rms` without a gate, zeros [..., 1] float32), whose gradient takes one pass over memory.

    Sums over a row are not of what it is given: everything that reads y must add to the gradient of the
    zeros the sum over the last axis of y's gradient times y that comes of it. Where y is multiplied by
    matrices that is the sum of the products times their gradients, as `told_product` has it.
    """
    return _told_rms_forward(x, scale, eps)[0]


def _told_rms_forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[tuple, tuple]:
    wide = x.astype(jnp.float32)
    r = checkpoint_name(_factor(wide, eps), STREAM)
    y = (wide * r * scale).astype(x.dtype)
    return (y, jnp.zeros_like(r)), (x, scale, r)


def _told_rms_backward(eps: float, kept: tuple, bars: tuple) -> tuple[jax.Array | None, ...]:
    x, scale, r = kept
    y_bar, along = bars
    return _gradients(x, scale, None, y_bar, r, along)[:2]


told_rms.defvjp(_told_rms_forward, _told_rms_backward)


@jax.custom_vjp
def told_product(gate: jax.Array, up: jax.Array, told: jax.Array) -> jax.Array:
    """silu(gate) * up, for gate and up that are products of what `told_rms` returned with these zeros."""
    return jax.nn.silu(gate) * up


def _told_product_backward(kept: tuple, y_bar: jax.Array) -> tuple[jax.Array, ...]:
    gate, up, y_bar = (x.astype(jnp.float32) for x in (*kept, y_bar))
    share = jax.nn.sigmoid(gate)
    gate_bar = y_bar * up * share * (1 + gate * (1 - share))
    up_bar = y_bar * gate * share
    along = jnp.sum(gate_bar * gate + up_bar * up, axis=-1, keepdims=True)
    return gate_bar.astype(kept[0].dtype), up_bar.astype(kept[1].dtype), along


told_product.defvjp(lambda *args: (told_product(*args), args[:2]), _told_product_backward)
