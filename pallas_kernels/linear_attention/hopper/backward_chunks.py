"""The gradients of q, k, log_decay and beta of the delta rule, chunk by chunk: no chunk waits for another.

With S the state that enters a chunk, dS the gradient of the one that leaves, U = V', dV from the reverse
scan, and D_ij = exp(G_i - G_j) on pairs j <= i of one document (docs/kernels_scan.md, section 4),
    E = scale D * (dO U^T)      F = -(D, j < i) * (dV U^T)
    dQ = scale e (dO S^T) + E K
    dK = [-e (dV S^T) + F K] + [f (U dS^T) + E^T Q + F^T K]
    dG_i = q_i.dQ_i + k_i.[first] - k_i.[second],    dG_C += sum_i k_i.(f U dS^T)_i + exp(G_C) <S, dS>
What must cancel between far tokens does: row and column sums use the same bf16 E, F and float32 sums.
dbeta_i = dV_i.U_i / beta_i^2 is the diagonal of dV U^T.

Two warpgroups take half of the key dimension each; the first also makes E, the second F. A third issues
copies.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.gates import log_decay_gradient
from pallas_kernels.linear_attention.hopper.inputs import Chunks, Inputs

# Rows of `sums_s`, one set a warpgroup (half of the key dimension): dG without its dG_C terms, k_i.(f U
# dS^T)_i, <S, dS> over a block of values, and (second warpgroup) dV_i.U_i.
DECAY, LEAVING, KEPT, ERROR = range(4)
RUN = 4  # chunks that a block of threads takes in turn


def chunk_gradients(inputs: Inputs, given: Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk [B, T, HV, K] BF16, one a value head; dlog_decay (junk without decay), dbeta [B, HV, 2, T]."""
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group = value_heads // heads
    chunks = length // C
    half, blocks_v = key_dim // 2, value_dim // C
    documents, decays = inputs.segment is not None, inputs.log_decay is not None
    slots = 2
    tile = (C, half)

    scratch = dict(
        qk_s=blocks.smem((slots, 2, 2, C, half), BF16),  # q, k by halves of the key dimension
        u_s=blocks.smem((blocks_v, C, C), BF16),
        d_s=blocks.smem((2, blocks_v, C, C), BF16),  # dO, dV
        h_s=blocks.smem((2, blocks_v, C, half), BF16),
        g_s=blocks.smem((2, blocks_v, C, half), BF16),
        e_s=blocks.smem((2, C, C), BF16),  # E, F
        gate_s=plgpu.SMEM((slots, 8, C), F32),
        segment_s=plgpu.SMEM((slots, C), F32) if documents else None,
        norm_s=plgpu.SMEM((2, 2, C), F32) if inputs.l2norm else None,
        sums_s=plgpu.SMEM((2, 2, 4, C), F32),  # of even and odd chunks, see above
        out_s=plgpu.SMEM((2, C), F32),
        qk_filled=plgpu.Barrier(num_arrivals=5 + documents, num_barriers=slots),
        qk_free=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        v_filled=plgpu.Barrier(num_arrivals=3 * blocks_v),
        v_free=plgpu.Barrier(num_arrivals=2),
        h_filled=plgpu.Barrier(num_arrivals=4 * blocks_v),
        h_free=plgpu.Barrier(num_arrivals=2),
        both=plgpu.Barrier(num_arrivals=2),
    )

    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, u=given.values, do=given.do)
    arrays |= dict(h=given.states, g=given.state_gradients, gates=given.gates, dv=given.dv)
    arrays |= dict(segment=inputs.segment)
    keys = jax.ShapeDtypeStruct((batch, length, value_heads, key_dim), BF16)
    numbers = jax.ShapeDtypeStruct((batch, value_heads, 2, length), F32)

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, first = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("n") * RUN
        warpgroup = lax.axis_index("wg")
        key_head = blocks.div(head, group)
        steps = jnp.minimum(RUN, chunks - first)

        sync = lambda: blocks.meet(s["both"])
        multiply = blocks.sums_of_products

        def copy(source: Any, target: Any, barrier: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, barrier)

        def fill_keys(i: Any) -> None:
            slot, n = blocks.rem(i, slots), first + i
            rows, barrier = pl.ds(n * C, C), s["qk_filled"].at[slot]
            for part in range(2):
                columns = pl.ds(part * half, half)
                copy(refs["q"].at[b, rows, key_head, columns], s["qk_s"].at[slot, 0, part], barrier)
                copy(refs["k"].at[b, rows, key_head, columns], s["qk_s"].at[slot, 1, part], barrier)
            copy(refs["gates"].at[b, head, n], s["gate_s"].at[slot], barrier)
            if documents:
                copy(refs["segment"].at[b, rows], s["segment_s"].at[slot], barrier)

        def fill_values(i: Any) -> None:
            rows = pl.ds((first + i) * C, C)
            for block in range(blocks_v):
                columns = pl.ds(block * C, C)
                copy(refs["u"].at[b, rows, head, columns], s["u_s"].at[block], s["v_filled"])
                copy(refs["do"].at[b, rows, head, columns], s["d_s"].at[0, block], s["v_filled"])
                copy(refs["dv"].at[b, rows, head, columns], s["d_s"].at[1, block], s["v_filled"])

        def fill_states(i: Any) -> None:
            for part in range(2):
                for block in range(blocks_v):
                    source = (b, head, first + i, pl.ds(block * C, C), pl.ds(part * half, half))
                    copy(refs["h"].at[source], s["h_s"].at[part, block], s["h_filled"])
                    copy(refs["g"].at[source], s["g_s"].at[part, block], s["h_filled"])

        def issue_copies() -> None:
            fill_keys(jnp.int32(0))
            fill_values(jnp.int32(0))
            fill_states(jnp.int32(0))

            @pl.loop(1, steps)
            def _(i: Any) -> None:
                @pl.when(i >= slots)
                def _() -> None:
                    plgpu.barrier_wait(s["qk_free"].at[blocks.rem(i, slots)])

                fill_keys(i)
                plgpu.barrier_wait(s["v_free"])
                fill_values(i)
                plgpu.barrier_wait(s["h_free"])
                fill_states(i)

            plgpu.barrier_wait(s["v_free"])
            plgpu.barrier_wait(s["h_free"])

        def left(ref: Any) -> Any:
            """A [C, C] left operand; two operands in shared memory must be swizzled alike, so narrow halves
            of K want it in registers."""
            return ref if half == C else blocks.tile(ref, BF16)

        def pair_gradients(wg: Any, gate_s: Any, segment_s: Any, error_s: Any) -> None:
            """E (first warpgroup) or F (second) to e_s; dV_i.U_i (second)."""
            (raw,) = multiply(([(s["d_s"].at[wg, j], s["u_s"].at[j].T) for j in range(blocks_v)], (C, C)))
            error_s[...] = jnp.sum(jnp.where(blocks.row_index() == blocks.col_index(), raw, 0.0), axis=1)
            keep = blocks.row_index() >= blocks.col_index() + wg  # E has its diagonal, F has not
            if documents:
                keep = keep & (
                    blocks.by_row(blocks.row_vector(segment_s)) == blocks.by_col(blocks.col_vector(segment_s))
                )
            sums = blocks.row_and_col(gate_s.at[blocks.SUM])
            norm = blocks.row_vector(gate_s.at[blocks.NORM_Q - wg * (blocks.NORM_Q - blocks.NORM_K)]) * (
                1.0 - 2.0 * wg.astype(F32)
            )
            raw = raw * blocks.pair_decay(keep, sums) * blocks.by_row(norm)
            raw = raw * blocks.by_col(blocks.col_vector(gate_s.at[blocks.NORM_K]))
            blocks.store(s["e_s"].at[wg], raw.astype(BF16))

        def per_token(wg: Any, gate_s: Any, sums_s: Any) -> jax.Array:
            """dlog_decay (first warpgroup) or dbeta (second) of the chunk."""
            beta = blocks.row_vector(gate_s.at[blocks.BETA])
            error = blocks.row_vector(sums_s.at[1, ERROR]) / (beta * beta)
            if not decays:
                return error
            d_sum, leaving, kept = (
                blocks.col_vector(sums_s.at[0, row]) + blocks.col_vector(sums_s.at[1, row])
                for row in (DECAY, LEAVING, KEPT)
            )
            d_log = log_decay_gradient(d_sum, leaving + kept * gate_s[blocks.CARRY, 0], wg - warpgroup)
            return jnp.where(wg == 0, d_log, error)

        def gradients() -> None:
            def step(i: Any, none: None) -> None:
                slot, n = blocks.rem(i, slots), first + i
                gate_s = s["gate_s"].at[slot]
                plgpu.barrier_wait(s["qk_filled"].at[slot])
                # Plus 0, unknown to the compiler: else it lifts every descriptor out of the loop into
                # registers, and spills 200 bytes.
                wg = warpgroup + (gate_s[blocks.NORM_K, 0] < -1.0).astype(jnp.int32)
                q_s, k_s = (s["qk_s"].at[slot, part, wg] for part in range(2))
                sums_s = s["sums_s"].at[blocks.rem(i, 2), wg]
                plgpu.barrier_wait(s["v_filled"])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's results have left

                @pl.when((i > 0) & (i + 1 < steps))
                def _() -> None:
                    plgpu.barrier_arrive(s["qk_free"].at[blocks.rem(i + 1, slots)])

                segment_s = s["segment_s"].at[slot] if documents else None
                pair_gradients(wg, gate_s, segment_s, sums_s.at[ERROR])

                plgpu.barrier_wait(s["h_filled"])
                h_s, g_s, over = s["h_s"].at[wg], s["g_s"].at[wg], range(blocks_v)
                if decays:
                    products = [blocks.tile(h_s.at[j]) * blocks.tile(g_s.at[j]) for j in over]
                    sums_s.at[KEPT][...] = jnp.sum(sum(products[1:], products[0]), axis=1)
                dq, dk, seen = multiply(
                    ([(left(s["d_s"].at[0, j]), h_s.at[j]) for j in over], tile),
                    ([(left(s["u_s"].at[j]), g_s.at[j]) for j in over], tile),
                    ([(left(s["d_s"].at[1, j]), h_s.at[j]) for j in over], tile),
                )
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["v_free"])
                plgpu.barrier_arrive(s["h_free"])
                dq = dq * blocks.by_row(blocks.row_vector(gate_s.at[blocks.READ_Q]), tile)
                dk = dk * blocks.by_row(blocks.row_vector(gate_s.at[blocks.WRITE]), tile)
                if decays:
                    sums_s.at[LEAVING][...] = jnp.sum(blocks.tile(k_s) * dk, axis=1)
                sync()  # E and F are there
                seen = seen * blocks.by_row(blocks.row_vector(gate_s.at[blocks.READ_K]) * -1.0, tile)
                e_s, f_s = s["e_s"].at[0], s["e_s"].at[1]
                dq, dk, seen = multiply(
                    ([(left(e_s), k_s)], dq),
                    ([(left(e_s.T), q_s), (left(f_s.T), k_s)], dk),
                    ([(left(f_s), k_s)], seen),
                )
                dk = dk + seen
                if decays or inputs.l2norm:
                    along_q = jnp.sum(blocks.tile(q_s) * dq, axis=1)
                    along_k = jnp.sum(blocks.tile(k_s) * dk, axis=1)
                if decays:
                    seen_k = jnp.sum(blocks.tile(k_s) * seen, axis=1)
                    sums_s.at[DECAY][...] = along_q - along_k + 2.0 * seen_k
                if inputs.l2norm:
                    norm_s = s["norm_s"]
                    norm_s.at[wg, 0][...] = along_q
                    norm_s.at[wg, 1][...] = along_k
                plgpu.commit_smem()
                sync()  # E and F may be overwritten, and both halves of the inner products are there
                if inputs.l2norm:  # take out the part along q, along k
                    norm = blocks.row_vector(gate_s.at[blocks.NORM_Q]) * (1 / inputs.scale)
                    along = blocks.row_vector(norm_s.at[0, 0]) + blocks.row_vector(norm_s.at[1, 0])
                    dq = dq + blocks.tile(q_s) * blocks.by_row(along * norm * norm * -1.0, tile)
                    norm = blocks.row_vector(gate_s.at[blocks.NORM_K])
                    along = blocks.row_vector(norm_s.at[0, 1]) + blocks.row_vector(norm_s.at[1, 1])
                    dk = dk + blocks.tile(k_s) * blocks.by_row(along * norm * norm * -1.0, tile)
                blocks.store(q_s, dq.astype(BF16))
                blocks.store(k_s, dk.astype(BF16))
                s["out_s"].at[wg][...] = per_token(wg, gate_s, s["sums_s"].at[blocks.rem(i, 2)])
                plgpu.commit_smem()
                target = (b, pl.ds(n * C, C), head, pl.ds(wg * half, half))
                plgpu.copy_smem_to_gmem(q_s, refs["dq"].at[target])
                plgpu.copy_smem_to_gmem(k_s, refs["dk"].at[target])
                plgpu.copy_smem_to_gmem(s["out_s"].at[wg], refs["numbers"].at[b, head, wg, pl.ds(n * C, C)])

            lax.fori_loop(0, steps, step, None)
            plgpu.wait_smem_to_gmem(0)

        blocks.role(warpgroup < 2, gradients, increase=232)
        blocks.role(warpgroup == 2, issue_copies, decrease=40)

    grid = dict(b=batch, h=value_heads, n=pl.cdiv(chunks, RUN))
    results = dict(dq=keys, dk=keys, numbers=numbers)
    out = blocks.launch(inputs, "delta_chunk_gradients", body, arrays, results, scratch, grid, threads=3)
    return out["dq"], out["dk"], out["numbers"]
