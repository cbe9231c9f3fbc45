"""Softmax attention behind a short convolution (Zoology's models have it): `benchmarks.conv_attention:Mixer`.

What linear layers have and attention has not: a look at the token before.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from hybridlm.context import Context
from hybridlm.layers import ShortConv
from hybridlm.mixers import Site, TokenMixer, attention

TAPS = 4


@dataclasses.dataclass(frozen=True)
class Config(attention.Config):
    """Softmax attention behind a short convolution of `TAPS` taps."""


class Mixer(attention.Mixer):
    config_class = Config
    init_cache = TokenMixer.init_cache  # refuses: nothing is kept of the convolution's inputs

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.conv = ShortConv(site.d_model, TAPS, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        y_BTD, _ = self.conv(x_BTD, context.rows)
        return super().__call__(y_BTD, context, cache)
