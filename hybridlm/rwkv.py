"""What RWKV's kinds have in common: token shift, low-rank maps, the norm of heads, initial values.

No weight decay but on the four or five projections, as in the authors' code.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.layers import Initializer, merge_heads, ones, param, zeros
from hybridlm.rows import Rows, continued


def shifted(
    x_BTD: jax.Array, rows: Rows, history: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(the token before each one, 0 before a document's first; the last one [B, 1, D], the next history)."""
    (last,) = history
    before = jnp.concatenate([continued(last, rows).astype(x_BTD.dtype), x_BTD[:, :-1]], axis=1)
    before = jnp.where((rows.positions == 0)[..., None], 0, before)
    return before, (x_BTD[:, -1:].astype(last.dtype),)


def mix(x_BTD: jax.Array, before_BTD: jax.Array, mu: jax.Array) -> jax.Array:
    """x + (before - x) mu, in x's dtype; mu float32 [D] or [B, T, D]."""
    x = x_BTD.astype(jnp.float32)
    return (x + (before_BTD.astype(jnp.float32) - x) * mu).astype(x_BTD.dtype)


class LowRank(nnx.Module):
    """act(x A) B (+ bias), float32 [..., F]; A starts at 0."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        rngs: nnx.Rngs,
        init: Initializer,
        bias: Initializer | None = None,
        act: Callable[[jax.Array], jax.Array] = lambda x: x,
    ):
        self.act = act
        self.A = param(rngs, (in_features, rank), ("embed", None), zeros, decay=False, cast=True)
        self.B = param(rngs, (rank, out_features), (None, "heads"), init, decay=False, cast=True)
        self.bias = None if bias is None else param(rngs, (out_features,), ("heads",), bias, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.act(x @ self.A[...].astype(x.dtype)) @ self.B[...].astype(x.dtype)
        y = y.astype(jnp.float32)
        return y if self.bias is None else y + self.bias[...]


class HeadNorm(nnx.Module):
    """LayerNorm of each head, scale and bias for every channel: [B, T, H, V] to float32 [B, T, H * V]."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, eps: float, init: Initializer = ones):
        self.eps = eps
        self.scale = param(rngs, (width,), ("heads",), init, decay=False)
        self.bias = param(rngs, (width,), ("heads",), zeros, decay=False)

    def __call__(self, o_BTHV: jax.Array) -> jax.Array:
        o = o_BTHV.astype(jnp.float32)
        o -= o.mean(-1, keepdims=True)
        o *= jax.lax.rsqrt(jnp.mean(o * o, axis=-1, keepdims=True) + self.eps)
        return merge_heads(o) * self.scale[...] + self.bias[...]


def constant(value: Callable[[int], Any]) -> Initializer:
    """An initialiser of ``value`` of the last axis' size, broadcast to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value(shape[-1]), dtype), shape)


def place(size: int) -> jax.Array:
    """i / (size - 1) of each channel."""
    return jnp.arange(size) / max(size - 1, 1)


def ratios(layer: Any, num_layers: int) -> tuple[jax.Array, jax.Array]:
    """(l / (L - 1), 1 - l / L) of layer l, which may be traced."""
    layer = jnp.asarray(layer, jnp.float32)
    return layer / max(num_layers - 1, 1), 1 - layer / num_layers
