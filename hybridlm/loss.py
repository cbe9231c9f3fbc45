"""Next-token cross-entropy in chunks along time, so that logits [B, T, V] never exist.

The gradient of a sum is known as soon as a chunk's logits are, so the forward pass of the differentiated
function computes d hidden and d head chunk by chunk and the backward pass only scales them: logits are
computed once, and nothing of size V per token is kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybridlm import pieces, sharding

# Tokens in a chunk, on each device: as many as make 128 MiB of float32 logits, but at least twice d_model,
# since every chunk reads the head and adds to its gradient (12 bytes an element, against 20 a logit).
CHUNK_ELEMENTS = 1 << 25
HEAD_REUSE = 2


class LossSums(NamedTuple):
    """Float32 sums over the tokens with a target.

    cross_entropy: in nats.  log_z_squared: log(Z)^2.  tokens: their number.
    correct: tokens whose logit is above all others; a tie is wrong.
    """

    cross_entropy: jax.Array
    log_z_squared: jax.Array
    tokens: jax.Array
    correct: jax.Array

    @classmethod
    def zero(cls) -> "LossSums":
        return cls(*[jnp.zeros((), jnp.float32)] * 4)


def cross_entropy(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, LossSums]:
    """Returns (cross-entropy sum + z_loss * sum of log Z squared, the sums apart).

    targets: int32, negative where a token carries no loss. Gradients flow through the first result only.
    z_loss: weight of log(Z)^2 per token (PaLM, section 5).
    """
    batch, length = targets_BT.shape
    rows = sharding.parts("batch")
    if (rows > 1 or pieces.over(length)) and batch % rows == 0:
        total, sums = _of_pieces(hidden_BTD, head_DV, targets_BT, z_loss)
    else:
        total, sums = _chunked(hidden_BTD, head_DV, targets_BT, z_loss)
    return total, jax.tree.map(jax.lax.stop_gradient, sums)


def _of_pieces(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, z_loss: float
) -> tuple[jax.Array, LossSums]:
    """Each device's own tokens in chunks: the head is gathered once and its gradient added up once, in
    float32, where XLA would do both in every chunk; a chunk of a cut row would lie on one device. The
    vocabulary is cut by XLA as elsewhere."""
    rows = sharding.mesh_axes("batch")
    time = sharding.mesh_axes("time") if pieces.over(targets.shape[1]) else ()
    axes = (*rows, *time)
    alone = lambda *args: jax.tree.map(lambda x: x[None], _chunked(*args, z_loss))
    cut = PartitionSpec(rows, time)
    run = jax.shard_map(
        alone, in_specs=(cut, PartitionSpec(), cut), out_specs=PartitionSpec(axes), axis_names=set(axes),
        check_vma=False,
    )  # fmt: skip
    return jax.tree.map(lambda x: x.sum(0), run(hidden, head, targets))


def per_token(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log probability of each target, whether its logit is above all others), float32 and bool [B, T].

    For evaluation, in the same chunks; 0 and False where a target is negative.
    """
    batch, length = targets_BT.shape
    hidden, targets, chunk = pad(hidden_BTD, targets_BT, head_DV.shape)
    head = head_DV.astype(hidden_BTD.dtype)

    def part(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, log_z, _, target_logit, correct = _scores(xs[0], head, xs[1])
        present = xs[1] >= 0
        return jnp.where(present, target_logit - log_z, 0), correct & present

    scores = jax.lax.map(part, (chunks(hidden, chunk), chunks(targets, chunk)))
    whole = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]
    return whole(scores[0]), whole(scores[1])


def chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T/chunk, B, chunk, ...]; T is a multiple of chunk."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)


