"""The first tokens of a document, which a sliding window keeps in sight (StreamingLLM: Xiao et al. 2023,
arXiv 2309.17453; there positions are counted in the cache, here in the document).

Shape legend: B batch, T queries, N first tokens, G key/value heads, K channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import token_cache
from hybridlm.rows import Rows
from hybridlm.token_cache import Held, TokenCache
from pallas_kernels.softmax_attention import gathered


class SinkCache(NamedTuple):
    """recent: what the window keeps.  first: k and v [B, N, G, K] of the document's first tokens."""

    recent: TokenCache
    first: tuple[jax.Array, jax.Array]


def places(document_BT: jax.Array, first_BT: jax.Array, count: int) -> jax.Array:
    """Places [B, T, count] of the first tokens that each query's window has left behind; -1: it has not.

    document_BT: place in the row of the first token of each query's document.  first_BT: of its window.
    """
    at_BTN = document_BT[..., None] + jnp.arange(count, dtype=jnp.int32)
    return jnp.where(at_BTN < first_BT[..., None], at_BTN, -1)


def hold(
    cache: SinkCache | None, tokens: tuple[jax.Array, jax.Array], rows: Rows, window: int, count: int
) -> tuple[SinkCache | None, Held]:
    """`token_cache.hold` that keeps the ``count`` first tokens of the document at the row's end, too."""
    if cache is None:
        return None, Held(tokens)
    recent, held = token_cache.hold(cache.recent, tokens, window)
    index_T, window_BT = token_cache.packed_indices(rows, cache.recent.length, window)
    at_BTN = places(index_T - rows.positions, window_BT, count)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1), cache.first, tokens
    )
    slot_N = jnp.arange(count, dtype=jnp.int32)
    from_both = lambda place: jnp.where(
        place >= cache.recent.length, place - cache.recent.length + count, slot_N
    )
    kept_BN = from_both((index_T[-1] - rows.positions[:, -1])[:, None] + slot_N)  # those to come: any other
    kept = jax.tree.map(lambda x: gathered(x, jnp.minimum(kept_BN, x.shape[1] - 1)), both)
    first = (*both, jnp.where(at_BTN < 0, -1, from_both(at_BTN)))
    return SinkCache(recent, kept), held._replace(first=first)


def largest(q_BTHK: jax.Array, k_BTGK: jax.Array, ids_BT: jax.Array, at_BTN: jax.Array) -> jax.Array:
    """Each head's largest q_t . k_s over the first tokens that queries see so, float32 [H]; -inf: none."""
    k_BTNGK = gathered(k_BTGK, jnp.maximum(at_BTN, 0))
    q = q_BTHK.reshape(*q_BTHK.shape[:2], k_BTGK.shape[2], -1, q_BTHK.shape[-1])
    scores: Any = jnp.einsum("btgrk,btngk->bgrtn", q, k_BTNGK, preferred_element_type=jnp.float32)
    seen = ((at_BTN >= 0) & (ids_BT != 0)[..., None])[:, None, None]
    return jnp.max(jnp.where(seen, scores, -jnp.inf), axis=(0, 3, 4)).reshape(-1)
