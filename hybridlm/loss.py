"""Next-token cross-entropy in chunks of tokens, so that logits [B, T, V] never exist.

The gradient of a sum is known as soon as a chunk's logits are, so the forward pass of the differentiated
function computes d hidden and d head chunk by chunk and the backward pass only scales them: logits are
computed once, and nothing of size V per token is kept. On several devices each takes its own tokens and
ids: the head is gathered once before the chunks, its gradient added up and scattered once after them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybridlm import loss_blocks, rows, sharding

# Tokens in a chunk, on each device: as many as make 128 MiB of float32 logits, but at least twice d_model,
# since every chunk reads the head and adds to its gradient (12 bytes an element, against 20 a logit).
CHUNK_ELEMENTS = 1 << 25
HEAD_REUSE = 2
# All tokens of a call in one chunk are made a block of ids at a time (`hybridlm.loss_blocks`) where their
# logits would take more than 2 GiB: a thirtieth of the memory, at 1.3 times the time of a full chunk.
MOST_ELEMENTS = 1 << 29


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


class Options(NamedTuple):
    """z_loss, tall: of `cross_entropy`.  slopes: whether gradients are wanted.

    vocab: mesh axes that the ids are cut over around a call.  cap: of the logits.
    """

    z_loss: float
    tall: bool
    slopes: bool
    vocab: tuple[str, ...] = ()
    cap: float = 0.0


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    tall: bool = False,
    cap: float = 0.0,
) -> tuple[jax.Array, LossSums]:
    """Returns (cross-entropy sum + z_loss * sum of log Z squared, the sums apart).

    targets: int32, negative where a token carries no loss. Gradients flow through the first result only.
    z_loss: weight of log(Z)^2 per token (PaLM, section 5).
    tall: the head is the transpose of a matrix [V, D], as a tied one is; a matter of memory only.
    cap: see `capped`.
    """

    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, slopes: bool) -> tuple:
        sums, *gradients = _on_devices(hidden, head, targets, Options(z_loss, tall, slopes, cap=cap))
        return sums.cross_entropy + z_loss * sums.log_z_squared, sums, *gradients

    return differentiated(run, hidden_BTD, head_DV, targets_BT)


def differentiated(
    run: Callable[..., tuple], hidden_BTD: jax.Array, head_DV: jax.Array, beside: Any
) -> tuple[jax.Array, Any]:
    """(a total, the sums that it is made of), with gradients of the total in hidden states and head.

    run: (hidden, head, beside, whether gradients are wanted) -> (total, sums, d hidden, d head), or the first
        two of them.
    """
    total, sums = _total_of(run, hidden_BTD, head_DV, beside)
    return total, jax.tree.map(jax.lax.stop_gradient, sums)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total_of(run: Callable[..., tuple], hidden: jax.Array, head: jax.Array, beside: Any) -> tuple:
    return run(hidden, head, beside, False)


def _forward(run: Callable[..., tuple], hidden: jax.Array, head: jax.Array, beside: Any) -> tuple:
    total, sums, d_hidden, d_head = run(hidden, head, beside, True)
    return (total, sums), (d_hidden, d_head.astype(head.dtype))


def _backward(run: Callable[..., tuple], residuals: tuple, cotangents: tuple) -> tuple:
    d_hidden, d_head = residuals
    d_total = cotangents[0]
    return (d_hidden * d_total.astype(d_hidden.dtype), d_head * d_total.astype(d_head.dtype), None)


_total_of.defvjp(_forward, _backward)


def capped(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap); cap 0: the logits (Gemma 2, xLSTM 7B)."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def capped_slope(logits: jax.Array, d_logits: jax.Array, cap: float) -> jax.Array:
    """The gradient in the logits before `capped`, of that in those after it."""
    return d_logits * (1 - (logits / cap) ** 2) if cap else d_logits


def per_token(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """(log probability of each target, whether its logit is above all others), float32 and bool [B, T].

    For evaluation, in the same chunks; 0 and False where a target is negative.
    """
    hidden, targets = chunks(head_DV.shape, hidden_BTD, targets_BT)
    head = sharding.constrain(head_DV.astype(hidden_BTD.dtype), (None, "vocab"))  # gathered once

    def part(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, target = xs
        _, log_z, _, target_logit, correct = _scores(h, head, target, cap=cap)
        present = target >= 0
        return jnp.where(present, target_logit - log_z, 0), correct & present

    scores = jax.lax.map(part, (hidden, targets))
    log_p, correct = (rows.joined(x, targets_BT.shape[1]) for x in scores)
    return log_p, correct


def chunks(
    head_shape: tuple[int, ...], hidden: jax.Array, targets: jax.Array, *beside: jax.Array
) -> list[jax.Array]:
    """Each [B, T, ...] as [chunks, B, time of a chunk, ...]; what is added to the last has no targets."""
    batch, length = targets.shape
    size = _chunk_length(batch, length, head_shape)
    others = [rows.cut(x, size) for x in beside]
    return [rows.cut(hidden, size), rows.cut(targets, size, constant_values=-1), *others]


def chunk_tokens(d_model: int, vocab: int) -> int:
    """Tokens in a chunk on one device, at most; ``vocab``: its part of the vocabulary."""
    return max(CHUNK_ELEMENTS // vocab, HEAD_REUSE * d_model)


def temporaries(d_model: int, vocab: int, tokens: int) -> int:
    """Bytes that one device needs for logits and their gradients, about."""
    if _in_blocks(tokens, d_model, vocab, jnp.bfloat16):
        return 8 * loss_blocks.BLOCK_ELEMENTS
    return 8 * min(chunk_tokens(d_model, vocab), tokens) * vocab


def _in_blocks(tokens: int, d_model: int, vocab: int, dtype: Any) -> bool:
    return tokens * vocab > MOST_ELEMENTS and tokens <= loss_blocks.most_tokens(d_model, dtype)


def _chunk_length(batch: int, length: int, head_shape: tuple[int, ...]) -> int:
    """A chunk of time, of at most as many tokens a device as the constants above allow."""
    d_model, vocab = head_shape
    cut, columns = (max(1, n // sharding.parts(axis)) for n, axis in ((batch, "batch"), (vocab, "vocab")))
    chunk = 1
    while chunk < length and 2 * chunk * cut <= chunk_tokens(d_model, columns):
        chunk *= 2
    return -(-length // -(-length // chunk))  # as many equal ones, so that little is padded


def _scores(
    h: jax.Array, head: jax.Array, targets: jax.Array, vocab: tuple[str, ...] = (), cap: float = 0.0
) -> tuple[jax.Array, ...]:
    """Logits and is_target [B, T, V]; log Z, the target's logit and whether it is above all others [B, T].

    vocab: mesh axes that the ids are cut over around the call; the head and [B, T, V] are of this device's.
    """
    logits = capped(jnp.einsum("btd,dv->btv", h, head, preferred_element_type=jnp.float32), cap)
    # A masked sum, not a gather: with the vocabulary sharded it stays local.
    own = targets - _first(head, vocab)
    is_target = jnp.arange(logits.shape[-1], dtype=targets.dtype) == own[..., None]
    best, exps, target_logit = _of_rows(logits, is_target)
    target_logit, best_other = _sum(target_logit, vocab), _max(best, vocab)
    top = jnp.where(targets >= 0, jnp.maximum(target_logit, best_other), best_other)
    others = _sum(exps * jnp.exp(best - top), vocab)
    log_z = top + jnp.log(others + jnp.where(targets >= 0, jnp.exp(target_logit - top), 0))
    correct = target_logit > best_other
    return logits, log_z, is_target, target_logit, correct


def _of_rows(logits: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(m, the largest logit but the target's; the sum of exp(logit - m) without it; the target's, or 0).

    In one pass: a sum knows the maximum that it is relative to, and two of them are added relative to the
    larger one.
    """
    lowest = jnp.finfo(logits.dtype).min  # -inf less itself would be nan

    def joined(left: tuple, right: tuple) -> tuple:
        (m, exps, target), (n, more, other) = left, right
        small = jnp.exp(-jnp.abs(m - n))
        exps = jnp.where(m > n, exps + more * small, exps * small + more)
        return jnp.maximum(m, n), exps, target + other

    zero = jnp.zeros((), logits.dtype)
    found = jnp.where(is_target, logits, zero)
    parts = jnp.where(is_target, lowest, logits), jnp.where(is_target, zero, zero + 1), found
    first = jnp.asarray(lowest), zero, zero
    return jax.lax.reduce(parts, first, joined, (logits.ndim - 1,))


