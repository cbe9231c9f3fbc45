"""A transformer block that layers share, before a linear mixer of their own (Zamba2, arXiv 2411.15242).

    h = attention(rmsnorm([x, x_0])),   t = W geglu(rmsnorm(h)),   y = mixer(rmsnorm(x + t))

x_0 is the embedding of the tokens. Attention is given 2 d_model channels, returns d_model, and scales its
logits by (K / 2)^-1/2; nothing in the block is residual. All layers of one name in `mixers` share attention,
GEGLU and the two norms; two blocks in turns are two names. A layer's own are its mixer with the norm before
it, W, and adapters: terms (x A) B beside the projections into the GEGLU (one A for both) and, if
``attention_adapters``, beside those of q, k and v.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers, over
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, linears
from hybridlm.convert.rules import Rule, concatenated, linear, norm
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Positive, Theta
from hybridlm.layers import Linear, RMSNorm
from hybridlm.mixers import Cost, Site, TokenMixer, attention
from hybridlm.mup import logit_scale


@dataclasses.dataclass(frozen=True)
class Config(over.Config):
    """A shared transformer block before a mixer.

    of: the name in `mixers` of each layer's own mixer.
    num_heads: query heads of the block; 0 is 2 d_model / head_dim.
    num_kv_heads: its key/value heads, of which num_heads is a multiple; 0 is num_heads.
    head_dim: channels of a head.
    rope_theta: base of the rotary frequencies; 0 for no position embedding.
    hidden: width of the block's GEGLU; 0 is 4 d_model.
    adapter_rank: of each layer's adapters; 0 for none.
    attention_adapters: whether q, k and v have adapters, too.
    norm_eps: of the block's norms and of the layer's own.
    """

    of: str = "mamba2"
    num_heads: Count = 0
    num_kv_heads: Count = 0
    head_dim: Positive = 128
    rope_theta: Theta = 10000.0
    hidden: Count = 0
    adapter_rank: Count = 128
    attention_adapters: bool = False
    norm_eps: Epsilon = 1e-5

    def attention(self, mup: bool = False) -> attention.Config:
        """Of the block's attention, at a width of 2 d_model."""
        names = ("num_heads", "num_kv_heads", "head_dim", "rope_theta")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        return attention.Config(kind="attention", logit_scale=logit_scale(self.head_dim / 2, mup), **own)

    def width(self, d_model: int) -> int:
        """Of the GEGLU."""
        return self.hidden or 4 * d_model

    @property
    def full_attention(self) -> bool:
        return True

    @property
    def norms_itself(self) -> bool:
        return True

    def check(self, d_model: int) -> None:
        if self.rope_theta and self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even where rope_theta rotates")
        self.attention().check(2 * d_model)
        if self.attention_adapters and not self.adapter_rank:
            raise ConfigError("adapter_rank", 0, "must be at least 1 with attention_adapters")

    def cost(self, d_model: int, context: int) -> Cost:
        parts = self.attention().cost(2 * d_model, context), self.part.cost(d_model, context)
        return Cost(*map(sum, zip(*parts, strict=True)))

    def explicit(self, d_model: int) -> Any:
        heads, kv_heads = self.attention().heads(2 * d_model)
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "hidden": self.width(d_model)}
        return dataclasses.replace(super().explicit(d_model), **sizes)


AXES = "heads", "kv_heads", "kv_heads"  # of what q, k and v are projected to


def block_attention(settings: attention.Config, site: Site, rngs: nnx.Rngs) -> attention.Mixer:
    """On twice the width of ``site``."""
    return attention.Mixer(settings, site._replace(d_model=2 * site.d_model), rngs=rngs)


class Shared(nnx.Module):
    """What the layers share."""

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, hidden = site.d_model, config.width(site.d_model)
        self.norm = RMSNorm(2 * d_model, rngs=rngs, eps=config.norm_eps)
        self.attention = block_attention(config.attention(site.mup), site, rngs)
        width = self.attention.o_proj.kernel.shape[0]
        self.attention.o_proj = Linear(width, d_model, rngs=rngs, axes=("heads", "embed"))
        self.mlp_norm = RMSNorm(d_model, rngs=rngs, eps=config.norm_eps)
        self.gate = Linear(d_model, hidden, rngs=rngs, axes=("embed", "mlp"))
        self.up = Linear(d_model, hidden, rngs=rngs, axes=("embed", "mlp"))
        self.down = Linear(hidden, d_model, rngs=rngs, axes=("mlp", "embed"))


class Adapted(nnx.Module):
    """y = x W + (x A) B."""

    def __init__(self, linear: Linear, A: Linear, B: Linear):
        self.linear, self.A, self.B = linear, A, B

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x) + self.B(self.A(x))


BLOCK = "shared_transformer."  # which tensors name by the first layer that has it
USE = "USE"  # stands for the number of a layer among the hybrid ones
INNER = "mamba2"


def _zamba_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """Attention is twice as wide as the stream; half of a head's width scales its logits."""
    fields.only("hidden_act", "gelu")
    fields.only("add_bias_linear", False)
    heads = fields.size("num_attention_heads", default=32)
    kv_heads = fields.size("num_key_value_heads", default=heads)
    adapted = fields.get("use_shared_attention_adapter", False)
    if adapted and kv_heads != heads:
        raise fields.refuse("num_key_value_heads", f"must be {heads} with use_shared_attention_adapter")
    theta, _ = fields.rope()
    return {
        "of": INNER,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.part("num_attention_heads", 2 * d_model, heads),
        "rope_theta": theta if fields.get("use_mem_rope", False) else 0.0,
        "hidden": fields.size("intermediate_size", default=4 * d_model),
        "adapter_rank": fields.size("adapter_rank", default=128),
        "attention_adapters": adapted,
        "norm_eps": eps,
    }


