"""SwiGLU (Shazeer 2020, arXiv 2002.05202): y = W_down (silu(W_gate x) * W_up x)."""

import dataclasses

import jax
from flax import nnx

from hybridlm.errors import ConfigError
from hybridlm.layers import SwiGLU
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config:
    """SwiGLU.

    hidden: width between the projections; 0 is model.mlp_hidden.
    """

    hidden: int = 0

    def check(self, d_model: int) -> None:
        if self.hidden < 0:
            raise ConfigError("hidden", self.hidden, "must be at least 0 (model.mlp_hidden)")


class Mlp(SwiGLU):
    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        super().__init__(d_model, config.hidden, rngs=rngs)

    def __call__(self, x: jax.Array, rows: Rows) -> tuple[jax.Array, None]:  # type: ignore[override]
        return super().__call__(x), None


def idle(config: Config, d_model: int) -> int:
    return 0
