"""Linear attention with a feature map f and, unless switched off, a normaliser (Katharopoulos et al. 2020,
arXiv 2006.16236); no decay.

S_t = S_{t-1} + f(k_t) v_t^T,   n_t = n_{t-1} + f(k_t),   Z_t = f(q_t) . n_t / sqrt(K)
sum:   o_t = S_t^T f(q_t) / sqrt(K) / (Z_t + eps)
mala:  o_t = (1 + 1/Z_t) S_t^T f(q_t) / sqrt(K) - Z_t mean_{s <= t}(v_s)     MALA (2507.00698), made causal
y = W_o rmsnorm(o)

Maps, each of a head's K channels:
    elu, relu, identity     elu(x) + 1, and so on
    t2r                     relu(W x)                                                   2103.13076
    hedgehog                softmax([y, -y]),  y = 2 (W x + b),  W = 1 and b = 0 at first    2402.04347
    elementwise_product     (W x + b) * (W' x + b'), FLA's default
    dpfp                    relu([x, -x]) times itself rolled by 1, ... dpfp_nu channels    2102.11174
    cosformer               [relu(x) cos(a), relu(x) sin(a)],  a = pi/2 position / max_length    2202.08791
    taylor                  Based's (see based.py), which has the 1 / sqrt(K) in it
    nalaformer              [relu(u)^p, relu(-u)^p], u = q/|q|, p = 3 (1/2 + tanh|q|); k^3 for k    2506.21137
Learned maps are FLA's: one for all heads, each for q and for k.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import linear_mixer
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, linears, multi_head, multi_head_fields
from hybridlm.convert.rules import Rule, bias, linear, norm
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, NonNegative, Positive
from hybridlm.layers import Initializer, Linear, RecurrentCache, elementwise, matrix, merge_heads, split_heads
from hybridlm.linear_mixer import Inputs, LinearMixer, recurrence
from hybridlm.mixers import Cost, Site
from hybridlm.rotary import rotate
from hybridlm.rows import Rows

Map = Literal[
    "elu", "relu", "identity", "t2r", "hedgehog", "elementwise_product", "dpfp", "cosformer", "nalaformer",
    "taylor",
]  # fmt: skip
Normalizer = Literal["none", "sum", "mala"]
LEARNED = {"t2r": 1, "hedgehog": 1, "elementwise_product": 2}  # matrices of a map
DOUBLED = ("hedgehog", "cosformer", "nalaformer")
KEY_DIMS = (64, 128, 256)  # of the kernels


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """Linear attention with a feature map.

    feature_map, normalizer: see the module.  eps: beside the normaliser.
    output_norm: whether what is read is normed; FLA's layers do, the papers' do not.
    rope_theta: base of the rotary frequencies of q and k before the map; 0 for no rotation.
    dpfp_nu: of dpfp.  max_length: of cosformer, the longest row or document there will ever be.
    """

    conv_size: Count = 0
    feature_map: Map = "elu"
    normalizer: Normalizer = "sum"
    eps: NonNegative = 1e-10
    output_norm: bool = True
    rope_theta: NonNegative = 0.0
    dpfp_nu: Positive = 4
    max_length: Positive = 4096

    def features(self, head_dim: int) -> int:
        """Width of a head's f(q) and f(k)."""
        if self.feature_map == "dpfp":
            return 2 * self.dpfp_nu * head_dim
        if self.feature_map == "taylor":
            return (head_dim + 1) * (head_dim + 2) // 2
        return (2 if self.feature_map in DOUBLED else 1) * head_dim

    def check(self, d_model: int) -> None:
        super().check(d_model)
        if self.output_gate != "none" and not self.output_norm:
            raise ConfigError("output_gate", self.output_gate, "must be none where output_norm is off")
        if self.rope_theta and self.heads(d_model).key % 2:
            raise ConfigError("head_dim", self.head_dim, "must be even to be rotated", "Or set rope_theta=0.")

    def cost(self, d_model: int, context: int) -> Cost:
        heads = self.heads(d_model)
        history = super().cost(d_model, context).state - heads.num_v * heads.key * heads.value
        heads = heads._replace(key=self.features(heads.key))
        one, n = linear_mixer.cost(heads, 0, delta=False), heads.key_width if self.normalizer != "none" else 0
        constant = heads.value_width if self.normalizer == "mala" else 0
        return Cost(state=one.state + history + n + constant, flops=one.flops + 3 * n + 2 * constant)


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    sizes = multi_head(fields, d_model, heads=4, expand_k=1.0, expand_v=1.0)
    fields.only("num_kv_heads", None, sizes["num_heads"])
    for name in ("tie_feature_map_qk", "norm_q", "norm_k"):
        fields.only(name, False)
    normalizer = "sum" if fields.get("norm_feature_map", False) else "none"
    feature_map = fields.get("feature_map", "elementwise_product")
    return sizes | {"feature_map": feature_map, "normalizer": normalizer, "norm_eps": eps}


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    sizes = multi_head_fields(config, d_model)
    return {name: sizes[name] for name in ("num_heads", "expand_k", "expand_v")} | {
        "feature_map": config.feature_map,
        "norm_feature_map": config.normalizer == "sum",
    }


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    found = [*linears("qkvo"), norm("o_norm", "norm")]
    count = LEARNED.get(config.feature_map, 0)
    for side in "qk":
        for at in range(count):
            ours, theirs = f"{side}_maps.{at}", f"feature_map_{side}.layer{at + 1 if count > 1 else ''}"
            found.append(linear(ours, theirs))
            found += [bias(ours, theirs)] if config.feature_map != "t2r" else []
    return found


