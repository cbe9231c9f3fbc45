"""S4D (Gu, Gupta, Goel, Re 2022, arXiv 2206.11893): N / 2 complex numbers a channel, none of them gated.

h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A u_t,  s_t = 2 Re sum_n C_n h_{t,n},  A = -exp(A_log) + i A_imag
y = glu(W gelu(s + D u) + bias)

Its scan runs as the real element-wise recurrence in a frame that turns with the state, exp(-i dt A_imag t)
h_t, and is set upright every 128 tokens, so that angles stay small. As in `mamba` what lies between is
made anew in the backward pass: what is kept of a row has no factor N. The authors train log_dt and A at
1e-3 (`optimizer.groups`), and let C and D decay.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers, pieces
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Positive
from hybridlm.layers import Linear, RecurrentCache, elementwise, normal, param, uniform
from hybridlm.mixers import Cost, Site
from hybridlm.recurrent_mixer import PIECE, RecurrentMixer, cut
from hybridlm.rows import Rows, continued, joined
from hybridlm.sharding import per_shard


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """S4D.

    state_size: state numbers per channel, two of them a complex one.
    init: of A's imaginary part, the paper's S4D-Lin or S4D-Inv.
    """

    state_size: Positive = 64
    init: Literal["lin", "inv"] = "lin"

    def check(self, d_model: int) -> None:
        if self.state_size % 2:
            raise ConfigError("state_size", self.state_size, "must be even: complex numbers are two")

    def cost(self, d_model: int, context: int) -> Cost:
        return Cost(state=d_model * self.state_size, flops=6 * d_model * self.state_size)


class System(NamedTuple):
    """log_dt [F]; A_log, A_imag [F, N]; C [F, N, 2], real and imaginary. N complex numbers a channel."""

    log_dt: jax.Array
    A_log: jax.Array
    A_imag: jax.Array
    C: jax.Array

    @property
    def A(self) -> jax.Array:
        return jax.lax.complex(-jnp.exp(self.A_log), self.A_imag)

    @property
    def step(self) -> jax.Array:
        """dt A."""
        return jnp.exp(self.log_dt)[:, None] * self.A

    @property
    def written(self) -> jax.Array:
        """(exp(dt A) - 1) / A, without loss where dt A is small."""
        decay, angle = self.step.real, self.step.imag
        less = jnp.expm1(decay) * jnp.cos(angle) - 2 * jnp.sin(angle / 2) ** 2
        return jax.lax.complex(less, jnp.exp(decay) * jnp.sin(angle)) / self.A


class Mixer(RecurrentMixer):
    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        width, pairs = site.d_model, config.state_size // 2
        wide, state = ("heads",), ("heads", None)
        self.state_shape = (width, pairs, 2)
        dt_init, half = uniform(math.log(1e-3), math.log(1e-1)), jax.nn.initializers.constant(math.log(0.5))
        self.log_dt = param(rngs, (width,), wide, dt_init, decay=False)
        self.A_log = param(rngs, (width, pairs), state, half, decay=False)
        self.A_imag = param(rngs, (width, pairs), state, FREQUENCIES[config.init], decay=False)
        self.C = param(rngs, (width, pairs, 2), (*state, None), normal(0.5**0.5), decay=False)
        self.D = param(rngs, (width,), wide, normal(1.0), decay=False)
        self.o_proj = Linear(width, 2 * width, rngs=rngs, axes=("heads", "embed"), bias=True)

    def mixed(
        self, x_BTD: jax.Array, context: Context, before: RecurrentCache, fresh: bool
    ) -> tuple[jax.Array, RecurrentCache]:
        system = System(self.log_dt[...], self.A_log[...], self.A_imag[...], self.C[...])
        s, state = scan(x_BTD, system, context.rows, before.state)
        s += self.D[...] * x_BTD.astype(jnp.float32)
        y, gate = jnp.split(self.o_proj(jax.nn.gelu(s, approximate=False).astype(x_BTD.dtype)), 2, axis=-1)
        return y * jax.nn.sigmoid(gate), RecurrentCache(state)


def lin(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """pi n."""
    return jnp.broadcast_to(jnp.pi * jnp.arange(shape[1], dtype=dtype), shape)


def inv(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """N / pi (N / (2 n + 1) - 1), N twice the pairs."""
    size = 2 * shape[1]
    return jnp.broadcast_to(size / jnp.pi * (size / (2 * jnp.arange(shape[1], dtype=dtype) + 1) - 1), shape)


FREQUENCIES = {"lin": lin, "inv": inv}


def scan(u: jax.Array, system: System, rows: Rows, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(2 Re sum_n C h float32 [B, T, F], the state after the last token).

    u: [B, T, F].  state: float32 [B, F, N, 2], carried on where a row's first position is not 0.
    """
    over = pieces.over(u.shape[1])
    if over is None:
        return _scan(u, system, rows, state)
    wide, states, row = ("batch", "time", "heads"), ("batch", "heads", None, None), ("batch", "time")
    axes = ("heads",), ("heads", None), ("heads", None), ("heads", None, None)  # of `System`
    op = lambda u, *rest: _of_a_piece(u, System(*rest[:4]), Rows(*rest[4:6]), rest[6], over)
    return per_shard(op, (wide, *axes, row, row, states), (wide, states))(
        u, *system, *rows, continued(state, rows)
    )


