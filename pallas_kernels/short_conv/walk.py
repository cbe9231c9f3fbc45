"""What the kernels do along the tokens, whatever they are written in: the convolution and its gradients.

A thread owns a few channels and walks along `RUN` tokens with the last few inputs in registers: no shared
memory, no barrier, and the gradient of the taps is a running sum in the thread.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

RUN = 64  # tokens of a block of threads
GROUP, GROUP_BACK = 8, 4  # tokens that a thread loads at once, forward and backward
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Strip:
    """What a block of threads works on: RUN tokens of a row of ``length`` from ``start``, some features.

    load(ref, t), store(ref, t, value): these features of token t.  tap(ref, w): those of row w of the taps.
    put(ref, w, value): as much of the block's gradient of the taps.  reach(ref, t): a number.
    """

    start: Any
    length: int
    load: Callable[[Any, Any], Any]
    store: Callable[[Any, Any, Any], None]
    tap: Callable[[Any, int], Any]
    reach: Callable[[Any, Any], Any]
    put: Callable[[Any, int, Any], None]

    def taps(self, ref: Any, width: int) -> list[Any]:
        """The taps 0, 1, ... tokens back."""
        return [self.tap(ref, width - 1 - back) for back in range(width)]

    def before(self, ref: Any, width: int) -> tuple[Any, ...]:
        """The inputs 1, 2, ... tokens before the start; any numbers for those before the row."""
        return tuple(
            self.load(ref, jnp.maximum(self.start - back, 0)).astype(F32) for back in range(1, width)
        )


def convolve(strip: Strip, width: int, silu: bool, x: Any, taps: Any, reach: Any, y: Any) -> None:
    """y of a strip of `Kernels.convolve`, with ``width`` taps; all are refs."""
    factors, before = strip.taps(taps, width), strip.before(x, width)

    def group(g: jax.Array, before: tuple) -> tuple:
        tokens = [strip.start + g * GROUP + i for i in range(GROUP)]
        xs = [strip.load(x, t) for t in tokens]
        reaches = [strip.reach(reach, t) for t in tokens]

        for t, x_t, reach_t in zip(tokens, xs, reaches, strict=True):
            window = (x_t.astype(F32), *before)
            total = _dot(_seen(window, reach_t), factors)
            strip.store(y, t, total * _sigmoid(total) if silu else total)
            before = window[:-1]
        return before

    lax.fori_loop(0, RUN // GROUP, group, before)


def gradients(
    strip: Strip, width: int, silu: bool, x: Any, taps: Any, reach: Any, dy: Any, dx: Any, dtaps: Any
) -> None:
    """dx and the strip's part of the gradient of the taps, from dy; all are refs.

    dx of a token needs the W - 1 tokens after it, so the walk is W - 1 tokens behind: it stores dx of its own
    tokens, and counts in dtaps the tokens W - 1 later (the first strip of a row its first ones, too).
    """
    ahead = width - 1
    factors = strip.taps(taps, width)

    def token(x_t: Any, dy_t: Any, reach_t: Any, state: tuple, counts: Any = None) -> tuple:
        """state: the inputs before the token, what dx of the tokens before it has so far, dtaps."""
        before, dx, dtaps = state
        window = (x_t.astype(F32), *before)
        seen = _seen(window, reach_t)
        d = dy_t.astype(F32)
        if silu:
            y = _dot(seen, factors)
            gate = _sigmoid(y)
            d *= gate + y * gate * (1.0 - gate)
        d = jnp.where(reach_t >= 0, d, 0.0)
        counted = d if counts is None else jnp.where(counts, d, 0.0)
        dtaps = tuple(total + counted * x_back for total, x_back in zip(dtaps, seen, strict=True))
        shares = [tap * x for tap, x in zip(factors, _seen((d,) * width, reach_t), strict=True)]
        dx = (shares[0], *(total + share for total, share in zip(dx, shares[1:], strict=True)))
        return dx[-1], (window[:-1], dx[:-1], dtaps)

    zero = factors[0] * 0.0
    state = strip.before(x, width), (zero,) * ahead, (zero,) * width
    for i in range(ahead):
        t = strip.start + i
        x_t, dy_t = strip.load(x, t), strip.load(dy, t)
        _, state = token(x_t, dy_t, strip.reach(reach, t), state, strip.start == 0)

    def group(g: jax.Array, state: tuple) -> tuple:
        tokens = [strip.start + ahead + g * GROUP_BACK + i for i in range(GROUP_BACK)]
        inside = [jnp.minimum(t, strip.length - 1) for t in tokens]
        xs, dys = ([strip.load(ref, t) for t in inside] for ref in (x, dy))
        reaches = [strip.reach(reach, t) for t in tokens]

        for t, x_t, dy_t, reach_t in zip(tokens, xs, dys, reaches, strict=True):
            dx_t, state = token(x_t, dy_t, reach_t, state)
            strip.store(dx, t - ahead, dx_t)
        return state

    _, _, totals = lax.fori_loop(0, RUN // GROUP_BACK, group, state)
    for back in range(width):
        strip.put(dtaps, width - 1 - back, totals[back])


def _seen(window: tuple, reach: Any) -> list[jax.Array]:
    """What is 0, 1, ... tokens back, with zeros beyond `reach`."""
    return [window[0]] + [jnp.where(reach >= back, window[back], 0.0) for back in range(1, len(window))]


def _dot(window: Any, taps: Any) -> jax.Array:
    total = window[0] * taps[0]
    for x, tap in zip(window[1:], taps[1:], strict=True):
        total += x * tap
    return total


def _sigmoid(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -math.log2(math.e)))  # two fast instructions, no division
    return root * root
