"""Matrix products of 8-bit floating-point numbers with one scale a tensor.

    q(x) = round(s x) to 8 bits,  s the largest power of two with s max|x| <= the format's largest
    y = q(x) q(w) / (s_x s_w)         dx = q(dy) q(w)^T / (s_dy s_w)         dw = q(x)^T q(dy) / (s_x s_dy)

x and w in e4m3 (4 bits of exponent, 3 of mantissa, up to 448), dy in e5m2 (up to 57,344): the recipe of
Micikevicius et al. 2022 (arXiv 2209.05433), with scales of the tensor at hand, so that there is no state.
As scales are powers of two, only q rounds: s x and q / s are exact. The scales have no gradient.

XLA on a GPU finds the operands' conversion and scale and calls cuBLASLt's 8-bit product, which wants both
operands with the summed axis last; it rounds and transposes in one kernel with what made the operand, if
Triton does not take the product first (`compiler.NO_PRODUCTS`). Elsewhere the same numbers come of products
in x's dtype.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hybridlm.sharding import Axes, constrain

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
MULTIPLE = 16  # of each dimension, for cuBLASLt
SCALE = "fp8_scale"  # name of the scales, which every policy of model.remat keeps
MANTISSA = (1 << 23) - 1  # of a float32


class Scaled(NamedTuple):
    """value / scale, with scale a float32 power of two."""

    value: jax.Array
    scale: jax.Array


def quantize(x: jax.Array, dtype: Any) -> Scaled:
    """``x`` rounded to an 8-bit ``dtype``. Where x is not finite, a product with it is not, either."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    ratio = float(jnp.finfo(dtype).max) / largest
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(ratio, jnp.int32) & ~MANTISSA, jnp.float32)
    scale = jnp.where(largest > 0, jnp.minimum(power, 2.0**60), 1.0)  # of an infinity 0, hence nan
    scale = checkpoint_name(lax.stop_gradient(scale), SCALE)
    return Scaled((x.astype(jnp.float32) * scale).astype(dtype), scale)


def _dot(a: Scaled, b: Scaled, sum_a: tuple[int, ...], sum_b: tuple[int, ...], dtype: Any) -> jax.Array:
    """The product over these axes, in ``dtype``; written so that XLA finds the scales."""
    real = lambda x: x.value.astype(dtype) * (1 / x.scale).astype(dtype)
    return lax.dot_general(real(a), real(b), ((sum_a, sum_b), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_matmul(x: jax.Array, w_FG: jax.Array, axes: Axes) -> jax.Array:
    """x [..., F] @ w [F, G] in x's dtype, which is w's.

    axes: w's logical ones. Where parameters are cut over "embed" its 8 bits are gathered.
    """
    return _forward(x, w_FG, axes)[0]


def _forward(x: jax.Array, w_FG: jax.Array, axes: Axes) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    a, b = quantize(x, FORWARD), quantize(w_FG, FORWARD)
    whole = tuple(None if name == "embed" else name for name in axes)
    b = b._replace(value=constrain(constrain(b.value, axes), whole))  # from one to the other
    return _dot(a, b, (x.ndim - 1,), (0,), x.dtype), (a, b)


def _backward(axes: Axes, kept: tuple[Scaled, Scaled], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = kept
    g, rows = quantize(dy, BACKWARD), tuple(range(dy.ndim - 1))
    return _dot(g, b, (dy.ndim - 1,), (1,), dy.dtype), _dot(a, g, rows, rows, dy.dtype)


scaled_matmul.defvjp(_forward, _backward)
