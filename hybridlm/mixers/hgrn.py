"""HGRN (Qin et al. 2023, arXiv 2311.04823): a gated element-wise recurrence, one state number per channel.

h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_i x_t),     f_t = lb + (1 - lb) sigmoid(W_f x_t)
y = W_o (rmsnorm(h) * swish(W_g x)) with the norm over the whole width; lb: see `forget_gate`
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, conv_fields, conv_size, linears
from hybridlm.convert.rules import Rule, norm, same, short_convs
from hybridlm.fields import Count, Epsilon
from hybridlm.forget_gate import LowerBounds, log_forget
from hybridlm.layers import Linear, RecurrentCache, RMSNorm, ShortConv, convolve, elementwise
from hybridlm.mixers import Cost, Site
from hybridlm.recurrent_mixer import RecurrentMixer


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """HGRN.

    width: channels of the recurrence; 0 is d_model.
    conv_size: taps of short convolutions on the input and the forget gate; 0 for none, as in the paper.
    lower_bound: whether forget gates have the learned layer-wise lower bound.
    norm_eps: of the output norm.
    """

    width: Count = 0
    conv_size: Count = 0
    lower_bound: bool = True
    norm_eps: Epsilon = 1e-6

    def cost(self, d_model: int, context: int) -> Cost:
        width = self.width or d_model
        return Cost(state=width + max(self.conv_size - 1, 0) * 2 * width, flops=5 * width)

    def explicit(self, d_model: int) -> "Config":
        return dataclasses.replace(self, width=self.width or d_model)


class Shared(LowerBounds):
    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(site.num_layers, config.width or site.d_model, config.lower_bound, rngs=rngs)


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return {
        "width": fields.part("expand_ratio", d_model * fields.get("expand_ratio", 1.0), 1),
        "conv_size": conv_size(fields, False),
        "lower_bound": fields.get("use_lower_bound", True),
        "norm_eps": eps,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    ratio = config.width / d_model
    said = {
        "expand_ratio": int(ratio) if ratio.is_integer() else ratio,
        "use_lower_bound": config.lower_bound,
    }
    return said | conv_fields(config.conv_size)


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    return [*linears("ifog"), *short_convs("if", "if", config.conv_size), norm("o_norm", "g_norm")]


class Bounded(Protocol):
    @property
    def lower_bound(self) -> bool: ...


def bounds(config: Bounded) -> list[Rule]:
    """Of HGRN and HGRN2, whose layers share them."""
    return [same("lower_bounds", "lower_bounds")] if config.lower_bound else []


class Mixer(RecurrentMixer):
    config_class = Config
    shared_class = Shared
    public: ClassVar = {"fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "hgrn", "HGRN", bounds)}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model = site.d_model
        self.width = width = config.width or d_model
        self.state_shape, self.conv_size = (width,), config.conv_size
        self.i_proj = Linear(d_model, self.width, rngs=rngs)
        self.f_proj = Linear(d_model, self.width, rngs=rngs, exact=True)
        self.g_proj = Linear(d_model, self.width, rngs=rngs)
        if self.conv_size:
            self.i_conv = ShortConv(self.width, self.conv_size, rngs=rngs)
            self.f_conv = ShortConv(self.width, self.conv_size, rngs=rngs)
        self.o_norm = RMSNorm(self.width, rngs=rngs, eps=config.norm_eps, axis="heads")
        self.o_proj = Linear(self.width, d_model, rngs=rngs, axes=("heads", "embed"))

    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        i, f = self.i_proj(x_BTD), self.f_proj(x_BTD)
        (i, f), history = convolve(self.convs, (i, f), context.rows, None if fresh else before.history)
        log_f = log_forget(f, context.shared)
        x = -jnp.expm1(log_f) * jax.nn.silu(i.astype(jnp.float32))
        h, state = elementwise(x, log_f, context.rows, before.state)
        gate = jax.nn.silu(self.g_proj(x_BTD).astype(jnp.float32))
        return self.o_proj(self.o_norm(h, gate).astype(x_BTD.dtype)), RecurrentCache(state, history)

    @property
    def convs(self) -> tuple[ShortConv, ...]:
        return (self.i_conv, self.f_conv) if self.conv_size else ()
