"""The checked arguments of one `softmax_attention` call: what every backend receives.

Shape legend: B batch, T tokens, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import dataclasses

import jax
import jax.numpy as jnp

KEPT = "softmax_attention"  # name, for policies of `jax.checkpoint`, of outputs and of what their gradient
# wants besides that is dear; cuDNN's whole calls have a primitive for it


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """q: [B, T, H, K].  k: [B, T, G, K].  v: [B, T, G, V].  Floating; T >= 1.

    starts: None (one document a row) or bool [B, T], where a document starts that is not the row's first.
    window: tokens that a query sees, its own included; 0 for the whole document.
    sinks: None or [H], a logit more in each softmax, without a value.
    forgotten: None or float32 [B, T, H], the sum of log forget gates up to each token: its logit for token s
        gains forgotten_t - forgotten_s.
    since: None or int32 [B, T, H], the last token up to each at which all before was forgotten; 0 for none.
    sink_tokens: with a window, the first tokens of each document that all its later ones see besides.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    starts: jax.Array | None
    scale: float
    window: int = 0
    sinks: jax.Array | None = None
    forgotten: jax.Array | None = None
    sink_tokens: int = 0
    since: jax.Array | None = None

    def document(self) -> jax.Array:
        """Where each query's document starts in the row: int32 [B, T] or [1, T]."""
        index_1T = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        if self.starts is None:
            return jnp.zeros_like(index_1T)
        return jax.lax.cummax(jnp.where(self.starts, index_1T, 0), axis=1)

    def first(self) -> jax.Array:
        """The first place in the row that each query may see, but for sink tokens: the same shape.

        With ``since``, that of each head: int32 [B, T, H].
        """
        index_1T = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        document = self.document()
        first = jnp.maximum(document, index_1T - self.window + 1) if self.window else document
        return first if self.since is None else jnp.maximum(first[..., None], self.since)

    def sink_places(self) -> jax.Array:
        """`sink_places` of all queries: int32 [B, T, sink_tokens]."""
        shape = *self.q.shape[:2], self.sink_tokens
        return jnp.broadcast_to(sink_places(self.document(), self.first(), self.sink_tokens), shape)


def sink_places(document_BT: jax.Array, first_BT: jax.Array, sink_tokens: int) -> jax.Array:
    """Places [B, T, N] of a document's first N tokens where a query's window has left them behind; else -1.

    document_BT: where the query's document starts in the row.  first_BT: where its window does.
    """
    at_BTN = document_BT[..., None] + jnp.arange(sink_tokens, dtype=jnp.int32)
    return jnp.where(at_BTN < first_BT[..., None], at_BTN, -1)
