"""Gated Linear Attention (Yang et al. 2023, arXiv 2312.06635).

S_t = Diag(a_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(K)       one decay per key channel
log a_t = logsigmoid(W_f2 W_f1 x_t + b) / 16
y = W_o (rmsnorm(o) * swish(W_g x)),   q, k, v linear
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Above, Count, Positive
from hybridlm.layers import Linear, split_heads
from hybridlm.linear_mixer import Heads, Inputs, LinearMixer, OutputGate
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """Gated Linear Attention.

    head_dim: 0 is d_model / 2 / num_heads.  v_head_dim: 0 is d_model / num_heads.
    conv_size: the paper has no convolutions.
    gate_rank: middle width of the decay gate.
    gate_normalizer: divides the log decay; larger forgets more slowly.
    """

    num_heads: Positive = 4
    head_dim: Count = 0
    conv_size: Count = 0
    gate_rank: Positive = 16
    gate_normalizer: Above = 16.0
    output_gate: OutputGate = "swish"

    def heads(self, d_model: int) -> Heads:
        key = self.head_dim or d_model // 2 // self.num_heads
        value = self.v_head_dim or d_model // self.num_heads
        return Heads(self.num_heads, self.num_heads, key, value)

    def check(self, d_model: int) -> None:
        if d_model % (2 * self.num_heads) and not (self.head_dim and self.v_head_dim):
            raise ConfigError(
                "num_heads",
                self.num_heads,
                f"twice it must divide d_model = {d_model} where head_dim or v_head_dim is 0",
            )
        super().check(d_model)


class Mixer(LinearMixer):
    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.silu = config.conv_size > 0
        self.gate_normalizer = config.gate_normalizer
        self.f_a_proj = Linear(site.d_model, config.gate_rank, rngs=rngs, axes=("embed", None))
        self.f_b_proj = Linear(
            config.gate_rank, self.heads.key_width, rngs=rngs, axes=(None, "heads"), bias=True
        )

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        f_BTHK = split_heads(self.f_b_proj(self.f_a_proj(x_BTD)), self.heads.key)
        return Inputs(q, k, v, jax.nn.log_sigmoid(f_BTHK.astype(jnp.float32)) / self.gate_normalizer)
