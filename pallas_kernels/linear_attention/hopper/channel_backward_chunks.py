"""The gradients of q, k, log_decay and beta with a decay per key channel: no chunk waits for another.

With S the state that enters a chunk, dS the gradient of the one that leaves, U = V' (additive: V), dV from
the reverse scan, q and k normalised and q scaled, e = exp(G) and f = exp(G_C - G) with their masks (now a
number per token and channel), and E = tril(dO U^T), F = -(dV U^T, j < i) on pairs of one document,
    dq = e (dO S^T) + [rows of E with k]
    dk = -e (dV S^T) + [rows of F with k] + f (U dS^T) + [columns of E with q and of F with k]
where a pair (i, j) has the factor exp(G_i - G_j) in every channel, made as in `channel_math`: with offsets
D_i from the middle of a block, row i has 2^D_i and column j 2^-D_j, so that
    rows:    2^D_i  sum_j E_ij (k_j 2^-D_j)        columns:  2^-D_j  sum_i E_ij (q_i 2^D_i).
The gradient of G is elementwise: what a row gains with exp(G_i) it has times q_i or k_i, what a column
loses with exp(-G_j) times k_j. Both are products of the same three bf16 tiles with float32 sums, so what
must cancel between far tokens does. The diagonal of E has no decay and stays out, and so does the last
token's f = 1: under strong decay nothing large is left whose difference would be rounded.
    dlog_decay_t = sum_{i >= t} dG_i,    dG_C += sum_i k_i (f U dS^T)_i + exp(G_C) <S, dS>.
dbeta_i = dV_i.U_i / beta_i^2 is the diagonal of dV U^T.

Two warpgroups take half of the key dimension each, 32 channels after 32 channels: more do not fit into the
registers. The first also makes E, the second F. A third issues copies.
"""

import functools
from itertools import count
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, channel_math, chunk_math
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.channel_backward_copies import (
    BF16,
    F16,
    WIDTH,
    WORKERS,
    buffers,
    issue_copies,
)
from pallas_kernels.linear_attention.hopper.channel_tiles import NORM_K, NORM_Q, SPAN
from pallas_kernels.linear_attention.hopper.inputs import Inputs

REGISTERS = (232, 40)  # a thread that works, that copies


def value_slices(value_dim: int) -> int:
    """Slices of V that the kernel takes one by one."""
    return value_dim // (min(value_dim, 2 * C) if value_dim % (2 * C) == 0 else C)