def _first(head: jax.Array, vocab: tuple[str, ...]) -> jax.Array | int:
    """The id that the first column of this device's part of the head is of."""
    return jax.lax.axis_index(vocab) * head.shape[1] if vocab else 0


def _sum(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(x, axes) if axes else x


def _max(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pmax(x, axes) if axes else x


def _sums(log_z: jax.Array, target_logit: jax.Array, correct: jax.Array, targets: jax.Array) -> LossSums:
    weight = (targets >= 0).astype(jnp.float32)
    return LossSums(
        cross_entropy=jnp.sum(weight * (log_z - target_logit)),
        log_z_squared=jnp.sum(weight * log_z**2),
        tokens=jnp.sum(weight),
        correct=jnp.sum(weight * correct),
    )


def logits_and_sums(
    h: jax.Array, head: jax.Array, targets: jax.Array, vocab: tuple[str, ...] = (), cap: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array, LossSums]:
    logits, log_z, is_target, target_logit, correct = _scores(h, head, targets, vocab, cap)
    return logits, log_z, is_target, _sums(log_z, target_logit, correct, targets)


def _on_devices(hidden: jax.Array, head: jax.Array, targets: jax.Array, options: Options) -> tuple:
    """`_sums_of` each device's own tokens and ids, added up, the gradients where their arrays lie.

    Tokens that the devices do not divide are left to XLA.
    """
    tokens = sharding.cut(("batch", "time"), targets.shape)
    whole = sharding.cut(("embed", "vocab"), head.shape)
    if tokens is None or whole is None:
        return _sums_of(hidden, head, targets, options)
    batch, time, embed, vocab = map(_names, (*tokens, *whole))
    over = (*batch, *time)
    if set(embed) - set(over):
        return _sums_of(hidden, head, targets, options)

    def own(h: jax.Array, part: jax.Array, t: jax.Array) -> tuple:
        part = part.astype(h.dtype)
        part = jax.lax.all_gather(part, embed, axis=0, tiled=True) if embed else part
        sums, *slopes = _sums_of(h, part, t, options._replace(vocab=vocab))
        sums = _sum(sums, over)
        if not slopes:
            return (sums,)
        d_h, d_head = slopes
        d_head = jax.lax.psum_scatter(d_head, embed, scatter_dimension=0, tiled=True) if embed else d_head
        return sums, _sum(d_h, vocab), _sum(d_head, tuple(name for name in over if name not in embed))

    out = (PartitionSpec(), tokens, whole)[: 3 if options.slopes else 1]
    run = jax.shard_map(own, in_specs=(tokens, whole, tokens), out_specs=out, check_vma=False)
    return run(hidden, head, targets)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes, of more than one device, of an entry of a PartitionSpec."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(name for name in ([entry] if isinstance(entry, str) else entry or ()) if sizes[name] > 1)


def _sums_of(hidden: jax.Array, head: jax.Array, targets: jax.Array, options: Options) -> tuple:
    """(sums,), with ``options.slopes`` also d hidden, and d head in float32."""
    blocks = options.slopes and not options.cap
    if blocks and _in_blocks(targets.size, head.shape[0], head.shape[1], hidden.dtype):
        return _in_blocks_of_ids(hidden, head, targets, options)

    def chunk(h: jax.Array, cast: jax.Array, target: jax.Array) -> tuple:
        logits, log_z, is_target, sums = logits_and_sums(h, cast, target, options.vocab, options.cap)

        def d_logits() -> jax.Array:
            scale = 1 + 2 * options.z_loss * log_z
            slopes = jnp.exp(logits - log_z[..., None]) * scale[..., None] - is_target
            return capped_slope(logits, slopes, options.cap)

        return sums, d_logits

    return in_chunks(chunk, hidden, head, targets, zero=LossSums.zero(), slopes=options.slopes)


def in_chunks(
    chunk: Callable[..., tuple[Any, Callable[[], jax.Array]]],
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *beside: jax.Array,
    zero: Any,
    slopes: bool,
) -> tuple:
    """(sums,), with ``slopes`` also d hidden, and d head in float32: added up over chunks of time.

    chunk: (hidden states, head, targets, beside) -> (sums like ``zero``, () -> d total / d logits).
    """
    cast = head.astype(hidden.dtype)

    def step(carry: tuple, xs: list[jax.Array]) -> tuple:
        h, target, *others = xs
        sums, d_logits_of = chunk(h, cast, target, *others)
        if not slopes:
            return (jax.tree.map(jnp.add, carry[0], sums),), None
        d_logits = jnp.where((target >= 0)[..., None], d_logits_of(), 0).astype(h.dtype)
        d_h = jnp.einsum("btv,dv->btd", d_logits, cast)
        d_head = carry[1] + jnp.einsum("btd,btv->dv", h, d_logits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, carry[0], sums), d_head), d_h

    start: tuple = (zero, jnp.zeros(head.shape, jnp.float32)) if slopes else (zero,)
    found: tuple
    d_chunks: jax.Array
    found, d_chunks = jax.lax.scan(step, start, chunks(head.shape, hidden, targets, *beside))
    if not slopes:
        return found
    d_hidden = rows.joined(d_chunks, targets.shape[1])
    # Folded into the product above, the transpose of a tied head is one that the CPU cannot run in bfloat16.
    return found[0], d_hidden, jax.lax.optimization_barrier(found[1])


def _in_blocks_of_ids(hidden: jax.Array, head: jax.Array, targets: jax.Array, options: Options) -> tuple:
    """`_sums_of` with slopes, by `hybridlm.loss_blocks`."""
    vocab, tokens = options.vocab, targets.size
    odd = tokens % 2  # exponentials go in pairs
    h = jnp.pad(hidden.reshape(tokens, -1), ((0, odd), (0, 0)))
    target = jnp.pad(targets.reshape(tokens), (0, odd), constant_values=-1)
    matrix = head.T if options.tall else head
    blocks = loss_blocks.Blocks(h, matrix, target - _first(head, vocab), options.tall)
    kept, found = blocks.scores()
    c = _max(found.c, vocab)
    log_z = c + jnp.log(_sum(found.exps * jnp.exp(found.c - c), vocab))
    found = found._replace(target=_sum(found.target, vocab), best=_max(found.best, vocab))
    sums = _sums(log_z, found.target, found.target > found.best, target)
    scale = jnp.where(target >= 0, 1 + 2 * options.z_loss * log_z, 0)
    d_h, d_head = blocks.gradients(kept, found, log_z, scale)
    d_hidden = d_h[:tokens].reshape(hidden.shape).astype(hidden.dtype)
    return sums, d_hidden, d_head.T if options.tall else d_head
