"""What the linear mixers have in common; each kind adds its gates.

    q, k, v = act(conv(x W_q)), act(conv(x W_k)), act(conv(x W_v))      short convolution per channel
    o = recurrence(q, k, v, log_decay, beta)                            one matrix state per value head
    y = (rmsnorm(o) * act(gate)) W_o                                    norm per head, gate optional

Parameterisation: FLA's layers (flash-linear-attention). Gates, log-decays and beta are float32.

Shape legend: B batch, T time, D model width, H key heads, HV value heads (multiple of H), K and V their dims.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import mixers, pieces
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Positive
from hybridlm.layers import (
    PASSED,
    Initializer,
    Linear,
    RecurrentCache,
    RMSNorm,
    ShortConv,
    convolve,
    merge_heads,
    split_heads,
)
from hybridlm.mixers import Cost, KeyGates, Site, TokenMixer, whole_heads
from hybridlm.rows import Rows, continued
from hybridlm.sharding import per_shard
from pallas_kernels import dplr, linear_attention, linear_attention_step

OUTPUT_GATES = {"none": None, "sigmoid": jax.nn.sigmoid, "swish": jax.nn.silu, "linear": lambda x: x}
OutputGate = Literal["none", "sigmoid", "swish", "linear"]
NEAR_NONE = 1e-3  # of a decay that starts near none and still has a gradient: half is left after 700 tokens
KEY_GATE = 16  # divides logsigmoid(keys) where a decay is made of keys, as in Liger's code and GLA's gate
CHUNK = 64  # tokens a chunk in the FLOP count, as in the papers


class Heads(NamedTuple):
    """Sizes of a linear mixer: num key heads of key channels, num_v value heads of value channels."""

    num: int
    num_v: int
    key: int
    value: int

    @property
    def key_width(self) -> int:
        return self.num * self.key

    @property
    def value_width(self) -> int:
        return self.num_v * self.value

    def check(self) -> None:
        """ConfigError unless all sizes are positive and value heads divide among key heads."""
        fields = ("num_heads", "num_v_heads", "head_dim", "v_head_dim")
        for field, size in zip(fields, self, strict=True):
            if size < 1:
                raise ConfigError(field, size, "must be at least 1")
        if self.num_v % self.num:
            raise ConfigError("num_v_heads", self.num_v, f"must be a multiple of num_heads = {self.num}")


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Settings of every linear mixer; a kind adds its own and its defaults.

    num_heads: key heads; 0 is key_width / head_dim, with key_width = d_model unless the kind says otherwise.
    head_dim: channels of q and k per head.
    v_head_dim: channels of v per value head; 0 is v_expansion * head_dim.
    conv_size: taps of the short convolutions with SiLU on q, k, v; 0 for none.
    output_gate: "none", or "swish" or "sigmoid" of a projection of the layer's input, or "linear": itself.
    norm_eps: of the output norm.
    """

    v_expansion: ClassVar[int] = 1
    delta: ClassVar[bool] = False  # whether the update is the delta rule's, for the FLOP count

    num_heads: Count = 0
    head_dim: Positive = 128
    v_head_dim: Count = 0
    conv_size: Count = 4
    output_gate: OutputGate = "none"
    norm_eps: Epsilon = 1e-6

    @property
    def writes(self) -> int:
        """Keys and values that a token writes, one after the other; see `LinearMixer.recur`."""
        return 1

    def key_width(self, d_model: int) -> int:
        return d_model

    def heads(self, d_model: int) -> Heads:
        num = self.num_heads or self.key_width(d_model) // self.head_dim
        return Heads(num, num, self.head_dim, self.v_head_dim or self.v_expansion * self.head_dim)

    def check(self, d_model: int) -> None:
        whole_heads(self, self.key_width(d_model), self.head_dim)
        self.heads(d_model).check()

    def cost(self, d_model: int, context: int) -> Cost:
        return cost(self.heads(d_model), self.conv_size, delta=self.delta, writes=self.writes)

    def explicit(self, d_model: int) -> Self:
        heads = self.heads(d_model)
        return dataclasses.replace(self, num_heads=heads.num, head_dim=heads.key, v_head_dim=heads.value)


