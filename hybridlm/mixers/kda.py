"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692).

S_t = (I - beta_t k_t k_t^T) Diag(a_t) S_{t-1} + beta_t k_t v_t^T      one decay per key channel
log a_t = -exp(A_log) softplus(f_t + dt_bias)                          or, with a lower bound b < 0,
log a_t = b sigmoid(exp(A_log) (f_t + dt_bias)),       f_t = W_f2 W_f1 x_t,   beta_t = sigmoid(W_b x_t)
y = W_o (rmsnorm(o) * sigmoid(W_g2 W_g1 x)),   q, k, v = silu(conv(W x)),  q and k of unit length
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.fields import INT32, Epsilon, Limits
from hybridlm.layers import Linear, param, split_heads, zeros
from hybridlm.linear_mixer import (
    Inputs,
    LinearMixer,
    OutputGate,
    dt_bias_init,
    log_uniform,
    softplus_decay,
    write_strength,
)
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.GroupedConfig):
    """Kimi Delta Attention. v_head_dim is also the middle width of the low-rank gates.

    lower_bound: 0 for the softplus decay gate; below 0 (FLA's safe gate has -5) the log decay stays above it.
    output_gate_rank: middle width of the output gate; 0 is v_head_dim, -1 one full-rank matrix (Kimi K3).
    output_gate_bias: bias of the output gate's second matrix (FLA has it, Kimi's released weights do not).
    """

    lower_bound: Annotated[float, Limits(-1e9, 0)] = 0.0
    output_gate: OutputGate = "sigmoid"
    output_gate_rank: Annotated[int, Limits(-1, INT32)] = 0
    output_gate_bias: bool = True
    norm_eps: Epsilon = 1e-5

    def explicit(self, d_model: int) -> "Config":
        explicit = super().explicit(d_model)
        assert isinstance(explicit, Config)
        same = self.output_gate_rank == explicit.v_head_dim
        return dataclasses.replace(explicit, output_gate_rank=0) if same else explicit


class Mixer(LinearMixer):
    config_class = Config
    qk_l2norm = True

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, heads = site.d_model, config.heads(site.d_model)
        super().__init__(
            config,
            site,
            rngs=rngs,
            gate_rank=max(config.output_gate_rank or heads.value, 0),
            gate_bias=config.output_gate_bias,
        )
        self.neg_eigval, self.lower_bound = config.neg_eigval, config.lower_bound
        decay_width = heads.num_v * heads.key
        self.f_a_proj = Linear(d_model, heads.value, rngs=rngs, axes=("embed", None))
        self.f_b_proj = Linear(heads.value, decay_width, rngs=rngs, axes=(None, "heads"))
        self.b_proj = Linear(d_model, heads.num_v, rngs=rngs)
        A_log_init = zeros if config.lower_bound else log_uniform(1, 16)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), A_log_init, decay=False)
        self.dt_bias = param(rngs, (decay_width,), ("heads",), dt_bias_init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        f_BTHK = split_heads(self.f_b_proj(self.f_a_proj(x_BTD)), self.heads.key)
        dt_bias_HK = split_heads(self.dt_bias[...], self.heads.key)
        log_decay_BTHK = channel_decay(f_BTHK, self.A_log[...], dt_bias_HK, self.lower_bound)
        return Inputs(q, k, v, log_decay_BTHK, write_strength(self.b_proj(x_BTD), self.neg_eigval))


def channel_decay(
    f_BTHK: jax.Array, A_log_H: jax.Array, dt_bias_HK: jax.Array, lower_bound: float
) -> jax.Array:
    """Log decay per key channel, float32 [B, T, HV, K], in either form of the module docstring."""
    A_log_H1 = A_log_H[:, None]
    if lower_bound:
        return lower_bound * jax.nn.sigmoid(jnp.exp(A_log_H1) * (f_BTHK.astype(jnp.float32) + dt_bias_HK))
    return softplus_decay(f_BTHK, A_log_H1, dt_bias_HK)
