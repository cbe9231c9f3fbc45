"""The normalised arguments of one `short_conv` call: what every backend receives."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """x: [B, T, F].  kernel: [W, F].  positions: [B, T].  history: None (zeros) or [B, W - 1, F], as x.

    widths: of the parts of F that the result comes in; () for one.
    """

    x: jax.Array
    kernel: jax.Array
    positions: jax.Array
    history: jax.Array | None = None
    silu: bool = False
    interpret: bool = False
    widths: tuple[int, ...] = ()

    def apart(self, y: jax.Array) -> tuple[jax.Array, ...]:
        """The parts of a result [B, T, F]."""
        return tuple(jnp.split(y, list(itertools.accumulate(self.widths[:-1])), axis=-1))