@dataclasses.dataclass(frozen=True)
class GroupedConfig(Config):
    """A `Config` with grouped value heads and a delta rule's beta.

    num_v_heads: value heads, a multiple of num_heads (neighbours share a key head); 0 is num_heads.
    neg_eigval: beta in (0, 2) instead of (0, 1), for state tracking (2411.12537).
    """

    delta: ClassVar[bool] = True

    num_v_heads: Count = 0
    neg_eigval: bool = False

    def heads(self, d_model: int) -> Heads:
        heads = super().heads(d_model)
        return heads._replace(num_v=self.num_v_heads or heads.num)

    def explicit(self, d_model: int) -> Self:
        return dataclasses.replace(super().explicit(d_model), num_v_heads=self.heads(d_model).num_v)


class Inputs(NamedTuple):
    """Arguments of the recurrence: q, k [B, T, H, K]; v [B, T, HV, V]; gates [B, T, HV(, K)] float32.

    skip: [B, T, HV, V], added to what the recurrence reads.
    gate: [B, T, rank], what the first of two matrices of the output gate made, where the kind has it already.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None = None
    beta: jax.Array | None = None
    skip: jax.Array | None = None
    gate: jax.Array | None = None


class LinearMixer(TokenMixer):
    """Projections, short convolutions, recurrence, gated output norm. A kind defines `inputs`.

    gate_rank: of the output gate: 0 for one matrix, else the middle width of two.
    gate_bias: bias of the second of the two.
    silu: whether SiLU acts on q, k and v, after their convolutions if there are any.
    scale: of the queries; None is K**-0.5.
    conv_bias: whether the short convolutions have a bias.
    joined: whether those of q and k are one to the op.
    neg_eigval: whether beta may be above 1, which the op is told.
    """

    qk_l2norm = False
    silu = True
    scale: float | None = None
    conv_bias = False
    joined = False
    neg_eigval = False

    def __init__(
        self, config: Config, site: Site, *, rngs: nnx.Rngs, gate_rank: int = 0, gate_bias: bool = False
    ):
        d_model = site.d_model
        self.heads = heads = config.heads(d_model)
        self.conv_size = conv_size = config.conv_size
        self.output_gate = output_gate = config.output_gate
        value_width, self.writes = heads.value_width, config.writes
        widths = heads.key_width, self.writes * heads.key_width, self.writes * value_width
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width, rngs=rngs) for width in widths)
        if conv_size:
            self.q_conv, self.k_conv, self.v_conv = (
                ShortConv(width, conv_size, rngs=rngs, bias=self.conv_bias) for width in widths
            )
        self.gate_rank = gate_rank
        if output_gate != "none" and gate_rank:
            self.g_a_proj = Linear(d_model, gate_rank, rngs=rngs, axes=("embed", None))
            self.g_b_proj = Linear(gate_rank, value_width, rngs=rngs, axes=(None, "heads"), bias=gate_bias)
        elif output_gate != "none":
            self.g_proj = Linear(d_model, value_width, rngs=rngs)
        self.o_norm = RMSNorm(heads.value, rngs=rngs, eps=config.norm_eps)
        self.o_proj = Linear(value_width, d_model, rngs=rngs, axes=("heads", "embed"))

    # What a kind overrides.

    @abc.abstractmethod
    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        """The recurrence's arguments from the projected and activated q, k, v (already split into heads)."""
        raise NotImplementedError

    def recur(self, inputs: Inputs, rows: Rows, state: Any) -> tuple[jax.Array, Any]:
        """(o [B, T, HV, V], the state after the last token, or None where ``state`` is None)."""
        options: dict[str, Any] = dict(qk_l2norm=self.qk_l2norm, scale=self.scale, strong=self.neg_eigval)
        return recurrence(inputs, rows, state, **options)

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        """The output norm, heads merged: [B, T, HV * V]."""
        return checkpoint_name(merge_heads(self.o_norm(o_BTHV, gate_BTHV)), PASSED)

    # The skeleton.

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        inputs, history = self.prepare(x_BTD, context, None if cache is None else cache.history)
        o_BTHV, state = self.recur(inputs, context.rows, None if cache is None else cache.state)
        y_BTD = self.finish(x_BTD, inputs, o_BTHV)
        return y_BTD, None if state is None else RecurrentCache(state, history)

    def prepare(
        self, x_BTD: jax.Array, context: Context, past: tuple[jax.Array, ...] | None
    ) -> tuple[Inputs, tuple[jax.Array, ...]]:
        """(what the recurrence is given, the convolutions' history); past: theirs, None: there is none."""
        heads = self.heads
        qkv = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        joined = 2 * self.joined
        (q, k, v), history = convolve(self._convs(), qkv, context.rows, past, silu=self.silu, joined=joined)
        q, k = split_heads(q, heads.key), split_heads(k, heads.key)
        return self.inputs(x_BTD, q, k, split_heads(v, heads.value), context), history

    def finish(self, x_BTD: jax.Array, inputs: Inputs, o_BTHV: jax.Array) -> jax.Array:
        """y [B, T, D] of what was read: the skip, the gated norm and the output projection."""
        if inputs.skip is not None:
            o_BTHV += inputs.skip.astype(o_BTHV.dtype)
        return self.o_proj(self.normalize(o_BTHV, self._gate(x_BTD, inputs.gate)))

    def _convs(self) -> tuple[ShortConv, ...]:
        return (self.q_conv, self.k_conv, self.v_conv) if self.conv_size else ()

    def _gate(self, x_BTD: jax.Array, low_BTR: jax.Array | None) -> jax.Array | None:
        act = OUTPUT_GATES[self.output_gate]
        if act is None:
            return None
        if self.gate_rank:
            logits = self.g_b_proj(self.g_a_proj(x_BTD) if low_BTR is None else low_BTR)
        else:
            logits = self.g_proj(x_BTD)
        return act(split_heads(logits, self.heads.value).astype(jnp.float32))

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        heads = self.heads
        state = jnp.zeros((batch, heads.num_v, heads.key, heads.value), jnp.float32)
        return RecurrentCache(state, tuple(conv.init_history(batch, dtype) for conv in self._convs()))


