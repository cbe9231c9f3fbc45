"""Next-token prediction and distillation of logits in one pass over chunks of time, as in `hybridlm.loss`.

    t^2 KL(p || q),   p = softmax(teacher's logits / t),  q = softmax(logits / t)    Hinton et al., 1503.02531
    d / d logits = t (q - p)

Both models' logits of a chunk are made once, in the forward pass, and none are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import loss
from hybridlm.loss import LossSums


class Weights(NamedTuple):
    """Of the sum that is differentiated: of the cross-entropy, and of t^2 KL.

    top_k: of the teacher's logits only so many are kept, the largest, and p is over them; 0: all.
    caps: `loss.capped` of the logits and of the teacher's.
    """

    cross_entropy: float
    kl: float
    temperature: float = 1.0
    top_k: int = 0
    caps: tuple[float, float] = (0.0, 0.0)


class Teacher(NamedTuple):
    """hidden: final hidden states [B, T, E] of the same tokens.  head: [E, V]."""

    hidden: jax.Array
    head: jax.Array


def distilled(
    hidden_BTD: jax.Array, head_DV: jax.Array, teacher: Teacher, targets_BT: jax.Array, weights: Weights
) -> tuple[jax.Array, tuple[LossSums, jax.Array]]:
    """Returns (the weighted sum, (sums of `loss.cross_entropy`, sum of t^2 KL in nats)), over the tokens with
    a target. Gradients flow through the first result only, and not into the teacher."""

    def run(hidden: jax.Array, head: jax.Array, beside: tuple[Teacher, jax.Array], slopes: bool) -> tuple:
        (seen, teacher_head), targets = beside
        chunk = partial(_chunk, weights, teacher_head.astype(seen.dtype))
        zero = LossSums.zero(), jnp.zeros((), jnp.float32)
        sums, *gradients = loss.in_chunks(chunk, hidden, head, targets, seen, zero=zero, slopes=slopes)
        return weights.cross_entropy * sums[0].cross_entropy + weights.kl * sums[1], sums, *gradients

    return loss.differentiated(run, hidden_BTD, head_DV, (teacher, targets_BT))


def _chunk(
    w: Weights, teacher_head: jax.Array, h: jax.Array, head: jax.Array, target: jax.Array, seen: jax.Array
) -> tuple[tuple[LossSums, jax.Array], Callable[[], jax.Array]]:
    """(sums, d total / d logits) of one chunk, as `loss.in_chunks` wants them."""
    logits, log_z, is_target, sums = loss.logits_and_sums(h, head, target, cap=w.caps[0])
    d_entropy = lambda: w.cross_entropy * (jnp.exp(logits - log_z[..., None]) - is_target)
    if not w.kl:
        return (sums, jnp.zeros((), jnp.float32)), lambda: loss.capped_slope(logits, d_entropy(), w.caps[0])
    z = jnp.einsum("btd,dv->btv", seen, teacher_head, preferred_element_type=jnp.float32)
    z = loss.capped(z, w.caps[1])
    if w.top_k:
        z = jnp.where(z >= jax.lax.top_k(z, w.top_k)[0][..., -1:], z, -jnp.inf)
    log_p, log_q = (jax.nn.log_softmax(x / w.temperature, axis=-1) for x in (z, logits))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = jnp.where((target >= 0)[..., None] & (p > 0), p * (log_p - log_q), 0)
    d_logits = lambda: d_entropy() + w.kl * w.temperature * (q - p)
    total = w.temperature**2 * jnp.sum(kl)
    return (sums, total), lambda: loss.capped_slope(logits, d_logits(), w.caps[0])
