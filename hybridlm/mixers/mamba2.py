"""Mamba-2 (Dao, Gu 2024, arXiv 2405.21060): one decay per head, B and C shared by groups of heads.

S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t,   A = -exp(A_log)
dt = softplus(W_dt u + dt_bias),   x, B, C = silu(conv(W u) + bias),   out = W_o rmsnorm(y * silu(W_z u))
with one norm per group. In terms of `linear_mixer` q is C, k is B, v is dt x, g is z; groups are key heads.
Its models have no MLP: pattern "mamba2/none".
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, mixers
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, NonNegative, Positive
from hybridlm.layers import Linear, RMSNorm, merge_heads, ones, param, uniform
from hybridlm.linear_mixer import (
    NEAR_NONE,
    GroupedConfig,
    Heads,
    Inputs,
    LinearMixer,
    dt_bias_init,
    inverse_softplus,
    log_uniform,
)
from hybridlm.mixers import Cost, Site


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Mamba-2, with the names of its public configs.

    num_heads: 0 is expand * d_model / head_dim.  expand: inner width over d_model.
    head_dim: channels of x per head.
    state_size: state numbers per channel.
    n_groups: groups of heads that share B and C.
    conv_size: taps of the short convolutions of x, B and C; 0 for none.
    dt_min, dt_max: between which dt is held; dt_max 0: no upper limit. Prefill and decoding alike.
    norm_eps: of the output norm.
    """

    num_heads: Count = 0
    head_dim: Positive = 64
    expand: Positive = 2
    state_size: Positive = 128
    n_groups: Positive = 1
    conv_size: Count = 4
    dt_min: NonNegative = 0.0
    dt_max: NonNegative = 0.0
    norm_eps: Epsilon = 1e-5

    def heads(self, d_model: int) -> Heads:
        num_v = self.num_heads or self.expand * d_model // self.head_dim
        return Heads(self.n_groups, num_v, self.state_size, self.head_dim)

    def check(self, d_model: int) -> None:
        mixers.whole_heads(self, self.expand * d_model, self.head_dim)
        if (heads := self.heads(d_model)).num_v % self.n_groups:
            raise ConfigError("n_groups", self.n_groups, f"must divide the number of heads, {heads.num_v}")
        if self.dt_max and self.dt_max < self.dt_min:
            raise ConfigError("dt_max", self.dt_max, f"must be at least dt_min = {self.dt_min}, or 0")

    def cost(self, d_model: int, context: int) -> Cost:
        return linear_mixer.cost(self.heads(d_model), self.conv_size, delta=False)

    def explicit(self, d_model: int) -> "Config":
        return dataclasses.replace(self, num_heads=self.heads(d_model).num_v, expand=1)

    def near_attention(self) -> dict[str, float]:
        """dt, which also scales what is written, is 1."""
        return {"dt_proj.kernel": 0.0, "dt_bias": inverse_softplus(1.0), "A_log": math.log(NEAR_NONE)}


class Mixer(LinearMixer):
    config_class = Config
    scale = 1.0
    conv_bias = True
    joined = True  # B and C are narrow: a group has state_size channels

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        heads = config.heads(site.d_model)
        common = GroupedConfig(
            heads.num, heads.key, heads.value, config.conv_size, "swish", config.norm_eps, heads.num_v
        )
        super().__init__(common, site, rngs=rngs)
        self.dt_min, self.dt_max = config.dt_min, config.dt_max or jnp.inf
        width, bound = heads.value_width, (heads.value_width * site.num_layers) ** -0.5
        self.dt_proj = Linear(site.d_model, heads.num_v, rngs=rngs)
        self.dt_bias = param(rngs, (heads.num_v,), ("heads",), dt_bias_init, decay=False)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), log_uniform(1, 16), decay=False)
        self.D = param(rngs, (heads.num_v,), ("heads",), ones, decay=False)
        self.o_norm = RMSNorm(width, rngs=rngs, eps=config.norm_eps, axis="heads", groups=heads.num)
        init = uniform(-bound, bound)  # PyTorch's default over the root of the depth, as in the authors' code
        self.o_proj = Linear(width, site.d_model, rngs=rngs, axes=("heads", "embed"), init=init)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        dt = jax.nn.softplus(self.dt_proj(x_BTD).astype(jnp.float32) + self.dt_bias[...])
        dt = jnp.clip(dt, self.dt_min, self.dt_max)
        return ssd(q, k, v, dt, self.A_log[...], self.D[...])

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        assert gate_BTHV is not None
        return self.o_norm(merge_heads(o_BTHV.astype(jnp.float32) * gate_BTHV)).astype(o_BTHV.dtype)


def ssd(C: jax.Array, B: jax.Array, x: jax.Array, dt: jax.Array, A_log: jax.Array, D: jax.Array) -> Inputs:
    """What the recurrence is given, with scale 1.

    C, B: [B, T, G, N].  x: [B, T, H, P].  dt: float32 [B, T, H], after the softplus.  A_log, D: [H].
    """
    wide = x.astype(jnp.float32)
    written = (wide * dt[..., None]).astype(x.dtype)
    return Inputs(C, B, written, -jnp.exp(A_log) * dt, skip=wide * D[:, None])