def recurrence(
    inputs: Inputs,
    rows: Rows,
    state: jax.Array | None = None,
    *,
    qk_l2norm: bool = False,
    scale: float | None = None,
    strong: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The op on each device's own rows and heads; documents never meet.  strong: as the op's.

    state: None (start from nothing, return nothing) or float32 [B, HV, K, V], carried on where a row's first
        position is not 0. Returns (o [B, T, HV, V], state after the last token or None).
    """
    over = pieces.over(inputs.q.shape[1])
    if inputs.log_decay is not None:
        inputs = inputs._replace(log_decay=checkpoint_name(inputs.log_decay, PASSED))

    def op(*arrays: Any) -> tuple[jax.Array, jax.Array | None]:
        q, k, v, log_decay, beta, segment_ids, state = arrays
        if state is not None and q.shape[1] == 1:
            g, b = (None if gate is None else gate[:, 0] for gate in (log_decay, beta))
            o_BHV, state = linear_attention_step(
                q[:, 0], k[:, 0], v[:, 0], state=state, log_decay=g, beta=b, qk_l2norm=qk_l2norm, scale=scale
            )
            return o_BHV[:, None], state
        call: dict[str, Any] = {"log_decay": log_decay, "beta": beta}
        call |= {"segment_ids": segment_ids, "qk_l2norm": qk_l2norm}
        last, carried = None, state
        if over and state is None:
            call |= {"axis": over, "continues": pieces.continues(segment_ids, over)}
        elif over:
            carried, last = pieces.linear_states(state, over, q=q, k=k, v=v, **call)
        call |= {"initial_state": carried, "output_final_state": state is not None}
        o, own_last = linear_attention(q, k, v, **call, scale=scale, strong=strong)
        return o, None if state is None else own_last if last is None else last

    if state is not None:
        state = continued(state, rows)
    token_axes, state_axes = ("batch", "time", "heads", None), ("batch", "heads", None, None)
    args = (*inputs[:5], rows.segment_ids, state)
    in_axes = [None if arg is None else token_axes[: arg.ndim] for arg in args[:-1]]
    out_state = None if state is None else state_axes
    return per_shard(op, (*in_axes, out_state), (token_axes, out_state))(*args)


def low_rank_recurrence(
    *qkvab_and_decay: jax.Array, rows: Rows, state: jax.Array | None, scale: float | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.dplr` on each device's own rows and heads; documents never meet. See `recurrence`."""
    first = None if state is None else continued(state, rows)

    def op(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        *per_token, g, segment_ids, before = arrays
        return dplr(*per_token, log_decay=g, initial_state=before, segment_ids=segment_ids, scale=scale)

    token_axes, state_axes = ("batch", None, "heads", None), ("batch", "heads", None, None)
    in_axes = (*[token_axes] * 6, ("batch", None), None if first is None else state_axes)
    o, last = per_shard(op, in_axes, (token_axes, state_axes))(*qkvab_and_decay, rows.segment_ids, first)
    return o, None if state is None else last


# Gates that several kinds have.


@jax.custom_vjp
def softplus_decay(x: jax.Array, A_log: jax.Array, dt_bias: jax.Array) -> jax.Array:
    """log decay = -exp(A_log) * softplus(x + dt_bias), float32 (Mamba-2's discretisation).

    dt_bias: of x's last axes.  A_log: broadcast to it. The gradient's sums over tokens are alike, so that XLA
    makes one kernel of it, which reads what it is given once: its own takes three, and float32 between them.
    """
    return -jnp.exp(A_log) * jax.nn.softplus(x.astype(jnp.float32) + dt_bias)


def _softplus_decay_backward(kept: tuple, d_decay: jax.Array) -> tuple[jax.Array, ...]:
    x, A_log, dt_bias = kept
    z = x.astype(jnp.float32) + dt_bias
    scaled = -jnp.exp(A_log) * d_decay
    d_z, d_A_log = scaled * jax.nn.sigmoid(z), scaled * jax.nn.softplus(z)
    tokens = tuple(range(x.ndim - dt_bias.ndim))
    d_A_log = jax.lax.optimization_barrier(jnp.sum(d_A_log, tokens))  # and over channels after that
    spread = [i for i, size in enumerate(A_log.shape) if size < dt_bias.shape[i]]
    return d_z.astype(x.dtype), jnp.sum(d_A_log, spread, keepdims=True), jnp.sum(d_z, tokens)


softplus_decay.defvjp(lambda *args: (softplus_decay(*args), args), _softplus_decay_backward)


def near_none(*writes: str) -> dict[str, float]:
    """Of `softplus_decay`: next to no decay. writes: matrices of write strengths, which are then 1/2."""
    return {"A_log": 0.0, "dt_bias": inverse_softplus(NEAR_NONE)} | dict.fromkeys(writes, 0.0)


def softplus_of_keys(matrices: tuple[str, ...], *writes: str) -> KeyGates:
    """`mixers.Config.gates_of_keys` of `softplus_decay`: -softplus(-keys) = logsigmoid(keys)."""
    filled = {"A_log": -math.log(KEY_GATE), "dt_bias": 0.0} | dict.fromkeys(writes, 0.0)
    return KeyGates(matrices, -1, filled)


def write_strength(logits: jax.Array, neg_eigval: bool) -> jax.Array:
    """beta = sigmoid, float32; doubled, I - beta k k^T has eigenvalues down to -1 (2411.12537)."""
    return jax.nn.sigmoid(logits.astype(jnp.float32)) * (2 if neg_eigval else 1)


def inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


def log_uniform(low: float, high: float) -> Initializer:
    """log of U(low, high), the initialiser of A_log; kept off log(0)."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, max(low, 1e-6), high))


def dt_bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """softplus^-1(dt) with dt log-uniform in [0.001, 0.1]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def cost(heads: Heads, conv_size: int, *, delta: bool, writes: int = 1) -> Cost:
    """FLOPs of the chunkwise form, the delta rule's after Kimi Linear (6 K V + 3 C K + C^2 where V = K)."""
    _, num_v, key, value = heads
    if delta:
        flops = 6 * key * value + 3 * CHUNK * (key + value) // 2 + CHUNK**2
    else:
        flops = 4 * key * value + CHUNK * (key + value)
    width = heads.key_width + writes * (heads.key_width + heads.value_width)
    history = max(conv_size - 1, 0) * width
    return Cost(state=num_v * key * value + history, flops=writes * num_v * flops)
