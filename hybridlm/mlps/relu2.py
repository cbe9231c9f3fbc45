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
from hybridlm.fields import Count
from hybridlm.layers import Linear
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(mlps.Config):
    """Squared ReLU.

    hidden: width between the projections; 0 is model.mlp_hidden.
    """

    hidden: Count = 0

    def filled(self, model_hidden: int) -> "Config":
        return dataclasses.replace(self, hidden=self.hidden or model_hidden)


class Relu2(nnx.Module):
    """down(relu(up(x))^2)."""

    def __init__(self, features: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = Linear(features, hidden, rngs=rngs, axes=("embed", "mlp"))
        self.down = Linear(hidden, features, rngs=rngs, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return {"hidden": fields.size("intermediate_size", default=21504)}


class Mlp(Relu2):
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
        super().__init__(site.d_model, config.hidden, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:  # type: ignore[override]
        return super().__call__(x)
