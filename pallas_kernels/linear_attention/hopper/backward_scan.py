"""The reverse scan over chunks: the gradient of the state, and the gradient of v on the way.

With dS the gradient of the state that leaves a chunk, and e, f, P, A as in forward.py,
    dV' = P^T dO + f K dS
    dV  = beta A^T dV'
    dS <- exp(G_C) dS + scale (e Q)^T dO - (e K)^T dV
An additive update has only its summary here, without the last term of dS (else: backward_additive.py).
One block of threads per sequence (or piece of one, pieces.py), value head and slice of V. Two or one
warpgroups hold dS^T, 64 values by K, in registers; one computes P and scale e Q a chunk ahead; one issues the
copies. The dS that enters each step and dV are stored: backward_chunks.py makes everything else of them, all
chunks at once.
"""

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts, warm_up
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.gates import write_gates
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors, fetch_values

AHEAD = 2  # chunks that may be prepared before the state warpgroups take them
# Registers a thread of the warpgroups that hold state, prepare and copy, by warpgroups that hold state.
REGISTERS = {1: (232, 232, 40), 2: (184, 120, 24)}


def reverse_scan(
    inputs: Inputs,
    gates: jax.Array | None,
    inverses: two_parts.Inverse | None,
    do: jax.Array,
    d_state: jax.Array | None,
    *,
    value_tile: int,
    pieces: int = 1,
    summary: bool = False,
    walk: jax.Array | None = None,
) -> tuple[Any, Any, jax.Array]:
    """dS^T after each chunk [B, HV, T/C, V, K], dV [B, T, HV, V], bf16; dS^T before each piece, float32.

    gates: what the forward saved; None (additive, summary) to make them here.  do: [B, T, HV, V] bf16.
    d_state: dS^T after each piece [B * pieces, HV, V, K] float32, or None.  summary: only the last result,
    None for the others.  walk: None or how far for a summary: `warm_up.Walks.first`.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group, chunks = value_heads // heads, length // C
    count = chunks // pieces  # that one block of threads takes
    tiles = value_tile // C
    registers = REGISTERS[tiles]
    delta, output = inverses is not None, not summary
    documents = delta and inputs.segment is not None

    vectors = Vectors(inputs, () if delta else ("log_decay", "segment", "entering"))

    stage = 2 * ((1 + delta) * C * key_dim + tiles * C * C + delta * C * C) + 9 * 4 * C
    fixed = 2 * (AHEAD * C * C + tiles * C * C + tiles * C * key_dim) + 8 * 1024
    stages = blocks.stages(count if walk is None else warm_up.chunks(count), stage, fixed)

    loads = 1 + tiles + 3 * delta + documents + len(vectors)
    scratch = dict(
        q_s=blocks.smem((stages, C, key_dim), BF16),
        k_s=blocks.smem((stages, C, key_dim), BF16) if delta else None,
        do_s=blocks.smem((stages, tiles, C, C), BF16),
        high_s=blocks.smem((stages, C, C), BF16) if delta else None,
        gate_s=plgpu.SMEM((stages, 8, C), F32),
        vectors_s=plgpu.SMEM((stages, len(vectors), C), F32) if len(vectors) else None,
        segment_s=plgpu.SMEM((stages, C), F32) if documents else None,
        p_s=blocks.smem((AHEAD, C, C), BF16) if delta else None,
        dv_s=blocks.smem((tiles, C, C), BF16),  # before, if a chunk is hard: A's second part
        g_s=blocks.smem((tiles, C, key_dim), BF16) if output else None,
        filled=plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=tiles + 1, num_barriers=stages),
        p_ready=plgpu.Barrier(num_barriers=AHEAD),
        p_free=plgpu.Barrier(num_arrivals=tiles, num_barriers=AHEAD),
        low=plgpu.Barrier(num_barriers=tiles) if delta else None,
    )

    arrays: dict[str, Any] = dict(q=inputs.q, do=do, gates=gates, **vectors.named)
    arrays |= dict(k=inputs.k if delta else None, **two_parts.named(inverses))
    arrays |= dict(segment=inputs.segment if documents else None, last=d_state, walk=walk)
    states = jax.ShapeDtypeStruct((batch, value_heads, chunks, value_dim, key_dim), BF16)
    results = dict(
        states=states if output else None,
        dv=jax.ShapeDtypeStruct((batch, length, value_heads, value_dim), BF16) if output else None,
        first=jax.ShapeDtypeStruct((batch * pieces, value_heads, value_dim, key_dim), F32),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        piece, head, value_block = (lax.axis_index(name) for name in ("b", "h", "v"))
        wg = lax.axis_index("wg")
        key_head = blocks.div(head, group)
        b, first, steps = blocks.div(piece, pieces), blocks.rem(piece, pieces) * count, count
        if walk is not None:
            first, steps = (refs["walk"][piece, head, n] for n in (0, 1))
        last = first + steps - 1

        def fill(i: Any, slot: Any) -> None:
            n = last - i
            rows, barrier = pl.ds(n * C, C), s["filled"].at[slot]
            if delta:
                plgpu.copy_gmem_to_smem(refs["k"].at[b, rows, key_head], s["k_s"].at[slot], barrier)
            plgpu.copy_gmem_to_smem(refs["q"].at[b, rows, key_head], s["q_s"].at[slot], barrier)
            if delta:
                plgpu.copy_gmem_to_smem(refs["gates"].at[b, head, n], s["gate_s"].at[slot], barrier)
            if len(vectors):
                vectors.copy(refs, s["vectors_s"].at[slot], barrier, b, head, rows)
            place = b, rows, head
            fetch_values(refs["do"], place, value_block * value_tile, s["do_s"], slot, barrier, tiles)
            if delta:
                plgpu.copy_gmem_to_smem(refs["high"].at[b, head, rows], s["high_s"].at[slot], barrier)
            if documents:
                plgpu.copy_gmem_to_smem(refs["segment"].at[b, rows], s["segment_s"].at[slot], barrier)

        def hold_state() -> None:
            columns = pl.ds(value_block * value_tile + wg * C, C)
            g = blocks.state(refs.get("last"), (C, key_dim), (piece, head, columns))

            def begin(i: Any, g: jax.Array, hard: Any) -> tuple[jax.Array, Any]:
                n, slot = last - i, blocks.rem(i, stages)
                mine = wg + (0 if hard is None else two_parts.hidden_zero(hard))
                if delta:
                    low = lambda: refs["low"].at[b, head, pl.ds(n * C, C)]
                    two_parts.load_low(hard > 0.0, low, s["dv_s"].at[mine], s["low"].at[mine])
                g_lo = g.astype(BF16)
                if output:
                    target = refs["states"].at[b, head, n, columns]
                    blocks.send(s["g_s"].at[mine], g_lo, target)
                plgpu.barrier_wait(s["filled"].at[slot])
                dv = blocks.matmul((g_lo, s["k_s"].at[slot].T)) if delta else None
                return g, dv

            def step(i: Any, g: jax.Array, dv: Any, parts: int, hard: Any) -> jax.Array:
                n, mine = last - i, wg + (0 if hard is None else two_parts.hidden_zero(hard))
                slot, ahead = blocks.rem(i, stages), blocks.rem(i, AHEAD)
                q_s, gate_s, do_s = (s[x].at[slot] for x in ("q_s", "gate_s", "do_s"))
                if delta:
                    k_s = s["k_s"].at[slot]
                    dv = two_parts.add_rest(dv, g, k_s, parts)
                    dv = dv * blocks.by_col(blocks.col_vector(gate_s.at[blocks.WRITE]))
                plgpu.barrier_wait(s["p_ready"].at[ahead])
                written = (do_s.at[mine].T, q_s, g * gate_s[blocks.CARRY, 0])
                if not delta:
                    g = blocks.matmul(written)
                else:
                    dv, g = blocks.matmul((do_s.at[mine].T, s["p_s"].at[ahead], dv), written)
                    beta = blocks.col_vector(gate_s.at[blocks.BETA])
                    back = beta * blocks.col_vector(gate_s.at[blocks.READ_K]) * -1.0
                    pair = s["high_s"].at[slot], s["dv_s"].at[mine], s["low"].at[mine]
                    dx = two_parts.times_inverse(dv, *pair, parts)
                    seen = two_parts.split(dx * blocks.by_col(back), parts)
                    (g,) = blocks.sums_of_products(([(part, k_s) for part in seen], g))
                    dv = dx * blocks.by_col(beta)
                if output:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    blocks.store(s["dv_s"].at[mine], dv.astype(BF16), transposed=True)
                plgpu.commit_smem()  # also before the arrivals: TMA may then overwrite what was read here
                plgpu.barrier_arrive(s["p_free"].at[ahead])
                plgpu.barrier_arrive(s["free"].at[slot])
                if output:
                    target = refs["dv"].at[b, pl.ds(n * C, C), head, columns]
                    plgpu.copy_smem_to_gmem(s["dv_s"].at[mine], target)
                return g

            hardness = (lambda i: refs["hard"][b, head, last - i, 0]) if delta else None
            g = two_parts.loop(steps, step, g, hardness, begin)
            refs["first"].at[piece, head, columns][...] = g
            plgpu.wait_smem_to_gmem(0)

        def prepare_chunk() -> None:
            @pl.loop(0, steps)
            def _(i: Any) -> None:
                slot, ahead = blocks.rem(i, stages), blocks.rem(i, AHEAD)
                q_s, gate_s = s["q_s"].at[slot], s["gate_s"].at[slot]
                plgpu.barrier_wait(s["filled"].at[slot])

                @pl.when(i >= AHEAD)
                def _() -> None:
                    plgpu.barrier_wait(s["p_free"].at[ahead])

                if delta:
                    sums = blocks.row_and_col(gate_s.at[blocks.SUM])
                    segment = blocks.row_and_col(s["segment_s"].at[slot]) if documents else None
                    scores = blocks.matmul((q_s, s["k_s"].at[slot].T))
                    plgpu.commit_smem()  # every warp is done with q before it is overwritten
                    scores *= blocks.pair_decay(blocks.causal(segment), sums)
                    scores *= blocks.by_row(blocks.row_vector(gate_s.at[blocks.NORM_Q]))
                    scores *= blocks.by_col(blocks.col_vector(gate_s.at[blocks.NORM_K]))
                    blocks.store(s["p_s"].at[ahead], scores.astype(BF16))
                else:
                    numbers = s["vectors_s"].at[slot] if len(vectors) else None
                    write_gates(inputs, vectors, numbers, gate_s, q=q_s, every=False)
                read = blocks.by_row(blocks.row_vector(gate_s.at[blocks.READ_Q]), (C, key_dim))
                read_q = (blocks.tile(q_s) * read).astype(BF16)
                blocks.store(q_s, read_q)
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["p_ready"].at[ahead])
                plgpu.barrier_arrive(s["free"].at[slot])

            for i in blocks.last(steps, AHEAD):
                plgpu.barrier_wait(s["p_free"].at[blocks.rem(i, AHEAD)])

        blocks.role(wg < tiles, hold_state, increase=registers[0])
        change = {"decrease" if tiles == 2 else "increase": registers[1]}
        blocks.role(wg == tiles, prepare_chunk, **change)
        copy = lambda: blocks.refill(fill, s["free"], steps, stages)
        blocks.role(wg == tiles + 1, copy, decrease=registers[2])

    grid = dict(b=batch * pieces, h=value_heads, v=value_dim // value_tile)
    name = ("delta_reverse_" if delta else "additive_reverse_") + ("summary" if summary else "scan")
    out = blocks.launch(inputs, name, body, arrays, results, scratch, grid, threads=tiles + 2)
    return out.get("states"), out.get("dv"), out["first"]
