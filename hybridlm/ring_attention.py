"""Causal softmax attention of rows that are cut over devices: equal work on each, keys and values in a ring.

Contiguous pieces suit recurrences, and leave the last device (2N - 1)/N of the mean work of causal attention.
So each piece is two blocks, and device i computes for blocks i and 2N - 1 - i of all 2N ("zigzag"); q, k and
v are sent there, and o back. Keys and values then go round, two blocks at a time, while those that came
before are in use. With the blocks of any other device there are two pairs to compute, all of one block by all
of the other but for documents, so that all devices have the same program and the same work at every step.

Of a block before, only the document that reaches over the border is seen: its last tokens there by its first
ones here. Documents that begin inside a block see nothing of others: `softmax_attention` within the block.
Backwards, gradients of keys and values travel with them, in float32. (Ring Attention, arXiv 2310.01889; the
zigzag order is ring-flash-attention's and Llama 3's, arXiv 2407.21783, section 3.3.2.)

Shape legend: B rows, N pieces, C tokens of a block (half a piece), H heads, G key/value heads, K and V their
dims; Z: the two blocks of a device, the early one first.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from hybridlm import pieces
from pallas_kernels import softmax_attention
from pallas_kernels.attention_part import UNSEEN, Merged, attention_part, attention_part_gradients, merge
from pallas_kernels.softmax_attention import KEPT

KV = tuple[jax.Array, jax.Array]


class Documents(NamedTuple):
    """Of every block of the row, int32 [B, 2N].

    begin: place in the row where the document of the block's first token begins.
    lead: tokens of the block that belong to that document.
    """

    begin: jax.Array
    lead: jax.Array


def ring_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGV: jax.Array, segment_ids: jax.Array,
    sinks_H: jax.Array | None, *, scale: float, axis: str,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V] of a piece of an even number of tokens, within `per_shard`; see `softmax_attention`."""
    length = segment_ids.shape[1]
    found = documents(pieces.starts(segment_ids, axis), axis)
    q, k, v, ids = (zigzag(x, axis) for x in (q_BTHK, k_BTGK, v_BTGV, segment_ids))
    shape = *q.shape[:-1], v.shape[-1]
    none = lambda q, k, v, *_: jnp.zeros_like(v, shape=shape)
    inside = lambda *args: _inside(*args, scale)
    all_led = jnp.all(_led(found, length // 2, axis))
    rest = jax.lax.cond(all_led, none, inside, q, k, v, sinks_H, ids)
    return _ring(q, k, v, sinks_H, rest, found, scale, axis)


def _within_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, ids: jax.Array, scale: float
) -> jax.Array:
    """o [2, B, C, H, V] of blocks that see nothing of each other."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    o = softmax_attention(*map(flat, (q, k, v)), segment_ids=flat(ids), scale=scale, sinks=sinks)
    return o.reshape(*q.shape[:-1], v.shape[-1])


# The gradient computes it again, whatever `jax.checkpoint` is told to keep: as zeros that would be kept where
# it never runs, too.
_inside = jax.custom_vjp(_within_blocks, nondiff_argnums=(5,))


def _inside_forward(*args: Any) -> tuple[jax.Array, tuple]:
    return _inside(*args), args[:5]


def _inside_backward(scale: float, args: tuple, do: jax.Array) -> tuple:
    *arrays, ids = args
    run = lambda q, k, v, sinks: _within_blocks(q, k, v, sinks, ids, scale)
    return *jax.vjp(run, *arrays)[1](do), None


_inside.defvjp(_inside_forward, _inside_backward)


def order(count: int) -> np.ndarray:
    """The two blocks, of 2 * count, that each of ``count`` devices computes: [count, 2]."""
    return np.stack([np.arange(count), 2 * count - 1 - np.arange(count)], axis=1)


def zigzag(x: jax.Array, axis: str) -> jax.Array:
    """Of a piece [B, 2C, ...]: the two blocks that this device computes, [2, B, C, ...]."""
    routes = _routes(jax.lax.axis_size(axis))
    halves = zip(jnp.split(x, 2, axis=1), routes, strict=True)
    came = jnp.stack([_moved(half, axis, route) for half, route in halves])
    return jnp.where(_swapped(axis), came[::-1], came)


def unzigzag(x: jax.Array, axis: str) -> jax.Array:
    """The inverse of `zigzag`."""
    routes = _routes(jax.lax.axis_size(axis))
    halves = zip(jnp.where(_swapped(axis), x[::-1], x), routes, strict=True)
    back = [_moved(half, axis, [(b, a) for a, b in route]) for half, route in halves]
    return jnp.concatenate(back, axis=1)


def _routes(count: int) -> list[list[tuple[int, int]]]:
    """Of first and of second halves of pieces: (the device that has it, the device that computes it)."""
    owner = {int(block): device for device, two in enumerate(order(count)) for block in two}
    return [[(piece, owner[2 * piece + half]) for piece in range(count)] for half in range(2)]


def _moved(x: jax.Array, axis: str, route: list[tuple[int, int]]) -> jax.Array:
    """Sent along; of two devices the first halves stay where they are, which XLA would send to themselves."""
    return x if all(a == b for a, b in route) else jax.lax.ppermute(x, axis, route)


def _swapped(axis: str) -> jax.Array:
    """Whether this device's early block is the second half of a piece: that of an odd number is."""
    return jax.lax.axis_index(axis) % 2 == 1


def documents(starts: jax.Array, axis: str) -> Documents:
    """From where documents start in this piece, bool [B, 2C]."""
    batch, length = starts.shape
    size = length // 2
    halves = starts.reshape(batch, 2, size)
    place = jax.lax.axis_index(axis) * length + jnp.arange(length, dtype=jnp.int32).reshape(2, size)
    last = jnp.max(jnp.where(halves, place, 0), axis=-1)
    inner = jnp.arange(1, size, dtype=jnp.int32)
    lead = jnp.min(jnp.where(halves[..., 1:], inner, size), axis=-1, initial=size)
    each = jnp.stack([last, lead, halves[..., 0].astype(jnp.int32)], axis=-1)
    last, lead, fresh = jnp.moveaxis(pieces.gather(each, axis), -1, 0)
    reached = jax.lax.cummax(jnp.pad(last, ((0, 0), (1, 0)))[:, :-1], axis=1)
    begin = jnp.where(fresh > 0, size * jnp.arange(reached.shape[1], dtype=jnp.int32), reached)
    return Documents(begin, lead)


def _of_blocks(x: jax.Array, axis: str) -> jax.Array:
    """Of x [B, 2N], what is of the two blocks of this device: [2, B]."""
    blocks = jnp.asarray(order(jax.lax.axis_size(axis)))[jax.lax.axis_index(axis)]
    return jnp.take(x, blocks, axis=1).T


def _led(found: Documents, size: int, axis: str) -> jax.Array:
    """Which tokens of this device's blocks lead them: bool [2, B, C]."""
    return jnp.arange(size) < _of_blocks(found.lead, axis)[..., None]


Pair = tuple[Any, Any, jax.Array, jax.Array | None]


def _pairs(found: Documents, size: int, axis: str, source: jax.Array | None = None) -> list[Pair]:
    """What this device computes with the keys of ``source``, or with its own.

    Each: (which of its blocks, which of those of the source, `PartCall`'s queries and keys).
    """
    count, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    lead, begin = (_of_blocks(x, axis) for x in (found.lead, found.begin))
    blocks = jnp.asarray(order(count))[here if source is None else source]

    def reach(mine: Any, theirs: Any) -> Pair:
        keys = jnp.clip((blocks[theirs] + 1) * size - begin[mine], 0, size)
        return mine, theirs, jnp.where(keys > 0, lead[mine], 0), keys

    if source is None:
        return [(0, 0, lead[0], None), (1, 1, lead[1], None), reach(1, 0)]
    # The early blocks of all are before the late ones. Of two late ones that of an earlier device is later.
    same = (source > here).astype(jnp.int32)
    return [reach(1, 0), reach(same, same)]


def _around(step: Callable[[Any, KV, jax.Array], Any], carry: Any, kv: KV, axis: str) -> Any:
    """``step`` with the keys and values of every other device, each sent on while it is in use."""
    count, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    kv = _next(kv, axis)

    def body(state: tuple[KV, Any], hop: jax.Array) -> tuple[tuple[KV, Any], None]:
        kv, carry = state
        return (_next(kv, axis), step(carry, kv, (index - hop) % count)), None

    if count > 2:
        (kv, carry), _ = jax.lax.scan(body, (kv, carry), jnp.arange(1, count - 1, dtype=jnp.int32))
    return step(carry, kv, (index + 1) % count)


def _at(x: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _put(x: jax.Array, index: Any, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _next(tree: Any, axis: str) -> Any:
    """Of the device before."""
    count = jax.lax.axis_size(axis)
    way = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, way), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _ring(*args: Any) -> jax.Array:
    """o [B, 2C, H, V] of this device's piece, from zigzag blocks: of tokens that do not lead theirs it is
    ``rest`` [2, B, C, H, V]. Arguments: of `_forward`."""
    return _forward(*args)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    rest: jax.Array,
    found: Documents,
    scale: float,
    axis: str,
) -> tuple[jax.Array, tuple]:
    size = q.shape[2]

    def part(queries: jax.Array, keys: jax.Array | None, *qkv: jax.Array) -> tuple:
        run = lambda q, k, v: attention_part(q, k, v, queries, keys, scale=scale)
        shapes = jax.eval_shape(run, *qkv)
        none = lambda *_: tuple(
            jnp.full(x.shape, fill, x.dtype) for x, fill in zip(shapes, (0, UNSEEN), strict=True)
        )
        return jax.lax.cond(jnp.any(queries > 0), run, none, *qkv)

    def parts(kv: KV, source: jax.Array | None = None) -> Iterator[tuple[Any, tuple]]:
        for mine, theirs, queries, keys in _pairs(found, size, axis, source):
            yield mine, part(queries, keys, _at(q, mine), *(_at(x, theirs) for x in kv))

    def step(carry: tuple, kv: KV, source: jax.Array) -> tuple:
        for mine, new in parts(kv, source):
            merged = merge(*(_at(x, mine) for x in carry), *new)
            carry = tuple(_put(x, mine, one) for x, one in zip(carry, merged, strict=True))
        return carry

    (o, log_sum), late, across = (new for _, new in parts((k, v)))
    late = merge(*late, *across)
    own = tuple(jnp.stack(two) for two in zip((o.astype(late[0].dtype), log_sum), late, strict=True))
    o, log_sum = _around(step, own, (k, v), axis)
    if sinks is not None:
        whole = jnp.logaddexp(log_sum, sinks.astype(jnp.float32)[:, None])
        o, log_sum = o * jnp.moveaxis(jnp.exp(log_sum - whole), -1, 2)[..., None], whole
    led = _led(found, size, axis)[..., None, None]
    o = unzigzag(jnp.where(led, o.astype(v.dtype), rest), axis)
    o, log_sum = checkpoint_name((o, log_sum), KEPT)
    return o, (q, k, v, sinks, found, o, log_sum)


def _backward(scale: float, axis: str, residuals: tuple, do: jax.Array) -> tuple:
    q, k, v, sinks, found, o, log_sum = residuals
    size = q.shape[2]
    o, do = zigzag(o, axis), zigzag(do, axis)
    led = _led(found, size, axis)[..., None, None]
    do, d_rest = jnp.where(led, do, 0), jnp.where(led, 0, do)

    def part(queries: jax.Array, keys: jax.Array | None, *arrays: jax.Array) -> tuple:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, *merged: jax.Array) -> tuple:
            return attention_part_gradients(q, k, v, queries, keys, Merged(*merged), scale=scale)

        none = lambda *arrays: tuple(map(jnp.zeros_like, arrays[:3]))
        return jax.lax.cond(jnp.any(queries > 0), run, none, *arrays)

    def step(carry: tuple, kv: KV, source: jax.Array | None = None) -> tuple:
        dq, dkv = carry[0], carry[1:]
        if source is not None and jax.lax.axis_size(axis) > 2:  # of two devices it was used nowhere before
            dkv = _next(dkv, axis)  # of the same keys, from where they were used before
        for mine, theirs, queries, keys in _pairs(found, size, axis, source):
            of_queries, of_keys = (lambda x, at=at: _at(x, at) for at in (mine, theirs))
            dq_C, *dkv_C = part(
                queries, keys, of_queries(q), *map(of_keys, kv), *map(of_queries, (do, o, log_sum))
            )
            dq = _put(dq, mine, of_queries(dq) + dq_C)
            dkv = tuple(_put(x, theirs, of_keys(x) + one) for x, one in zip(dkv, dkv_C, strict=True))
        return dq, *dkv

    zeros = tuple(jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
    # What is of its own keys comes last on a device: those of the others travel home meanwhile.
    dq, *dkv = _around(step, zeros, (k, v), axis)
    dq, dk, dv = step((dq, *_next(dkv, axis)), (k, v))
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32)[:, None] - log_sum)
        product = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
        d_sinks = -jnp.einsum("zbch,zbhc->h", product, share).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, d_rest, None


_ring.defvjp(_forward, _backward)
