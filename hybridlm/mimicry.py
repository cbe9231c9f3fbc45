"""Attention weights of a linear layer held to those of softmax attention (Hedgehog, arXiv 2402.04347, eq. 5).

    - sum_j A_ij log L_ij,   A = softmax(scale q k^T),   L_ij = f(q_i) . f(k_j) / sum_l f(q_i) . f(k_l)

over j, l <= i of the same document. Blocks of queries are made again in the backward pass, so that [T, T]
never exists.

Shape legend: N layers, B rows, T tokens, H heads, G key heads of the attention, K and F channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm.rows import Rows, cut

BLOCK = 128  # queries
LEAST = 1e-30  # of a weight in a logarithm


class Heads(NamedTuple):
    """q [N, B, T, H, K] and k [N, B, T, G, K]: G divides H, and neighbouring heads share a key."""

    q: jax.Array
    k: jax.Array


def cross_entropy(theirs: Heads, ours: Heads, rows: Rows, counted_BT: jax.Array, scale: float) -> jax.Array:
    """[N] sums over the counted tokens of the mean over heads, in nats; no gradient into ``theirs``.

    ours: the features f(q) and f(k), not negative.  scale: of the attention's logits.
    """
    B, T = counted_BT.shape
    size = min(BLOCK, T)
    index = jnp.arange(T)

    def weights(q: jax.Array, k: jax.Array) -> jax.Array:
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        products = jnp.einsum("bcgrk,btgk->bgrct", grouped, k, preferred_element_type=jnp.float32)
        return products.reshape(B, -1, *products.shape[3:])

    def layer(xs: tuple[jax.Array, ...]) -> jax.Array:
        q, k, f_q, f_k = xs

        @jax.checkpoint
        def block(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            q_C, f_C, segment_C, at_C, counted_C = xs
            seen = (segment_C[:, :, None] == rows.segment_ids[:, None]) & (at_C[:, :, None] >= index)
            seen = seen[:, None]
            A = jax.lax.stop_gradient(
                jax.nn.softmax(jnp.where(seen, scale * weights(q_C, k), -1e30), axis=-1)
            )
            f = jnp.where(seen, weights(f_C, f_k), 0)
            log_L = jnp.log(jnp.maximum(f, LEAST)) - jnp.log(jnp.maximum(f.sum(-1, keepdims=True), LEAST))
            each = -jnp.sum(jnp.where(seen, A * log_L, 0), axis=-1).mean(1)
            return total + jnp.sum(jnp.where(counted_C, each, 0)), None

        places = jnp.broadcast_to(index, (B, T))
        blocks = tuple(cut(x, size) for x in (q, f_q, rows.segment_ids, places, counted_BT))
        return jax.lax.scan(block, jnp.zeros((), jnp.float32), blocks)[0]

    return jax.lax.map(layer, (*jax.lax.stop_gradient(theirs), *ours))
