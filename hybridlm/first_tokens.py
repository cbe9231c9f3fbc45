"""The first tokens of a document, which a sliding window keeps in sight (StreamingLLM: Xiao et al. 2023,
arXiv 2309.17453; there positions are counted in the cache, here in the document).

Shape legend: B batch, T queries, N first tokens, G key/value heads, K channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import token_cache
from hybridlm.rows import Rows
from hybridlm.token_cache import Held, TokenCache
from pallas_kernels.softmax_attention import gathered, sink_places


class SinkCache(NamedTuple):
    """recent: what the window keeps.  first: k and v [B, N, G, K] of the document's first tokens."""

    recent: TokenCache
    first: tuple[jax.Array, jax.Array]


def hold(
    cache: SinkCache | None, tokens: tuple[jax.Array, jax.Array], rows: Rows, window: int, count: int
) -> tuple[SinkCache | None, Held]:
    """`token_cache.hold` that keeps the ``count`` first tokens of the document at the row's end, too."""
    if cache is None:
        return None, Held(tokens)
    recent, held = token_cache.hold(cache.recent, tokens, window)
    assert recent is not None  # there was one
    index_T, window_BT = token_cache.packed_indices(rows, cache.recent.length, window)
    at_BTN = sink_places(index_T - rows.positions, window_BT, count)
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
