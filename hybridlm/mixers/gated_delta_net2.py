"""Gated DeltaNet-2 (2026, arXiv 2605.22791): KDA with a gate per channel for erasing and one for writing.

S_t = (I - k_t (e_t * k_t)^T) Diag(a_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = S_t^T q_t / sqrt(K)
e = sigmoid(W_e x), doubled with neg_eigval,   w = sigmoid(W_w x)
log a = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)
y = W_o (rmsnorm(o) * sigmoid(W_g2 W_g1 x)),   q, k, v = silu(conv(W x)),  q and k of unit length
With grouped value heads a and e belong to the key head, as in FLA's layer (gdn2, which has no model type).
The op is `dplr` with a * e * k and -k.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.layers import Linear, param, split_heads
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import KeyGates, Site
from hybridlm.rows import Rows
from pallas_kernels.linear_attention.call import l2_normalize


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.GroupedConfig):
    """Gated DeltaNet-2. v_head_dim is also the middle width of the low-rank gates; neg_eigval doubles e."""

    output_gate: OutputGate = "sigmoid"

    def near_attention(self) -> dict[str, float]:
        return linear_mixer.near_none("b_proj.kernel", "w_proj.kernel") | {"f_b_proj.kernel": 0.0}

    def gates_of_keys(self) -> KeyGates:
        return linear_mixer.softplus_of_keys(
            ("f_a_proj.kernel", "f_b_proj.kernel"), "b_proj.kernel", "w_proj.kernel"
        )


class Mixer(LinearMixer):
    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, heads = site.d_model, config.heads(site.d_model)
        super().__init__(config, site, rngs=rngs, gate_rank=heads.value, gate_bias=True)
        self.neg_eigval = config.neg_eigval
        self.f_a_proj = Linear(d_model, heads.value, rngs=rngs, axes=("embed", None))
        self.f_b_proj = Linear(heads.value, heads.key_width, rngs=rngs, axes=(None, "heads"))
        self.b_proj = Linear(d_model, heads.key_width, rngs=rngs, exact=True)
        self.w_proj = Linear(d_model, heads.value_width, rngs=rngs, exact=True)
        self.A_log = param(rngs, (heads.num,), ("heads",), linear_mixer.log_uniform(1, 16), decay=False)
        self.dt_bias = param(rngs, (heads.key_width,), ("heads",), linear_mixer.dt_bias_init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        """beta is e [B, T, H, K], v is w * v."""
        f_BTHK, e_BTHK = (
            split_heads(y, self.heads.key) for y in (self.f_b_proj(self.f_a_proj(x_BTD)), self.b_proj(x_BTD))
        )
        dt_bias_HK = split_heads(self.dt_bias[...], self.heads.key)
        log_decay = linear_mixer.softplus_decay(f_BTHK, self.A_log[...][:, None], dt_bias_HK)
        w = jax.nn.sigmoid(split_heads(self.w_proj(x_BTD), self.heads.value).astype(jnp.float32))
        written = (w * v.astype(jnp.float32)).astype(v.dtype)
        return Inputs(q, k, written, log_decay, linear_mixer.write_strength(e_BTHK, self.neg_eigval))

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        q, k = (l2_normalize(x.astype(jnp.float32)).astype(x.dtype) for x in inputs[:2])
        return erase(inputs._replace(q=q, k=k), rows, state)


def erase(inputs: Inputs, rows: Rows, state: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """The recurrence of the module docstring; beta is e, v is w * v; q and k as they are to be read."""
    q, k, v, log_decay, e = inputs[:5]
    assert log_decay is not None and e is not None
    group = v.shape[2] // k.shape[2]
    q, k, log_decay, e = (jnp.repeat(x, group, axis=2) for x in (q, k, log_decay, e))
    reads = (jnp.exp(log_decay) * e * k.astype(jnp.float32)).astype(k.dtype)
    return linear_mixer.low_rank_recurrence(q, k, v, reads, -k, log_decay, rows=rows, state=state)
