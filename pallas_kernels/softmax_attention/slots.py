"""Attention over a cache whose slots are in order, in blocks of slots: those that no query sees are not read.

A chunk of a prompt meets a cache of which most may be empty yet, and far longer than a block of scores. So
queries go in large blocks, and slots in turn past each, with the largest logit and the sums so far (online
softmax, arXiv 1805.02867). How many blocks of slots are met is known only as it runs: not for gradients.
The blocks between the first tokens that every query sees and the chunk, all of a prompt but its padding, are
seen whole: where a kernel computes such a part (`pallas_kernels.attention_part`), it does, and only the
blocks that are left are gone past.

Shape legend: B batch, T queries, S slots, G key/value heads of R heads each (H = G R), K and V their dims.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention_part.call import PartCall
from pallas_kernels.attention_part.op import OP
from pallas_kernels.dispatch import KERNELS
from pallas_kernels.softmax_attention import xla

UNSEEN = -1e30  # the largest logit of none; finite, so that differences are


class Partial(NamedTuple):
    """Over some slots. most: largest logit.  total: sum of exp(logit - most).  o: that of the values so
    weighted. float32 [B, G, R, T] and [B, G, R, T, V]."""

    most: jax.Array
    total: jax.Array
    o: jax.Array

    def at(self, most: jax.Array) -> "Partial":
        """The same with sums of exp(logit - ``most``)."""
        factor = jnp.exp(self.most - most)
        return Partial(most, self.total * factor, self.o * factor[..., None])


def over_slots(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array,
    index_T: jax.Array, first_BT: jax.Array, index_S: jax.Array, *,
    scale: float, sinks_H: jax.Array | None = None,
    forgotten_BTH: jax.Array | None = None, forgotten_BSH: jax.Array | None = None, axis: str | None = None,
) -> jax.Array:  # fmt: skip
    """o [B, T, H, V]: as `blockwise`, of keys at consecutive places index_S.

    axis: of a mesh, within a `jax.shard_map`: each of its devices has other keys and the same queries, and
        gets the whole o: the largest logits and then the sums travel.
    """
    batch, length, heads, dim = q_BTHK.shape
    slots, groups = k_BSGK.shape[1:3]
    queries = min(xla.MAX_BLOCK, length)
    size = slots if length == 1 else min(slots, max(1, xla.SCORES // queries))
    grouped = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], groups, heads // groups), 1, 3)
    plain = forgotten_BTH is None and length > 1 and size < slots
    low_B = jnp.max(jnp.maximum(first_BT, 0), axis=1)
    before = _before(q_BTHK, k_BSGK, v_BSGV, low_B, index_T[0], index_S, size, scale) if plain else None

    def block(start: jax.Array | int) -> jax.Array:
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, queries, axis)
        q = cut(q_BTHK, 1).reshape(batch, queries, groups, -1, dim)
        place_T, low_BT = cut(index_T, 0), jnp.maximum(cut(first_BT, 1), 0)

        def part(number: Any) -> Partial:
            at = jnp.minimum(number * size, slots - size)  # the last one begins where it is whole
            some = lambda x, axis=1: jax.lax.dynamic_slice_in_dim(x, at, size, axis)
            place_S = some(index_S, 0)
            logits = scale * jnp.einsum(
                "btgrk,bsgk->bgrts", q, some(k_BSGK), preferred_element_type=jnp.float32
            )
            if forgotten_BTH is not None and forgotten_BSH is not None:
                logits += grouped(cut(forgotten_BTH, 1))[..., None]
                logits -= grouped(some(forgotten_BSH))[..., None, :]
            seen = (place_S <= place_T[:, None]) & (place_S >= low_BT[..., None])
            seen = (seen & (place_S >= index_S[0] + number * size))[:, None, None]
            most = jnp.max(logits, axis=-1, initial=UNSEEN, where=seen)
            p = jnp.where(seen, jnp.exp(logits - most[..., None]), 0)
            exact: dict[str, Any] = dict(preferred_element_type=jnp.float32)
            o = jnp.einsum("bgrts,bsgv->bgrtv", p.astype(v_BSGV.dtype), some(v_BSGV), **exact)
            return Partial(most, jnp.sum(p, axis=-1), o)

        if size == slots:
            found = part(0)
        else:
            low, past = jnp.min(low_BT) - index_S[0], jnp.max(place_T) + 1 - index_S[0]
            numbers = jnp.clip(low // size, 0), jnp.clip(-(-past // size), 0, -(-slots // size))
            shape = batch, groups, heads // groups, queries
            some_seen = Partial(
                jnp.full(shape, UNSEEN), jnp.zeros(shape), jnp.zeros((*shape, v_BSGV.shape[-1]))
            )
            number: Any = lambda n: n
            if before is not None:
                some_seen, (begin, end) = jax.tree.map(lambda x: cut(x, 3), before[0]), before[1]
                numbers = numbers[0], numbers[1] - (end - begin)
                number = lambda n: jnp.where(n < begin, n, n + end - begin)
            found = jax.lax.fori_loop(*numbers, lambda n, found: _merged(found, part(number(n))), some_seen)
        return _finished(found, sinks_H, axis).reshape(batch, queries, heads, -1).astype(v_BSGV.dtype)

    if queries == length:
        return block(0)
    starts = jnp.minimum(queries * jnp.arange(-(-length // queries)), length - queries)
    o, rest = jax.lax.map(block, starts), length % queries
    whole = jnp.moveaxis(o, 0, 1)
    if rest:  # the last block begins where it is whole, too
        others = whole[:, :-1].reshape(batch, -1, *o.shape[3:])
        return jnp.concatenate([others, whole[:, -1, -rest:]], axis=1)
    return whole.reshape(batch, length, *o.shape[3:])


def _before(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array,
    low_B: jax.Array, start: jax.Array, index_S: jax.Array, size: int, scale: float,
) -> tuple[Partial, tuple[jax.Array, jax.Array]] | None:  # fmt: skip
    """(of the blocks of ``size`` slots that every query sees whole, what is found; the first of them, and the
    one behind them).

    low_B: the place of the first token that all queries of a row see.  start: the first query's place.
    None where no kernel computes it.
    """
    batch, length, heads, _ = q_BTHK.shape
    slots, groups = k_BSGK.shape[1:3]
    same = lambda count: jnp.full(batch, count, jnp.int32)
    begin = jnp.clip(-(-(jnp.max(low_B) - index_S[0]) // size), 0, slots // size)
    end = jnp.maximum(jnp.clip((start - index_S[0]) // size, 0, slots // size), begin)
    call = PartCall(q_BTHK, k_BSGK, v_BSGV, same(length), same((end - begin) * size), scale, leading=True)
    if not _by_kernel(call):
        return None
    # The kernel's keys are the leading ones: those behind padding are copied.
    moved = lambda x: jnp.take(x, begin * size + jnp.arange(slots), axis=1, mode="clip")
    behind = lambda: OP.compute(dataclasses.replace(call, k=moved(k_BSGK), v=moved(v_BSGV)))
    o, log_sum = jax.lax.cond(begin > 0, behind, lambda: OP.compute(call))
    apart = lambda x: x.reshape(batch, groups, heads // groups, *x.shape[2:]).astype(jnp.float32)
    some = jnp.broadcast_to(jnp.where(end > begin, 1.0, 0.0), log_sum.shape)
    return Partial(apart(log_sum), apart(some), apart(jnp.moveaxis(o, 2, 1))), (begin, end)


def _by_kernel(call: PartCall) -> bool:
    return OP.choose(call).backend in KERNELS


def _merged(one: Partial, other: Partial) -> Partial:
    most = jnp.maximum(one.most, other.most)
    one, other = one.at(most), other.at(most)
    return Partial(most, one.total + other.total, one.o + other.o)


def _finished(found: Partial, sinks_H: jax.Array | None, axis: str | None) -> jax.Array:
    """float32 [B, T, G, R, V] of what was found on all devices of ``axis``."""
    most = found.most if axis is None else jax.lax.pmax(found.most, axis)
    sinks = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(*found.most.shape[1:3], 1)
    if sinks is not None:
        most = jnp.maximum(most, sinks)
    _, total, o = found.at(most)
    if axis is not None:
        o, total = jax.lax.psum((o, total), axis)
    if sinks is not None:
        total += jnp.exp(sinks - most)
    return jnp.moveaxis(o / total[..., None], 3, 1)
