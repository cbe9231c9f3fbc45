"""The backward pass of the additive update in one reverse scan: the gradient of the state stays on chip.

With S the state that enters a chunk, dS the gradient of the one that leaves, D_ij = exp(G_i - G_j) on pairs
j <= i of one document, P = scale D * (Q K^T), E = scale D * (dO V^T) and e, f as in forward.py,
    dV = P^T dO + f K dS
    dQ = scale e (dO S^T) + E K
    dK = f (V dS^T) + E^T Q
    dG_i = q_i.dQ_i - k_i.dK_i,    dG_C += sum_i k_i.(f V dS^T)_i + exp(G_C) <S, dS>
    dS <- exp(G_C) dS + scale (e Q)^T dO.
One block of threads per sequence (or piece of one, pieces.py) and value head. One or two warpgroups hold
dS^T, 64 values by K, in registers, and make dV; one makes P, E, dQ, dK and the gradient of the log-decay; one
issues copies. dQ, dK and dV leave through the buffers that q, k and v came in.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import BF16, CARRY, F32, NORM_K, NORM_Q, READ_Q, WRITE, C
from pallas_kernels.linear_attention.hopper.gates import log_decay_gradient, write_gates
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors

# Registers a thread of the warpgroups that hold state, make gradients and copy, by those that hold state.
REGISTERS = {1: (208, 232, 40), 2: (144, 200, 24)}


def additive_gradients(
    inputs: Inputs,
    states: jax.Array,
    do: jax.Array,
    d_state: jax.Array | None,
    *,
    pieces: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """dq, dk [B, T, HV, K] (one per value head), dv [B, T, HV, V], bf16; dlog_decay [B, HV, T]; dS^T.

    states: [B, HV, T/C, V, K] bf16.  do: [B, T, HV, V] bf16.  d_state: dS^T after each piece or None; the
    last result is dS^T before each piece, [B * pieces, HV, V, K] float32. dlog_decay is None without decay.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    chunks, tiles = length // C, value_dim // C
    count = chunks // pieces
    decays = inputs.log_decay is not None
    shape, over = (C, key_dim), range(tiles)
    registers = REGISTERS[tiles]

    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, v=inputs.v, do=do, states=states, last=d_state)
    vectors = Vectors(inputs, ("log_decay", "segment", "entering"))
    arrays |= vectors.named
    keys = jax.ShapeDtypeStruct((batch, length, value_heads, key_dim), BF16)
    results = dict(dq=keys, dk=keys, dv=jax.ShapeDtypeStruct(inputs.v.shape, BF16))
    if decays:
        results |= dict(d_log=jax.ShapeDtypeStruct((batch, value_heads, length), F32))
    results |= dict(first=jax.ShapeDtypeStruct((batch * pieces, value_heads, value_dim, key_dim), F32))
    stage = 2 * 2 * C * (key_dim + value_dim) + 3 * 4 * C
    fixed = 2 * (2 * tiles * C * key_dim + 2 * C * C) + 6 * 1024
    stages = blocks.stages(count, stage, fixed)
    scratch = dict(
        q_s=blocks.smem((stages, C, key_dim), BF16),
        k_s=blocks.smem((stages, C, key_dim), BF16),
        v_s=blocks.smem((stages, tiles, C, C), BF16),
        do_s=blocks.smem((stages, tiles, C, C), BF16),
        vectors_s=plgpu.SMEM((stages, len(vectors), C), F32) if len(vectors) else None,
        gate_s=plgpu.SMEM((8, C), F32),
        zero_s=plgpu.SMEM((tiles + 1, C), F32),
        h_s=blocks.smem((tiles, C, key_dim), BF16),
        g_s=blocks.smem((tiles, C, key_dim), BF16),
        pairs_s=blocks.smem((2, C, C), BF16),  # P, E
        kept_s=plgpu.SMEM((2, tiles, C), F32) if decays else None,
        sums_s=plgpu.SMEM((3, C), F32) if decays else None,
        filled=plgpu.Barrier(num_arrivals=2 + len(vectors) + 2 * tiles, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=tiles + 1, num_barriers=stages),
        h_filled=plgpu.Barrier(num_arrivals=tiles),
        h_free=plgpu.Barrier(num_arrivals=1 + tiles * decays),
        g_ready=plgpu.Barrier(num_arrivals=tiles),  # dS is in g_s
        p_ready=plgpu.Barrier(),  # P is in pairs_s, and gate_s is written
        taken=plgpu.Barrier(),  # v_s and g_s have been read
        stepped=plgpu.Barrier(num_arrivals=tiles),  # q_s, k_s, P, gate_s have been read, kept_s is written
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        piece, head, wg = (lax.axis_index(name) for name in ("b", "h", "wg"))
        key_head = blocks.div(head, value_heads // heads)
        b, last = blocks.div(piece, pieces), (blocks.rem(piece, pieces) + 1) * count - 1

        rows = lambda i: pl.ds((last - i) * C, C)
        multiply = blocks.sums_of_products

        def hide_zero() -> None:
            s["zero_s"].at[wg][...] = plgpu.layout_cast(jnp.zeros((C,), F32), blocks.ROWS)
            plgpu.commit_smem()

        def hidden_zero() -> jax.Array:
            """0, unknown to the compiler: else it lifts every descriptor out of the loop, and spills."""
            return (s["zero_s"][wg, 0] < -1.0).astype(jnp.int32)

        def release(i: Any) -> None:
            """Chunk i's results have left: its buffers may be filled again."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s["free"].at[blocks.rem(i, stages)])

        def hold_state() -> None:
            columns = pl.ds(wg * C, C)
            hide_zero()
            g = blocks.state(refs.get("last"), shape, (piece, head, columns))

            def step(i: Any, g: jax.Array) -> jax.Array:
                slot = blocks.rem(i, stages)
                q_s, k_s, gate_s = s["q_s"].at[slot], s["k_s"].at[slot], s["gate_s"]
                by_token = lambda row: blocks.by_col(blocks.col_vector(gate_s.at[row]))
                blocks.store(s["g_s"].at[wg], g.astype(BF16))
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["g_ready"])
                pl.when(i > 0)(lambda: release(i - 1))
                plgpu.barrier_wait(s["filled"].at[slot])
                zero = hidden_zero()
                if decays:
                    plgpu.barrier_wait(s["h_filled"])
                    kept = None
                    for first in range(0, key_dim, C):  # fewer registers at once
                        h = blocks.tile(s["h_s"].at[wg + zero, :, pl.ds(first, C)])
                        part = jnp.sum(g[:, first : first + C] * h, axis=1)
                        kept = part if kept is None else kept + part
                    s["kept_s"].at[blocks.rem(i, 2), wg][...] = kept
                dv = blocks.matmul((s["g_s"].at[wg + zero], k_s.T))
                do_t = s["do_s"].at[slot, wg].T
                plgpu.barrier_wait(s["p_ready"])
                dv = dv * by_token(WRITE)
                read_t = (blocks.tile(do_t) * by_token(READ_Q)).astype(BF16)
                dv, g = blocks.matmul(
                    (do_t, s["pairs_s"].at[zero], dv),
                    (read_t, q_s, g * gate_s[CARRY, 0]),
                )
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["stepped"])
                if decays:
                    plgpu.barrier_arrive(s["h_free"])
                plgpu.barrier_wait(s["taken"])
                dv_s = s["v_s"].at[slot, wg]
                blocks.store(dv_s, dv.astype(BF16), transposed=True)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dv_s, refs["dv"].at[b, rows(i), head, columns])
                return g

            g = lax.fori_loop(0, count, step, g)
            release(jnp.int32(count - 1))
            refs["first"].at[piece, head, columns][...] = g
            plgpu.wait_smem_to_gmem(0)

        def pairs(slot: Any, scores: jax.Array, raw: jax.Array) -> None:
            """gate_s; P and E to pairs_s."""
            numbers = s["vectors_s"].at[slot] if len(vectors) else None
            norm_q, sums, segment = write_gates(
                inputs, vectors, numbers, s["gate_s"],
                q=s["q_s"].at[slot], k=s["k_s"].at[slot], every=inputs.l2norm,
            )  # fmt: skip
            decay = blocks.pair_decay(blocks.causal(segment), sums)
            decay *= blocks.by_row(norm_q)
            if inputs.l2norm:
                decay *= blocks.by_col(blocks.col_vector(s["gate_s"].at[NORM_K]))
            blocks.store(s["pairs_s"].at[0], (scores * decay).astype(BF16))
            blocks.store(s["pairs_s"].at[1], (raw * decay).astype(BF16))

        def decay_gradient(i: Any, d_sum: jax.Array, leaving: jax.Array, gate_s: Any) -> None:
            sums_s = s["sums_s"]
            sums_s.at[0][...] = d_sum
            sums_s.at[1][...] = leaving
            plgpu.commit_smem()
            kept = [blocks.col_vector(s["kept_s"].at[blocks.rem(i, 2), j]) for j in over]
            end = blocks.col_vector(sums_s.at[1]) + sum(kept[1:], kept[0]) * gate_s[CARRY, 0]
            own = blocks.col_vector(sums_s.at[0])
            sums_s.at[2][...] = log_decay_gradient(own, end, hidden_zero())

        def finish(d: jax.Array, x_s: Any, gate_s: Any, row: int, factor: float) -> tuple[jax.Array, Any]:
            """The gradient of x, for l2norm without its part along x, in bf16; inner products x_i.d_i."""
            if not decays and not inputs.l2norm:
                return d.astype(BF16), None
            along = jnp.sum(blocks.tile(x_s) * d, axis=1)
            if inputs.l2norm:
                norm = blocks.row_vector(gate_s.at[row]) * factor
                d = d - blocks.tile(x_s) * blocks.by_row(along * norm * norm, shape)
            return d.astype(BF16), along

        def make_gradients() -> None:
            hide_zero()

            def step(i: Any, none: None) -> None:
                slot = blocks.rem(i, stages)
                q_s, k_s, v_s, do_s = (s[name].at[slot] for name in ("q_s", "k_s", "v_s", "do_s"))
                gate_s = s["gate_s"]
                by_token = lambda row: blocks.by_row(blocks.row_vector(gate_s.at[row]), shape)
                plgpu.barrier_wait(s["filled"].at[slot])
                raw = [(do_s.at[j], v_s.at[j].T) for j in over]
                pairs(slot, *multiply(([(q_s, k_s.T)], (C, C)), (raw, (C, C))))
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["p_ready"])
                pl.when(i > 0)(lambda: release(i - 1))
                plgpu.barrier_wait(s["g_ready"])
                zero = hidden_zero()
                e_s = s["pairs_s"].at[zero + 1]
                (dk,) = multiply(([(v_s.at[j], s["g_s"].at[zero + j]) for j in over], shape))
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["taken"])
                dk = dk * by_token(WRITE)
                if decays:
                    leaving = jnp.sum(blocks.tile(k_s) * dk, axis=1)
                (dk,) = multiply(([(e_s.T, q_s)], dk))
                dk, along_k = finish(dk, k_s, gate_s, NORM_K, 1.0)
                plgpu.barrier_wait(s["h_filled"])
                (dq,) = multiply(([(do_s.at[j], s["h_s"].at[zero + j]) for j in over], shape))
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["h_free"])
                (dq,) = multiply(([(e_s, k_s)], dq * by_token(READ_Q)))
                dq, along_q = finish(dq, q_s, gate_s, NORM_Q, 1 / inputs.scale)
                plgpu.barrier_wait(s["stepped"])
                if decays:
                    decay_gradient(i, along_q - along_k, leaving, gate_s)
                else:
                    plgpu.commit_smem()  # every warp has read q_s, k_s
                blocks.store(q_s, dq)
                blocks.store(k_s, dk)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_s, refs["dq"].at[b, rows(i), head])
                plgpu.copy_smem_to_gmem(k_s, refs["dk"].at[b, rows(i), head])
                if decays:
                    plgpu.copy_smem_to_gmem(s["sums_s"].at[2], refs["d_log"].at[b, head, rows(i)])

            lax.fori_loop(0, count, step, None)
            release(jnp.int32(count - 1))
            plgpu.wait_smem_to_gmem(0)

        def fill(i: Any) -> None:
            slot = blocks.rem(i, stages)
            barrier = s["filled"].at[slot]
            copy = lambda source, name: plgpu.copy_gmem_to_smem(source, s[name].at[slot], barrier)
            copy(refs["k"].at[b, rows(i), key_head], "k_s")
            copy(refs["q"].at[b, rows(i), key_head], "q_s")
            if len(vectors):
                vectors.copy(refs, s["vectors_s"].at[slot], barrier, b, head, rows(i))
            for name in ("do", "v"):
                for j in over:
                    source = refs[name].at[b, rows(i), head, pl.ds(j * C, C)]
                    plgpu.copy_gmem_to_smem(source, s[name + "_s"].at[slot, j], barrier)

        def fill_state(i: Any) -> None:
            for j in over:
                source = refs["states"].at[b, head, last - i, pl.ds(j * C, C)]
                plgpu.copy_gmem_to_smem(source, s["h_s"].at[j], s["h_filled"])

        def issue_copies() -> None:
            for i in range(min(stages, count)):
                fill(jnp.int32(i))
            fill_state(jnp.int32(0))

            @pl.loop(1, count)
            def _(i: Any) -> None:
                plgpu.barrier_wait(s["h_free"])
                fill_state(i)

                @pl.when(i + stages - 1 < count)
                def _() -> None:
                    plgpu.barrier_wait(s["free"].at[blocks.rem(i - 1, stages)])
                    fill(i + stages - 1)

            plgpu.barrier_wait(s["h_free"])
            for i in range(max(count - stages, 0), count):
                plgpu.barrier_wait(s["free"].at[i % stages])

        blocks.role(wg < tiles, hold_state, increase=registers[0])
        blocks.role(wg == tiles, make_gradients, increase=registers[1])
        blocks.role(wg == tiles + 1, issue_copies, decrease=registers[2])

    grid = dict(b=batch * pieces, h=value_heads)
    out = blocks.launch(inputs, "additive_gradients", body, arrays, results, scratch, grid, threads=tiles + 2)
    return out["dq"], out["dk"], out["dv"], out.get("d_log"), out["first"]
