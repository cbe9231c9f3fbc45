"""Squared ReLU (Primer, So et al. 2021, arXiv 2109.08668): y = W_down relu(W_up x)^2, as in Nemotron-H."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mlps
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import relu2_rules
from hybridlm.layers import Linear
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(mlps.Inner):
    """Squared ReLU."""


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return {"hidden": fields.size("intermediate_size", default=21504)}


class Mlp(mlps.Mlp):
    """down(relu(up(x))^2)."""

    config_class = Config
    public: ClassVar[dict[str, Format[Any]]] = {
        "nemotron_h": Format(
            _read,
            lambda config, _: {"intermediate_size": config.hidden},
            lambda *_: relu2_rules(),
            "mixer.",
            "mlp",
        )
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.up = Linear(site.d_model, config.hidden, rngs=rngs, axes=("embed", "mlp"))
        self.down = Linear(config.hidden, site.d_model, rngs=rngs, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))
