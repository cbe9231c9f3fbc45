"""Softmax attention, causal per document, with grouped key/value heads (GQA, arXiv 2305.13245).

o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s,   y = W_o (o * sigmoid(W_g x))   gate optional
q and k optionally RMS-normalised, then rotated (RoPE) in all or the first of their channels

Forgetting attention (FoX, arXiv 2503.02130): the logit of token s gains the sum of log f_i over s < i <= t,
f = sigmoid(W_f x + b) per head. Sinks (gpt-oss): each head's softmax has one more logit, learned, that has no
value. Sink tokens (StreamingLLM, arXiv 2309.17453): a sliding window keeps the first tokens of its
document in sight, with their positions in the document.

A layer can reuse the k and v of an earlier one, normed and rotated (cross-layer attention, arXiv 2405.12981;
`hybridlm.pattern` has the notation): it projects q only, and keeps no cache.
"""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import first_tokens, mixers
from hybridlm.context import Context
from hybridlm.convert.public_attention import FORMATS
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Limits, NonNegative, Positive, Theta
from hybridlm.layers import Linear, RMSNorm, merge_heads, normal, param, scale_heads, split_heads
from hybridlm.mixers import Cost, Site, TokenMixer, whole_heads
from hybridlm.mup import logit_scale
from hybridlm.rotary import rotate, yarn
from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend, record_largest, visible
from hybridlm.token_cache import Held, TokenCache, attend_held, hold, slots


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
    o_bias: a bias of the output projection (RecurrentGemma).
    qk_norm: "none", "head" (RMSNorm of each head, Qwen3) or "width" (of all heads together, OLMo 2).
    norm_unit_offset: qk_norm scales by 1 + its parameter (Qwen3-Next).
    output_gate: "none" or "sigmoid" (Qwen3-Next's gated attention).
    norm_eps: of qk_norm.
    forget_gate: logits decay with distance, by a gate per head and token (FoX, which has no rotation).
    sinks: a learned logit per head takes part in the softmax without a value (gpt-oss).
    logit_scale: what q . k is multiplied by; 0: head_dim**-0.5 (Granite has a number of its own).
    sink_tokens: first tokens of each document that its window keeps in sight besides (StreamingLLM has 4).
    yarn: FACTOR, CONTEXT, BETA_FAST=32, BETA_SLOW=1, MSCALE=1, MSCALE_ALL=1: rotations stretched for contexts
        FACTOR times as long as CONTEXT (`hybridlm.rotary`); none: as they are.
    """

    num_heads: Count = 0
    num_kv_heads: Count = 0
    head_dim: Positive = 64
    rope_theta: Theta = 10000.0
    rotary_fraction: Annotated[float, Limits(0, 1, above=True)] = 1.0
    window: Count = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    norm_unit_offset: bool = False
    output_gate: Literal["none", "sigmoid"] = "none"
    norm_eps: Epsilon = 1e-6
    forget_gate: bool = False
    sinks: bool = False
    logit_scale: NonNegative = 0.0
    sink_tokens: Annotated[int, Limits(0, 128)] = 0
    yarn: tuple[NonNegative, ...] = ()

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
        yarn(self.yarn, self.rope_theta)
        if self.rotary_dim % 2:
            rotated = f"head_dim = {self.head_dim} rotates {self.rotary_dim} channels"
            raise ConfigError("rotary_fraction", self.rotary_fraction, f"{rotated}, which must be even")
        if self.sink_tokens and not self.window:
            problem = "are those that a window would lose: without one every token is seen"
            raise ConfigError("sink_tokens", self.sink_tokens, problem, "Set window, or sink_tokens=0.")
        if self.sink_tokens and self.forget_gate:
            problem = "is forgotten by forget_gate, which fades what is far"
            raise ConfigError("sink_tokens", self.sink_tokens, problem, "Set forget_gate=False.")

    def check_reuse(self, source: mixers.Config, d_model: int) -> None:
        if not isinstance(source, Config):
            raise ConfigError("kind", self.kind, f"cannot reuse the keys and values of kind {source.kind}")
        if self.forget_gate or source.forget_gate:
            whose = self if self.forget_gate else source
            raise ConfigError("forget_gate", whose.forget_gate, "belongs to a layer's own keys: share others")
        if most := max(self.sink_tokens, source.sink_tokens):
            raise ConfigError("sink_tokens", most, "belong to a layer's own keys: share others")
        kv_heads = [one.heads(d_model)[1] for one in (self, source)]
        pairs = {"num_kv_heads": kv_heads} | {
            name: [getattr(one, name) for one in (self, source)]
            for name in ("head_dim", "rope_theta", "yarn")
        }
        if self.rope_theta:
            pairs["rotary_fraction"] = [self.rotary_fraction, source.rotary_fraction]
        for name, (own, theirs) in pairs.items():
            if own != theirs:
                problem = f"must be {theirs}, as in the layer whose keys and values it reuses"
                raise ConfigError(name, own, problem)
        if source.window and not 0 < self.window <= source.window:
            problem = f"must be 1 to {source.window}, what the layer whose keys it reuses keeps"
            raise ConfigError("window", self.window, problem)

    def clips(self, d_model: int, shares: bool) -> dict[str, Any]:
        if self.qk_norm != "none":  # which undoes any scale
            return {}
        heads, kv_heads = self.heads(d_model)
        alone = heads == kv_heads and not shares  # else all of it on the queries
        scale = lambda value, g_H: scale_heads(value, (jnp.sqrt(g_H) if alone else g_H)[:, None])
        names = [f"{side}_proj.kernel" for side in ("qk" if alone else "q")]
        biases = [name.replace("kernel", "bias") for name in names] if self.qkv_bias else []
        return dict.fromkeys((*names, *biases), ("max.logit", scale))

    @property
    def full_attention(self) -> bool:
        return not self.window

    def cost(self, d_model: int, context: int) -> Cost:
        heads, kv_heads = self.heads(d_model)
        kept = min(self.window or context, context) + self.sink_tokens
        return Cost(
            state=heads * kept if self.forget_gate else 0,
            cache=2 * kv_heads * self.head_dim * kept,
            flops=4 * heads * self.head_dim * visible(context, self.window, self.sink_tokens),
        )

    def explicit(self, d_model: int) -> "Config":
        heads, kv_heads = self.heads(d_model)
        idle: dict[str, Any] = {}
        if self.qk_norm == "none":
            idle = {"norm_eps": Config.norm_eps, "norm_unit_offset": False}
        idle |= {} if self.rope_theta else {"rotary_fraction": Config.rotary_fraction}
        scale = self.logit_scale or self.head_dim**-0.5
        if stretch := yarn(self.yarn, self.rope_theta):  # where every channel turns, the scales are one
            stretch = stretch._replace(mscale_all=0.0) if self.rotary_dim == self.head_dim else stretch
            idle |= {"yarn": tuple(stretch) if stretch.factor > 1 else ()}
        return dataclasses.replace(self, num_heads=heads, num_kv_heads=kv_heads, logit_scale=scale, **idle)


class Mixer(TokenMixer):
    config_class = Config
    public: ClassVar = FORMATS

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config, d_model = config, site.d_model
        self.leaves, self.reuses = site.leaves, site.reuses
        self.yarn = yarn(config.yarn, config.rope_theta)
        self.scale = config.logit_scale or logit_scale(config.head_dim, site.mup)
        self.scale *= self.yarn.logits if self.yarn else 1.0
        heads, self.kv_heads = config.heads(d_model)
        width, kv_width = heads * config.head_dim, self.kv_heads * config.head_dim
        kv_axes = ("embed", "kv_heads")
        self.q_proj = Linear(d_model, width, rngs=rngs, bias=config.qkv_bias)
        if not site.reuses:
            self.k_proj = Linear(d_model, kv_width, rngs=rngs, axes=kv_axes, bias=config.qkv_bias)
            self.v_proj = Linear(d_model, kv_width, rngs=rngs, axes=kv_axes, bias=config.qkv_bias)
        if config.qk_norm != "none":
            norm = functools.partial(
                RMSNorm, rngs=rngs, eps=config.norm_eps, unit_offset=config.norm_unit_offset
            )
            per_head = config.qk_norm == "head"
            self.q_norm = norm(config.head_dim) if per_head else norm(width, axis="heads")
            if not site.reuses:
                self.k_norm = norm(config.head_dim) if per_head else norm(kv_width, axis="kv_heads")
        if config.output_gate != "none":
            self.g_proj = Linear(d_model, width, rngs=rngs)
        if config.forget_gate:
            self.f_proj = Linear(d_model, heads, rngs=rngs, bias=True)
        self.sinks = param(rngs, (heads,), ("heads",), normal(), decay=False) if config.sinks else None
        self.o_proj = Linear(width, d_model, rngs=rngs, axes=("heads", "embed"), bias=config.o_bias)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any = None
    ) -> tuple[jax.Array, TokenCache | first_tokens.SinkCache | None]:
        config, rows = self.config, context.rows
        q_BTHK = self._queries(x_BTD, rows)
        context.record("q", q_BTHK)
        context.record("scale", jnp.float32(self.scale))
        log_f_BTH = self._log_forget(x_BTD, context) if config.forget_gate else None
        now = () if log_f_BTH is None or cache is None else (_forgotten(log_f_BTH, cache),)
        if self.reuses:
            held = context.left(f"kv.{self.reuses}")
        elif count := config.sink_tokens:
            cache, held = first_tokens.hold(cache, self._keys_values(x_BTD, rows), rows, config.window, count)
        else:
            cache, held = hold(cache, (*self._keys_values(x_BTD, rows), *now), config.window)
        if self.leaves:
            context.leave(f"kv.{self.leaves}", held)
        context.record("k", held.tokens[0])
        if self.sinks is not None:
            context.record("sinks", self.sinks[...])
        o_BTHK = self._attend(q_BTHK, held, context, log_f_BTH, now)
        o_BTF = merge_heads(o_BTHK)
        if config.output_gate != "none":
            o_BTF = o_BTF * jax.nn.sigmoid(self.g_proj(x_BTD))
        return self.o_proj(o_BTF), cache

    def _attend(
        self, q_BTHK: jax.Array, held: Held, context: Context, log_f_BTH: jax.Array | None, now: tuple
    ) -> jax.Array:
        """now: what has been forgotten up to each query, with a cache that has the same of its keys."""
        k, v, *then = held.tokens
        sinks = None if self.sinks is None else self.sinks[...]
        scale, window, first = self.scale, self.config.window, self.config.sink_tokens
        if held.start is None:
            size: dict[str, Any] = dict(scale=scale, window=window, sink_tokens=first)
            record_largest(context, q_BTHK, k, **size)
            return attend(q_BTHK, k, v, context.rows, **size, sinks=sinks, log_forget=log_f_BTH)
        of_cache: dict[str, Any] = dict(scale=scale, window=window, sinks=sinks, forgotten=(*now, *then))
        return attend_held(q_BTHK, k, v, held, context.rows, **of_cache)

    def _log_forget(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        log_f_BTH = jax.nn.log_sigmoid(self.f_proj(x_BTD).astype(jnp.float32))
        context.record("log_forget", log_f_BTH)
        return log_f_BTH

    def _queries(self, x_BTD: jax.Array, rows: Rows) -> jax.Array:
        norm = None if self.config.qk_norm == "none" else self.q_norm
        return self._placed(self.q_proj(x_BTD), norm, rows)

    def _keys_values(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
        norm = None if self.config.qk_norm == "none" else self.k_norm
        v_BTGK = split_heads(self.v_proj(x_BTD), self.config.head_dim)
        return self._placed(self.k_proj(x_BTD), norm, rows), v_BTGK

    def _placed(self, x_BTF: jax.Array, norm: RMSNorm | None, rows: Rows) -> jax.Array:
        """Queries or keys by head, normed and rotated."""
        config = self.config
        x_BTF = norm(x_BTF) if norm and config.qk_norm == "width" else x_BTF
        x_BTHK = split_heads(x_BTF, config.head_dim)
        x_BTHK = norm(x_BTHK) if norm and config.qk_norm == "head" else x_BTHK
        if not config.rope_theta:
            return x_BTHK
        return rotate(x_BTHK, rows.positions, config.rope_theta, config.rotary_dim, self.yarn)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Any:
        if self.reuses:
            return ()
        window = self.config.window
        size = min(window, max_length) if window else slots(max_length)
        shape = (batch, size, self.kv_heads, self.config.head_dim)
        forgotten = (batch, size, self.f_proj.kernel.shape[1]) if self.config.forget_gate else None
        gates = () if forgotten is None else (jnp.zeros(forgotten, jnp.float32),)
        cache = TokenCache((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *gates), jnp.int32(0))
        if not (count := self.config.sink_tokens):
            return cache
        first = jnp.zeros((batch, count, *shape[2:]), dtype)
        return first_tokens.SinkCache(cache, (first, first))


def _forgotten(log_f_BTH: jax.Array, cache: TokenCache) -> jax.Array:
    """Sum of the log gates from the row's start to each token, which appends to the cache of such sums."""
    before_BSH = cache.tokens[-1]  # zeros where nothing was appended
    last_BH = jnp.take(before_BSH, (cache.length - 1) % before_BSH.shape[1], axis=1)
    return last_BH[:, None] + jnp.cumsum(log_f_BTH, axis=1)
