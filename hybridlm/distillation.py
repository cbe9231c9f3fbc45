"""Next-token prediction and distillation of logits in one pass over chunks of time, as in `hybridlm.loss`.

    t^2 KL(p || q),   p = softmax(teacher's logits / t),  q = softmax(logits / t)    Hinton et al., 1503.02531
    d / d logits = t (q - p)

Both models' logits of a chunk are made once, in the forward pass, and none are kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybridlm import loss
from hybridlm.loss import LossSums


class Weights(NamedTuple):
    """Of the sum that is differentiated: of the cross-entropy, and of t^2 KL.

    top_k: of the teacher's logits only so many are kept, the largest, and p is over them; 0: all.
    """

    cross_entropy: float
    kl: float
    temperature: float = 1.0
    top_k: int = 0


class Teacher(NamedTuple):
    """hidden: final hidden states [B, T, E] of the same tokens.  head: [E, V]."""

    hidden: jax.Array
    head: jax.Array


Sums = tuple[LossSums, jax.Array]


def distilled(
    hidden_BTD: jax.Array, head_DV: jax.Array, teacher: Teacher, targets_BT: jax.Array, weights: Weights
) -> tuple[jax.Array, Sums]:
    """Returns (the weighted sum, (sums of `loss.cross_entropy`, sum of t^2 KL in nats)), over the tokens with
    a target. Gradients flow through the first result only, and not into the teacher."""
    total, sums = _distilled(hidden_BTD, head_DV, teacher, targets_BT, weights)
    return total, jax.tree.map(jax.lax.stop_gradient, sums)


def _chunk(
    h: jax.Array, head: jax.Array, seen: jax.Array, teacher_head: jax.Array, target: jax.Array, w: Weights
) -> tuple[Sums, jax.Array]:
    """(sums, d total / d logits) of one chunk."""
    logits, log_z, is_target, sums = loss.logits_and_sums(h, head, target)
    present = (target >= 0)[..., None]
    d_logits = w.cross_entropy * (jnp.exp(logits - log_z[..., None]) - is_target)
    if not w.kl:
        return (sums, jnp.zeros((), jnp.float32)), jnp.where(present, d_logits, 0).astype(h.dtype)
    z = jnp.einsum("btd,dv->btv", seen, teacher_head, preferred_element_type=jnp.float32)
    if w.top_k:
        z = jnp.where(z >= jax.lax.top_k(z, w.top_k)[0][..., -1:], z, -jnp.inf)
    log_p, log_q = (jax.nn.log_softmax(x / w.temperature, axis=-1) for x in (z, logits))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = jnp.where(present & (p > 0), p * (log_p - log_q), 0)
    d_logits += w.kl * w.temperature * (q - p)
    return (sums, w.temperature**2 * jnp.sum(kl)), jnp.where(present, d_logits, 0).astype(h.dtype)


def _total(sums: Sums, weights: Weights) -> jax.Array:
    return weights.cross_entropy * sums[0].cross_entropy + weights.kl * sums[1]


def _scan(
    hidden: jax.Array, head: jax.Array, teacher: Teacher, targets: jax.Array, weights: Weights, slopes: bool
) -> tuple[Sums, jax.Array, jax.Array]:
    """(sums, d hidden, d head); the gradients are empty unless ``slopes``."""
    length = targets.shape[1]
    seen = loss.pad(teacher.hidden, targets, head.shape)[0]
    padded, targets, chunk = loss.pad(hidden, targets, head.shape)
    cast, teacher_head = head.astype(hidden.dtype), teacher.head.astype(seen.dtype)

    def step(carry: tuple[Sums, jax.Array], xs: tuple[jax.Array, ...]) -> tuple:
        total, d_head = carry
        h, teacher_h, target = xs
        sums, d_logits = _chunk(h, cast, teacher_h, teacher_head, target, weights)
        total = jax.tree.map(jnp.add, total, sums)
        if not slopes:
            return (total, d_head), None
        d_h = jnp.einsum("btv,dv->btd", d_logits, cast)
        d_head = d_head + jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (total, d_head), d_h

    zero = LossSums.zero(), jnp.zeros((), jnp.float32)
    start = zero, jnp.zeros(head.shape if slopes else (), jnp.float32)
    xs = tuple(loss.chunks(x, chunk) for x in (padded, seen, targets))
    d_chunks: jax.Array
    (sums, d_head), d_chunks = jax.lax.scan(step, start, xs)
    if not slopes:
        return sums, hidden, d_head
    d_hidden = jnp.moveaxis(d_chunks, 0, 1).reshape(padded.shape)[:, :length]
    return sums, d_hidden, jax.lax.optimization_barrier(d_head)  # as in `loss._forward`


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _distilled(
    hidden: jax.Array, head: jax.Array, teacher: Teacher, targets: jax.Array, weights: Weights
) -> tuple[jax.Array, Sums]:
    sums, _, _ = _scan(hidden, head, teacher, targets, weights, slopes=False)
    return _total(sums, weights), sums


def _forward(
    hidden: jax.Array, head: jax.Array, teacher: Teacher, targets: jax.Array, weights: Weights
) -> tuple:
    sums, d_hidden, d_head = _scan(hidden, head, teacher, targets, weights, slopes=True)
    return (_total(sums, weights), sums), (d_hidden, d_head.astype(head.dtype))


def _backward(weights: Weights, residuals: tuple[jax.Array, jax.Array], cotangents: tuple) -> tuple:
    d_hidden, d_head = residuals
    d_total = cotangents[0]
    return d_hidden * d_total.astype(d_hidden.dtype), d_head * d_total.astype(d_head.dtype), None, None


_distilled.defvjp(_forward, _backward)
