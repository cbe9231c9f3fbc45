"""Sparse state expansion (Pan et al. 2025, arXiv 2507.16577) over a linear mixer: parts of a larger state.

e = softmax(W_e x),  P = the top_k of e,  S^i <- A_t S^i + e_i k_t v_t^T for i in P, the others stay
o_t = (S^0)^T q^0_t + sum over i in P of e_i (S^i)^T q_t
S^0 is the mixer's own state, of every token. The others share v, the output, its norm and gate with it;
their q and k are q^0 and k^0 plus a low-rank map of x, before convolution and activation; gates (A_t) are
their own.
With a delta rule e_i is a factor of beta, so that a token that writes less erases less (ours).
Row-sparse writes: k is a softmax over its `rows` largest channels, and the other channels do not decay.

A row of T tokens is one of top_k * T sorted by partition to the op, whose documents are a document's tokens
in a partition. Decoding masks instead: partitions are heads, which the others' tokens leave as they are.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import over
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Limits, NonNegative, Positive
from hybridlm.layers import Linear, RecurrentCache
from hybridlm.linear_mixer import Inputs
from hybridlm.mixers import Cost, Site, TokenMixer
from hybridlm.rows import Rows


@dataclasses.dataclass(frozen=True)
class Config(over.Config):
    """Sparse state expansion.

    partitions: to choose from, beside the one of every token.  top_k: that each token writes and reads.
    rank: of the low-rank maps.
    rows: channels of k that a token writes to; 0: k is what the mixer makes of it.
    balance_loss: weight of the load-balancing loss, of each microbatch (train.microbatches) by itself.
    """

    of: str = "gla"
    partitions: Annotated[int, Limits(1, 1024)] = 4
    top_k: Positive = 1
    rank: Positive = 64
    rows: Count = 0
    balance_loss: NonNegative = 0.01

    def check(self, d_model: int) -> None:
        if self.top_k > self.partitions:
            raise ConfigError("top_k", self.top_k, f"must be at most partitions = {self.partitions}")

    def joined(self, known: Any) -> Any:
        joined = super().joined(known)
        if self.rows and getattr(joined.part, "delta", False):
            raise ConfigError("rows", self.rows, f"{self.of} has a delta rule, which erases by whole keys")
        return joined

    def cost(self, d_model: int, context: int) -> Cost:
        one = self.part.cost(d_model, context)
        state = 2 * one.state + (self.partitions - 1) * self.matrix(d_model)
        return Cost(state, one.cache, (1 + self.top_k) * one.flops)


class Adapted(nnx.Module):
    """A projection plus a low-rank one of its own."""

    def __init__(self, base: Linear, rank: int, *, rngs: nnx.Rngs):
        width, features = base.kernel.shape
        self.base = base
        self.down = Linear(width, rank, rngs=rngs, axes=("embed", None))
        self.up = Linear(rank, features, rngs=rngs, axes=(None, "heads"))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.up(self.down(x))


SHARED = ("v_proj", "v_conv", "g_proj", "g_a_proj", "g_b_proj", "o_norm", "o_proj")


class Mixer(TokenMixer):
    """inner: the mixer of every token.  sparse: that of the partitions, with inner's modules where shared."""

    config_class = Config

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.config = config
        self.inner = over.make(config.part, site, rngs)
        sparse: Any = over.make(config.part, site, rngs)
        over.share(sparse, self.inner, SHARED)
        sparse.q_proj = Adapted(self.inner.q_proj, config.rank, rngs=rngs)
        sparse.k_proj = Adapted(self.inner.k_proj, config.rank, rngs=rngs)
        self.sparse = sparse
        self.router = Linear(site.d_model, config.partitions, rngs=rngs, axes=("embed", None), cast=False)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: RecurrentCache | None = None
    ) -> tuple[jax.Array, RecurrentCache | None]:
        config, rows = self.config, context.rows
        past: Any = (None, None) if cache is None else _halves(cache.history)
        (first, own), (many, others) = (
            mixer.prepare(x_BTD, context, before)
            for mixer, before in zip((self.inner, self.sparse), past, strict=True)
        )
        many = row_sparse(many, config.rows) if config.rows else many
        choice = over.choose(self.router, x_BTD, context, config.top_k, config.balance_loss)
        o, state = self.inner.recur(first, rows, None if cache is None else cache.state[0])
        if cache is None:
            read, states = self._sorted(many, choice, rows), None
        else:
            read, states = self._masked(many, choice.spread(config.partitions), rows, cache.state[1])
        y_BTD = self.inner.finish(x_BTD, first, (o.astype(jnp.float32) + read).astype(o.dtype))
        return y_BTD, None if cache is None else RecurrentCache((state, states), (*own, *others))

    def _sorted(self, inputs: Inputs, choice: over.Choice, rows: Rows) -> jax.Array:
        """What the partitions are read as, float32 [B, T, HV, V], by rows of top_k * T tokens."""
        batch, length, top_k = choice.chosen.shape
        flat = choice.chosen.reshape(batch, -1)
        order = jnp.argsort(flat, axis=1, stable=True)
        at = lambda x, index: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
        token, weight = order // top_k, at(choice.weight.reshape(batch, -1), order)
        document = jnp.cumsum(rows.positions == 0, axis=1)
        ids = at(flat, order) * (length + 1) + at(document, token) + 1
        index = jnp.arange(top_k * length)
        starts = ids != jnp.pad(ids, [(0, 0), (1, 0)])[:, :-1]
        positions = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
        moved = jax.tree.map(lambda x: at(x, token), inputs)
        o, _ = self.sparse.recur(over.weighed(moved, weight), Rows(ids, positions), None)
        read = at(over.read(moved, o) * weight[..., None, None], jnp.argsort(order, axis=1))
        return read.reshape(batch, length, top_k, *read.shape[2:]).sum(2)

    def _masked(
        self, inputs: Inputs, weight_BTP: jax.Array, rows: Rows, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(the same, the states [B, P, HV, K, V]), every partition at every token."""
        parts = [over.weighed(inputs, weight_BTP[..., p]) for p in range(self.config.partitions)]
        many = jax.tree.map(lambda *each: jnp.concatenate(each, axis=2), *parts)
        o, after = self.sparse.recur(many, rows, state.reshape(len(state), -1, *state.shape[3:]))
        o = over.read(many, o).reshape(*o.shape[:2], self.config.partitions, -1, o.shape[-1])
        return jnp.einsum("btp,btphv->bthv", weight_BTP, o), after.reshape(state.shape)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> RecurrentCache:
        own, others = (one.init_cache(batch, max_length, dtype) for one in (self.inner, self.sparse))
        states = jnp.zeros((batch, self.config.partitions, *others.state.shape[1:]), jnp.float32)
        return RecurrentCache((own.state, states), own.history + others.history)


def _halves(histories: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    return histories[: len(histories) // 2], histories[len(histories) // 2 :]


def row_sparse(inputs: Inputs, rows: int) -> Inputs:
    """k a softmax over its ``rows`` largest channels; where it is nothing, nothing decays."""
    k = inputs.k.astype(jnp.float32)
    largest = jax.lax.top_k(k, min(rows, k.shape[-1]))[1]
    chosen = jax.nn.one_hot(largest, k.shape[-1]).sum(-2) > 0
    k = jax.nn.softmax(jnp.where(chosen, k, -jnp.inf)).astype(inputs.k.dtype)
    if inputs.log_decay is None:
        return inputs._replace(k=k)
    decay = inputs.log_decay if inputs.log_decay.ndim == 4 else inputs.log_decay[..., None]
    chosen = jnp.repeat(chosen, decay.shape[2] // chosen.shape[2], axis=2)
    return inputs._replace(k=k, log_decay=jnp.where(chosen, decay, 0))
