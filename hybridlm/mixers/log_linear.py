"""Log-linear attention (Guo et al. 2025, arXiv 2506.04761) over a linear mixer: a state a level of the past.

o_t = sum_l lambda_{t,l} (S_t^l)^T q_t,   lambda = softplus(L * (W_l x)) per value head and level
Level 0 holds token t, level l >= 1 those tokens s whose highest bit that differs from t, counted in the
document, is bit l - 1 (a Fenwick tree). Every S^l goes through all later transitions of the mixer.

A row is O(T log T): level l is the op on documents cut at multiples of 2^l, where only tokens with bit l - 1
clear write and only those with it set read. Decoding keeps one state a level that a context may have, and the
token after t adds levels 0 to z up in level z + 1, z the trailing ones of t.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import over
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, same
from hybridlm.errors import ConfigError
from hybridlm.fields import Limits
from hybridlm.layers import Linear, RecurrentCache, ones, param
from hybridlm.linear_mixer import Inputs
from hybridlm.mixers import Cost, Site, TokenMixer, mamba2
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config(over.Config):
    """Log-linear attention.

    levels: that have a lambda of their own, enough for 2^(levels - 1) tokens; those beyond share the last.
    """

    of: str = "mamba2"
    levels: Annotated[int, Limits(1, 32)] = 15

    def cost(self, d_model: int, context: int) -> Cost:
        one, kept = self.part.cost(d_model, context), max(context, 1).bit_length()
        return Cost(one.state + (kept - 1) * self.matrix(d_model), one.cache, (kept + 1) * one.flops)


OF, LEVELS, CHUNK = "mamba2", 15, 64  # FLA's, which has no others


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("residual_in_fp32", False)
    fields.only("chunk_size", CHUNK)
    inner = mamba2.fla_read(fields, d_model, eps)
    if inner["dt_min"] or inner["dt_max"]:
        raise fields.refuse("dt_limit", "is not supported here")
    return {"of": (OF, inner), "levels": LEVELS}


def _fla_write(config: "Config", d_model: int) -> dict[str, Any]:
    inner = config.part
    if inner.kind != OF:
        raise ConfigError("of", inner.kind, f"FLA has log-linear attention over {OF} alone")
    if inner.dt_min or inner.dt_max:
        raise ConfigError("dt_max", inner.dt_max, "FLA's log_linear_mamba2 has no limits of dt")
    return mamba2.fla_write(inner, d_model) | {"chunk_size": CHUNK}


def _fla_rules(config: "Config", d_model: int) -> list[Rule]:
    levels = ("l_proj", config.part.heads(d_model).num_v * config.levels)
    return [*mamba2.fla_rules(config.part, d_model, "inner.", (levels,)), same("L", "L")]


class Mixer(TokenMixer):
    config_class = Config
    public: ClassVar = {
        "fla_backbone": Format(
            _fla_read, _fla_write, _fla_rules, "mixer.", "log_linear_mamba2", "LogLinearMamba2"
        )
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.inner = over.make(config.part, site, rngs)
        heads = self.inner.heads.num_v
        self.l_proj = Linear(site.d_model, heads * config.levels, rngs=rngs, exact=True)
        self.L = param(rngs, (heads, config.levels), ("heads", None), ones, decay=False)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        inputs, history = self.inner.prepare(x_BTD, context, None if cache is None else cache.history)
        logits = self.l_proj(x_BTD).astype(jnp.float32).reshape(*x_BTD.shape[:2], *self.L.shape)
        scales, recur = jax.nn.softplus(self.L[...] * logits), self.inner.recur
        if cache is None:
            count = (x_BTD.shape[1] - 1).bit_length()
            o, state = levels(inputs, scales, context.rows, count, recur), None
        else:
            run = step if x_BTD.shape[1] == 1 else prefill
            o, state = run(inputs, scales, context.rows, cache.state, recur)
        y_BTD = self.inner.finish(x_BTD, inputs, o.astype(inputs.v.dtype))
        return y_BTD, None if cache is None else RecurrentCache(state, history)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        cache, kept = self.inner.init_cache(batch, max_length, dtype), max(max_length, 1).bit_length()
        return cache._replace(state=jnp.zeros((batch, kept, *cache.state.shape[1:]), jnp.float32))


Recur = Callable[[Inputs, Rows, Any], tuple[jax.Array, Any]]


def _bits(x: jax.Array) -> jax.Array:
    """How many bits a number takes."""
    return 32 - jax.lax.clz(x.astype(jnp.int32))


def _of_level(scales: jax.Array, level: jax.Array) -> jax.Array:
    """lambda [B, T, HV, 1] of levels [B, T], or one for all."""
    level = jnp.minimum(jnp.broadcast_to(level, scales.shape[:2]), scales.shape[-1] - 1)
    return jnp.take_along_axis(scales, level[..., None, None], axis=-1)


def _written(inputs: Inputs, where_BT: jax.Array) -> Inputs:
    """Only these tokens write; the others' transitions stay."""
    return inputs._replace(v=inputs.v * where_BT[..., None, None].astype(inputs.v.dtype), skip=None)


