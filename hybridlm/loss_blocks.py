"""Cross-entropy and its gradients where even one chunk of tokens has too many logits to hold.

Logits are made a block of ids at a time, once. What the gradients want of them, exp(logit - c) in the hidden
states' dtype, waits in the bytes of the head's gradient until log Z is known; then each block of it makes way
for the gradient that it gives. c: the largest logit of the first ids; should another id be e^FAR times as
likely, all logits are made again with the largest for c.

Shape legend: N tokens, D model width, V ids, W ids of a block.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK_ELEMENTS = 3 << 23  # logits of a block: 96 MiB in float32
LANES = 128  # ids of a block are a multiple
FAR = 60.0


class Scores(NamedTuple):
    """Of each token, float32 [N].  exps: sum of exp(logit - c).  best: the largest logit but the target's."""

    c: jax.Array
    exps: jax.Array
    target: jax.Array
    best: jax.Array


def _join(a: Any, b: Any) -> Any:
    return a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2])


def most_tokens(d_model: int, dtype: Any) -> int:
    """So many have their exponentials in the bytes of the head's gradient; an even number."""
    return d_model * 4 // jnp.dtype(dtype).itemsize // 2 * 2


class Blocks:
    """One chunk of tokens, at most `most_tokens` and an even number.

    head: [D, V], or [V, D] where it is ``tall``; blocks of logits, and all that is like them, lie so then.
    targets: int32 [N], an id of this head, or none where it is another device's.
    """

    def __init__(self, h_ND: jax.Array, head: jax.Array, targets_N: jax.Array, tall: bool = False):
        self.h, self.head, self.targets, self.axis = h_ND, head, targets_N, 0 if tall else 1
        self.ids, self.pairs = head.shape[self.axis], h_ND.dtype.itemsize == 2
        most = max(1, BLOCK_ELEMENTS // len(h_ND) // LANES) * LANES
        even = (width for width in range(most, most // 2, -LANES) if self.ids % width == 0)
        self.width = min(self.ids, next(even, most))
        self.forms = ("wd", "wn") if tall else ("dw", "nw")

    def scores(self) -> tuple[jax.Array, Scores]:
        """(exponentials in an array like the head, what was found of each token)."""

        def block(carry: tuple[jax.Array, Scores], start: Any, width: int) -> tuple[jax.Array, Scores]:
            kept, found = carry
            logits = self._logits(start, width)
            exps = jnp.exp(logits - self._each(found.c)).astype(self.h.dtype)
            kept, now = self._put(kept, self._packed(exps), start), self._over_ids(logits, start, found.c)
            return kept, Scores(found.c, *_join(found[1:], now))

        def attempt(state: tuple) -> tuple:
            kept, c, _, _ = state
            none = jnp.zeros_like(c)
            kept, found = self._walk(block, (kept, Scores(c, none, none, none - jnp.inf)))
            inside = (self.targets >= 0) & (self.targets < self.ids)
            top = jnp.where(inside, jnp.maximum(found.target, found.best), found.best)
            far = top > c + FAR
            return kept, jnp.where(far, top, c), found, jnp.any(far)

        c = jnp.max(self._logits(0, min(self.ids, LANES)), axis=self.axis)
        state = (jnp.zeros(self.head.shape, jnp.float32), c, Scores(c, c, c, c), jnp.array(True))
        kept, _, found, _ = jax.lax.while_loop(lambda state: state[3], attempt, state)
        return kept, found

    def gradients(
        self, kept: jax.Array, found: Scores, log_z: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(d h [N, D], d head), float32, of a sum whose gradient in the logits is scale * softmax, less 1 for
        the target, over the tokens whose scale is not 0. kept, found: of `scores`."""
        share, target = (self._each(jnp.exp(x - log_z)) for x in (found.c, found.target))
        scale, (head, block_of) = self._each(scale), self.forms

        def block(carry: tuple[jax.Array, jax.Array], start: Any, width: int) -> tuple[jax.Array, jax.Array]:
            d_h, d_head = carry
            here, exps = self._here(start, width), self._unpacked(self._part(d_head, start, width))
            d_logits = jnp.where(here, target, exps * share) * scale - here
            d_logits = jnp.where(scale != 0, d_logits, 0).astype(self.h.dtype)
            dot = lambda form, a, b: jnp.einsum(form, a, b, preferred_element_type=jnp.float32)
            d_h += dot(f"{block_of},{head}->nd", d_logits, self._cast(start, width))
            return d_h, self._put(d_head, dot(f"nd,{block_of}->{head}", self.h, d_logits), start)

        return self._walk(block, (jnp.zeros(self.h.shape, jnp.float32), kept))

    def _walk(self, block: Callable[[Any, Any, int], Any], carry: Any) -> Any:
        count, rest = divmod(self.ids, self.width)
        step = lambda i, carry: block(carry, i * self.width, self.width)
        carry = jax.lax.fori_loop(0, count, step, carry)
        return block(carry, count * self.width, rest) if rest else carry

    def _over_ids(self, logits: jax.Array, start: Any, c: jax.Array) -> Any:
        """`Scores` but c of a block, in one pass over it."""
        width = logits.shape[self.axis]
        # Down columns XLA goes in two steps, and writes what it is to reduce first unless they are given.
        steps = 1 if self.axis else math.gcd(width, 64)
        cut = lambda x: x if self.axis else x.reshape(steps, -1, x.shape[1])
        logits, here = cut(logits), cut(self._here(start, width))
        parts = jnp.exp(logits - self._each(c)), jnp.where(here, logits, 0), jnp.where(here, -jnp.inf, logits)
        if self.axis:
            return jax.lax.reduce(parts, (0.0, 0.0, -jnp.inf), _join, (1,))
        both = lambda how, x: how(how(x, 1), 0)
        return both(jnp.sum, parts[0]), both(jnp.sum, parts[1]), both(jnp.max, parts[2])

    def _each(self, x_N: jax.Array) -> jax.Array:
        return jnp.expand_dims(x_N, self.axis)

    def _part(self, x: jax.Array, start: Any, width: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, width, self.axis)

    def _put(self, whole: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, part, (start, 0) if self.axis == 0 else (0, start))

    def _cast(self, start: Any, width: int) -> jax.Array:
        return self._part(self.head, start, width).astype(self.h.dtype)

    def _logits(self, start: Any, width: int) -> jax.Array:
        head, block = self.forms
        form = f"nd,{head}->{block}"
        return jnp.einsum(form, self.h, self._cast(start, width), preferred_element_type=jnp.float32)

    def _here(self, start: Any, width: int) -> jax.Array:
        ids = jnp.arange(width, dtype=jnp.int32) + start
        return jnp.expand_dims(ids, 1 - self.axis) == self._each(self.targets)

    def _packed(self, block: jax.Array) -> jax.Array:
        """As float32 of the same bytes: of bfloat16, two tokens in one."""
        if not self.pairs:
            return block
        bits = jax.lax.bitcast_convert_type(block, jnp.uint16).astype(jnp.uint32)
        low, high = (jax.lax.slice_in_dim(bits, i, None, 2, 1 - self.axis) for i in (0, 1))
        return jax.lax.bitcast_convert_type(low | high << 16, jnp.float32)

    def _unpacked(self, part: jax.Array) -> jax.Array:
        """The inverse, in float32."""
        tokens = len(self.h)
        part = jax.lax.slice_in_dim(part, 0, tokens // 2 if self.pairs else tokens, 1, 1 - self.axis)
        if not self.pairs:
            return part
        bits = jnp.expand_dims(jax.lax.bitcast_convert_type(part, jnp.uint32), 2 - self.axis)
        shifts = jnp.array([0, 16], jnp.uint32).reshape(2, 1) if self.axis else jnp.array([0, 16], jnp.uint32)
        halves = jax.lax.bitcast_convert_type((bits >> shifts).astype(jnp.uint16), self.h.dtype)
        shape = (tokens, part.shape[1]) if self.axis else (part.shape[0], tokens)
        return halves.reshape(shape).astype(jnp.float32)
