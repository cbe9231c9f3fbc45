"""The checked arguments of one `softmax_attention` call: what every backend receives.

Shape legend: B batch, T tokens, H heads, G key/value heads (H a multiple of G), K and V their dims.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """q: [B, T, H, K].  k: [B, T, G, K].  v: [B, T, G, V].  Floating; T >= 1.

    starts: None (one document a row) or bool [B, T], where a document starts that is not the row's first.
    window: tokens that a query sees, its own included; 0 for the whole document.
    sinks: None or [H], a logit more in each softmax, without a value.
    forgotten: None or float32 [B, T, H], the sum of log forget gates up to each token: its logit for token s
        gains forgotten_t - forgotten_s.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    starts: jax.Array | None
    scale: float
    window: int = 0
    sinks: jax.Array | None = None
    forgotten: jax.Array | None = None

    def first(self) -> jax.Array:
        """The first place in the row that each query may see: int32 [B, T] or [1, T]."""
        index_1T = jnp.arange(self.q.shape[1], dtype=jnp.int32)[None]
        first = jnp.zeros_like(index_1T)
        if self.starts is not None:
            first = jax.lax.cummax(jnp.where(self.starts, index_1T, 0), axis=1)
        return jnp.maximum(first, index_1T - self.window + 1) if self.window else first