def levels(inputs: Inputs, scales: jax.Array, rows: Rows, count: int, recur: Recur) -> jax.Array:
    """o float32 [B, T, HV, V] of what the tokens of these rows wrote.

    scales: lambda, float32 [B, T, HV, L].  count: levels above 0 that there can be.
    recur: (inputs, rows, state or None) -> (o, state after the last token), of the mixer.
    """
    positions = rows.positions

    @jax.checkpoint
    def one(total: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
        reads = ((positions << 1) >> level) & 1 | (level == 0)
        writes = 1 - reads | (level == 0)
        starts = positions & ((1 << level) - 1) == 0
        cut = Rows(jnp.cumsum(starts, axis=1, dtype=jnp.int32), positions)
        o, _ = recur(_written(inputs, writes), cut, None)
        return total + o.astype(jnp.float32) * _of_level(scales, level) * reads[..., None, None], None

    return jax.lax.scan(one, jnp.zeros(inputs.v.shape, jnp.float32), jnp.arange(count + 1))[0]


def prefill(
    inputs: Inputs, scales: jax.Array, rows: Rows, state: jax.Array, recur: Recur
) -> tuple[jax.Array, jax.Array]:
    """(o, the states after the last token) where ``state`` [B, levels, HV, K, V] came before the rows."""
    count, first = state.shape[1], rows.positions[:, :1]
    after = rows.positions[:, -1:] + 1

    def one(carry: tuple[jax.Array, jax.Array], level: jax.Array) -> tuple[tuple, None]:
        total, kept = carry
        before = jax.lax.dynamic_index_in_dim(state, level - 1, 1, keepdims=False)
        o, old = recur(_written(inputs, jnp.zeros_like(rows.positions)), rows, before)
        total += o.astype(jnp.float32) * _of_level(scales, jnp.maximum(level, _bits(rows.positions ^ first)))
        _, new = recur(_written(inputs, _bits(rows.positions ^ after) == level), rows, jnp.zeros_like(before))
        at = lambda level_B1: (jnp.arange(1, count + 1) == level_B1)[..., None, None, None]
        kept += at(jnp.maximum(level, _bits(after ^ first))) * old[:, None] + at(level) * new[:, None]
        return (total, kept), None

    start = levels(inputs, scales, rows, count, recur), jnp.zeros_like(state)
    return jax.lax.scan(one, start, jnp.arange(1, count + 1))[0]


def step(
    inputs: Inputs, scales: jax.Array, rows: Rows, state: jax.Array, recur: Recur
) -> tuple[jax.Array, jax.Array]:
    """`prefill` of one token: the levels are heads."""
    batch, count, heads = state.shape[:3]
    tile: Any = lambda x: None if x is None else jnp.concatenate([x] * (count + 1), axis=2)
    v = jnp.pad(inputs.v, [(0, 0), (0, 0), (0, count * heads), (0, 0)])
    many = Inputs(tile(inputs.q), tile(inputs.k), v, tile(inputs.log_decay), tile(inputs.beta))
    before = jnp.pad(state, [(0, 0), (1, 0), (0, 0), (0, 0), (0, 0)])
    o, after = recur(many, rows, before.reshape(batch, -1, *state.shape[3:]))
    level = jnp.arange(count + 1)
    scale_BLH = jnp.moveaxis(scales[:, 0, :, jnp.minimum(level, scales.shape[-1] - 1)], 0, 1)
    o = (o.reshape(batch, count + 1, heads, -1).astype(jnp.float32) * scale_BLH[..., None]).sum(1)
    after, place = after.reshape(before.shape), rows.positions[:, 0]
    into = _bits(~place & (place + 1))[:, None]  # z + 1, the lowest bit that is clear
    shape = lambda where: where[..., None, None, None]
    total = jnp.sum(after * shape(level < into), axis=1, keepdims=True)
    kept = jnp.where(shape(level < into), 0, jnp.where(shape(level == into), total, after))
    return o[:, None], kept[:, 1:]