def _zamba_write(config: Config, d_model: int) -> dict[str, Any]:
    if config.part.kind != INNER:
        raise ConfigError("of", config.part.kind, f"must be of kind {INNER} in this format")
    if not config.adapter_rank:
        raise ConfigError("adapter_rank", 0, "must be at least 1 in this format")
    turned: dict[str, Any] = {"use_mem_rope": bool(config.rope_theta)}
    if config.rope_theta:
        turned["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return turned | {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.hidden,
        "adapter_rank": config.adapter_rank,
        "use_shared_attention_adapter": config.attention_adapters,
    }


def _zamba_rules(config: Config, d_model: int) -> list[Rule]:
    """Of a layer's own; its adapters are among the tensors of the shared block."""
    own, width = mixers.public(INNER)["zamba2"].rules(config.part, d_model), config.width(d_model)
    inner = [rule.under("inner.", "mamba_decoder.mamba.") for rule in own]
    mlp = f"{BLOCK}feed_forward.gate_up_proj_adapter_list.{USE}."
    both = concatenated(("gate_b_proj", "up_b_proj"), (width, width), f"{mlp}1", linear)
    found = [linear("linear", "linear"), norm("norm", "mamba_decoder.input_layernorm"), *inner]
    found += [linear("mlp_a_proj", f"{mlp}0"), both]
    for name in "qkv" if config.attention_adapters else "":
        theirs = f"{BLOCK}self_attn.linear_{name}_adapter_list.{USE}."
        found += [linear(f"{name}_a_proj", f"{theirs}0"), linear(f"{name}_b_proj", f"{theirs}1")]
    return found


def _zamba_shared(config: Config) -> list[Rule]:
    widths = (config.hidden, config.hidden)
    return [
        norm("norm", f"{BLOCK}input_layernorm"),
        *(rule.under("attention.", f"{BLOCK}self_attn.") for rule in linears("qkvo")),
        norm("mlp_norm", f"{BLOCK}pre_ff_layernorm"),
        concatenated(("gate", "up"), widths, f"{BLOCK}feed_forward.gate_up_proj", linear),
        linear("down", f"{BLOCK}feed_forward.down_proj"),
    ]


class Mixer(TokenMixer):
    """``inner``: the layer's own mixer.

    Its cache is that of the attention and that of ``inner``. Records of the attention are "attention.<name>".
    """

    config_class = Config
    shared_class = Shared
    public: ClassVar = {
        "zamba2": Format(_zamba_read, _zamba_write, _zamba_rules, "", "hybrid", shared=_zamba_shared)
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, rank, hidden = site.d_model, config.adapter_rank, config.width(site.d_model)
        self.attention, self.d_model = config.attention(site.mup), d_model
        self.rank, self.attention_rank = rank, rank if config.attention_adapters else 0
        self.linear = Linear(d_model, d_model, rngs=rngs, axes=("heads", "embed"))
        self.norm = RMSNorm(d_model, rngs=rngs, eps=config.norm_eps)
        self.inner = over.make(config.part, site, rngs)
        if rank:
            self.mlp_a_proj = Linear(d_model, rank, rngs=rngs, axes=("embed", None))
            self.gate_b_proj = Linear(rank, hidden, rngs=rngs, axes=(None, "mlp"))
            self.up_b_proj = Linear(rank, hidden, rngs=rngs, axes=(None, "mlp"))
        if self.attention_rank:
            heads, kv_heads = self.attention.heads(2 * d_model)
            for name, count, axis in zip("qkv", (heads, kv_heads, kv_heads), AXES, strict=True):
                width = count * config.head_dim
                setattr(self, f"{name}_a_proj", Linear(2 * d_model, rank, rngs=rngs, axes=("embed", None)))
                setattr(self, f"{name}_b_proj", Linear(rank, width, rngs=rngs, axes=(None, axis)))

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> tuple[Any, Any]:
        site = Site(self.d_model)
        of_block = nnx.eval_shape(lambda: block_attention(self.attention, site, nnx.Rngs(params=0)))
        seen, own = (one.init_cache(batch, max_length, dtype) for one in (of_block, self.inner))
        return seen, own

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        return self._mixed(x_BTD, context, cache, lambda mixer, *given: mixer(*given))

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        return self._mixed(x_BD, context, cache, lambda mixer, *given: mixer.step(*given))

    def _mixed(
        self, x: jax.Array, context: Context, cache: Any, run: Callable[..., Any]
    ) -> tuple[jax.Array, Any]:
        """``run``: calls a mixer with (x, context, cache)."""
        block = self._adapted(context.shared)
        seen, inner = cache or (None, None)
        both, apart = jnp.concatenate([x, context.entered], axis=-1), context.branch()
        h, seen = run(block.attention, block.norm(both), apart, seen)
        context.join("attention", apart)
        h = block.mlp_norm(h)
        t = self.linear(block.down(jax.nn.gelu(block.gate(h), approximate=False) * block.up(h)))
        y, inner = run(self.inner, self.norm(x + t), context, inner)
        return y, None if cache is None else (seen, inner)

    def _adapted(self, shared: Shared) -> Shared:
        """The shared block with this layer's adapters in it; the other layers' stays as it is."""
        block: Any = nnx.clone(shared)
        if self.rank:
            block.gate = Adapted(block.gate, self.mlp_a_proj, self.gate_b_proj)
            block.up = Adapted(block.up, self.mlp_a_proj, self.up_b_proj)
        for name in "qkv" if self.attention_rank else "":
            A, B = getattr(self, f"{name}_a_proj"), getattr(self, f"{name}_b_proj")
            setattr(block.attention, f"{name}_proj", Adapted(getattr(block.attention, f"{name}_proj"), A, B))
        return block
