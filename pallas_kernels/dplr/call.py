"""The normalised arguments of one `dplr` call: what every backend receives.

Shape legend: B batch, T time, H heads, K key dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import QKV


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call(QKV):
    """Checked arguments; a pytree whose leaves are the arrays.

    q, k, a, b, log_decay: [B, T, H, K].  v: [B, T, H, V].
    state: [B, H, K, V] in `compute_dtype`, what came before the first token, of its document.
    starts: None (one document a row) or bool [B, T], where a document starts that is not the row's first.
    scale: factor of q.
    """

    a: jax.Array
    b: jax.Array
    log_decay: jax.Array
    state: jax.Array
    starts: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})

    def separate(self) -> "Call":
        """Documents kept apart by the numbers themselves: at a start nothing is read and all is forgotten."""
        if self.starts is None:
            return self
        starts = self.starts[..., None, None]
        a, log_decay = jnp.where(starts, 0, self.a), jnp.where(starts, -jnp.inf, self.log_decay)
        return dataclasses.replace(self, a=a, log_decay=log_decay, starts=None)
