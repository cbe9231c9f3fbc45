"""All that a chunk needs before its state is known, for a decay per key channel: every chunk on its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors

NORM_K, NORM_Q, SPAN = range(3)  # rows of `Tiles.norms`


class Tiles(NamedTuple):
    """Per value head; G: sums of log-decays from the chunk's start, C: its last token.

    read_q, read_k: scale q exp(G) and k exp(G) of tokens of the document that enters the chunk, else 0.
    write: k exp(G_C - G) of tokens of the document that leaves it, else 0.  All [B, T, HV, K] bf16.
    carry: exp(G_C), or 0 if no document spans the chunk, [B, HV, T/C, K] float32.
    scores: scale q_i.k_j exp(G_i - G_j), j <= i of one document, [B, HV, T, C] bf16.
    inverses: `two_parts.Inverse`.
    norms: 1 / |k|, scale / |q| and the size of the last level's blocks (for all tokens), NORM_K, NORM_Q and
        SPAN, [B, HV, T/C, 3, C] float32.
    read_k and inverses are None if additive, norms unless kept; q and k are normalised with `l2norm`.
    """

    read_q: jax.Array
    write: jax.Array
    carry: jax.Array
    scores: jax.Array
    read_k: Any = None
    inverses: Any = None
    norms: Any = None


class ChannelSaved(NamedTuple):
    """What the forward keeps beside its inputs: see `Tiles` and `Scanned`; moves as in pieces.py.

    wrong: of one pass (one_pass_forward.py), which has no tiles but norms and carry: the first token of each
    head, [B, HV], from which on it was not right.
    steps: of one pass, what it read of log-decays that are not bf16 (one_pass_steps.py): the backward pass
    reads no others.
    """

    tiles: Tiles
    states: jax.Array
    values: jax.Array | None = None
    moves: jax.Array | None = None
    wrong: jax.Array | None = None
    steps: jax.Array | None = None


def channel_tiles(inputs: Inputs, *, keep: bool = False) -> Tiles:
    i = inputs
    assert i.log_decay is not None
    batch, length, heads, value_heads, key_dim, _ = i.sizes
    group, chunks, halves = value_heads // heads, length // C, key_dim // C
    delta = i.beta is not None
    vectors = Vectors(i, ("beta", "segment", "entering"))
    keys = jax.ShapeDtypeStruct((batch, length, value_heads, key_dim), BF16)
    square = jax.ShapeDtypeStruct((batch, value_heads, length, C), BF16)
    results = dict(
        read_q=keys,
        write=keys,
        carry=jax.ShapeDtypeStruct((batch, value_heads, chunks, key_dim), F32),
        scores=square,
    )
    if delta:
        results |= dict(read_k=keys, **two_parts.result(batch, value_heads, length)._asdict())
    if keep:
        results |= dict(norms=jax.ShapeDtypeStruct((batch, value_heads, chunks, 3, C), F32))

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows, key_head = pl.ds(n * C, C), blocks.div(head, group)
        decay_s, products_s = s["decay_or_products"]
        x_s, scores_s = products_s[:2]
        q_s, k_s, steps_s, norm_s = (s[name] for name in ("q", "k", "steps", "norms"))
        in_s: Any = s.get("vectors")
        decay_ready, ready = s["decay_ready"], s["ready"]

        for half in range(halves):
            columns = pl.ds(half * C, C)
            plgpu.copy_gmem_to_smem(refs["decay"].at[b, rows, head, columns], decay_s.at[half], decay_ready)
        for half in range(halves):
            columns = pl.ds(half * C, C)
            plgpu.copy_gmem_to_smem(refs["k"].at[b, rows, key_head, columns], k_s.at[half], ready)
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, key_head, columns], q_s.at[half], ready)
        vectors.copy(refs, in_s, ready, b, head, rows)
        plgpu.barrier_wait(decay_ready)
        for half in range(halves):
            steps = channel_math.steps(blocks.tile(decay_s.at[half]))
            blocks.store(steps_s.at[half], steps)
        plgpu.barrier_wait(ready)

        if delta:
            keys = [k_s.at[half] for half in range(halves)]
            two_parts.find_hard(i, vectors.get("beta", in_s), keys, s)
        squares_q: Any = 0.0
        squares_k: Any = 0.0
        diagonal: Any = 0.0
        for half in range(halves):
            q, k = blocks.tile(q_s.at[half]), blocks.tile(k_s.at[half])
            diagonal += jnp.sum(q * k, axis=1)
            if i.l2norm:
                squares_q += jnp.sum(q * q, axis=1)
                squares_k += jnp.sum(k * k, axis=1)
        one = plgpu.layout_cast(jnp.full((C,), 1.0, F32), blocks.ROWS)
        inverse_norm = lambda squares: lax.rsqrt(squares + blocks.L2NORM_EPS) if i.l2norm else one
        norm_s.at[NORM_K][...] = inverse_norm(squares_k)
        norm_s.at[NORM_Q][...] = inverse_norm(squares_q) * i.scale
        s["reach"][...] = one
        plgpu.commit_smem()

        def level(carried: tuple) -> tuple:
            size, _, reach, *old = carried
            zero = channel_math.hidden_zero(s["reach"])
            slots = [half + zero for half in range(halves)]
            middle = channel_math.from_middle(size, zero)
            far = one * 0.0
            left: list = [[], []]
            for half in range(halves):  # one after the other: both at once are too many registers
                offset = channel_math.sums(middle, steps_s.at[slots[half]])
                far = jnp.maximum(far, jnp.max(jnp.abs(offset), axis=1))
                up, k = jnp.exp2(offset), blocks.tile(k_s.at[slots[half]])
                left[0].append((blocks.tile(q_s.at[slots[half]]) * up).astype(BF16))
                left[1].append((k * up).astype(BF16))
                blocks.store(x_s.at[slots[half]], (k * jnp.exp2(-offset)).astype(BF16))
            served = channel_math.unsettled(size, reach, zero)
            reach = jnp.where(served, far, reach)
            s["reach"][...] = reach
            plgpu.commit_smem()
            zero = channel_math.hidden_zero(s["reach"])
            new = blocks.sums_of_products(
                *[
                    ([(x, x_s.at[half + zero].T) for half, x in enumerate(row)], (C, C))
                    for row in left[: len(old)]
                ],
            )
            pairs = channel_math.within(size, served, zero)
            found = [jnp.where(pairs, x, y) for x, y in zip(new, old, strict=True)]
            following = channel_math.next_size(size, s["reach"])
            plgpu.commit_smem()  # all have read x_s and reach
            return following, size, reach, *found

        diagonal_tile = jnp.where(
            blocks.row_index() == blocks.col_index(), blocks.by_row(diagonal), blocks.zeros((C, C))
        )
        start: tuple = (jnp.asarray(2 * C, jnp.int32),) * 2 + (one * (2 * channel_math.RANGE), diagonal_tile)
        start += (blocks.zeros((C, C)),) * delta
        _, span, _, *found = lax.while_loop(lambda carried: carried[0] > 1, level, start)
        if keep:
            norm_s.at[SPAN][...] = one * jnp.minimum(span, C).astype(F32)
        norm_k, norm_q = blocks.row_vector(norm_s.at[NORM_K]), blocks.row_vector(norm_s.at[NORM_Q])
        read = write = one
        carry: Any = 1.0
        same: Any = None
        if vectors.has("segment"):
            ids = vectors.get("segment", in_s)
            of_row = blocks.row_vector(ids)
            entering, leaving = vectors.get("entering", in_s)[0], ids[C - 1]
            read = jnp.where(of_row == entering, 1.0, 0.0)
            write = jnp.where(of_row == leaving, 1.0, 0.0)
            carry = jnp.where(entering == leaving, 1.0, 0.0)
            same = blocks.by_row(of_row) == blocks.by_col(blocks.col_vector(ids))

        def finish(products: jax.Array, row_scale: jax.Array) -> jax.Array:
            if i.l2norm:
                products *= blocks.by_col(blocks.col_vector(norm_s.at[NORM_K]))
            products *= blocks.by_row(row_scale)
            return products if same is None else jnp.where(same, products, 0.0)

        blocks.store(scores_s, finish(found[0], norm_q).astype(BF16))

        for half in range(halves):
            zero = channel_math.hidden_zero(s["reach"])
            up_to, after = channel_math.up_to(zero), channel_math.after(zero)
            every = channel_math.every(s["reach"])
            ends = channel_math.sums(every, steps_s.at[half])
            end = channel_math.any_row(ends)
            s["carry"].at[pl.ds(half * C, C)][...] = jnp.exp2(end) * carry
            total = channel_math.sums(up_to, steps_s.at[half])
            decay, k = jnp.exp2(total), blocks.tile(k_s.at[half])
            q = blocks.tile(q_s.at[half]) * blocks.by_row(norm_q * read) * decay
            blocks.store(q_s.at[half], q.astype(BF16))
            if delta:
                seen = k * blocks.by_row(norm_k * read) * decay
                blocks.store(k_s.at[half], seen.astype(BF16))
            later = channel_math.sums(after, steps_s.at[half])
            written = k * blocks.by_row(norm_k * write) * jnp.exp2(later)
            blocks.store(x_s.at[half], written.astype(BF16))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_s, refs["scores"].at[b, head, rows])
        if keep:
            plgpu.copy_smem_to_gmem(norm_s, refs["norms"].at[b, head, n])
        plgpu.copy_smem_to_gmem(s["carry"], refs["carry"].at[b, head, n])
        for half in range(halves):
            columns = pl.ds(half * C, C)
            plgpu.copy_smem_to_gmem(q_s.at[half], refs["read_q"].at[b, rows, head, columns])
            plgpu.copy_smem_to_gmem(x_s.at[half], refs["write"].at[b, rows, head, columns])
            if delta:
                plgpu.copy_smem_to_gmem(k_s.at[half], refs["read_k"].at[b, rows, head, columns])
        if delta:
            lower = finish(found[1], norm_k * blocks.row_vector(vectors.get("beta", in_s)))
            high_s, low_s = products_s[2:]
            two_parts.store_inverse(lower, high_s, low_s, s, refs, (b, head, n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    products = blocks.smem((halves, C, C), BF16), *[blocks.smem((C, C), BF16)] * (1 + 2 * delta)
    scratch = dict(
        q=blocks.smem((halves, C, C), BF16),
        k=blocks.smem((halves, C, C), BF16),
        steps=blocks.smem((halves, C, C), jnp.float16),
        decay_or_products=plgpu.RefUnion(blocks.smem((halves, C, C), i.log_decay.dtype), products),
        vectors=plgpu.SMEM((len(vectors), C), F32) if len(vectors) else None,
        norms=plgpu.SMEM((3, C), F32),
        reach=plgpu.SMEM((C,), F32),
        carry=plgpu.SMEM((key_dim,), F32),
        decay_ready=plgpu.Barrier(num_arrivals=halves),
        ready=plgpu.Barrier(num_arrivals=2 * halves + len(vectors)),
        **(two_parts.scratch() if delta else {}),
    )
    name = ("delta_" if delta else "additive_") + "channel_tiles"
    arrays = dict(q=i.q, k=i.k, decay=i.log_decay, **vectors.named)
    grid = dict(b=batch, h=value_heads, n=chunks)
    out = blocks.launch(i, name, body, arrays, results, scratch, grid)
    parts = [out.pop(name) for name in two_parts.Inverse._fields if delta]
    return Tiles(**out, inverses=two_parts.Inverse(*parts) if delta else None)