class Mixer(LinearMixer):
    config_class = Config
    silu = False
    public: ClassVar = {
        "fla": Format(_fla_read, _fla_write, _fla_rules, "attn.", "linear_attn", "LinearAttention")
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.config, key = config, self.heads.key
        self.features = config.features(key)
        if not config.output_norm:
            del self.o_norm
        if count := LEARNED.get(config.feature_map, 0):
            init: Initializer = matrix if count > 1 or config.feature_map == "t2r" else identity
            made = lambda: Linear(
                key, key, rngs=rngs, axes=(None, None), bias=config.feature_map != "t2r", init=init
            )
            self.q_maps = nnx.List(made() for _ in range(count))
            self.k_maps = nnx.List(made() for _ in range(count))

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        if self.config.feature_map == "cosformer" and x_BTD.shape[1] > self.config.max_length:
            raise too_long(self.config, x_BTD.shape[1])
        q, k = (self.map(x, side, context.rows) for x, side in ((q, "q"), (k, "k")))
        context.record("features.q", q)
        context.record("features.k", k)
        return Inputs(q, k, v)

    def map(self, x: jax.Array, side: str, rows: Rows) -> jax.Array:
        """f(x) [B, T, H, F] of a query's or a key's channels, in x's dtype."""
        if self.config.rope_theta:
            x = rotate(x, rows.positions, self.config.rope_theta)
        name = self.config.feature_map
        if name in LEARNED:
            made = [layer(x).astype(jnp.float32) for layer in getattr(self, f"{side}_maps")]
        else:
            made = [x.astype(jnp.float32)]
        return apply(name, made, side, rows.positions, self.config).astype(x.dtype)

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        scale = 1.0 if self.config.feature_map == "taylor" else self.heads.key**-0.5
        return attend(inputs, rows, state, self.config.normalizer, self.config.eps, scale)

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        return super().normalize(o_BTHV, gate_BTHV) if self.config.output_norm else merge_heads(o_BTHV)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        if self.config.feature_map == "cosformer" and max_length > self.config.max_length:
            raise too_long(self.config, max_length)
        empty = super().init_cache(batch, max_length, dtype)
        features, normalizer = self.features, self.config.normalizer
        shape = (batch, self.heads.num, features + (normalizer == "mala"), self.heads.value)
        state = {"S": jnp.zeros(shape, jnp.float32)}
        if normalizer != "none":
            state["n"] = jnp.zeros((batch, self.heads.num * features), jnp.float32)
        return empty._replace(state=state)


def too_long(config: Config, length: int) -> ConfigError:
    return ConfigError("max_length", config.max_length, f"must be at least the {length} tokens of a row")


def identity(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.eye(shape[0], dtype=dtype)


def apply(name: str, xs: list[jax.Array], side: str, positions: jax.Array, config: Config) -> jax.Array:
    """The map of the module docstring in float32; ``xs``: the layers' outputs of a learned map, or [x]."""
    x, relu = xs[0], jax.nn.relu
    if name == "elu":
        return jax.nn.elu(x) + 1
    if name in ("relu", "t2r"):
        return relu(x)
    if name == "hedgehog":
        return jax.nn.softmax(jnp.concatenate([2 * x, -2 * x], axis=-1), axis=-1)
    if name == "elementwise_product":
        return x * xs[1]
    if name == "dpfp":
        x = relu(jnp.concatenate([x, -x], axis=-1))
        rolled = [jnp.roll(x, shift, axis=-1) for shift in range(1, config.dpfp_nu + 1)]
        return jnp.concatenate([x * one for one in rolled], axis=-1)
    if name == "cosformer":
        angle = (math.pi / 2 / config.max_length * positions.astype(jnp.float32))[..., None, None]
        return jnp.concatenate([relu(x) * jnp.cos(angle), relu(x) * jnp.sin(angle)], axis=-1)
    if name == "nalaformer":
        return signed_powers(x) if side == "q" else relu(jnp.concatenate([x, -x], axis=-1)) ** 3
    if name == "taylor":
        return taylor(x)
    return x


def taylor(x: jax.Array) -> jax.Array:
    """Features whose products are 1 + s + s^2 / 2 of s = q . k / sqrt(d); d become (d + 1)(d + 2) / 2."""
    d = x.shape[-1]
    first, second = np.triu_indices(d, 1)
    parts = [jnp.ones_like(x[..., :1]), x * d**-0.25, x * x * (2 * d) ** -0.5]
    return jnp.concatenate([*parts, x[..., first] * x[..., second] * d**-0.5], axis=-1)


def signed_powers(q: jax.Array) -> jax.Array:
    """NaLaFormer's map of queries; 0, with gradient 0, where a part is 0."""
    length = jnp.sqrt(jnp.sum(q * q, axis=-1, keepdims=True) + 1e-12)
    parts = jnp.concatenate([q, -q], axis=-1) / length
    there = parts > 0
    return jnp.where(there, jnp.where(there, parts, 1.0) ** (3 * (0.5 + jnp.tanh(length))), 0.0)


def attend(
    inputs: Inputs, rows: Rows, state: Any, normalizer: str, eps: float, scale: float
) -> tuple[jax.Array, Any]:
    """(o [B, T, H, V] in v's dtype, the state after the last token or None); see the module docstring.

    inputs: f(q), f(k) [B, T, H, F] and v.  scale: of Z and S^T f(q), 1 / sqrt(K) above.
    state: None or S [B, H, F, V] (mala: F + 1) and, with a normaliser, n [B, H * F].
    Rows are padded with features of 0 to the width that the kernels take; states are not.
    """
    q, k, v = inputs[:3]
    heads, features = k.shape[2:]
    after, Z = {}, jnp.float32(1)
    if normalizer != "none":
        first = jnp.zeros((len(k), heads, features)) if state is None else split_heads(state["n"], features)
        x, first = (widened(a, a.ndim - 1, k.shape[1]) for a in (k.astype(jnp.float32), first))
        flat = merge_heads(x)
        n, last = (
            split_heads(a, x.shape[3])[..., :features]
            for a in elementwise(flat, jnp.zeros_like(flat), rows, merge_heads(first))
        )
        after["n"], Z = merge_heads(last), (n * q.astype(jnp.float32)).sum(-1, keepdims=True) * scale
    if normalizer == "mala":  # one more feature, 1 in every key, reads the sum of the values
        place = (rows.positions + 1)[..., None, None] * scale
        wide = q.astype(jnp.float32) * (1 + 1 / (Z + eps))
        q = jnp.concatenate([wide, -Z / place], axis=-1).astype(v.dtype)
        k = jnp.concatenate([k, jnp.ones_like(k[..., :1])], axis=-1)
        features += 1
    q, k = (widened(a, 3, k.shape[1]) for a in (q, k))
    S = None if state is None else widened(state["S"], 2, k.shape[1])
    o, S = recurrence(Inputs(q, k, v), rows, S, scale=scale)
    if normalizer == "sum":
        o = (o / (Z + eps)).astype(v.dtype)
    return o, None if S is None else after | {"S": S[:, :, :features]}


def widened(x: jax.Array, axis: int, length: int) -> jax.Array:
    """``x`` with zeros on ``axis`` up to the width that kernels take, in calls of more than a token."""
    width = next((width for width in KEY_DIMS if width >= x.shape[axis]), x.shape[axis])
    pads = [(0, width - x.shape[axis] if at == axis and length > 1 else 0) for at in range(x.ndim)]
    return jnp.pad(x, pads)