def chunk_tokens(d_model: int, vocab: int) -> int:
    """Tokens in a chunk on one device, at most; ``vocab``: its part of the vocabulary."""
    return max(CHUNK_ELEMENTS // vocab, HEAD_REUSE * d_model)


def _chunk_length(batch: int, length: int, head_shape: tuple[int, ...]) -> int:
    """The longest power-of-two chunk of time of as many tokens a device as the constants above allow."""
    d_model, vocab = head_shape
    rows, columns = (max(1, n // sharding.parts(axis)) for n, axis in ((batch, "batch"), (vocab, "vocab")))
    chunk = 1
    while chunk < length and 2 * chunk * rows <= chunk_tokens(d_model, columns):
        chunk *= 2
    return chunk


def _scores(h: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Logits and is_target [B, T, V]; log Z, the target's logit and whether it is above all others [B, T]."""
    logits = jnp.einsum("btd,dv->btv", h, head, preferred_element_type=jnp.float32)
    # A masked sum, not a gather: with the vocabulary sharded it stays local.
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    best_other = jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1)
    # Two passes over the logits, these maxima and the sum: `logsumexp` would look for the maximum again.
    top = jnp.where(targets >= 0, jnp.maximum(target_logit, best_other), best_other)
    log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))
    correct = target_logit > best_other
    return logits, log_z, is_target, target_logit, correct


def logits_and_sums(
    h: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, LossSums]:
    logits, log_z, is_target, target_logit, correct = _scores(h, head, targets)
    weight = (targets >= 0).astype(jnp.float32)
    sums = LossSums(
        cross_entropy=jnp.sum(weight * (log_z - target_logit)),
        log_z_squared=jnp.sum(weight * log_z**2),
        tokens=jnp.sum(weight),
        correct=jnp.sum(weight * correct),
    )
    return logits, log_z, is_target, sums


def pad(
    hidden: jax.Array, targets: jax.Array, head_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, int]:
    batch, length = targets.shape
    chunk = _chunk_length(batch, length, head_shape)
    extra = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, extra), (0, 0)))
    return hidden, jnp.pad(targets, ((0, 0), (0, extra)), constant_values=-1), chunk


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, z_loss: float
) -> tuple[jax.Array, LossSums]:
    hidden, targets, chunk = pad(hidden, targets, head.shape)
    head = head.astype(hidden.dtype)

    def step(total: LossSums, xs: tuple[jax.Array, jax.Array]) -> tuple[LossSums, None]:
        sums = logits_and_sums(xs[0], head, xs[1])[-1]
        return jax.tree.map(jnp.add, total, sums), None

    sums, _ = jax.lax.scan(step, LossSums.zero(), (chunks(hidden, chunk), chunks(targets, chunk)))
    return sums.cross_entropy + z_loss * sums.log_z_squared, sums


def _forward(hidden: jax.Array, head: jax.Array, targets: jax.Array, z_loss: float) -> tuple:
    length = targets.shape[1]
    padded, targets, chunk = pad(hidden, targets, head.shape)
    cast = head.astype(hidden.dtype)

    def step(carry: tuple[LossSums, jax.Array], xs: tuple[jax.Array, jax.Array]) -> tuple:
        total, d_head = carry
        h, target = xs
        logits, log_z, is_target, sums = logits_and_sums(h, cast, target)
        scale = 1 + 2 * z_loss * log_z
        d_logits = jnp.exp(logits - log_z[..., None]) * scale[..., None] - is_target
        d_logits = jnp.where((target >= 0)[..., None], d_logits, 0).astype(h.dtype)
        d_h = jnp.einsum("btv,dv->btd", d_logits, cast)
        d_head = d_head + jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, total, sums), d_head), d_h

    start = (LossSums.zero(), jnp.zeros(head.shape, jnp.float32))
    d_chunks: jax.Array
    (sums, d_head), d_chunks = jax.lax.scan(step, start, (chunks(padded, chunk), chunks(targets, chunk)))
    d_hidden = jnp.moveaxis(d_chunks, 0, 1).reshape(padded.shape)[:, :length]
    total = sums.cross_entropy + z_loss * sums.log_z_squared
    # Folded into the product above, the transpose of a tied head is one that the CPU cannot run in bfloat16.
    d_head = jax.lax.optimization_barrier(d_head)
    return (total, sums), (d_hidden, d_head.astype(head.dtype))


def _backward(z_loss: float, residuals: tuple[jax.Array, jax.Array], cotangents: tuple) -> tuple:
    d_hidden, d_head = residuals
    d_total = cotangents[0]
    return (d_hidden * d_total.astype(d_hidden.dtype), d_head * d_total.astype(d_head.dtype), None)


_chunked.defvjp(_forward, _backward)
