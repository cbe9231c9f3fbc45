"""Mamba (Gu, Dao 2023, arXiv 2312.00752): a selective scan, N state numbers for each of its channels.

h[c, n] <- exp(dt[c] A[c, n]) h[c, n] + dt[c] B[n] x[c],   y[c] = sum_n C[n] h[c, n] + D[c] x[c]
dt = softplus(W_dt r + dt_bias),  r, B, C = W x,  x = silu(conv(W_x u) + bias),  out = W_o (y * silu(W_z u))
Its models have no MLP: pattern "mamba/none". The scan keeps states only every 128 tokens for the backward
pass, which makes those between anew; what it keeps of a row is linear in T.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import layers, mixers, pieces
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, bias, concatenated, conv, linear, norm, same
from hybridlm.fields import Count, Epsilon, Positive
from hybridlm.layers import Linear, RecurrentCache, RMSNorm, ShortConv
from hybridlm.linear_mixer import dt_bias_init
from hybridlm.mixers import Cost, Site
from hybridlm.recurrent_mixer import RecurrentMixer, cut
from hybridlm.rms import rms
from hybridlm.rows import Rows, continued, joined
from hybridlm.sharding import per_shard
from pallas_kernels.elementwise import Piece


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Mamba, with the names of its public configs.

    expand: channels of the scan over d_model.
    state_size: state numbers per channel.
    dt_rank: width that dt is projected through; 0 is d_model / 16, rounded up.
    conv_size: taps of the short convolution of x; 0 for none.
    dbc_norm: of r, B and C: none, rms without a scale (Falcon-Mamba), or scaled (Jamba).
    norm_eps: of these norms.
    """

    expand: Positive = 2
    state_size: Positive = 16
    dt_rank: Count = 0
    conv_size: Count = 4
    dbc_norm: Literal["none", "rms", "scaled"] = "none"
    norm_eps: Epsilon = 1e-6

    def cost(self, d_model: int, context: int) -> Cost:
        width = self.expand * d_model
        history = max(self.conv_size - 1, 0) * width
        return Cost(state=width * self.state_size + history, flops=9 * width * self.state_size)

    def explicit(self, d_model: int) -> "Config":
        idle: dict[str, Any] = {"norm_eps": Config.norm_eps} if self.dbc_norm == "none" else {}
        return dataclasses.replace(self, dt_rank=self.dt_rank or -(-d_model // 16), **idle)


NAMES = dict(expand="expand", state_size="state_size", dt_rank="time_step_rank", conv_size="conv_kernel")
JAMBA = dict(
    expand="mamba_expand", state_size="mamba_d_state", dt_rank="mamba_dt_rank", conv_size="mamba_d_conv"
)
BIASES = "use_bias", "use_conv_bias"  # of the projections, of the convolution
JAMBA_BIASES = "mamba_proj_bias", "mamba_conv_bias"


def _hf(dbc_norm: str, eps_field: str = "", names: dict[str, str] = NAMES, biases: tuple[str, str] = BIASES,
        module: str = "mixer.", layer_type: str = "mamba") -> Format[Config]:  # fmt: skip
    """Of transformers' models. eps_field: that of ``dbc_norm``, "": the model's.  names: of fields."""

    def read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
        fields.only(biases[0], False)
        fields.only(biases[1], True)
        if fields.values.get(names["dt_rank"]) == "auto":
            fields.ignore(names["dt_rank"])
            rank = 0
        else:
            rank = fields.get(names["dt_rank"], 0)
        return {
            "expand": fields.size(names["expand"], default=2),
            "state_size": fields.size(names["state_size"], default=16),
            "dt_rank": rank,
            "conv_size": fields.size(names["conv_size"], default=4),
            "dbc_norm": dbc_norm,
            "norm_eps": fields.get(eps_field, 1e-6) if eps_field else eps,
        }

    def write(config: Config, d_model: int) -> dict[str, Any]:
        sizes = {theirs: getattr(config, ours) for ours, theirs in names.items()}
        own = {eps_field: config.norm_eps} if eps_field else {}
        return sizes | own | {biases[0]: False, biases[1]: True}

    return Format(read, write, _hf_rules, module, layer_type)


def _hf_rules(config: Config, d_model: int) -> list[Rule]:
    width = config.expand * d_model
    scales = enumerate(("dt", "b", "c") if config.dbc_norm == "scaled" else ())
    return [
        concatenated(("x_proj", "z_proj"), (width, width), "in_proj", linear),
        conv("x_conv", "conv1d"),
        bias("x_conv", "conv1d"),
        linear("dbc_proj", "x_proj"),
        *(norm(f"dbc_norms.{index}", f"{name}_layernorm") for index, name in scales),
        linear("dt_proj", "dt_proj"),
        same("dt_bias", "dt_proj.bias"),
        same("A_log", "A_log"),
        same("D", "D"),
        linear("o_proj", "out_proj"),
    ]


class Mixer(RecurrentMixer):
    config_class = Config
    public: ClassVar = {
        "mamba": _hf("none"),
        "falcon_mamba": _hf("rms", "mixer_rms_eps"),
        "jamba": _hf("scaled", "", JAMBA, JAMBA_BIASES, "mamba.", "linear_attention"),
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, state, rank = site.d_model, config.state_size, config.explicit(site.d_model).dt_rank
        self.config, self.sizes, self.width = config, (rank, state, state), config.expand * d_model
        self.state_shape = (self.width, state)
        self.x_proj = Linear(d_model, self.width, rngs=rngs)
        self.z_proj = Linear(d_model, self.width, rngs=rngs)
        if config.conv_size:
            self.x_conv = ShortConv(self.width, config.conv_size, rngs=rngs, bias=True)
        self.dbc_proj = Linear(self.width, sum(self.sizes), rngs=rngs, axes=("heads", None))
        if config.dbc_norm == "scaled":
            self.dbc_norms = nnx.List(RMSNorm(size, rngs=rngs, eps=config.norm_eps) for size in self.sizes)
        init = layers.uniform(-(rank**-0.5), rank**-0.5)
        self.dt_proj = Linear(rank, self.width, rngs=rngs, axes=(None, "heads"), init=init)
        self.dt_bias = layers.param(rngs, (self.width,), ("heads",), dt_bias_init, decay=False)
        self.A_log = layers.param(rngs, (self.width, state), ("heads", None), counted, decay=False)
        self.D = layers.param(rngs, (self.width,), ("heads",), layers.ones, decay=False)
        self.o_proj = Linear(self.width, d_model, rngs=rngs, axes=("heads", "embed"))

    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        past = None if fresh else before.history
        (x,), history = layers.convolve(self.convs, (self.x_proj(x_BTD),), context.rows, past, silu=True)
        r, B, C = self._dbc(x)
        dt = jax.nn.softplus(self.dt_proj(r).astype(jnp.float32) + self.dt_bias[...])
        y, state = selective_scan(x, dt, self.A_log[...], B, C, context.rows, before.state)
        y += self.D[...] * x.astype(jnp.float32)
        y *= jax.nn.silu(self.z_proj(x_BTD).astype(jnp.float32))
        return self.o_proj(y.astype(x_BTD.dtype)), RecurrentCache(state, history)

    def _dbc(self, x_BTF: jax.Array) -> list[jax.Array]:
        rank, state, _ = self.sizes
        parts = jnp.split(self.dbc_proj(x_BTF), (rank, rank + state), axis=-1)
        if self.config.dbc_norm == "rms":
            return [rms(part, self.config.norm_eps).astype(part.dtype) for part in parts]
        if self.config.dbc_norm == "scaled":
            return [norm(part) for norm, part in zip(self.dbc_norms, parts, strict=True)]
        return parts

    @property
    def convs(self) -> tuple[ShortConv, ...]:
        return (self.x_conv,) if self.config.conv_size else ()


def counted(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """log(1 ... N) in every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def selective_scan(
    x: jax.Array, dt: jax.Array, A_log: jax.Array, B: jax.Array, C: jax.Array, rows: Rows, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(sum_n C h float32 [B, T, F], the state after the last token).

    x, dt: [B, T, F].  A_log: [F, N].  B, C: [B, T, N].  state: [B, F, N], as in `layers.elementwise`.
    """
    if over := pieces.over(x.shape[1]):
        wide, narrow = ("batch", "time", "heads"), ("batch", "time", None)
        states, row = ("batch", "heads", None), ("batch", "time")
        op = lambda *args: _of_a_piece(*args, axis=over)
        in_axes = (wide, wide, ("heads", None), narrow, narrow, row, row, states)
        return per_shard(op, in_axes, (wide, states))(x, dt, A_log, B, C, *rows, continued(state, rows))
    return _scan(x, dt, A_log, B, C, rows, state)


def _of_a_piece(
    x: jax.Array, dt: jax.Array, A_log: jax.Array, B: jax.Array, C: jax.Array,
    segment_ids: jax.Array, positions: jax.Array, state: jax.Array, *, axis: str,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`selective_scan` of a piece of the rows: first from zeros, for what it does to the state."""
    rows, starts = Rows(segment_ids, positions), pieces.starts(segment_ids, axis)
    flat = lambda a: a.reshape(len(x), -1)
    alone = _scan(x, dt, A_log, B, C, rows, jnp.zeros_like(state))[1]
    decay = jnp.exp(-jnp.exp(A_log) * dt.astype(jnp.float32).sum(1)[..., None])
    whole = Piece(flat(decay), flat(alone), starts.any(1, keepdims=True))
    before, last = pieces.elementwise_states(whole, starts, flat(state), axis)
    return _scan(x, dt, A_log, B, C, rows, before.reshape(state.shape))[0], last.reshape(state.shape)


def _scan(
    x: jax.Array, dt: jax.Array, A_log: jax.Array, B: jax.Array, C: jax.Array, rows: Rows, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """By pieces; beyond the end dt is 0, so that the state stays."""
    batch, length, width = x.shape

    @jax.checkpoint
    def piece(state_BM: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        x, dt, B, C, rows = inputs
        size = x.shape[1]
        flat = lambda a: a.reshape(batch, size, -1)
        log_decay = flat(-jnp.exp(A_log) * dt[..., None])
        written = flat((dt * x)[..., None] * B[:, :, None])
        h, state_BM = layers.elementwise(written, log_decay, rows, state_BM)
        return state_BM, jnp.einsum("btfn,btn->btf", h.reshape(batch, size, width, -1), C)

    floats = (a.astype(jnp.float32) for a in (x, dt, B, C))
    last, y = jax.lax.scan(piece, state.reshape(batch, -1), cut((*floats, rows)))
    return joined(y, length), last.reshape(state.shape)
