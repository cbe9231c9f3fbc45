"""Comba (Hu et al. 2025, arXiv 2506.02475): Gated DeltaNet with feedback from its state.

S_t = a_t S_{t-1} + k_t beta_t (v_t - S_{t-1}^T p_t)^T,   o_t = S_t^T (q_t - D p_t) / sqrt(K),   p = s(d) k
The state is not decayed before it is read. d (feedback) and D (output correction) per key head; a and beta as
in Gated DeltaNet;  y = W_o (rmsnorm(o) * sigmoid(W_g x)),   q, k, v = silu(conv(W x))
q - D p, k and p are brought to unit length, as in FLA's layers, so that s(d) acts through q - D p alone.
In terms of the op, whose delta rule reads the decayed state: beta / a for beta and a v for v.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, grouped, grouped_fields, linears
from hybridlm.convert.rules import Rule, norm, same, short_convs
from hybridlm.fields import NonNegative
from hybridlm.layers import ones, param
from hybridlm.linear_mixer import Inputs, OutputGate
from hybridlm.mixers import KeyGates, Site, gated_delta_net
from pallas_kernels.linear_attention.call import L2NORM_EPS

LEAST = -30.0  # what stays of a state below it, 1e-13, is nothing beside what is written; 1 / a stays finite


@dataclasses.dataclass(frozen=True)
class Config(gated_delta_net.Config):
    """Comba; sizes as Gated DeltaNet's.

    inner_decay: whether p is s(d) k; else it is k.
    correction: what D is at first, 1 as in the paper or 0.02, which it likes better in small models; 0 for no
        output correction.
    """

    output_gate: OutputGate = "sigmoid"
    inner_decay: bool = True
    correction: NonNegative = 1.0

    def near_attention(self) -> dict[str, float]:
        return super().near_attention() | self._as_they_are()

    def gates_of_keys(self) -> KeyGates:
        gates = super().gates_of_keys()
        return gates._replace(filled={**gates.filled, **self._as_they_are()})

    def _as_they_are(self) -> dict[str, float]:
        """Queries without the correction, which subtracts the token's own key; its gradient is not 0."""
        return {"D": 0.0} if self.correction else {}


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    gate = "sigmoid" if fields.get("use_output_gate", True) else "none"
    corrected = fields.get("use_output_correction", True)
    factor = fields.get("correction_factor", 1.0)
    return grouped(fields, heads=6, head_dim=256, expand_v=2.0) | {
        "output_gate": gate,
        "inner_decay": fields.get("use_inner_decay", True),
        "correction": factor if corrected else 0.0,
        "norm_eps": eps,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    fields = grouped_fields(config)
    del fields["allow_neg_eigval"]
    return fields | {
        "use_output_gate": config.output_gate != "none",
        "use_inner_decay": config.inner_decay,
        "use_output_correction": config.correction > 0,
        "correction_factor": config.correction or 1.0,
    }


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    gate = "g" if config.output_gate != "none" else ""
    own = ["A_log", "dt_bias"] + ["decay"] * config.inner_decay + ["D"] * (config.correction > 0)
    convs = short_convs("qkv", "qkv", config.conv_size)
    return [*linears(f"qkvoab{gate}"), *convs, norm("o_norm", "o_norm"), *(same(name, name) for name in own)]


class Mixer(gated_delta_net.Mixer):
    config_class = Config
    public: ClassVar = {"fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "comba", "Comba")}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.inner_decay, self.corrected = config.inner_decay, config.correction > 0
        if config.inner_decay:
            self.decay = param(rngs, (self.heads.num,), ("heads",), ones, decay=False)
        if config.correction:
            init = jax.nn.initializers.constant(config.correction)
            self.D = param(rngs, (self.heads.num,), ("heads",), init, decay=False)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        part = jax.nn.sigmoid(self.decay[...]) if self.inner_decay else jnp.ones(self.heads.num)
        if self.corrected:
            fed = (self.D[...] * part)[:, None] * k.astype(jnp.float32)
            q = (q.astype(jnp.float32) - fed).astype(q.dtype)
        gated = super().inputs(x_BTD, q, k, v, context)
        assert gated.log_decay is not None and gated.beta is not None
        return feedback(q, k, v, gated.log_decay, gated.beta, length_ratio(k, part))


def length_ratio(k: jax.Array, part: jax.Array) -> jax.Array:
    """p = r k where k and p = part k were each brought to unit length: r, float32 [B, T, H]; part [H]."""
    square = jnp.sum(k.astype(jnp.float32) ** 2, axis=-1)
    return part * jnp.sqrt((square + L2NORM_EPS) / (part**2 * square + L2NORM_EPS))


def feedback(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, ratio: jax.Array
) -> Inputs:
    """What the op is given for S_t = a S_{t-1} + beta k (v - S_{t-1}^T p)^T with p = ratio k.

    log_decay, beta: [B, T, HV].  ratio: [B, T, H], positive.
    """
    log_decay = jnp.maximum(log_decay, LEAST)
    erase = jnp.repeat(ratio, v.shape[2] // k.shape[2], axis=2) * jnp.exp(-log_decay)
    written = v.astype(jnp.float32) / erase[..., None]
    return Inputs(q, k, written.astype(v.dtype), log_decay, beta * erase)
