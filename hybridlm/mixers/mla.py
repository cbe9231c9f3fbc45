"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with rotary channels or without (Kimi Linear).

    c_s = rmsnorm(W_kv_a x_s)        the latent, all that is cached besides the shared key channels r_s
    k_s = [W_k_b c_s, r_s],  v_s = W_v_b c_s,  r_s = rope(W_r x_s) one for all heads
    q_t = [n_t, rope(p_t)] per head,   o_t = sum_s softmax_s(q_t . k_s / sqrt(dim)) v_s
    y_t = W_o (o_t * sigmoid(W_g x_t))      the gate is optional, one number a head (Ling 3)

With a cache, W_k_b is moved onto the query and W_v_b onto the output, so that attention runs on the latents
themselves, as if with one key/value head. A layer can reuse an earlier one's c and r (`hybridlm.pattern` has
the notation; CLLA, arXiv 2410.15252): it has its own W_k_b and W_v_b, and keeps no cache.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, rope_fields, told
from hybridlm.convert.rules import Rule, divided, linear, norm, permuted
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, NonNegative, Positive, Theta
from hybridlm.layers import Linear, RMSNorm, merge_heads, scale_heads, split_heads
from hybridlm.mixers import Cost, Site, TokenMixer, whole_heads
from hybridlm.mup import logit_scale
from hybridlm.rotary import rotate, yarn
from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend, record_largest, visible
from hybridlm.token_cache import TokenCache, attend_held, hold, slots


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Multi-head latent attention.

    num_heads: heads; 0 is d_model / v_head_dim.
    q_lora_rank: width of the query's own latent; 0 for a direct projection.
    kv_lora_rank: width of the latent.
    qk_nope_head_dim: query/key channels per head made from the latent.
    qk_rope_head_dim: query/key channels per head whose key all heads share; may be 0.
    v_head_dim: value channels per head.
    rope_theta: base of the shared channels' rotary frequencies; 0 leaves them unrotated (NoPE).
    norm_eps: of the latents' norms.
    latent_norm: whether the keys' and values' latent is normed; not in one that attention was turned into.
    rope_groups: parts of the shared channels that rotate each like a head of its own, as after TransMLA.
    yarn: FACTOR, CONTEXT, BETA_FAST=32, BETA_SLOW=1, MSCALE=1, MSCALE_ALL=1: rotations stretched for contexts
        FACTOR times as long as CONTEXT (`hybridlm.rotary`; DeepSeek-V3, Kimi K2); none: as they are.
    output_gate: "none", or "head": what a head reads is scaled by a sigmoid of the layer's input.
    """

    num_heads: Count = 0
    q_lora_rank: Count = 0
    kv_lora_rank: Positive = 512
    qk_nope_head_dim: Positive = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Positive = 128
    rope_theta: Theta = 10000.0
    norm_eps: Epsilon = 1e-6
    latent_norm: bool = True
    rope_groups: Positive = 1
    yarn: tuple[NonNegative, ...] = ()
    output_gate: Literal["none", "head"] = "none"

    def heads(self, d_model: int) -> int:
        return self.num_heads or d_model // self.v_head_dim

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def check(self, d_model: int) -> None:
        whole_heads(self, d_model, self.v_head_dim)
        yarn(self.yarn, self.rope_theta)
        if self.rope_theta and self.qk_rope_head_dim % (2 * self.rope_groups):
            each = "" if self.rope_groups == 1 else f" in each of rope_groups = {self.rope_groups} parts"
            problem = f"must be even to be rotated{each}"
            raise ConfigError("qk_rope_head_dim", self.qk_rope_head_dim, problem, "Or set rope_theta=0.")

    def check_reuse(self, source: mixers.Config, d_model: int) -> None:
        if not isinstance(source, Config):
            raise ConfigError("kind", self.kind, f"cannot reuse the latents of kind {source.kind}")
        for name in ("kv_lora_rank", "qk_rope_head_dim", "rope_theta", "rope_groups", "yarn"):
            own, theirs = getattr(self, name), getattr(source, name)
            if own != theirs:
                problem = f"must be {theirs}, as in the layer whose latents it reuses"
                raise ConfigError(name, own, problem)

    def clips(self, d_model: int, shares: bool) -> dict[str, Any]:
        """The heads' own channels by sqrt(g) on either side; of the shared key's, the queries by g."""
        nope, rope, value = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        beside = lambda *parts: jnp.concatenate(
            [jnp.broadcast_to(g_H[:, None], (len(g_H), size)) for g_H, size in parts], axis=1
        )
        queries = lambda kernel, g_H: scale_heads(kernel, beside((jnp.sqrt(g_H), nope), (g_H, rope)))
        up = lambda kernel, g_H: scale_heads(
            kernel, beside((jnp.sqrt(g_H), nope), (jnp.ones_like(g_H), value))
        )
        return {"q_proj.kernel": ("max.logit", queries), "kv_b_proj.kernel": ("max.logit", up)}

    @property
    def full_attention(self) -> bool:
        return True

    def cost(self, d_model: int, context: int) -> Cost:
        heads = self.heads(d_model)
        return Cost(
            cache=(self.kv_lora_rank + self.qk_rope_head_dim) * context,
            flops=2 * heads * (self.qk_head_dim + self.v_head_dim) * visible(context, 0),
        )

    def explicit(self, d_model: int) -> "Config":
        stretch = yarn(self.yarn, self.rope_theta)
        stretched = tuple(stretch) if stretch and stretch.factor > 1 else ()
        return dataclasses.replace(self, num_heads=self.heads(d_model), yarn=stretched)


SIZES = {
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_nope_head_dim", 128),
    "v_head_dim": ("v_head_dim", 128),
}
KIMI_NORM_EPS = 1e-6  # of the latents there, whatever rms_norm_eps is


def _kimi_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """Nothing rotates, so that what is said of it says nothing."""
    fields.only("attention_bias", False)
    fields.only("mla_use_nope", True)
    fields.ignore(
        "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "head_dim", "qk_head_dim"
    )
    heads = fields.size("num_attention_heads", default=32)
    fields.only("num_key_value_heads", None, heads)
    return fields.table(SIZES) | {
        "num_heads": heads,
        "q_lora_rank": fields.get("q_lora_rank", 0),
        "qk_rope_head_dim": fields.get("qk_rope_head_dim", 64),
        "rope_theta": 0.0,
        "norm_eps": KIMI_NORM_EPS,
    }


def _sizes(config: Config) -> dict[str, Any]:
    own = {"q_lora_rank": config.q_lora_rank or None, "qk_rope_head_dim": config.qk_rope_head_dim}
    return told(config, SIZES) | own


def _kimi_write(config: Config, d_model: int) -> dict[str, Any]:
    heads = {"num_attention_heads": config.num_heads, "num_key_value_heads": config.num_heads}
    return heads | _sizes(config)


def _kimi_rules(config: Config, d_model: int) -> list[Rule]:
    latent = [linear("q_a_proj", "q_a_proj"), norm("q_a_norm", "q_a_layernorm"), linear("q_proj", "q_b_proj")]
    return [
        *(latent if config.q_lora_rank else [linear("q_proj", "q_proj")]),
        linear("kv_a_proj", "kv_a_proj_with_mqa"),
        norm("kv_a_norm", "kv_a_layernorm"),
        linear("kv_b_proj", "kv_b_proj"),
        linear("o_proj", "o_proj"),
    ]


FLA_NORM_EPS = 1e-5  # of the latents there, whatever norm_eps is


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    for name in ("attn", "window_size"):
        fields.only(name, None)
    theta, rotated = fields.rope()
    if rotated != 1:
        raise fields.refuse("partial_rotary_factor", "must be 1: all shared channels rotate")
    sizes, rope = fields.table(SIZES), fields.size("qk_rope_head_dim", default=64)
    fields.only("qk_head_dim", sizes["qk_nope_head_dim"] + rope)
    direct = "q_lora_rank" in fields.values and fields.values["q_lora_rank"] is None
    return sizes | {
        "num_heads": fields.size("num_heads", default=16),
        "q_lora_rank": fields.get("q_lora_rank", 0 if direct else 64),
        "qk_rope_head_dim": rope,
        "rope_theta": theta,
        "norm_eps": FLA_NORM_EPS,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    if config.norm_eps != FLA_NORM_EPS:
        raise ConfigError("norm_eps", config.norm_eps, f"is {FLA_NORM_EPS} of the latents in FLA's mla")
    heads = {"num_heads": config.num_heads, "qk_head_dim": config.qk_head_dim}
    return heads | _sizes(config) | {"rope_theta": config.rope_theta}


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    latent = [linear("q_a_proj", "q_proj.0"), norm("q_a_norm", "q_proj.1"), linear("q_proj", "q_proj.2")]
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    return [
        *(latent if config.q_lora_rank else [linear("q_proj", "q_proj")]),
        divided("kv_a_proj", ("kv_proj.0", "k_rope"), widths, linear),
        norm("kv_a_norm", "kv_proj.1"),
        linear("kv_b_proj", "kv_proj.2"),
        linear("o_proj", "o_proj"),
    ]


def _deepseek_read(
    fields: Fields, d_model: int, eps: float, heads: int = 128, q_rank: int = 1536, theta: float = 10000.0
) -> dict[str, Any]:
    """heads, q_rank, theta: where nothing is said."""
    fields.only("attention_bias", False)
    fields.only("rope_interleave", True)
    fields.ignore("head_dim", "qk_head_dim")
    heads = fields.size("num_attention_heads", default=heads)
    fields.only("num_key_value_heads", None, heads)
    direct = "q_lora_rank" in fields.values and fields.values["q_lora_rank"] is None
    return fields.table(SIZES) | {
        "num_heads": heads,
        "q_lora_rank": fields.get("q_lora_rank", 0 if direct else q_rank),
        "qk_rope_head_dim": fields.size("qk_rope_head_dim", default=64),
        "rope_theta": fields.rope(theta=theta, stretched=True)[0],
        "yarn": fields.yarn(every=True),
        "norm_eps": KIMI_NORM_EPS,
    }


def _deepseek_write(config: Config, d_model: int) -> dict[str, Any]:
    if not config.rope_theta:
        raise ConfigError("rope_theta", config.rope_theta, "must be above 0: this format's layers rotate")
    rope = rope_fields(config.rope_theta, config.yarn, every=True)
    return _kimi_write(config, d_model) | {"rope_interleave": True} | rope


def _deepseek_rules(config: Config, d_model: int) -> list[Rule]:
    """Kimi's but that neighbours turn together there, channels half the width apart here."""
    heads, rank = config.num_heads, config.kv_lora_rank
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    halves = np.arange(rope).reshape(-1, 2).T.ravel()
    of_head = np.concatenate([np.arange(nope), nope + halves])
    order = {
        "q_proj.kernel": (np.arange(heads)[:, None] * (nope + rope) + of_head).ravel(),
        "kv_a_proj.kernel": np.concatenate([np.arange(rank), rank + halves]),
    }
    turned = lambda rule: permuted(
        rule.ours[0].removesuffix(".kernel"), rule.theirs[0].removesuffix(".weight"), order[rule.ours[0]]
    )
    return [turned(rule) if rule.ours[0] in order else rule for rule in _kimi_rules(config, d_model)]