def _of_a_piece(
    u: jax.Array, system: System, rows: Rows, state: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """`scan` of a piece of the rows: first from zeros, for what it does to the state."""
    starts = pieces.starts(rows.segment_ids, axis)
    alone = _scan(u, system, rows, jnp.zeros_like(state))[1]
    every, begun = (jax.lax.all_gather(a, axis) for a in (alone, starts.any(1)))
    states, move = [state], jnp.exp(system.step * u.shape[1])
    for added, new in zip(every, begun, strict=True):
        states.append(jnp.where(new[:, None, None, None], 0, _pair(_complex(states[-1]) * move)) + added)
    before = jnp.where(starts[:, 0, None, None, None], 0, pieces.own(states[:-1], axis))
    return _scan(u, system, rows, before)[0], states[-1]


def _scan(u: jax.Array, system: System, rows: Rows, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By pieces; beyond the end nothing is written and nothing turns."""
    batch, length, width = u.shape
    size = min(length, PIECE)
    decay, angle, written, C = system.step.real, system.step.imag, system.written, _complex(system.C)

    @jax.checkpoint
    def piece(state: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        u, inside, rows = inputs
        turn = jnp.exp(1j * angle * jnp.arange(1, size + 1, dtype=jnp.float32)[:, None, None])
        x = (u[..., None, None] * _pair(written * turn.conj())).reshape(batch, size, -1)
        log_decay = (jnp.repeat(decay, 2, axis=1) * inside[:, None, None]).reshape(size, -1)
        h, last = elementwise(x, jnp.broadcast_to(log_decay, x.shape), rows, state.reshape(batch, -1))
        read = _pair(2 * (C * turn).conj()).reshape(size, width, -1)
        s = jnp.einsum("btfn,tfn->btf", h.reshape(batch, size, width, -1), read)
        return _pair(_complex(last.reshape(state.shape)) * jnp.exp(1j * angle * inside.sum())), s

    u, rows = cut((u.astype(jnp.float32), rows))
    inside = (jnp.arange(len(u) * size) < length).astype(jnp.float32).reshape(-1, size)
    last, s = jax.lax.scan(piece, state, (u, inside, rows))
    return joined(s, length), last


def _complex(pair: jax.Array) -> jax.Array:
    return jax.lax.complex(pair[..., 0], pair[..., 1])


def _pair(z: jax.Array) -> jax.Array:
    return jnp.stack([z.real, z.imag], axis=-1)
