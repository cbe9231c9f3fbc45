"""mLSTM (xLSTM, arXiv 2405.04517; as in xLSTM 7B, 2503.13427): linear attention with gates and a normaliser.

C_t = f C_{t-1} + i k_t v_t^T,   n_t = f n_{t-1} + i k_t,   h_t = C_t^T q_t / (max(|n_t . q_t|, 1) + eps)
y = W_o (layernorm(h) * sigmoid(W_g x)), a norm per head;   f = sigmoid(f'),  f' and i' soft-capped W x + bias
exponential input gate: i = exp(i').  C and n are kept divided by exp(m),  m_t = max(log f_t + m_{t-1}, i'_t),
m_0 = 0, so that nothing overflows: h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps).
sigmoid (TFLA, 2503.14376): i = sigmoid(i'), no m.   q is divided by sqrt(K).
In `Inputs` log_decay is log f and beta is i'.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, pieces
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, NonNegative
from hybridlm.layers import Linear, RecurrentCache, RMSNorm, elementwise, merge_heads, normal, param, zeros
from hybridlm.linear_mixer import Inputs, LinearMixer, OutputGate
from hybridlm.mixers import Cost, Site
from hybridlm.rows import Rows, continued
from hybridlm.sharding import per_shard

FORGET = -1e30  # a log decay: what came before does not count


@dataclasses.dataclass(frozen=True)
class Config(linear_mixer.Config):
    """mLSTM. Keys take d_model / 2, values d_model.

    input_gate: exponential (stabilised) or sigmoid.
    normalizer: whether what is read is divided by |n . q|.
    gate_cap: i' and f' stay within it, cap * tanh(x / cap); 0 for no cap.
    eps: beside the normaliser.
    """

    v_expansion: ClassVar[int] = 2

    conv_size: Count = 0
    output_gate: OutputGate = "sigmoid"
    input_gate: Literal["exponential", "sigmoid"] = "exponential"
    normalizer: bool = True
    gate_cap: NonNegative = 15.0
    eps: NonNegative = 1e-6

    def key_width(self, d_model: int) -> int:
        return d_model // 2

    def cost(self, d_model: int, context: int) -> Cost:
        heads, cost = self.heads(d_model), super().cost(d_model, context)
        n = heads.key_width if self.normalizer else 0
        return cost._replace(state=cost.state + heads.num + n, flops=cost.flops + 5 * n)

    def near_attention(self) -> dict[str, float]:
        return {"i_bias": 0.0, "f_bias": -linear_mixer.inverse_softplus(linear_mixer.NEAR_NONE)}


def _hf_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_heads", default=8)
    fields.only("weight_mode", "single")
    fields.only("use_bias", False)
    return {
        "num_heads": heads,
        "head_dim": fields.part("qk_dim_factor", int(d_model * fields.get("qk_dim_factor", 0.5)), heads),
        "v_head_dim": fields.part("v_dim_factor", int(d_model * fields.get("v_dim_factor", 1.0)), heads),
        "norm_eps": eps,
        "gate_cap": fields.get("gate_soft_cap", 15.0),
        "eps": fields.get("eps", 1e-6),
    }


def _hf_write(config: Config, d_model: int) -> dict[str, Any]:
    if not config.gate_cap:
        raise ConfigError("gate_cap", config.gate_cap, "must be above 0 in this format")
    return {
        "num_heads": config.num_heads,
        "qk_dim_factor": config.num_heads * config.head_dim / d_model,
        "v_dim_factor": config.num_heads * config.v_head_dim / d_model,
        "gate_soft_cap": config.gate_cap,
        "eps": config.eps,
        "weight_mode": "single",
        "use_bias": False,
    }


def _hf_rules(config: Config, d_model: int) -> list[Rule]:
    gates = [(f"{one}_proj", f"{one}gate_preact") for one in "if"]
    return [
        *(linear(f"{one}_proj", one) for one in "qkv"),
        linear("g_proj", "ogate_preact"),
        *(linear(*pair) for pair in gates),
        *(same(ours.replace("proj", "bias"), f"{theirs}.bias") for ours, theirs in gates),
        norm("o_norm", "multihead_norm"),
        linear("o_proj", "out_proj"),
    ]


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {"xlstm": Format(_hf_read, _hf_write, _hf_rules, "mlstm_layer.", "mlstm")}
    silu = False

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        super().__init__(config, site, rngs=rngs)
        self.config, num, width = config, self.heads.num, self.heads.value_width
        self.i_proj = Linear(site.d_model, num, rngs=rngs, init=zeros)
        self.f_proj = Linear(site.d_model, num, rngs=rngs, init=zeros)
        self.i_bias = param(rngs, (num,), ("heads",), jax.nn.initializers.constant(-10.0), decay=False)
        spread = lambda key, shape, dtype: jnp.linspace(3.0, 6.0, shape[0], dtype=dtype)
        self.f_bias = param(rngs, (num,), ("heads",), spread, decay=False)
        self.o_norm = RMSNorm(width, rngs=rngs, eps=config.norm_eps, axis="heads", groups=num)
        init = normal(2 / site.num_layers / site.d_model**0.5)
        self.o_proj = Linear(width, site.d_model, rngs=rngs, axes=("heads", "embed"), init=init)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        i = self.i_proj(x_BTD).astype(jnp.float32) + self.i_bias[...]
        f = self.f_proj(x_BTD).astype(jnp.float32) + self.f_bias[...]
        if cap := self.config.gate_cap:
            i, f = cap * jnp.tanh(i / cap), cap * jnp.tanh(f / cap)
        return Inputs(q, k, v, jax.nn.log_sigmoid(f), i)

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        return mlstm(inputs, rows, state, self.config)

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        o = o_BTHV.astype(jnp.float32)
        o = merge_heads(o - o.mean(-1, keepdims=True))
        return self.o_norm(o, None if gate_BTHV is None else merge_heads(gate_BTHV)).astype(o_BTHV.dtype)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        cache, (num, _, key, _) = super().init_cache(batch, max_length, dtype), self.heads
        state = {"C": cache.state, "m": jnp.zeros((batch, num), jnp.float32)}
        if self.config.normalizer:
            state["n"] = jnp.zeros((batch, num * key), jnp.float32)
        return cache._replace(state=state)


def mlstm(inputs: Inputs, rows: Rows, state: Any, config: Config) -> tuple[jax.Array, Any]:
    """(h [B, T, H, V] in v's dtype, the state after the last token or None); see the module docstring.

    state: None or C [B, H, K, V], m [B, H] (0 with sigmoid gates) and, with a normaliser, n [B, H * K].
    """
    q, k, v, log_f, log_i = inputs[:5]
    assert log_f is not None and log_i is not None
    batch, _, heads, key = k.shape
    m_BH = jnp.zeros((batch, heads)) if state is None else continued(state["m"], rows)
    if config.input_gate == "sigmoid":
        i, floor, m = jax.nn.sigmoid(log_i), jnp.float32(1), jnp.zeros_like(log_i)
    else:
        m, before = stabilizer(log_i, log_f, rows, m_BH)
        i, floor = jnp.exp(log_i - m), jnp.exp(-m)
        log_f += before - m
        log_f -= jax.lax.stop_gradient(jnp.maximum(log_f, 0))  # a minimum halves gradients at 0
    written = (v.astype(jnp.float32) * i[..., None]).astype(v.dtype)
    o, C = linear_mixer.recurrence(Inputs(q, k, written, log_f), rows, None if state is None else state["C"])
    after = {"C": C, "m": m[:, -1]}
    if config.normalizer:
        x, flat = merge_heads(k.astype(jnp.float32) * i[..., None]), jnp.repeat(log_f, key, axis=-1)
        n, after["n"] = elementwise(x, flat, rows, jnp.zeros_like(x[:, 0]) if state is None else state["n"])
        dot = (n.reshape(q.shape) * q.astype(jnp.float32)).sum(-1) * key**-0.5
        o = (o / (jnp.maximum(jnp.abs(dot), floor) + config.eps)[..., None]).astype(v.dtype)
    return o, None if state is None else after


def stabilizer(
    log_i: jax.Array, log_f: jax.Array, rows: Rows, m_BH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(m [B, T, H] after ``m_BH``, m before each token), without a gradient: it moves h by eps only.

    What is not finite counts as 0, since no sum would keep it out of the next document: what it spoils of its
    own is said by the rest.
    """
    given = jax.lax.stop_gradient((log_i, log_f, m_BH))
    log_i, log_f, start_BH = (jnp.where(jnp.isfinite(x), x, 0) for x in given)
    if over := pieces.over(log_f.shape[1]):
        wide = ("batch", "time", "heads")
        op = lambda *args: _stabilizer_piece(*args, axis=over)
        run = per_shard(op, (wide, wide, ("batch", "time"), ("batch", "heads")), (wide, wide))
        return run(log_i, log_f, rows.positions, start_BH)
    starts = (rows.positions == 0)[..., None]
    reached = jnp.where(starts, jnp.maximum(log_f, log_i), log_i)
    reached = reached.at[:, 0].max(log_f[:, 0] + start_BH)
    join = lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1]))
    pairs = jnp.where(starts, FORGET, log_f), reached
    m = jax.lax.associative_scan(join, pairs, axis=1)[1]
    return m, jnp.concatenate([m_BH[:, None], m[:, :-1]], axis=1)


def _stabilizer_piece(
    log_i: jax.Array, log_f: jax.Array, positions: jax.Array, m_BH: jax.Array, *, axis: str
) -> tuple[jax.Array, jax.Array]:
    starts = (positions == 0)[..., None]
    reached = jnp.where(starts, jnp.maximum(log_f, log_i), log_i)
    join = lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1]))
    scan = lambda *pair: jax.lax.associative_scan(join, pair, axis=1)
    m = pieces.running_max(scan, jnp.where(starts, FORGET, log_f), reached, m_BH, axis)
    last = pieces.before(m, 1, axis, m_BH[:, None])
    return m, jnp.concatenate([last, m[:, :-1]], axis=1)
