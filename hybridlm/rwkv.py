"""What RWKV's kinds have in common: sizes, token shift, low-rank maps, the norm of heads, initial values.

No weight decay but on the four or five projections, as in the authors' code.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.fields import Count, Epsilon, Positive
from hybridlm.layers import Initializer, Linear, RecurrentCache, merge_heads, ones, param, zeros
from hybridlm.linear_mixer import Heads
from hybridlm.mixers import Site, whole_heads
from hybridlm.recurrent_mixer import RecurrentMixer
from hybridlm.rms import rms
from hybridlm.rows import Rows, continued


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """num_heads: 0 is d_model / head_dim.  head_dim: channels of a head, keys and values alike.
    norm_eps: of the output norm.
    """

    num_heads: Count = 0
    head_dim: Positive = 64
    norm_eps: Epsilon = 64e-5

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or d_model // self.head_dim
        return Heads(num, num, self.head_dim, self.head_dim)

    def check(self, d_model: int) -> None:
        whole_heads(self, d_model, self.head_dim)


class TimeMix(RecurrentMixer):
    """A matrix state a head, a token shift before it, a norm of heads and a projection after it.

    A kind defines `time_mixed`.
    """

    heads: Heads

    def make_output(self, config: Config, site: Site, rngs: nnx.Rngs) -> None:
        width = self.heads.value_width
        level = constant(lambda size: ((1 + jnp.asarray(site.layer)) / site.num_layers) ** 0.7)
        self.o_norm = HeadNorm(width, rngs=rngs, eps=config.norm_eps, init=level)
        self.o_proj = Linear(width, site.d_model, rngs=rngs, axes=("heads", "embed"), init=zeros)

    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        earlier, history = shifted(x_BTD, context.rows, before.history)
        y_BTD, state = self.time_mixed(x_BTD, earlier, context, None if fresh else before.state)
        return y_BTD, RecurrentCache(state, history)

    @abc.abstractmethod
    def time_mixed(
        self, x_BTD: jax.Array, earlier: jax.Array, context: Context, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(y [B, T, D], the state after the last token or None); earlier: the token before each one."""
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        num, _, key, value = self.heads
        state = jnp.zeros((batch, num, key, value), jnp.float32)
        return RecurrentCache(state, (jnp.zeros((batch, 1, self.o_proj.kernel.shape[-1]), dtype),))


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
        o = rms(o - o.mean(-1, keepdims=True), self.eps)
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
