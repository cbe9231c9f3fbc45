"""DeltaProduct (Siems et al. 2025, arXiv 2502.10297): DeltaNet with several Householder steps a token.

S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   j = 1 ... n
o_t = S_{t,n}^T q_t / sqrt(K),   S_{t,0} = S_{t-1,n}.   The rest as in `delta_net`. With beta up to 2
the product of two steps is any rotation of a plane.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, mixers
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, conv_fields, grouped, linears
from hybridlm.convert.rules import Rule, norm, same, short_convs
from hybridlm.errors import ConfigError
from hybridlm.fields import Positive
from hybridlm.layers import Linear
from hybridlm.linear_mixer import Inputs, LinearMixer, recurrence
from hybridlm.mixers import Site, delta_net
from hybridlm.rows import Rows

if TYPE_CHECKING:
    from hybridlm.mixers import gated_delta_product


@dataclasses.dataclass(frozen=True)
class Steps(mixers.Config):
    """What several steps a token add to the settings of a kind with one.

    num_householder: steps a token, each with its own k, v and beta.
    """

    num_householder: Positive = 2
    neg_eigval: bool = True

    @property
    def writes(self) -> int:
        return self.num_householder


@dataclasses.dataclass(frozen=True)
class Config(Steps, delta_net.Config):
    """DeltaProduct."""


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    sizes = grouped(fields, heads=6, head_dim=256, expand_v=2.0)
    fields.only("num_v_heads", sizes["num_heads"])  # which FLA's model does not hand on
    gated = fields.get("use_forget_gate", False)
    if not gated:
        del sizes["num_v_heads"]
    return sizes | {
        "kind": "gated_delta_product" if gated else "delta_product",
        "output_gate": "swish" if fields.get("use_output_gate", True) else "none",
        "num_householder": fields.size("num_householder", default=1),
        "norm_eps": eps,
    }


def _fla_write(config: "Config | gated_delta_product.Config", d_model: int) -> dict[str, Any]:
    """Of `gated_delta_product`, too, which alone has num_v_heads."""
    gated = config.kind == "gated_delta_product"
    values = config.heads(d_model).num_v
    if values != config.num_heads:
        problem = f"is num_heads = {config.num_heads} in FLA's gated_deltaproduct"
        raise ConfigError("num_v_heads", values, problem)
    if config.output_gate not in ("swish", "none"):
        problem = "FLA's gated_deltaproduct has swish or none"
        raise ConfigError("output_gate", config.output_gate, problem)
    return {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "expand_v": config.v_head_dim / config.head_dim,
        "use_output_gate": config.output_gate != "none",
        "use_forget_gate": gated,
        "allow_neg_eigval": config.neg_eigval,
        "num_householder": config.num_householder,
    } | conv_fields(config.conv_size)


def _fla_rules(config: "Config | gated_delta_product.Config", d_model: int) -> list[Rule]:
    gated = config.kind == "gated_delta_product"
    names = "qkvob" + "a" * gated + "g" * (config.output_gate != "none")
    decay = [same(name, name) for name in ("A_log", "dt_bias")] * gated
    return [*linears(names), *short_convs("qkv", "qkv", config.conv_size), norm("o_norm", "o_norm"), *decay]


FLA: Format[Any] = Format(
    _fla_read, _fla_write, _fla_rules, "attn.", "gated_deltaproduct", "GatedDeltaProduct"
)


class ProductMixer(LinearMixer):
    """To stand before the Mixer of the kind with one step."""

    def __init__(self, config: linear_mixer.Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.b_proj = Linear(site.d_model, self.writes * self.heads.num_v, rngs=rngs)

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        return product(inputs, self.writes, rows, state, qk_l2norm=self.qk_l2norm)


class Mixer(ProductMixer, delta_net.Mixer):
    config_class = Config
    public: ClassVar = {"fla": FLA}


def product(
    inputs: Inputs, steps: int, rows: Rows, state: jax.Array | None, *, qk_l2norm: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The recurrence over ``steps`` times as many tokens: a token decays at its first, is read at its last.

    inputs: q [B, T, H, K] and log_decay as for one step; k, v, beta with steps * H heads, step by step.
    """
    batch, length, _, _ = inputs.q.shape
    split = lambda x: x.reshape(batch, length, steps, -1, *x.shape[3:])
    k, v, beta = (split(x) for x in (inputs.k, inputs.v, inputs.beta))
    if state is not None and length == 1:
        for step in range(steps):
            decay = None if step else inputs.log_decay
            one = Inputs(inputs.q, k[:, :, step], v[:, :, step], decay, beta[:, :, step])
            o, state = recurrence(one, rows, state, qk_l2norm=qk_l2norm)
            rows = rows._replace(positions=jnp.ones_like(rows.positions))  # the document has begun
        return o, state

    def alone(x: jax.Array, step: int) -> jax.Array:
        """``x`` at one step of each token, zeros at the others."""
        widths = [(0, 0), (0, 0), (step, steps - 1 - step)] + [(0, 0)] * (x.ndim - 2)
        return merge(jnp.pad(x[:, :, None], widths))

    merge = lambda x: x.reshape(batch, length * steps, *x.shape[3:])
    decay = None if inputs.log_decay is None else alone(inputs.log_decay, 0)
    many = Inputs(alone(inputs.q, steps - 1), merge(k), merge(v), decay, merge(beta))
    wide = Rows(*(jnp.repeat(x, steps, axis=1) for x in rows))
    o, state = recurrence(many, wide, state, qk_l2norm=qk_l2norm)
    return o[:, steps - 1 :: steps], state
