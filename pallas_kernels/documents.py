"""Where documents start in packed rows, from the ids that an op is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def document_starts(segment_ids: Any, shape: tuple[int, int]) -> jax.Array:
    """Where a document starts that is not its row's first: bool [B, T], where neighbours differ.

    Raises:
        ValueError: segment_ids are no integers of this ``shape`` [B, T].
    """
    if not isinstance(segment_ids, jax.Array):
        segment_ids = np.asarray(segment_ids)  # JAX would cut off what is above 32 bits
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids.shape = {segment_ids.shape}: must be {shape}, [B, T] of the tokens")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids.dtype = {segment_ids.dtype}: must be an integer type")
    changes = jnp.asarray(segment_ids[:, 1:] != segment_ids[:, :-1])
    return jnp.pad(changes, ((0, 0), (min(shape[1], 1), 0)))
