"""Where documents start in packed rows, from the ids that an op is given."""

from typing import Any

import jax
import jax.numpy as jnp


def document_starts(segment_ids: Any, shape: tuple[int, int]) -> jax.Array:
    """Where a document starts that is not its row's first: bool [B, T], where neighbours differ.

    Raises:
        ValueError: segment_ids are no integers of this ``shape`` [B, T].
    """
    if getattr(segment_ids, "shape", None) != shape:
        got = getattr(segment_ids, "shape", segment_ids)
        raise ValueError(f"segment_ids.shape = {got}: must be {shape}, [B, T] of the tokens")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids.dtype = {segment_ids.dtype}: must be an integer type")
    # Compared in their own dtype: a NumPy array of 64 bits would lose half of them to jnp.asarray.
    changes = jnp.asarray(segment_ids[:, 1:] != segment_ids[:, :-1])
    return jnp.pad(changes, ((0, 0), (min(shape[1], 1), 0)))
