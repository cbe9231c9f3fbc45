"""The checked arguments of one `elementwise_recurrence` call: what every backend receives.

Shape legend: B batch, T time, F channels.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.call import alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Checked arguments; a pytree whose leaves are the arrays.

    x, log_decay: [B, T, F], T >= 1, each of its own dtype.
    starts: None (one document a row) or bool [B, T], where a document starts that is not the row's first.
    state: [B, F] in `compute_dtype`, what came before the first token, of its document.
    interpret: run kernels interpreted.
    """

    x: jax.Array
    log_decay: jax.Array
    starts: jax.Array | None
    state: jax.Array
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of the state and all arithmetic: float32, float64 if x or log_decay is, or the complex of that."""
        return compute_dtype(self.x, self.log_decay)

    @property
    def output_dtype(self) -> jnp.dtype:
        """Of h: x's, unless a complex decay makes a real x's states complex."""
        if self.x.dtype.kind == "c" or self.log_decay.dtype.kind != "c":
            return self.x.dtype
        return self.compute_dtype


def make(
    x: jax.Array,
    log_decay: jax.Array,
    starts: jax.Array | None,
    state: jax.Array | None,
    interpret: bool = False,
) -> Call:
    dtype = compute_dtype(x, log_decay)
    if state is None:
        state = jax.lax.full_like(x[:, 0], 0, dtype)
    return alike(Call(x, log_decay, starts, state.astype(dtype), interpret))


def compute_dtype(x: jax.Array, log_decay: jax.Array) -> jnp.dtype:
    return jnp.result_type(jnp.float32, x.dtype, log_decay.dtype)
