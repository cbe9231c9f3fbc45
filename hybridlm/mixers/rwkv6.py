"""RWKV-6's time mixing (Finch; Peng et al. 2024, arXiv 2404.05892): a decay per channel, read before writing.

o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t,   S_t = Diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T
x_c = x + (x_before - x) * (mu_c + tanh(z A)_c B_c) for c = w, k, v, r, g,   z = x + (x_before - x) * mu_x
w = w0 + tanh(x_w D1) D2,   r, k, v = W x_c,   y = W_o (headnorm(o) * silu(W_g x_g))
x_before is the token before, 0 before a document's first. Source: the authors' RWKV-LM (x060), whose models
have their own MLP and LayerNorms, which are not here.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import linear_mixer, rwkv
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, head_fields
from hybridlm.convert.rules import Rule, bias, linear, low_rank, norm, reshaped, same
from hybridlm.fields import Count, Positive
from hybridlm.layers import Linear, param, split_heads, uniform, zeros
from hybridlm.linear_mixer import Heads, Inputs, recurrence
from hybridlm.mixers import Cost, Site
from hybridlm.rows import Rows, continued
from hybridlm.rwkv import LowRank, TimeMix, constant, mix, place, ratios

STREAMS = "wkvrg"


@dataclasses.dataclass(frozen=True)
class Config(rwkv.Config):
    """RWKV-6.

    mix_rank, decay_rank: middle widths of what moves the token shift and the decay.
    v_head_dim: channels of v per head; 0 is head_dim, those of r, k and the decay.
    """

    mix_rank: Positive = 32
    decay_rank: Positive = 64
    v_head_dim: Count = 0

    def heads(self, d_model: int) -> Heads:
        heads = super().heads(d_model)
        return heads._replace(value=self.v_head_dim or heads.value)

    def cost(self, d_model: int, context: int) -> Cost:
        one = linear_mixer.cost(self.heads(d_model), 0, delta=False)
        return one._replace(state=one.state + d_model)

    def explicit(self, d_model: int) -> "Config":
        heads = self.heads(d_model)
        return dataclasses.replace(self, num_heads=heads.num, v_head_dim=heads.value)


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_heads", default=4)
    return {
        "num_heads": heads,
        "head_dim": fields.part("expand_k", d_model * fields.get("expand_k", 0.5), heads),
        "v_head_dim": fields.part("expand_v", d_model * fields.get("expand_v", 1.0), heads),
        "mix_rank": fields.size("proj_low_rank_dim", default=32),
        "decay_rank": fields.size("gate_low_rank_dim", default=64),
        "norm_eps": eps,
    }


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    ranks = {"proj_low_rank_dim": config.mix_rank, "gate_low_rank_dim": config.decay_rank}
    return head_fields(config.num_heads, config.head_dim, config.v_head_dim, d_model) | ranks


ORDER = "rwkvg"  # of the streams in FLA
THEIRS = [STREAMS.index(name) for name in ORDER]
OURS = [ORDER.index(name) for name in STREAMS]


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    rank = config.mix_rank
    low = Rule(
        ("mix_A",),
        ("x_proj.0.linear.weight",),
        lambda arrays: [arrays[0].reshape(5, rank, -1)[OURS].reshape(5 * rank, -1).T],
        lambda arrays: [arrays[0].T.reshape(5, rank, -1)[THEIRS].reshape(5 * rank, -1)],
    )
    up = Rule(
        ("mix_B",),
        ("x_proj.2.weight",),
        lambda arrays: [arrays[0].reshape(-1, 5, rank).transpose(1, 2, 0)[OURS]],
        lambda arrays: [arrays[0][THEIRS].transpose(2, 0, 1).reshape(-1, 5 * rank)],
    )
    shifts = tuple(f"mix_{name}" for name in ORDER)
    return [
        low,
        up,
        same("mix_x", "x_proj.0.mu"),
        Rule(shifts, ("x_bias",), lambda arrays: list(arrays[0]), lambda arrays: [np.stack(arrays)]),
        *(linear(f"{name}_proj", f"{name}_proj.linear") for name in "rkvg"),
        *low_rank("w_proj", "w_proj.linear"),
        reshaped("u", "bonus", lambda size: (size // config.head_dim, config.head_dim)),
        linear("o_proj", "o_proj"),
        norm("o_norm", "g_norm"),
        bias("o_norm", "g_norm"),
    ]


class Mixer(TimeMix):
    config_class = Config
    public: ClassVar = {"fla_rwkv": Format(_fla_read, _fla_write, _fla_rules, "attn.", "rwkv6", "RWKV6")}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, self.heads = site.d_model, config.heads(site.d_model)
        width, rank, (up, down) = self.heads.key_width, config.mix_rank, ratios(site.layer, site.num_layers)
        channel = jnp.arange(d_model) / d_model
        first = lambda power, more=0.0: constant(lambda size: 1 - channel ** (power * down) - more)
        self.mix_x = param(rngs, (d_model,), ("embed",), first(1.0), decay=False)
        self.mix_A = param(rngs, (d_model, 5 * rank), ("embed", None), zeros, decay=False, cast=True)
        small = uniform(-0.01, 0.01)
        self.mix_B = param(rngs, (5, rank, d_model), (None, None, "embed"), small, decay=False, cast=True)
        powers = dict(w=first(1.0), k=first(1.0), v=first(1.0, 0.3 * up), r=first(0.5), g=first(0.5))
        for name, init in powers.items():
            setattr(self, f"mix_{name}", param(rngs, (d_model,), ("embed",), init, decay=False))
        decay = constant(lambda size: -6 + 5 * place(size) ** (0.7 + 1.3 * up))
        self.w_proj = LowRank(
            d_model, width, config.decay_rank, rngs=rngs, init=small, bias=decay, act=jnp.tanh
        )
        zigzag = lambda size: up * (1 - place(size)) + 0.1 * ((jnp.arange(size) + 1) % 3 - 1)
        self.u = param(rngs, (width,), ("heads",), constant(zigzag), decay=False)
        whole, tenth = jax.nn.initializers.orthogonal(), jax.nn.initializers.orthogonal(0.1)
        self.r_proj = Linear(d_model, width, rngs=rngs, init=whole)
        self.k_proj = Linear(d_model, width, rngs=rngs, init=tenth)
        self.v_proj = Linear(d_model, self.heads.value_width, rngs=rngs, init=whole)
        self.g_proj = Linear(d_model, self.heads.value_width, rngs=rngs, init=tenth)
        self.make_output(config, site, rngs)

    def time_mixed(
        self, x_BTD: jax.Array, earlier: jax.Array, context: Context, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        xs = self._streams(x_BTD, earlier)
        r, k = (split_heads(y, self.heads.key) for y in (self.r_proj(xs["r"]), self.k_proj(xs["k"])))
        v = split_heads(self.v_proj(xs["v"]), self.heads.value)
        log_decay = -jnp.exp(split_heads(self.w_proj(xs["w"]), self.heads.key))
        u_HK = split_heads(self.u[...], self.heads.key)
        o, state = wkv(r, k, v, log_decay, u_HK, context.rows, state)
        gate = jax.nn.silu(self.g_proj(xs["g"]).astype(jnp.float32))
        return self.o_proj((self.o_norm(o) * gate).astype(x_BTD.dtype)), state

    def _streams(self, x_BTD: jax.Array, earlier: jax.Array) -> dict[str, jax.Array]:
        """x_c of the module docstring by c."""
        z = mix(x_BTD, earlier, self.mix_x[...])
        low = split_heads(jnp.tanh(z @ self.mix_A[...].astype(z.dtype)), self.mix_B.shape[1])
        moves = jnp.einsum("btcr,crd->cbtd", low, self.mix_B[...].astype(z.dtype)).astype(jnp.float32)
        return {
            name: mix(x_BTD, earlier, getattr(self, f"mix_{name}")[...] + move)
            for name, move in zip(STREAMS, moves, strict=True)
        }


def wkv(
    r: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    u_HK: jax.Array,
    rows: Rows,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """(o float32 [B, T, H, V], the state after the last token or None).

    The op reads after it has written: token t asks there for what token t + 1 is to read, one place later.
    """
    wide = r.astype(jnp.float32)
    own = jnp.sum(wide * u_HK * k.astype(jnp.float32), axis=-1, keepdims=True) * v.astype(jnp.float32)
    next_r = jnp.concatenate([r[:, 1:], jnp.zeros_like(r[:, :1])], axis=1)
    o, after = recurrence(Inputs(next_r, k, v, log_decay), rows, state, scale=1.0)
    first = jnp.zeros_like(own[:, :1])
    if state is not None:
        first = jnp.einsum("bhk,bhkv->bhv", wide[:, 0], continued(state, rows))[:, None]
    read = jnp.concatenate([first, o[:, :-1].astype(jnp.float32)], axis=1)
    return jnp.where((rows.positions == 0)[..., None, None], 0, read) + own, after
