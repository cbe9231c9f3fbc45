"""RWKV-7's time mixing (Goose; Peng et al. 2025, arXiv 2503.14456): a generalised delta rule.

S_t = Diag(w_t) S_{t-1} - (a_t * kappa_t) (kappa_t^T S_{t-1}) + k'_t v_t^T,   o_t = S_t^T r_t
x_c = x + (x_before - x) * mu_c for c = r, w, k, v, a, g,   log w = -exp(-1/2) sigmoid(w0 + tanh(x_w W1) W2)
r, k, v = W x_c,   a = sigmoid(a0 + x_a A1 A2),   k' = k * (1 + (a - 1) * k_a),   kappa = k * k_k of length 1
v <- v + (v_first - v) * sigmoid(v0 + x_v V1 V2), v_first that of the stack's first layer of this kind
y = W_o ((headnorm(o) + (sum_K r * k' * r_k) v) * (sigmoid(x_g G1) G2))
x_before is the token before, 0 before a document's first. Source: the authors' RWKV-LM (x070), and FLA's
layer, which has an eps of 1e-6 under the root of that length. Their models have their own MLP and LayerNorms,
which are not here. The op is `dplr` with -kappa and a * kappa.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, rwkv
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, linears
from hybridlm.convert.rules import Rule, bias, low_rank, norm, reshaped, same
from hybridlm.errors import ConfigError
from hybridlm.fields import Count
from hybridlm.layers import Linear, param, split_heads, uniform
from hybridlm.linear_mixer import low_rank_recurrence
from hybridlm.mixers import Cost, Site
from hybridlm.rows import Rows
from hybridlm.rwkv import LowRank, TimeMix, constant, mix, place, ratios
from pallas_kernels.linear_attention.call import l2_normalize

FASTEST = -(2.718281828459045**-0.5)  # log w is above it
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # of the token shifts at first
FIRST = "rwkv7.values"


@dataclasses.dataclass(frozen=True)
class Config(rwkv.Config):
    """RWKV-7.

    decay_rank, rate_rank, value_rank, gate_rank: middle widths of w, a, the mixing of v, and g; 0 is 2.5,
        2.5, 1.7 and 5 times the root of d_model in multiples of 32, as in the authors' code.
    value_residual: whether layers take in the values of the first one.
    neg_eigval: a in (0, 2) instead of (0, 1), for state tracking (2411.12537): with a < 1 no eigenvalue is
        below exp(-exp(-1/2)) - 1 = -0.45.
    """

    decay_rank: Count = 0
    rate_rank: Count = 0
    value_rank: Count = 0
    gate_rank: Count = 0
    value_residual: bool = True
    neg_eigval: bool = False

    @property
    def carries(self) -> bool:
        return self.value_residual

    def cost(self, d_model: int, context: int) -> Cost:
        """FLOPs of the chunkwise form: four products of rows, and two updates of the state."""
        num, _, key, value = self.heads(d_model)
        flops = 8 * key * value + 4 * linear_mixer.CHUNK * (key + value) + linear_mixer.CHUNK**2
        return Cost(state=num * key * value + d_model, flops=num * flops)

    def explicit(self, d_model: int) -> "Config":
        rank = lambda given, factor: given or max(32, 32 * round(factor * d_model**0.5 / 32))
        return dataclasses.replace(
            self,
            num_heads=self.heads(d_model).num,
            decay_rank=rank(self.decay_rank, 2.5),
            rate_rank=rank(self.rate_rank, 2.5),
            value_rank=rank(self.value_rank, 1.7) if self.value_residual else 0,
            gate_rank=rank(self.gate_rank, 5.0),
        )


RANKS = {  # by FLA's field: (ours, what a missing one is, its factor of the root of d_model where it is null)
    "decay_low_rank_dim": ("decay_rank", 64, 2.5),
    "a_low_rank_dim": ("rate_rank", 64, 2.5),
    "v_low_rank_dim": ("value_rank", 16, 1.7),
    "gate_low_rank_dim": ("gate_rank", 128, 5.0),
}


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.ignore("num_heads")  # which counts where there is no head_dim alone
    head_dim = fields.size("head_dim", default=64)
    if "head_dim" in fields.values and fields.values["head_dim"] is None:
        head_dim = fields.part("num_heads", d_model, fields.size("num_heads"))
    layers = fields.size("num_hidden_layers")
    fields.only("value_dim", d_model, [d_model] * layers)
    heads = fields.part("head_dim", d_model, head_dim)
    found: dict[str, Any] = {"num_heads": heads, "head_dim": d_model // heads, "norm_eps": head_dim * eps}
    for name, (ours, missing, factor) in RANKS.items():
        wide = 1.0 if ours == "gate_rank" else head_dim / 64
        if name in fields.values and fields.values[name] is None:
            missing = max(32, 32 * round(factor * d_model**0.5 * wide / 32))
        found[ours] = fields.size(name, default=missing)
    return found


def _fla_write(config: Config, d_model: int) -> dict[str, Any]:
    if not config.value_residual:
        raise ConfigError("value_residual", False, "FLA's rwkv7 has it")
    if config.neg_eigval:
        raise ConfigError("neg_eigval", True, "FLA's rwkv7 has a in (0, 1) alone")
    if config.num_heads * config.head_dim != d_model:
        raise ConfigError("num_heads", config.num_heads, "times head_dim is d_model in FLA's rwkv7")
    ranks = {name: getattr(config, ours) for name, (ours, *_) in RANKS.items()}
    return {"num_heads": config.num_heads, "head_dim": config.head_dim} | ranks


def _fla_rules(config: Config, d_model: int) -> list[Rule]:
    each = lambda size: (size // config.head_dim, config.head_dim)
    return [
        *(reshaped(f"mix_{name}", f"x_{name}", lambda size: (1, 1, size)) for name in POWERS),
        *low_rank("w_proj", "w_lora"),
        *low_rank("a_proj", "a_lora"),
        *low_rank("value_proj", "v_lora"),
        *low_rank("g_proj", "g_lora", biased=False),
        same("k_k", "k_k"),
        same("k_a", "k_a"),
        reshaped("r_k", "r_k", each),
        *linears("rkvo"),
        norm("o_norm", "g_norm"),
        bias("o_norm", "g_norm"),
    ]


class Mixer(TimeMix):
    config_class = Config
    public: ClassVar = {"fla_rwkv": Format(_fla_read, _fla_write, _fla_rules, "attn.", "rwkv7", "RWKV7")}

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        d_model, config = site.d_model, config.explicit(site.d_model)
        self.heads, self.value_residual = config.heads(d_model), config.value_residual
        self.neg_eigval = config.neg_eigval
        width, (up, down) = self.heads.key_width, ratios(site.layer, site.num_layers)
        for name, power in POWERS.items():
            init = functools.partial(shift_init, power * down)
            setattr(self, f"mix_{name}", param(rngs, (d_model,), ("embed",), constant(init), decay=False))
        linear = lambda size: place(size) - 0.5
        speed = lambda size: 6 * place(size) ** (1 + up**0.3) - 5.5 + 2.5 * zigzag(size, config.head_dim)
        rate = lambda size: 0.3 * zigzag(size, config.head_dim) + 0.4 * linear(size) - 0.19

        def low(rank: int, bias: Any = None, act: Any = lambda x: x) -> LowRank:
            start = None if bias is None else constant(bias)
            init = jax.nn.initializers.orthogonal(0.1)
            return LowRank(d_model, width, rank, rngs=rngs, init=init, bias=start, act=act)

        self.w_proj = low(config.decay_rank, speed, jnp.tanh)
        self.a_proj = low(config.rate_rank, rate)
        if config.value_residual:
            self.value_proj = low(config.value_rank, lambda size: 0.73 - 0.4 * linear(size))
        self.g_proj = low(config.gate_rank, act=jax.nn.sigmoid)
        vector = lambda init: param(rngs, (width,), ("heads",), init, decay=False)
        self.k_k = vector(constant(lambda size: 0.71 - 0.1 * linear(size)))
        self.k_a = vector(jax.nn.initializers.constant(1.02))
        self.r_k = vector(jax.nn.initializers.constant(-0.04))
        bound = 0.5 * d_model**-0.5
        self.r_proj = Linear(d_model, width, rngs=rngs, init=uniform(-bound, bound))
        self.k_proj = Linear(d_model, width, rngs=rngs, init=uniform(-bound / 10, bound / 10))
        self.v_proj = Linear(d_model, width, rngs=rngs, init=uniform(-bound, bound))
        self.make_output(config, site, rngs)

    def time_mixed(
        self, x_BTD: jax.Array, earlier: jax.Array, context: Context, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        xs = {name: mix(x_BTD, earlier, getattr(self, f"mix_{name}")[...]) for name in POWERS}
        r, k, v = self.r_proj(xs["r"]), self.k_proj(xs["k"]), self.v_proj(xs["v"])
        if self.value_residual:
            first = context.left(FIRST, v)  # the first layer's own: it then mixes v with itself
            context.leave(FIRST, first)
            part = jax.nn.sigmoid(self.value_proj(xs["v"]))
            v = (v + (first.astype(jnp.float32) - v) * part).astype(v.dtype)
        heads = lambda x: split_heads(x, self.heads.key)
        o, own, state = time_mix(
            heads(r),
            heads(self.w_proj(xs["w"])),
            heads(k),
            heads(v),
            heads(linear_mixer.write_strength(self.a_proj(xs["a"]), self.neg_eigval)),
            heads(self.k_k[...]),
            heads(self.k_a[...]),
            heads(self.r_k[...]),
            context.rows,
            state,
        )
        o = self.o_norm(o) + own.reshape((*x_BTD.shape[:2], -1))
        return self.o_proj((o * self.g_proj(xs["g"])).astype(x_BTD.dtype)), state


def time_mix(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rate: jax.Array,
    k_k: jax.Array,
    k_a: jax.Array,
    r_k: jax.Array,
    rows: Rows,
    state: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(o and (sum_K r k' r_k) v, [B, T, H, V]; the state after the last token or None).

    r, k, v: [B, T, H, K].  w: before its sigmoid; rate: a; both float32.  k_k, k_a, r_k: [H, K].
    """
    wide = k.astype(jnp.float32)
    kappa, written = l2_normalize(wide * k_k), wide * (1 + (rate - 1) * k_a)
    own = jnp.sum(r.astype(jnp.float32) * written * r_k, axis=-1, keepdims=True) * v.astype(jnp.float32)
    log_decay = FASTEST * jax.nn.sigmoid(w.astype(jnp.float32))
    written, reads, moved = (x.astype(k.dtype) for x in (written, -kappa, kappa * rate))
    o, state = low_rank_recurrence(r, written, v, reads, moved, log_decay, rows=rows, state=state, scale=1.0)
    return o, own, state


def shift_init(power: jax.Array, size: int) -> jax.Array:
    return 1 - (jnp.arange(size) / size) ** power


def zigzag(size: int, head_dim: int) -> jax.Array:
    """z |z|, z from -1 to 1 over each head's channels."""
    z = 2 * (jnp.arange(size) % head_dim) / max(head_dim - 1, 1) - 1
    return z * jnp.abs(z)
