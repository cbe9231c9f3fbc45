"""The recurrent block of Griffin (De et al. 2024, arXiv 2402.19427) around its RG-LRU, a number per channel.

h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (sigmoid(W_i x_t) x_t),   log a_t = -8 sigmoid(W_r x_t) softplus(p)
y = W_o (h * gelu(W_y u)),   x = conv(W_x u) + bias;   at a document's first token the root is 1
W_i and W_r are block-diagonal; in RecurrentGemma W_x is linear_x, W_y linear_y, p recurrent_param.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import layers, mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, bias, conv, linear, same
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Positive
from hybridlm.layers import Linear, RecurrentCache, ShortConv
from hybridlm.mixers import Cost, Site, whole_heads
from hybridlm.recurrent_mixer import RecurrentMixer
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """RG-LRU.

    width: channels of the recurrence; 0 is d_model.
    num_heads: blocks of the gates' matrices; 0 is width / head_dim.
    head_dim: channels of a block.
    conv_size: taps of the short convolution, which has no activation; 0 for none.
    bias: whether the projections have biases, as in RecurrentGemma.
    """

    width: Count = 0
    num_heads: Count = 0
    head_dim: Positive = 128
    conv_size: Count = 4
    bias: bool = True

    def check(self, d_model: int) -> None:
        width = self.width or d_model
        whole_heads(self, width, self.head_dim)
        if self.num_heads and width % self.num_heads:
            raise ConfigError("num_heads", self.num_heads, f"must divide the width, {width}")

    def cost(self, d_model: int, context: int) -> Cost:
        width = self.width or d_model
        return Cost(state=width * max(self.conv_size, 1), flops=10 * width)

    def explicit(self, d_model: int) -> "Config":
        width = self.width or d_model
        num_heads = self.num_heads or width // self.head_dim
        return dataclasses.replace(self, width=width, num_heads=num_heads, head_dim=width // num_heads)


def _hf_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    width, heads = fields.get("lru_width", d_model), fields.size("num_attention_heads", default=10)
    return {
        "width": width,
        "num_heads": heads,
        "head_dim": fields.part("lru_width", width, heads),
        "conv_size": fields.size("conv1d_width", default=4),
        "bias": True,
    }


def _hf_write(config: Config, d_model: int) -> dict[str, Any]:
    return {
        "lru_width": config.width,
        "num_attention_heads": config.num_heads,
        "conv1d_width": config.conv_size,
    }


def _hf_rules(config: Config, d_model: int) -> list[Rule]:
    pairs = ("x_proj", "linear_x"), ("y_proj", "linear_y"), ("o_proj", "linear_out")
    parts = [(f"{gate}.{ours}", f"rg_lru.{gate}_{theirs}") for gate in ("input_gate", "recurrent_gate")
             for ours, theirs in (("kernel", "weight"), ("bias", "bias"))]  # fmt: skip
    return [
        *(rule(*pair) for pair in pairs for rule in (linear, bias)),
        conv("x_conv", "conv_1d"),
        bias("x_conv", "conv_1d"),
        *(same(*pair) for pair in parts),
        same("recurrent_param", "rg_lru.recurrent_param"),
    ]


class BlockLinear(nnx.Module):
    """y = x W + bias with W block-diagonal: kernel [H, K, K], bias [H, K], x and y [..., H * K]."""

    def __init__(self, blocks: int, size: int, *, rngs: nnx.Rngs):
        self.kernel = layers.param(
            rngs, (blocks, size, size), ("heads", None, None), layers.normal(size**-0.5), decay=True
        )
        self.bias = layers.param(rngs, (blocks, size), ("heads", None), layers.zeros, decay=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        x_H = layers.split_heads(x, self.kernel.shape[1])
        y = jnp.einsum("...hk,hkl->...hl", x_H, self.kernel[...].astype(x.dtype))
        return layers.merge_heads(y.astype(jnp.float32) + self.bias[...])


class Mixer(RecurrentMixer):
    config_class = Config
    public: ClassVar = {
        "recurrent_gemma": Format(_hf_read, _hf_write, _hf_rules, "temporal_block.", "recurrent")
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, sizes = site.d_model, config.explicit(site.d_model)
        self.state_shape, self.conv_size = (sizes.width,), config.conv_size
        init, final = layers.normal(d_model**-0.5), layers.normal((2 / site.num_layers / sizes.width) ** 0.5)
        self.x_proj = Linear(d_model, sizes.width, rngs=rngs, bias=config.bias, init=init)
        self.y_proj = Linear(d_model, sizes.width, rngs=rngs, bias=config.bias, init=init)
        if config.conv_size:
            self.x_conv = ShortConv(sizes.width, config.conv_size, rngs=rngs, bias=True)
        self.input_gate = BlockLinear(sizes.num_heads, sizes.head_dim, rngs=rngs)
        self.recurrent_gate = BlockLinear(sizes.num_heads, sizes.head_dim, rngs=rngs)
        self.recurrent_param = layers.param(rngs, (sizes.width,), ("heads",), radius, decay=False)
        self.o_proj = Linear(
            sizes.width, d_model, rngs=rngs, axes=("heads", "embed"), bias=config.bias, init=final
        )

    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        past = None if fresh else before.history
        (x,), history = layers.convolve(self.convs, (self.x_proj(x_BTD),), context.rows, past)
        gates = self.input_gate(x), self.recurrent_gate(x)
        h, state = rg_lru(x, *gates, self.recurrent_param[...], context.rows, before.state)
        gate = jax.nn.gelu(self.y_proj(x_BTD).astype(jnp.float32), approximate=True)
        return self.o_proj((h * gate).astype(x_BTD.dtype)), RecurrentCache(state, history)

    @property
    def convs(self) -> tuple[ShortConv, ...]:
        return (self.x_conv,) if self.conv_size else ()


def rg_lru(
    x: jax.Array, input_gate: jax.Array, recurrent_gate: jax.Array, p: jax.Array, rows: Rows, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(h float32 [B, T, F], the state after the last token); gates before their sigmoids, p [F]."""
    log_a = -8 * jax.nn.sigmoid(recurrent_gate) * jax.nn.softplus(p)
    root = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), 1e-8))  # the floor bounds its slope
    root = jnp.where((rows.positions == 0)[..., None], 1.0, root)
    return layers.elementwise(root * jax.nn.sigmoid(input_gate) * x.astype(jnp.float32), log_a, rows, state)


def radius(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """p with exp(-softplus(p)) in [0.9, 0.999], uniform in its square, as in the authors' code."""
    square = jax.random.uniform(key, shape, dtype, 0.9**2, 0.999**2)
    return jnp.log(jnp.expm1(-jnp.log(square) / 2))
