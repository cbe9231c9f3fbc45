"""Softmax attention, causal per document, with grouped key/value heads (GQA, arXiv 2305.13245).

o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,   y = W_o (o * sigmoid(W_g x))   gate optional
q and k optionally RMS-normalised, then rotated (RoPE) in all or the first of their channels
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Limits, Positive, Theta
from hybridlm.layers import Linear, RMSNorm, merge_heads, rotate, split_heads
from hybridlm.mixers import Cost, Site, TokenMixer, whole_heads
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
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads)


class Mixer(TokenMixer):
    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config, d_model = config, site.d_model
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
        scale, window = config.head_dim**-0.5, config.window
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
