"""Layers that talk, as code outside the package would write them: kinds "tests.talking:<Class>"."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.layers import Linear
from hybridlm.mixers import Cost, Site, TokenMixer, attention
from hybridlm.mixers.gated_delta_net import Config as DeltaConfig
from hybridlm.mixers.gated_delta_net import Mixer as DeltaMixer
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class WriterConfig(attention.Config):
    @property
    def carries(self) -> bool:
        return True


class Writer(attention.Mixer):
    """Attention that leaves its keys and values, or the cache of them, to later layers (as in CLA)."""

    config_class = WriterConfig

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        k, v = self._keys_values(x_BTD, context.rows)
        y, after = super().__call__(x_BTD, context, cache)
        context.leave("kv", (k, v) if after is None else (*after.tokens, after.length))
        return y, after


@dataclasses.dataclass(frozen=True)
class ReaderConfig(mixers.Config):
    num_heads: int = 2
    head_dim: int = 8

    def cost(self, d_model: int, context: int) -> Cost:
        return Cost(flops=4 * self.num_heads * self.head_dim * context / 2)


class Reader(TokenMixer):
    """Attention to the keys and values of an earlier layer: it projects queries only and caches nothing."""

    config_class = ReaderConfig

    def __init__(self, config: ReaderConfig, site: Site, *, rngs: nnx.Rngs):
        self.config, width = config, config.num_heads * config.head_dim
        self.q_proj = Linear(site.d_model, width, rngs=rngs)
        self.o_proj = Linear(width, site.d_model, rngs=rngs, axes=("heads", "embed"))

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        q = self.q_proj(x_BTD).reshape(*x_BTD.shape[:2], self.config.num_heads, self.config.head_dim)
        k, v, *length = context.left("kv")
        rows = context.rows
        place_T = jnp.arange(q.shape[1]) + (length[0] - q.shape[1] if length else 0)
        first_BT = place_T - rows.positions
        place_S = jnp.arange(k.shape[1])
        seen = (place_S <= place_T[:, None]) & (place_S >= first_BT[..., None])
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * self.config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
        o = jnp.einsum("bhts,bshk->bthk", weights, v)
        return self.o_proj(o.reshape(*x_BTD.shape[:2], -1)), cache

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> tuple:
        return ()


@dataclasses.dataclass(frozen=True)
class ResidualConfig(DeltaConfig):
    @property
    def carries(self) -> bool:
        return True


class ValueResidual(DeltaMixer):
    """Values mixed half and half with those of the first such layer (RWKV-7's value residual)."""

    config_class = ResidualConfig

    def inputs(self, x_BTD: jax.Array, q: Any, k: Any, v: Any, context: Context) -> Any:
        first = context.left("first_values", v)
        context.leave("first_values", first)
        return super().inputs(x_BTD, q, k, (v + first) / 2, context)


__all__ = ["Reader", "Rows", "ValueResidual", "Writer"]
