"""Gated short convolution (LFM2, arXiv 2511.23404): y = W_o (C * conv(B * x)), [B, C, x] = W u

It sees no more than the last conv_size tokens.
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, concatenated, conv, linear
from hybridlm.fields import Positive
from hybridlm.layers import Linear, RecurrentCache, ShortConv, convolve
from hybridlm.mixers import Cost, Site, TokenMixer


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """A gated short convolution.

    conv_size: its taps.
    """

    conv_size: Positive = 3

    def cost(self, d_model: int, context: int) -> Cost:
        return Cost(state=(self.conv_size - 1) * d_model, flops=2 * (self.conv_size + 1) * d_model)


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("conv_bias", False)
    return {"conv_size": fields.size("conv_L_cache", default=3)}


def _rules(config: Config, d_model: int) -> list[Rule]:
    names = ("b_proj", "c_proj", "x_proj")
    return [
        concatenated(names, (d_model,) * 3, "in_proj", linear),
        conv("x_conv", "conv"),
        linear("o_proj", "out_proj"),
    ]


class Mixer(TokenMixer):
    config_class = Config
    public: ClassVar = {
        "lfm2": Format(_read, lambda config, _: {"conv_L_cache": config.conv_size}, _rules, "conv.", "conv")
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model = site.d_model
        self.b_proj, self.c_proj, self.x_proj = (Linear(d_model, d_model, rngs=rngs) for _ in range(3))
        self.x_conv = ShortConv(d_model, config.conv_size, rngs=rngs)
        self.o_proj = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        past = None if cache is None else cache.history
        gated = self.b_proj(x_BTD) * self.x_proj(x_BTD)
        (y,), history = convolve((self.x_conv,), (gated,), context.rows, past)
        y_BTD = self.o_proj(self.c_proj(x_BTD) * y)
        return y_BTD, None if cache is None else RecurrentCache((), history)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        return RecurrentCache((), (self.x_conv.init_history(batch, dtype),))
