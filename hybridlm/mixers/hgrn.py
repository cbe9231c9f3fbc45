"""HGRN (Qin et al. 2023, arXiv 2311.04823): a gated element-wise recurrence, one state number per channel.

h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_i x_t),     f_t = lb + (1 - lb) sigmoid(W_f x_t)
y = W_o (rmsnorm(h) * swish(W_g x)) with the norm over the whole width; lb: see `forget_gate`
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.forget_gate import LowerBounds, log_forget
from hybridlm.layers import Linear, RMSNorm, ShortConv
from hybridlm.mixers import Cost, TokenMixer, at_least
from hybridlm.rows import Rows, continued
from hybridlm.sharding import per_shard
from pallas_kernels import elementwise_recurrence


@dataclasses.dataclass(frozen=True)
class Config:
    """HGRN.

    width: channels of the recurrence; 0 is d_model.
    conv_size: taps of short convolutions on the input and the forget gate; 0 for none, as in the paper.
    lower_bound: whether forget gates have the learned layer-wise lower bound.
    norm_eps: of the output norm.
    """

    width: int = 0
    conv_size: int = 0
    lower_bound: bool = True
    norm_eps: float = 1e-6

    def check(self, d_model: int) -> None:
        at_least(self, 0, "width", "conv_size", "norm_eps")


class Cache(NamedTuple):
    """state: float32 [B, width]; history: raw inputs of the i and f convolutions, () without."""

    state: jax.Array
    history: tuple[jax.Array, ...]


class Shared(LowerBounds):
    def __init__(self, config: Config, d_model: int, num_layers: int, *, rngs: nnx.Rngs):
        super().__init__(num_layers, config.width or d_model, config.lower_bound, rngs=rngs)


class Mixer(TokenMixer):
    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.width, self.conv_size = config.width or d_model, config.conv_size
        self.i_proj = Linear(d_model, self.width, rngs=rngs)
        self.f_proj = Linear(d_model, self.width, rngs=rngs)
        self.g_proj = Linear(d_model, self.width, rngs=rngs)
        if self.conv_size:
            self.i_conv = ShortConv(self.width, self.conv_size, rngs=rngs)
            self.f_conv = ShortConv(self.width, self.conv_size, rngs=rngs)
        self.o_norm = RMSNorm(self.width, rngs=rngs, eps=config.norm_eps, axis="heads")
        self.o_proj = Linear(self.width, d_model, rngs=rngs, axes=("heads", "embed"))

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, cache: Cache | None = None, shared: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        before = self.init_cache(x_BTD.shape[0], 0, x_BTD.dtype) if cache is None else cache
        i, f = self.i_proj(x_BTD), self.f_proj(x_BTD)
        history: tuple[jax.Array, ...] = ()
        if self.conv_size:
            past = (None, None) if cache is None else cache.history
            i, past_i = self.i_conv(i, rows, past[0])
            f, past_f = self.f_conv(f, rows, past[1])
            history = (past_i, past_f)
        assert shared is not None
        log_f = log_forget(f, shared)
        x = -jnp.expm1(log_f) * jax.nn.silu(i.astype(jnp.float32))
        h, state = _recurrence(x, log_f, rows, continued(before.state, rows))
        gate = jax.nn.silu(self.g_proj(x_BTD).astype(jnp.float32))
        y_BTD = self.o_proj(self.o_norm(h, gate).astype(x_BTD.dtype))
        return y_BTD, None if cache is None else Cache(state, history)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Cache:
        convs = (self.i_conv, self.f_conv) if self.conv_size else ()
        state = jnp.zeros((batch, self.width), jnp.float32)
        return Cache(state, tuple(conv.init_history(batch, dtype) for conv in convs))


def _recurrence(
    x_BTF: jax.Array, log_f_BTF: jax.Array, rows: Rows, state_BF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(h [B, T, F], the state after the last token), each device on its own rows and channels."""

    def op(
        x: jax.Array, log_decay: jax.Array, segment_ids: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return elementwise_recurrence(x, log_decay, initial_state=state, segment_ids=segment_ids)

    tokens, state = ("batch", None, "heads"), ("batch", "heads")
    run = per_shard(op, (tokens, tokens, ("batch", None), state), (tokens, state))
    return run(x_BTF, log_f_BTF, rows.segment_ids, state_BF)


def cost(config: Config, d_model: int) -> Cost:
    width = config.width or d_model
    return Cost(state=width + max(config.conv_size - 1, 0) * 2 * width, flops=5 * width)
