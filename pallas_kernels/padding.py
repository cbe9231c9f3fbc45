"""Rows of tokens padded to what kernels take."""

from typing import Any

import jax.numpy as jnp


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def pad_time(x: Any, length: int, mode: str = "constant") -> Any:
    """x [B, T, ...] with axis 1 padded to ``length`` with zeros (or mode="edge")."""
    missing = length - x.shape[1]
    return x if not missing else jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)), mode=mode)