def chunk_gradients(
    inputs: Inputs,
    norms: jax.Array,
    carry: jax.Array,
    states: jax.Array,
    state_gradients: jax.Array,
    values: jax.Array,
    do: jax.Array,
    dv: jax.Array | None,
    *,
    run: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq, dk [B, T, N, K] bf16, dlog_decay [B, T, N, K] as it is, dV.U [B, N, T] (delta), N of HV, slices.

    Shared memory holds 128 values of a head: of a wider one every slice (of 128 or 64) adds a summand.
    norms: [B, HV, T/C, 3, C] float32: 1 / |k|, scale / |q|, tokens in a block of the finest level the chunk
    needs.  carry: [B, HV, T/C, K] float32.  states, state_gradients: [B, HV, T/C, V, K] bf16.
    values, do, dv: [B, T, HV, V] bf16; dv None: additive.  run: chunks one block of threads takes in turn.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group = value_heads // heads
    chunks = length // C
    slices = value_slices(value_dim)
    parts, blocks_v = key_dim // WIDTH, value_dim // slices // C
    turns = parts // WORKERS
    delta, documents = dv is not None, inputs.segment is not None
    interpret = inputs.interpret
    tile = (C, WIDTH)
    write = functools.partial(blocks.write, interpret=interpret)
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, decay=inputs.log_decay, u=values, do=do)
    arrays |= dict(h=states, g=state_gradients, norms=norms, carry=carry)
    decay_type = arrays["decay"].dtype
    arrays |= dict(dv=dv) | (dict(segment=inputs.segment, entering=inputs.entering) if documents else {})

    scratch = buffers(parts, turns, blocks_v, delta=delta, documents=documents)
    keys = (batch, length, value_heads * slices, key_dim)
    results = dict(
        dq=jax.ShapeDtypeStruct(keys, BF16),
        dk=jax.ShapeDtypeStruct(keys, BF16),
        d_decay=jax.ShapeDtypeStruct(keys, decay_type),
        error=jax.ShapeDtypeStruct((batch, value_heads * slices, length), F32) if delta else None,
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, summand, first = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("n") * run
        head = blocks.div(summand, slices)
        warpgroup = lax.axis_index("wg")
        key_head = blocks.div(head, group)
        steps = jnp.minimum(run, chunks - first)

        sync = lambda: blocks.meet(s["both"])

        def multiply(*sums: tuple) -> tuple[jax.Array, ...]:
            return chunk_math.sums_of_products(*sums, interpret=interpret)

        def rounded(x: jax.Array) -> jax.Array:
            """bf16 pairs; the barrier keeps a way back to float32 from becoming a slow conversion of each."""
            return lax.optimization_barrier(x.astype(BF16))

        def store(ref: Any, value: jax.Array) -> None:
            blocks.store(ref, value.astype(BF16), interpret=interpret, width=WIDTH)

        def store_parts(tiles: list, x: jax.Array) -> None:
            """x as the sum of two bf16 tiles."""
            high = rounded(x)
            store(tiles[0], high)
            store(tiles[1], x - high.astype(F32))

        def in_parts(pairs: list, tiles: list) -> list:
            """Operands of E, F times a tile in two parts; additive: of E in two parts times it."""
            if delta:
                return [[(x, y) for y in tiles] for x in pairs]
            return [[(pairs[0], tiles[0]), (pairs[0], tiles[1]), (pairs[1], tiles[0])]]

        def halve(at: SimpleNamespace, wg: Any, size: Any) -> None:
            """E and F without the pairs, `middle` for blocks of `size` tokens."""

            @pl.when(wg < 2)
            def _() -> None:
                x = blocks.tile(s["pairs"].at[0, wg])
                store(s["pairs"].at[1, wg], jnp.where((at.row() ^ at.col()) < size, x, 0.0))

            pl.when(wg == 0)(lambda: set_middle(at, size, s["middle"].at[1]))
            plgpu.commit_smem()

        def set_middle(at: Any, size: Any, ref: Any) -> None:
            middle = channel_math.middle_of(at.row(), at.col(), size)
            blocks.store(ref, middle, interpret=interpret, width=WIDTH)

        def load_decay(i: Any, turn: Any) -> jax.Array:
            columns = pl.ds((warpgroup * turns + turn) * WIDTH, WIDTH)
            source = refs["decay"].at[b, pl.ds((first + i) * C, C), head, columns]
            return plgpu.load(source, layout=blocks.WGMMA, optimized=False)

        def step(i: Any, decay: jax.Array) -> jax.Array:
            slot, n = blocks.rem(i, 2), first + i
            rows = pl.ds(n * C, C)
            plgpu.barrier_wait(s["numbers_filled"].at[slot])
            norms_s = s["norms"].at[slot]
            seen_by = count()

            def here(turn: Any) -> SimpleNamespace:
                """What the next steps name. The 0 in it is unknown to the compiler and new each time: else it
                lifts the addresses, descriptors and masks of a whole chunk to its start, and spills."""
                zero = jnp.minimum(norms_s[NORM_K, next(seen_by)].astype(jnp.int32), 0)
                wg = warpgroup + zero
                part = wg * turns + turn
                norm_q = blocks.by_row(blocks.row_vector(norms_s.at[NORM_Q]), tile)
                norm_k = blocks.by_row(blocks.row_vector(norms_s.at[NORM_K]), tile)
                over = range(blocks_v)
                q, k = s["q"].at[part], s["k"].at[part]
                return SimpleNamespace(
                    wg=wg,
                    one=jnp.where(blocks.row_vector(norms_s.at[NORM_K]) < 0.0, 0.0, 1.0),
                    columns=pl.ds(part * WIDTH, WIDTH),
                    row=lambda shape=(C, C): blocks.row_index(shape) + zero,
                    col=lambda shape=(C, C): blocks.col_index(shape) + zero,
                    q=q,
                    k=k,
                    norm_q=norm_q,
                    norm_k=norm_k,
                    query=lambda: blocks.tile(q) * norm_q,
                    key=lambda: blocks.tile(k) * norm_k,
                    steps=s["steps"].at[wg],
                    middle=lambda level: s["middle"].at[level + zero],
                    tiles=[s["tiles"].at[wg, which] for which in range(2)],
                    h=[s["h"].at[part, j] for j in over],
                    g=[s["g"].at[part, j] for j in over],
                    u=[s["u"].at[zero + j] for j in over],
                    do=[s["d"].at[zero, j] for j in over],
                    dv=[[s["d"].at[zero + 1, j] for j in over]] if delta else [],
                    pairs=lambda level: [s["pairs"].at[level + zero, which] for which in range(2)],
                )

            def mask(x: jax.Array, of: Any) -> jax.Array:
                """Rows of tokens of the document `of`."""
                if not documents:
                    return x
                ids = blocks.row_vector(s["segment"].at[slot, 0])
                return x * blocks.by_row(jnp.where(ids == of, 1.0, 0.0), tile)

            def make_pairs() -> None:
                """E (first warpgroup), F (second) strictly below the diagonal; the diagonal apart. Additive:
                the two parts of E."""
                at = here(0)
                rows_of = s["d"].at[at.wg if delta else at.wg * 0]
                (raw,) = multiply(([(rows_of.at[j], u.T) for j, u in enumerate(at.u)], (C, C)))
                s["rows"].at[at.wg][...] = jnp.sum(jnp.where(at.row() == at.col(), raw, 0.0), axis=1)
                keep = at.row() > at.col()
                if documents:
                    ids = s["segment"].at[slot, 0]
                    keep = keep & (
                        blocks.by_row(blocks.row_vector(ids)) == blocks.by_col(blocks.col_vector(ids))
                    )
                x, second = jnp.where(keep, raw, 0.0), at.wg.astype(F32)
                x = x * (1.0 - 2.0 * second) if delta else x - rounded(x).astype(F32) * second
                store(s["pairs"].at[0, at.wg], x)

            plgpu.barrier_wait(s["v_filled"])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dV.U of the last chunk has left
            pl.when(warpgroup < 2)(make_pairs)
            plgpu.commit_smem()
            sync()  # E and F are there
            if delta:
                pl.when(warpgroup == 1)(
                    lambda: plgpu.copy_smem_to_gmem(s["rows"].at[1], refs["error"].at[b, summand, rows])
                )
            span = norms_s[SPAN, 0].astype(jnp.int32)
            entering = s["segment"][slot, 1, 0] if documents else None
            leaving = s["segment"][slot, 0, C - 1] if documents else None

            def take(turn: Any, decay: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                """dq, dk of one part, but for their norms, and the log-decays of the next."""
                at = here(turn)
                blocks.store(at.steps, channel_math.steps(decay.astype(F32)), interpret=interpret)
                following = i * turns + turn + 1
                following = jnp.minimum(following, steps * turns - 1)
                decay = load_decay(blocks.div(following, turns), blocks.rem(following, turns))
                plgpu.barrier_wait(s["h_filled"].at[turn])
                dq, written, *rest = multiply(
                    ([(x, y) for x, y in zip(at.do, at.h, strict=True)], tile),
                    ([(x, y) for x, y in zip(at.u, at.g, strict=True)], tile),
                    *[([(x, y) for x, y in zip(dv, at.h, strict=True)], tile) for dv in at.dv],
                )
                plgpu.commit_smem()  # all have read the values and the states, and the steps are there
                pl.when(turn == turns - 1)(lambda: plgpu.barrier_arrive(s["v_free"]))
                pl.when(turn == 0)(lambda: plgpu.barrier_wait(s["qk_filled"]))
                at = here(turn)
                # Ones that the compiler does not know: constant left operands are wrong on hardware.
                ones = blocks.by_row(at.one.astype(F16), (C, C // 2))
                early, late = (at.steps.at[pl.ds(start, C // 2)] for start in (0, C // 2))
                # Sums up to i: those of the first half's steps and the offset; after i: all others.
                before, behind = multiply(
                    ([(at.middle(0), at.steps), (ones, early)], tile),
                    ([(at.middle(0), at.steps), (ones * jnp.asarray(-1.0, F16), late)], tile),
                )
                dk = written * mask(jnp.exp2(behind * -1.0), leaving)
                written = rounded(jnp.where(at.row(tile) < C - 1, at.key() * dk, 0.0))
                store(at.tiles[0], written)
                read = mask(jnp.exp2(before), entering)
                dq = dq * read
                d_sum = at.query() * dq - written.astype(F32)
                if delta:
                    seen = rest[0] * read * -1.0
                    d_sum = d_sum + at.key() * seen
                    dk = dk + seen
                for h, g in zip(at.h, at.g, strict=True):
                    store(h, blocks.tile(h, BF16) * blocks.tile(g, BF16))
                plgpu.commit_smem()
                at = here(turn)
                last = jnp.where(at.row() == C - 1, 1.0, 0.0).astype(BF16)
                d_sum, kept = multiply(([(last, at.tiles[0])], d_sum), ([(last, h) for h in at.h], tile))
                carried = blocks.by_col(blocks.col_vector(s["carry"].at[slot, at.columns]), tile)
                d_sum = d_sum + kept * carried
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["h_free"].at[turn])
                at = here(turn)
                own = blocks.by_row(blocks.row_vector(s["rows"].at[0]), tile)
                dq, dk = dq + own * at.key(), dk + own * at.query()

                def level(carried: tuple) -> tuple:
                    size, dq, dk, d_sum = carried
                    which = (size < C).astype(jnp.int32)
                    at = here(turn)
                    (offset,) = multiply(([(at.middle(which), at.steps)], tile))
                    finest = (size == span) & (size > 2)  # blocks of 2 have one pair
                    late = (at.row(tile) & (size >> 1)) != 0
                    up = lambda x: jnp.exp2(jnp.where(finest | late, x, -jnp.inf))
                    down = lambda x: jnp.exp2(jnp.where(finest | ~late, x * -1.0, -jnp.inf))
                    store_parts(at.tiles, at.key() * down(offset))
                    plgpu.commit_smem()
                    at = here(turn)
                    found = multiply(*[(x, tile) for x in in_parts(at.pairs(which), at.tiles)])
                    plgpu.commit_smem()  # all have read the tiles
                    at = here(turn)
                    factor = up(lax.optimization_barrier(offset))  # else exponentials of both signs are kept
                    dq = dq + factor * found[0]
                    x = at.query() * factor
                    d_sum = d_sum + x * found[0]
                    store_parts(at.tiles, x)
                    if delta:
                        dk = dk + factor * found[1]
                        x_k = rounded(at.key() * factor)
                        d_sum = d_sum + x_k.astype(F32) * found[1]
                    plgpu.commit_smem()
                    at = here(turn)
                    (found_k,) = multiply((in_parts([x.T for x in at.pairs(which)], at.tiles)[0], tile))
                    if delta:
                        plgpu.commit_smem()  # all have read the tiles
                        at = here(turn)
                        store(at.tiles[0], x_k)
                        plgpu.commit_smem()
                        at = here(turn)
                        (found_k,) = multiply(([(at.pairs(which)[1].T, at.tiles[0])], found_k))
                    factor = down(lax.optimization_barrier(offset))
                    dk = dk + factor * found_k
                    d_sum = d_sum - at.key() * factor * found_k
                    plgpu.commit_smem()

                    @pl.when(~finest)
                    def _() -> None:  # only pairs within half a block are left
                        sync()
                        at = here(turn)
                        halve(at, at.wg, size >> 1)
                        sync()

                    return size >> 1, dq, dk, d_sum

                _, dq, dk, d_sum = lax.while_loop(
                    lambda carried: (carried[0] >= span) & (carried[0] > 1),
                    level,
                    (jnp.int32(C), dq, dk, d_sum),
                )
                at = here(turn)
                store_parts(at.tiles, d_sum)
                plgpu.commit_smem()
                at = here(turn)
                later = jnp.where(at.col() >= at.row(), 1.0, 0.0).astype(BF16)
                (d_decay,) = multiply(([(later, x) for x in at.tiles], tile))
                write(refs["d_decay"].at[b, rows, summand, at.columns], d_decay.astype(decay_type))
                plgpu.commit_smem()
                return dq, dk, decay

            empty = (blocks.zeros(tile), blocks.zeros(tile))

            def in_turn(turn: Any, carried: tuple) -> tuple:
                *done, decay = carried
                dq, dk, decay = take(turn, decay)
                return *done[1:], (dq, dk), decay

            if turns == 1:
                *done, decay = in_turn(0, (empty, decay))
            else:
                *done, decay = lax.fori_loop(0, turns, in_turn, (*[empty] * turns, decay))

            if inputs.l2norm:
                along: list = [0.0, 0.0]
                for turn, (dq, dk) in enumerate(done):
                    at = here(turn)
                    along[0] += jnp.sum(blocks.tile(at.q) * dq, axis=1)
                    along[1] += jnp.sum(blocks.tile(at.k) * dk, axis=1)
                s["rows"].at[2 + warpgroup][...] = along[0]
                s["rows"].at[2 + WORKERS + warpgroup][...] = along[1]
                plgpu.commit_smem()
            sync()  # E and F may be overwritten, and both halves of the inner products are there
            if inputs.l2norm:  # take out the part along q, along k
                norm_q = blocks.row_vector(norms_s.at[NORM_Q]) * (1 / inputs.scale)
                norm_k = blocks.row_vector(norms_s.at[NORM_K])
                sums = [blocks.row_vector(s["rows"].at[2 + row]) for row in range(2 * WORKERS)]
                along_q = sum(sums[:WORKERS]) * norm_q * norm_q
                along_k = sum(sums[WORKERS:]) * norm_k * norm_k
            for turn, (dq, dk) in enumerate(done):
                at = here(turn)
                if inputs.l2norm:
                    dq = dq - blocks.tile(at.q) * blocks.by_row(along_q, tile)
                    dk = dk - blocks.tile(at.k) * blocks.by_row(along_k, tile)
                target = (b, rows, summand, at.columns)
                write(refs["dq"].at[target], (dq * at.norm_q).astype(BF16))
                write(refs["dk"].at[target], (dk * at.norm_k).astype(BF16))
            plgpu.commit_smem()
            plgpu.barrier_arrive(s["qk_free"])
            return decay

        @pl.when(warpgroup < WORKERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="increase")
            indices = SimpleNamespace(row=blocks.row_index, col=blocks.col_index)
            pl.when(warpgroup == 0)(lambda: set_middle(indices, jnp.int32(C), s["middle"].at[0]))
            plgpu.commit_smem()
            sync()
            lax.fori_loop(0, steps, step, load_decay(0, 0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WORKERS)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="decrease")
            sizes = dict(steps=steps, parts=parts, turns=turns, blocks_v=blocks_v)
            place = dict(b=b, head=head, key_head=key_head, first=first)
            place |= dict(first_value=blocks.rem(summand, slices) * (blocks_v * C))
            issue_copies(refs, s, SimpleNamespace(**place, **sizes))

        blocks.finish_together(s["done"])

    grid = dict(b=batch, h=value_heads * slices, n=pl.cdiv(chunks, run))
    name = ("delta_" if delta else "additive_") + "channel_gradients"
    out = blocks.launch(name, body, arrays, results, scratch, grid, threads=WORKERS + 1, interpret=interpret)
    return out["dq"], out["dk"], out["d_decay"], out.get("error")
