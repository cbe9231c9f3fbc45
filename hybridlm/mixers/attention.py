"""Softmax attention, causal per document, with grouped key/value heads (GQA, arXiv 2305.13245).

o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,   y = W_o (o * sigmoid(W_g x))   gate optional
q and k optionally RMS-normalised, then rotated (RoPE) in all or the first of their channels
"""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, linears
from hybridlm.convert.rules import Rule, bias, interleaved, norm
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Limits, Positive, Theta
from hybridlm.layers import Linear, RMSNorm, merge_heads, rotate, split_heads
from hybridlm.mixers import Cost, Site, TokenMixer, whole_heads
from hybridlm.mup import logit_scale
from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend, visible
from hybridlm.token_cache import TokenCache, append, packed_indices, slots
from pallas_kernels.softmax_attention import blockwise


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Softmax attention.

    num_heads: query heads; 0 is d_model / head_dim.
    num_kv_heads: key/value heads, of which num_heads is a multiple; 0 is num_heads.
    head_dim: channels per head.
    rope_theta: base of the rotary frequencies; 0 for no position embedding (NoPE).
    rotary_fraction: share of each head's channels that is rotated, the first ones (Qwen3-Next has 0.25).
    window: tokens that a query sees, its own included; 0 for the whole document.
    qkv_bias: biases of the q, k, v projections.
    qk_norm: "none", "head" (RMSNorm of each head, Qwen3) or "width" (of all heads together, OLMo 2).
    norm_unit_offset: qk_norm scales by 1 + its parameter (Qwen3-Next).
    output_gate: "none" or "sigmoid" (Qwen3-Next's gated attention).
    norm_eps: of qk_norm.
    """

    num_heads: Count = 0
    num_kv_heads: Count = 0
    head_dim: Positive = 64
    rope_theta: Theta = 10000.0
    rotary_fraction: Annotated[float, Limits(0, 1, above=True)] = 1.0
    window: Count = 0
    qkv_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    norm_unit_offset: bool = False
    output_gate: Literal["none", "sigmoid"] = "none"
    norm_eps: Epsilon = 1e-6

    def heads(self, d_model: int) -> tuple[int, int]:
        num = self.num_heads or d_model // self.head_dim
        return num, self.num_kv_heads or num

    @property
    def rotary_dim(self) -> int:
        return round(self.head_dim * self.rotary_fraction) if self.rope_theta else 0

    def check(self, d_model: int) -> None:
        whole_heads(self, d_model, self.head_dim)
        heads, kv_heads = self.heads(d_model)
        if heads % kv_heads:
            raise ConfigError("num_kv_heads", kv_heads, f"must divide num_heads = {heads}")
        if self.rotary_dim % 2:
            rotated = f"head_dim = {self.head_dim} rotates {self.rotary_dim} channels"
            raise ConfigError("rotary_fraction", self.rotary_fraction, f"{rotated}, which must be even")

    @property
    def full_attention(self) -> bool:
        return not self.window

    def cost(self, d_model: int, context: int) -> Cost:
        heads, kv_heads = self.heads(d_model)
        return Cost(
            cache=2 * kv_heads * self.head_dim * min(self.window or context, context),
            flops=4 * heads * self.head_dim * visible(context, self.window),
        )

    def explicit(self, d_model: int) -> "Config":
        heads, kv_heads = self.heads(d_model)
        idle: dict[str, Any] = {}
        if self.qk_norm == "none":
            idle = {"norm_eps": Config.norm_eps, "norm_unit_offset": False}
        idle |= {} if self.rope_theta else {"rotary_fraction": Config.rotary_fraction}
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, **idle)


FLA_NORM_EPS = 1e-5  # fla's layer leaves its norms at their default


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_heads")
    if "rope_theta" in fields.values and not fields.get("rope_theta", 0.0) > 0:
        raise fields.refuse("rope_theta", "must be a number above 0: fla's attention always rotates")
    return {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_kv_heads", heads),
        "head_dim": fields.part("num_heads", d_model, heads),
        "rope_theta": fields.get("rope_theta", 10000.0),
        "window": fields.get("window_size", 0),
        "qkv_bias": fields.get("qkv_bias", False),
        "qk_norm": "head" if fields.get("qk_norm", False) else "none",
        "norm_eps": FLA_NORM_EPS,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm == "head",
        "rope_theta": config.rope_theta,
        "window_size": config.window or None,
    }


def _hf(
    heads: int | None = None, kv_heads: int | None = None, head_dim: int = 0, **fixed: Any
) -> Format[Config]:
    """Of transformers' models, whose defaults differ. None, 0: what Llama had. fixed: that cannot be said."""

    def read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
        fields.only("attention_bias", False)
        theta, fraction = fields.rope(fraction=0.25 if fixed.get("output_gate") else 1.0)
        count = fields.size("num_attention_heads", default=heads)
        return {
            "num_heads": count,
            "num_kv_heads": fields.get("num_key_value_heads", kv_heads or count),
            "head_dim": fields.get("head_dim", head_dim or d_model // count),
            "rope_theta": theta,
            "rotary_fraction": fraction,
            "norm_eps": eps,
        } | fixed

    def write(config: Config, d_model: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rotary_fraction != 1:
            rope["partial_rotary_factor"] = config.rotary_fraction
        window = {"use_sliding_window": True, "sliding_window": config.window} if config.window else {}
        return {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rope_parameters": rope,
        } | window

    return Format(read, write, _rules, "self_attn.", "full_attention")


def _olmo_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """Without a rope_theta nothing rotates; head_dim cannot be chosen."""
    values = (fields.sub("rope_parameters") or fields).values
    rotates = values.get("rope_theta", None if values is not fields.values else 0) is not None
    settings = _hf(qk_norm="width").read(fields, d_model, eps)
    fields.only("head_dim", d_model // settings["num_heads"])
    return settings if rotates else settings | {"rope_theta": 0.0}


def _olmo_write(config: Config, d_model: int) -> dict[str, Any]:
    values = _hf().write(config, d_model)
    del values["head_dim"]
    return values if config.rope_theta else values | {"rope_parameters": None, "rope_theta": None}


def _rules(config: Config, d_model: int) -> list[Rule]:
    found = linears("qkvo")
    if config.output_gate != "none":  # Qwen's q_proj holds [query, gate] per head
        both, dim = ("q_proj", "g_proj"), config.head_dim
        found = [*linears("kvo"), interleaved(both, (dim, dim), "q_proj")]
    if config.qkv_bias:
        found += [bias(f"{name}_proj", f"{name}_proj") for name in "qkv"]
    if config.qk_norm != "none":
        found += [norm(f"{name}_norm", f"{name}_norm") for name in "qk"]
    return found


GATED = {"qk_norm": "head", "norm_unit_offset": True, "output_gate": "sigmoid"}  # Qwen3-Next's


class Mixer(TokenMixer):
    config_class = Config
    public: ClassVar = {
        "fla": Format(_fla_read, _fla_write, _rules, "attn.", "transformer", "Transformer"),
        "qwen3": _hf(heads=32, head_dim=128, qk_norm="head"),
        "qwen3_next": _hf(heads=16, kv_heads=2, head_dim=256, **GATED),
        "qwen3_5": _hf(heads=16, kv_heads=4, head_dim=256, **GATED),
        "qwen3_5_moe": _hf(heads=16, kv_heads=2, head_dim=256, **GATED),
        "olmo_hybrid": Format(_olmo_read, _olmo_write, _rules, "self_attn.", "full_attention"),
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config, d_model = config, site.d_model
        self.scale = logit_scale(config.head_dim, site.mup)
        heads, self.kv_heads = config.heads(d_model)
        width, kv_width = heads * config.head_dim, self.kv_heads * config.head_dim
        kv_axes = ("embed", "kv_heads")
        self.q_proj = Linear(d_model, width, rngs=rngs, bias=config.qkv_bias)
        self.k_proj = Linear(d_model, kv_width, rngs=rngs, axes=kv_axes, bias=config.qkv_bias)
        self.v_proj = Linear(d_model, kv_width, rngs=rngs, axes=kv_axes, bias=config.qkv_bias)
        if config.qk_norm != "none":
            norm = functools.partial(
                RMSNorm, rngs=rngs, eps=config.norm_eps, unit_offset=config.norm_unit_offset
            )
            per_head = config.qk_norm == "head"
            self.q_norm = norm(config.head_dim) if per_head else norm(width, axis="heads")
            self.k_norm = norm(config.head_dim) if per_head else norm(kv_width, axis="kv_heads")
        if config.output_gate != "none":
            self.g_proj = Linear(d_model, width, rngs=rngs)
        self.o_proj = Linear(width, d_model, rngs=rngs, axes=("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: TokenCache | None = None
    ) -> tuple[jax.Array, TokenCache | None]:
        config, rows = self.config, context.rows
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, rows)
        context.record("q", q_BTHK)
        context.record("k", k_BTGK)
        scale, window = self.scale, config.window
        if cache is None:
            o_BTHK = attend(q_BTHK, k_BTGK, v_BTGK, rows, scale=scale, window=window)
        else:
            index_T, first_BT = packed_indices(rows, cache.length, window)
            cache, (k_BSGK, v_BSGK), index_S = append(cache, (k_BTGK, v_BTGK), window)
            o_BTHK = blockwise(q_BTHK, k_BSGK, v_BSGK, index_T, first_BT, index_S, scale=scale)
        o_BTF = merge_heads(o_BTHK)
        if config.output_gate != "none":
            o_BTF = o_BTF * jax.nn.sigmoid(self.g_proj(x_BTD))
        return self.o_proj(o_BTF), cache

    def _project(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if config.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (split_heads(x, config.head_dim) for x in (q, k, v))
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope_theta:
            q, k = (rotate(x, rows.positions, config.rope_theta, config.rotary_dim) for x in (q, k))
        return q, k, v

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> TokenCache:
        window = self.config.window
        size = min(window, max_length) if window else slots(max_length)
        shape = (batch, size, self.kv_heads, self.config.head_dim)
        return TokenCache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), jnp.int32(0))
