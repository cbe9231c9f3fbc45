"""The normalised arguments of one `short_conv` call: what every backend receives."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """x: [B, T, F].  kernel: [W, F].  positions: [B, T].  history: None (zeros) or [B, W - 1, F], as x."""

    x: jax.Array
    kernel: jax.Array
    positions: jax.Array
    history: jax.Array | None = None
    silu: bool = False
    interpret: bool = False
