"""GEGLU (Shazeer 2020, arXiv 2002.05202): y = W_down (gelu(W_gate x) * W_up x), as in Griffin and Gemma."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from hybridlm import mlps
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, bias, swiglu_rules
from hybridlm.layers import Linear
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(mlps.Inner):
    """GEGLU, with tanh's approximation of the GELU.

    bias: whether the projections have biases, as in RecurrentGemma.
    """

    bias: bool = False


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """intermediate_size is of both halves."""
    return {"hidden": fields.part("intermediate_size", fields.size("intermediate_size"), 2), "bias": True}


def _rules(config: Config, d_model: int) -> list[Rule]:
    return [*swiglu_rules(), *(bias(name, f"{name}_proj") for name in ("gate", "up", "down"))]


class Mlp(mlps.Mlp):
    config_class = Config
    public: ClassVar = {
        "recurrent_gemma": Format(
            _read, lambda config, d_model: {"intermediate_size": 2 * config.hidden}, _rules, "mlp_block."
        )
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        wide = lambda: Linear(site.d_model, config.hidden, rngs=rngs, axes=("embed", "mlp"), bias=config.bias)
        self.gate, self.up = wide(), wide()
        self.down = Linear(config.hidden, site.d_model, rngs=rngs, axes=("mlp", "embed"), bias=config.bias)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))