def _ling_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("gated_attention_proj_granularity_type", "head_wise")
    for name in ("use_bias", "use_qkv_bias"):
        fields.only(name, False)
    settings = _deepseek_read(fields, d_model, eps, heads=32, q_rank=0, theta=6e6)
    return settings | {"output_gate": "head"}


def _ling_rules(config: Config, d_model: int) -> list[Rule]:
    before = [rule for rule in _deepseek_rules(config, d_model) if rule.ours != ("o_proj.kernel",)]
    return [*before, linear("g_proj", "g_proj"), linear("o_proj", "dense")]


class Mixer(TokenMixer):
    config_class = Config
    public: ClassVar = {
        "bailing_hybrid": Format(_ling_read, _deepseek_write, _ling_rules, "attention.", "full_attention"),
        "deepseek_v3": Format(
            _deepseek_read, _deepseek_write, _deepseek_rules, "self_attn.", "full_attention"
        ),
        "fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "mla", "MLA"),
        "kimi_linear": Format(_kimi_read, _kimi_write, _kimi_rules, "self_attn.", "full_attention"),
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model = site.d_model
        self.config, heads = config, config.heads(d_model)
        self.leaves, self.reuses = site.leaves, site.reuses
        self.yarn = yarn(config.yarn, config.rope_theta)
        self.scale = logit_scale(config.qk_head_dim, site.mup) * (self.yarn.logits if self.yarn else 1.0)
        rank, q_rank, shared = config.kv_lora_rank, config.q_lora_rank, config.qk_rope_head_dim
        if q_rank:
            self.q_a_proj = Linear(d_model, q_rank, rngs=rngs, axes=("embed", None))
            self.q_a_norm = RMSNorm(q_rank, rngs=rngs, eps=config.norm_eps)
        q_axes = (None, "heads") if q_rank else ("embed", "heads")
        self.q_proj = Linear(q_rank or d_model, heads * config.qk_head_dim, rngs=rngs, axes=q_axes)
        if not site.reuses:
            self.kv_a_proj = Linear(d_model, rank + shared, rngs=rngs, axes=("embed", None))
        if config.latent_norm and not site.reuses:
            self.kv_a_norm = RMSNorm(rank, rngs=rngs, eps=config.norm_eps)
        up_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(rank, up_width, rngs=rngs, axes=(None, "heads"))
        if config.output_gate != "none":
            self.g_proj = Linear(d_model, heads, rngs=rngs)
        self.o_proj = Linear(heads * config.v_head_dim, d_model, rngs=rngs, axes=("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: TokenCache | None = None
    ) -> tuple[jax.Array, TokenCache | None]:
        rows = context.rows
        nope, scale = self.config.qk_nope_head_dim, self.scale
        q_BTHK = self.q_proj(self.q_a_norm(self.q_a_proj(x_BTD)) if self.config.q_lora_rank else x_BTD)
        q_BTHK = split_heads(q_BTHK, self.config.qk_head_dim)
        q_BTHN, q_BTHP = q_BTHK[..., :nope], self._rotate(q_BTHK[..., nope:], rows)
        if self.reuses:
            held = context.left(f"kv.{self.reuses}")
        else:
            cache, held = hold(cache, self._latent(x_BTD, rows), 0)
        if self.leaves:
            context.leave(f"kv.{self.leaves}", held)
        latent_BSC = held.tokens
        up_RHF = split_heads(self.kv_b_proj.matrix(x_BTD.dtype), nope + self.config.v_head_dim)
        up_k_RHN, up_v_RHV = up_RHF[..., :nope], up_RHF[..., nope:]
        rank = self.config.kv_lora_rank
        if held.start is None:
            k_BTHN = jnp.einsum("btr,rhn->bthn", latent_BSC[..., :rank], up_k_RHN)
            v_BTHV = jnp.einsum("btr,rhv->bthv", latent_BSC[..., :rank], up_v_RHV)
            k_BT1P = latent_BSC[:, :, None, rank:]
            k_BTHK = jnp.concatenate([k_BTHN, jnp.broadcast_to(k_BT1P, q_BTHP.shape)], axis=-1)
            q_BTHK = jnp.concatenate([q_BTHN, q_BTHP], axis=-1)
            context.record("q", q_BTHK)
            context.record("k", k_BTHK)
            context.record("scale", jnp.float32(scale))
            record_largest(context, q_BTHK, k_BTHK, scale=scale)
            o_BTHV = attend(q_BTHK, k_BTHK, v_BTHV, rows, scale=scale)
            return self._leave(x_BTD, o_BTHV), None
        q_BTHR = jnp.einsum("bthn,rhn->bthr", q_BTHN, up_k_RHN)
        q_BTHC = jnp.concatenate([q_BTHR, q_BTHP], axis=-1)
        k_BS1C = latent_BSC[:, :, None].astype(x_BTD.dtype)
        # Values are the keys, whole: a part of them would be copied at every step.
        o_BTHR = attend_held(q_BTHC, k_BS1C, k_BS1C, held, rows, scale=scale)[..., :rank]
        o_BTHV = jnp.einsum("bthr,rhv->bthv", o_BTHR, up_v_RHV)
        return self._leave(x_BTD, o_BTHV), cache

    def _leave(self, x_BTD: jax.Array, o_BTHV: jax.Array) -> jax.Array:
        if self.config.output_gate != "none":
            o_BTHV = o_BTHV * jax.nn.sigmoid(self.g_proj(x_BTD))[..., None]
        return self.o_proj(merge_heads(o_BTHV))

    def _latent(self, x_BTD: jax.Array, rows: Rows) -> jax.Array:
        """[B, T, kv_lora_rank + qk_rope_head_dim]: what one token leaves behind."""
        c = self.kv_a_proj(x_BTD)
        rank = self.config.kv_lora_rank
        shared_key = self._rotate(c[:, :, None, rank:], rows)[:, :, 0]
        latent = self.kv_a_norm(c[..., :rank]) if self.config.latent_norm else c[..., :rank]
        return jnp.concatenate([latent, shared_key], axis=-1)

    def _rotate(self, x_BTHP: jax.Array, rows: Rows) -> jax.Array:
        if not self.config.rope_theta:
            return x_BTHP
        parts = x_BTHP.reshape(*x_BTHP.shape[:2], -1, x_BTHP.shape[-1] // self.config.rope_groups)
        theta, stretch = self.config.rope_theta, self.yarn
        return rotate(parts, rows.positions, theta, stretch=stretch).reshape(x_BTHP.shape)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> TokenCache | tuple[()]:
        if self.reuses:
            return ()
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return TokenCache(jnp.zeros((batch, slots(max_length), width), dtype), jnp.int32(0))
