"""Rotary position embedding (arXiv 2104.09864), and YaRN (2309.00071), which stretches it for long contexts.

Channels i and i + dim / 2 of a head turn together, by position * theta^(-2 i / dim). YaRN divides these
frequencies by ``factor``: all of it where a pair turns at most ``beta_slow`` times within the ``context`` of
before, nothing where it turns ``beta_fast`` times or more, in proportion to i between. All logits grow by
m(mscale_all)^2, what rotated channels add to them by (m(mscale) / m(mscale_all))^2 besides, with
m(s) = 1 + 0.1 s log(factor). That is DeepSeek-V3's form, of which mscale = 1, mscale_all = 0 is the paper's.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.errors import ConfigError


class Yarn(NamedTuple):
    """See the module docstring."""

    factor: float
    context: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all: float = 1.0

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def turned(self) -> float:
        """Of rotated channels, queries' and keys'."""
        return self._growth(self.mscale) / self._growth(self.mscale_all)

    @property
    def logits(self) -> float:
        return self._growth(self.mscale_all) ** 2

    def frequencies(self, theta: float, dim: int) -> np.ndarray:
        """Angles a position, [dim / 2], float64."""
        plain = theta ** (-np.arange(0, dim, 2) / dim)
        place = lambda turns: dim * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low = max(math.floor(place(self.beta_fast)), 0)
        high = min(math.ceil(place(self.beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp


def yarn(values: tuple[float, ...], theta: float) -> Yarn | None:
    """The setting ``yarn`` of a mixer whose rope_theta is ``theta``; None: positions as they are."""
    if not values:
        return None
    if not 2 <= len(values) <= len(Yarn._fields):
        problem = f"must be FACTOR, CONTEXT and at most {', '.join(Yarn._fields[2:])}"
        raise ConfigError("yarn", values, problem, "For example 40, 4096.")
    found = Yarn(*values)
    if theta <= 1:
        raise ConfigError("yarn", values, f"stretches rotations, which rope_theta={theta:g} has not")
    if min(found[:2]) < 1 or min(found[2:]) < 0 or not 0 < found.beta_slow <= found.beta_fast:
        problem = "must have FACTOR, CONTEXT of at least 1, BETA_FAST >= BETA_SLOW > 0, nothing below 0"
        raise ConfigError("yarn", values, problem)
    return found


def rotate(
    x_BTHK: jax.Array,
    positions_BT: jax.Array,
    theta: float,
    rotary_dim: int | None = None,
    stretch: Yarn | None = None,
) -> jax.Array:
    """Rotary position embedding, rotate-half form (GPT-NeoX, FLA, Llama), angles in float32.

    The first ``rotary_dim`` (even; all of K when None) channels of each head turn, the rest pass.
    """
    rotary_dim = x_BTHK.shape[-1] if rotary_dim is None else rotary_dim
    half = rotary_dim // 2
    if stretch is None:
        frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    else:
        frequency = jnp.asarray(stretch.frequencies(theta, rotary_dim), jnp.float32)
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequency
    size = 1.0 if stretch is None else stretch.turned
    cos, sin = (turn if size == 1 else size * turn for turn in (jnp.cos(angle), jnp.sin(angle)))
    x = x_BTHK.astype(jnp.float32)
    a, b = x[..., :half], x[..., half:rotary_dim]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary_dim:]], axis=-1)
    return turned.astype(x_BTHK.dtype)
