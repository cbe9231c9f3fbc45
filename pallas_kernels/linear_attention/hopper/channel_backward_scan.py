"""The reverse scan with a decay per key channel: the gradient of the state, and that of v on the way.

With dS the gradient of the state that leaves a chunk, and the forward's tiles QE, KE, KF, P, A and carry c,
    dV' = P^T dO + KF dS
    dV  = beta A^T dV'                 (additive: dV = dV')
    dS <- c dS + QE^T dO - KE^T dV     (additive: without the last term)
One block of threads per sequence (or piece of one), value head and slice of V. One or two warpgroups hold
dS^T, 64 values by K, in registers, and one issues the copies: every factor of a product lies in memory as
the forward left it, gates, norms and masks included. The dS that enters each step and dV are stored:
channel_backward_chunks.py makes everything else of them, all chunks at once.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts, warm_up
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs, fetch, fetch_values

REGISTERS = (232, 40)  # a thread, with two warpgroups that hold state: those, and the one that copies


def reverse_scan(
    inputs: Inputs,
    tiles: Any,
    do: jax.Array,
    d_state: jax.Array | None,
    *,
    value_tile: int,
    pieces: int = 1,
    summary: bool = False,
    walk: jax.Array | None = None,
    lead: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """dS^T after each chunk [B, HV, T/C, V, K], dV [B, T, HV, V], bf16; dS^T at the start of each piece.

    do: [B, T, HV, V] bf16.  d_state: gradient of the state after each piece, transposed, float32
    [B * pieces, HV, V, K], or None (zero).  summary: only the last result, [B * pieces, HV, V, K] float32.
    walk: None or how far for a summary: `warm_up.Walks.first`.  lead: None or the chunks after each piece
    that it walks before it: `warm_up.leads`; d_state is then of the state after the last piece.
    """
    batch, length, _, value_heads, key_dim, value_dim = inputs.sizes
    chunks, count = length // C, length // C // pieces
    wide = value_tile // C
    delta = tiles.inverses is not None
    factors = dict(write=tiles.write, read_q=tiles.read_q, read_k=tiles.read_k)
    inverses = two_parts.named(tiles.inverses)
    pairs = dict(scores=tiles.scores, high=inverses["high"])
    factors, pairs = blocks.present(factors), blocks.present(pairs)
    arrays = factors | pairs | inverses | dict(do=do, carry=tiles.carry, beta=inputs.beta, last=d_state)
    arrays |= dict(walk=walk, lead=lead)

    stage = 2 * C * (key_dim * len(factors) + C * (len(pairs) + wide)) + 2048
    fixed = 2 * wide * C * (C + key_dim * (not summary)) + 1024
    stages = blocks.stages(count if walk is None else warm_up.chunks(count), stage, fixed)
    scratch = {name: blocks.smem((stages, C, key_dim), BF16) for name in factors}
    scratch |= {name: blocks.smem((stages, C, C), BF16) for name in pairs}
    scratch |= dict(
        do=blocks.smem((stages, wide, C, C), BF16),
        carry=plgpu.SMEM((stages, key_dim), F32),
        filled=plgpu.Barrier(num_arrivals=len(scratch) + wide + 1 + delta, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=wide, num_barriers=stages),
    )
    if delta:
        scratch |= dict(beta=plgpu.SMEM((stages, C), F32), low=plgpu.Barrier(num_barriers=wide))
    scratch |= dict(dv=blocks.smem((wide, C, C), BF16))  # before, if a chunk is hard: A's second part
    if not summary:
        scratch |= dict(ds=blocks.smem((wide, C, key_dim), BF16))
    results = dict(first=jax.ShapeDtypeStruct((batch * pieces, value_heads, value_dim, key_dim), F32))
    if not summary:
        results["ds"] = jax.ShapeDtypeStruct((batch, value_heads, chunks, value_dim, key_dim), BF16)
        results["dv"] = jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), BF16)

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        piece, head, value_block = (lax.axis_index(name) for name in ("b", "h", "v"))
        wg = lax.axis_index("wg")
        b = blocks.div(piece, pieces)
        first, steps = blocks.rem(piece, pieces) * count, count
        if walk is not None:
            first, steps = (refs["walk"][piece, head, n] for n in (0, 1))
        quiet: Any = 0  # steps without results
        if lead is not None:
            quiet = refs["lead"][piece, head]
            steps += quiet
        after = first + steps  # the chunk after those walked

        def fill(i: Any, slot: Any) -> None:
            n = after - 1 - i
            rows, barrier = pl.ds(n * C, C), s["filled"].at[slot]

            keys, pairs = (b, rows, head), (b, head, rows)
            fetch(refs, s, slot, barrier, write=keys)
            fetch_values(refs["do"], keys, value_block * value_tile, s["do"], slot, barrier, wide)
            fetch(refs, s, slot, barrier, scores=pairs, high=pairs, carry=(b, head, n))
            fetch(refs, s, slot, barrier, read_q=keys, read_k=keys, beta=pairs)

        def hold_state() -> None:
            columns = pl.ds(value_block * value_tile + wg * C, C)
            load = lambda place: blocks.state(refs.get("last"), (C, key_dim), (place, head, columns))
            if lead is None or "last" not in refs:
                ds = load(piece)
            else:
                ds = lax.cond(after == chunks, lambda: load(b), lambda: blocks.zeros((C, key_dim)))

            def begin(silent: bool, i: Any, ds: jax.Array, hard: Any) -> tuple[jax.Array, jax.Array]:
                n, slot = after - 1 - i, blocks.rem(i, stages)
                if delta:
                    low = lambda: refs["low"].at[b, head, pl.ds(n * C, C)]
                    two_parts.load_low(hard > 0.0, low, s["dv"].at[wg], s["low"].at[wg])
                ds_lo = ds.astype(BF16)
                if not silent:
                    target = refs["ds"].at[b, head, n, columns]
                    blocks.send(s["ds"].at[wg], ds_lo, target)
                plgpu.barrier_wait(s["filled"].at[slot])
                return ds, blocks.matmul((ds_lo, s["write"].at[slot].T))

            def step(silent: bool, i: Any, ds: jax.Array, dv: jax.Array, parts: int, hard: Any) -> jax.Array:
                n, slot = after - 1 - i, blocks.rem(i, stages)
                mine = wg + (0 if hard is None else two_parts.hidden_zero(hard))
                do_s = s["do"].at[slot, mine]
                carry = blocks.by_col(blocks.col_vector(s["carry"].at[slot]), (C, key_dim))
                dv = two_parts.add_rest(dv, ds, s["write"].at[slot], parts)
                dv, ds = blocks.matmul(
                    (do_s.T, s["scores"].at[slot], dv),
                    (do_s.T, s["read_q"].at[slot], ds * carry),
                )
                if delta:
                    pair = s["high"].at[slot], s["dv"].at[mine], s["low"].at[mine]
                    dv = two_parts.times_inverse(dv, *pair, parts)
                    dv = dv * blocks.by_col(blocks.col_vector(s["beta"].at[slot]))
                    seen = two_parts.split(dv * -1.0, parts)
                    seen = [(part, s["read_k"].at[slot]) for part in seen]
                    (ds,) = blocks.sums_of_products((seen, ds))
                if not silent:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    blocks.store(s["dv"].at[mine], dv.astype(BF16), transposed=True)
                plgpu.commit_smem()  # also before the arrival: TMA may then overwrite what was read here
                plgpu.barrier_arrive(s["free"].at[slot])
                if not silent:
                    target = refs["dv"].at[b, pl.ds(n * C, C), head, columns]
                    plgpu.copy_smem_to_gmem(s["dv"].at[mine], target)
                return ds

            hardness = (lambda i: refs["hard"][b, head, after - 1 - i, 0]) if delta else None
            for silent, start, end in ((True, 0, quiet), (summary, quiet, steps))[lead is None :]:
                each, before = functools.partial(step, silent), functools.partial(begin, silent)
                ds = two_parts.loop(end, each, ds, hardness, before, start)
            refs["first"].at[piece, head, columns][...] = ds
            plgpu.wait_smem_to_gmem(0)

        more, fewer = REGISTERS if wide == 2 else (0, 0)
        blocks.role(wg < wide, hold_state, increase=more)
        blocks.role(wg == wide, lambda: blocks.refill(fill, s["free"], steps, stages), decrease=fewer)

    grid = dict(b=batch * pieces, h=value_heads, v=value_dim // value_tile)
    name = "channel_reverse_" + ("summary" if summary else "scan")
    out = blocks.launch(inputs, name, body, arrays, results, scratch, grid, threads=wide + 1)
    return out.get("ds"), out.get("dv"), out["first"]
