"""The delta rule's gradients of q, k, log_decay and beta for K 128 or 256 and any V, every chunk alone.

The algebra is that of backward_chunks.py. Here U, dO, dV, S and dS come in blocks of 64 values, one after the
other through a ring of buffers, and everything that sums over V accumulates in registers; so V has no limit.
A block of threads takes a slice of 128 channels: two warpgroups half of it each, where the first also makes
E, the second F; a third issues copies. With K = 256 two blocks of threads make E and F both, and what sums
over all of K is left to the caller: with l2norm, the parts of dq along q and of dk along k.
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

SLICE = 2 * C  # channels of a block of threads
STAGES = 3  # blocks of V on their way
RUN = 4  # chunks that a block of threads takes in turn
# Rows of `sums`, one set a warpgroup: dG without dG_C, numbers that add up to dG_C, q_i.dq_i, k_i.dk_i.
DECAY, END, ALONG_Q, ALONG_K = range(4)
# Rows of the last result: dlog_decay and dbeta; q_i.dq_i and k_i.dk_i.
D_LOG, D_BETA, OUT_Q, OUT_K = range(4)


def wide_gradients(inputs: Inputs, given: Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `backward_chunks.chunk_gradients`: dq, dk; dlog_decay and dbeta [B, HV, 2, T]."""
    dq, dk, numbers = _of_slices(inputs, given)
    total = numbers.sum(2)  # over slices of K
    if inputs.l2norm and inputs.k.shape[3] > SLICE:
        group = dq.shape[2] // inputs.q.shape[2]
        gates = jnp.swapaxes(given.gates, 2, 3).reshape(*given.gates.shape[:2], 8, -1)

        def across(d: jax.Array, x: jax.Array, along: jax.Array, norm: jax.Array) -> jax.Array:
            """d without its part along x; along: x.d, norm: 1 / |x|, both [B, HV, T]."""
            part = jnp.swapaxes(along * norm * norm, 1, 2)[..., None]
            return (d.astype(F32) - jnp.repeat(x, group, axis=2).astype(F32) * part).astype(d.dtype)

        dq = across(dq, inputs.q, total[:, :, OUT_Q], gates[:, :, blocks.NORM_Q] / inputs.scale)
        dk = across(dk, inputs.k, total[:, :, OUT_K], gates[:, :, blocks.NORM_K])
    return dq, dk, jnp.stack([total[:, :, D_LOG], numbers[:, :, 0, D_BETA]], 2)


def _of_slices(inputs: Inputs, given: Chunks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk [B, T, HV, K] bf16, one per value head, and [B, HV, K/128, 4, T] float32 (D_LOG ... OUT_K).

    Of a slice of K: dlog_decay (junk without decay) is its share, dbeta the same in every slice. With l2norm
    and K = 256 dq and dk still have their parts along q and k; OUT_Q, OUT_K are a slice's share of their
    products.
    """
    batch, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group, chunks = value_heads // heads, length // C
    slices, blocks_v = key_dim // SLICE, value_dim // C
    documents, decays = inputs.segment is not None, inputs.log_decay is not None
    project = inputs.l2norm and slices == 1
    late = min(STAGES, blocks_v) - 1  # the block of V behind which the next chunk's q and k are fetched

    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, u=given.values, do=given.do, dv=given.dv)
    arrays |= dict(h=given.states, g=given.state_gradients, gates=given.gates, segment=inputs.segment)
    keys = jax.ShapeDtypeStruct((batch, length, value_heads, key_dim), BF16)
    numbers = jax.ShapeDtypeStruct((batch, value_heads, slices, 4, length), F32)
    scratch = dict(
        qk=blocks.smem((2, 2, C, C), BF16),  # q, k by halves of the slice
        u=blocks.smem((STAGES, C, C), BF16),
        d=blocks.smem((STAGES, 2, C, C), BF16),  # dO, dV
        h=blocks.smem((STAGES, 2, C, C), BF16),
        g=blocks.smem((STAGES, 2, C, C), BF16),
        pairs=blocks.smem((2, C, C), BF16),  # E, F
        gates=plgpu.SMEM((8, C), F32),
        segment=plgpu.SMEM((C,), F32) if documents else None,
        sums=plgpu.SMEM((2, 2, 4, C), F32),  # of even and odd chunks, see above
        out=plgpu.SMEM((2, 2, C), F32),
        qk_filled=plgpu.Barrier(num_arrivals=5 + documents),
        qk_free=plgpu.Barrier(num_arrivals=2),
        filled=plgpu.Barrier(num_arrivals=7, num_barriers=STAGES),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        both=plgpu.Barrier(num_arrivals=2),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, key_slice = (lax.axis_index(name) for name in ("b", "h", "k"))
        first, warpgroup = lax.axis_index("n") * RUN, lax.axis_index("wg")
        key_head = blocks.div(head, group)
        steps = jnp.minimum(RUN, chunks - first)

        sync = lambda: blocks.meet(s["both"])
        multiply = blocks.sums_of_products

        def channels(part: Any) -> Any:
            return pl.ds(key_slice * SLICE + part * C, C)

        def fill_keys(i: Any) -> None:
            rows, barrier = pl.ds((first + i) * C, C), s["qk_filled"]
            for part in range(2):
                for place, name in enumerate(("q", "k")):
                    source = refs[name].at[b, rows, key_head, channels(part)]
                    plgpu.copy_gmem_to_smem(source, s["qk"].at[place, part], barrier)
            plgpu.copy_gmem_to_smem(refs["gates"].at[b, head, first + i], s["gates"], barrier)
            if documents:
                plgpu.copy_gmem_to_smem(refs["segment"].at[b, rows], s["segment"], barrier)

        def fill_values(i: Any, j: Any, slot: Any) -> None:
            rows, columns, barrier = pl.ds((first + i) * C, C), pl.ds(j * C, C), s["filled"].at[slot]
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, barrier)
            copy(refs["u"].at[b, rows, head, columns], s["u"].at[slot])
            copy(refs["do"].at[b, rows, head, columns], s["d"].at[slot, 0])
            copy(refs["dv"].at[b, rows, head, columns], s["d"].at[slot, 1])
            for part in range(2):
                for name in ("h", "g"):
                    source = refs[name].at[b, head, first + i, columns, channels(part)]
                    copy(source, s[name].at[slot, part])

        def issue_copies() -> None:
            @pl.loop(0, steps * blocks_v)
            def _(turn: Any) -> None:
                slot, i, j = blocks.rem(turn, STAGES), blocks.div(turn, blocks_v), blocks.rem(turn, blocks_v)

                @pl.when(turn >= STAGES)
                def _() -> None:
                    plgpu.barrier_wait(s["free"].at[slot])

                fill_values(i, j, slot)

                @pl.when((j == late) & (i > 0))
                def _() -> None:
                    plgpu.barrier_wait(s["qk_free"])

                pl.when(j == late)(lambda: fill_keys(i))

            @pl.loop(jnp.maximum(steps * blocks_v - STAGES, 0), steps * blocks_v)
            def _(turn: Any) -> None:
                plgpu.barrier_wait(s["free"].at[blocks.rem(turn, STAGES)])

        def over_values(i: Any) -> tuple[jax.Array, ...]:
            """dO S^T, U dS^T, dV S^T; dO U^T (first warpgroup) or dV U^T (second); <S, dS> by rows."""

            def take(j: Any, carried: tuple) -> tuple:
                kept, sums = carried[0], carried[1:]
                turn = i * blocks_v + j
                slot = blocks.rem(turn, STAGES)
                plgpu.barrier_wait(s["filled"].at[slot])
                u, d = s["u"].at[slot], s["d"].at[slot]
                h, g = s["h"].at[slot, warpgroup], s["g"].at[slot, warpgroup]
                if decays:
                    kept += jnp.sum(blocks.tile(h) * blocks.tile(g), axis=1)
                operands = (d.at[0], h), (u, g), (d.at[1], h), (d.at[warpgroup], u.T)
                sums = multiply(*[([pair], start) for pair, start in zip(operands, sums, strict=True)])
                plgpu.commit_smem()
                plgpu.barrier_arrive(s["free"].at[slot])

                @pl.when((j == 0) & (i > 0))
                def _() -> None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's results have left
                    plgpu.barrier_arrive(s["qk_free"])

                return kept, *sums

            kept = plgpu.layout_cast(jnp.zeros((C,), F32), blocks.ROWS)
            start = kept, *[blocks.zeros((C, C)) for _ in range(4)]
            return lax.fori_loop(0, blocks_v, take, start)

        def pair_gradients(wg: Any, raw: jax.Array) -> jax.Array:
            """E (first warpgroup) or F (second) of dO U^T or dV U^T."""
            gate_s = s["gates"]
            keep = blocks.row_index() >= blocks.col_index() + wg  # E has its diagonal, F has not
            if documents:
                of_row, of_col = blocks.row_and_col(s["segment"])
                keep = keep & (blocks.by_row(of_row) == blocks.by_col(of_col))
            sums = blocks.row_and_col(gate_s.at[blocks.SUM])
            sign = 1.0 - 2.0 * wg.astype(F32)
            norm = blocks.row_vector(gate_s.at[blocks.NORM_Q - wg * (blocks.NORM_Q - blocks.NORM_K)]) * sign
            raw = raw * blocks.pair_decay(keep, sums) * blocks.by_row(norm)
            return raw * blocks.by_col(blocks.col_vector(gate_s.at[blocks.NORM_K]))

        def across(d: jax.Array, x_s: Any, sums: Any, row: int, norm_row: int, factor: float) -> jax.Array:
            """d without its part along x."""
            along = blocks.row_vector(sums.at[0, row]) + blocks.row_vector(sums.at[1, row])
            norm = blocks.row_vector(s["gates"].at[norm_row]) * factor
            return d + blocks.tile(x_s) * blocks.by_row(along * norm * norm * -1.0)

        def per_token(wg: Any, sums: Any, error: jax.Array) -> tuple[jax.Array, jax.Array]:
            """dlog_decay and q_i.dq_i (first warpgroup) or dbeta and k_i.dk_i (second)."""
            both = lambda load, row: load(sums.at[0, row]) + load(sums.at[1, row])
            beta = blocks.row_vector(s["gates"].at[blocks.BETA])
            number = error / (beta * beta)
            along = jnp.where(wg == 0, both(blocks.row_vector, ALONG_Q), both(blocks.row_vector, ALONG_K))
            if decays:
                own, end = both(blocks.col_vector, DECAY), both(blocks.col_vector, END)
                number = jnp.where(wg == 0, log_decay_gradient(own, end, wg - warpgroup), number)
            return number, along

        def step(i: Any, none: None) -> None:
            rows = pl.ds((first + i) * C, C)
            kept, dq, dk, seen, raw = over_values(i)
            plgpu.barrier_wait(s["qk_filled"])
            gate_s = s["gates"]
            # Plus 0, unknown to the compiler: else it lifts every descriptor out of the loop into registers.
            wg = warpgroup + (gate_s[blocks.NORM_K, 0] < -1.0).astype(jnp.int32)
            q_s, k_s, sums_s = s["qk"].at[0, wg], s["qk"].at[1, wg], s["sums"].at[blocks.rem(i, 2), wg]
            by_token = lambda row, factor=1.0: blocks.by_row(blocks.row_vector(gate_s.at[row]) * factor)
            diagonal = blocks.row_index() == blocks.col_index()
            error = jnp.sum(jnp.where(diagonal, raw, 0.0), axis=1)
            blocks.store(s["pairs"].at[wg], pair_gradients(wg, raw).astype(BF16))
            dq, dk = dq * by_token(blocks.READ_Q), dk * by_token(blocks.WRITE)
            seen = seen * by_token(blocks.READ_K, -1.0)
            if decays:
                leaving = jnp.sum(blocks.tile(k_s) * dk, axis=1)
                sums_s.at[END][...] = leaving + kept * gate_s[blocks.CARRY, 0]
            plgpu.commit_smem()
            sync()  # E and F are there
            e, f = s["pairs"].at[0], s["pairs"].at[1]
            dq, dk, seen = multiply(([(e, k_s)], dq), ([(e.T, q_s), (f.T, k_s)], dk), ([(f, k_s)], seen))
            dk = dk + seen
            if decays or inputs.l2norm:
                along_q = jnp.sum(blocks.tile(q_s) * dq, axis=1)
                along_k = jnp.sum(blocks.tile(k_s) * dk, axis=1)
                sums_s.at[ALONG_Q][...] = along_q
                sums_s.at[ALONG_K][...] = along_k
            if decays:
                seen_k = jnp.sum(blocks.tile(k_s) * seen, axis=1)
                sums_s.at[DECAY][...] = along_q - along_k + 2.0 * seen_k
            plgpu.commit_smem()
            sync()  # E and F may be overwritten, and both halves of the inner products are there
            sums = s["sums"].at[blocks.rem(i, 2)]
            if project:
                dq = across(dq, q_s, sums, ALONG_Q, blocks.NORM_Q, 1 / inputs.scale)
                dk = across(dk, k_s, sums, ALONG_K, blocks.NORM_K, 1.0)
            blocks.store(q_s, dq.astype(BF16))
            blocks.store(k_s, dk.astype(BF16))
            s["out"].at[wg, 0][...], s["out"].at[wg, 1][...] = per_token(wg, sums, error)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, refs["dq"].at[b, rows, head, channels(wg)])
            plgpu.copy_smem_to_gmem(k_s, refs["dk"].at[b, rows, head, channels(wg)])
            for place in range(2):
                target = refs["numbers"].at[b, head, key_slice, 2 * place + wg, rows]
                plgpu.copy_smem_to_gmem(s["out"].at[wg, place], target)

        def gradients() -> None:
            lax.fori_loop(0, steps, step, None)
            plgpu.wait_smem_to_gmem(0)

        blocks.role(warpgroup < 2, gradients, increase=240)
        blocks.role(warpgroup == 2, issue_copies, decrease=24)

    grid = dict(b=batch, h=value_heads, k=slices, n=pl.cdiv(chunks, RUN))
    results = dict(dq=keys, dk=keys, numbers=numbers)
    out = blocks.launch(inputs, "delta_wide_chunks", body, arrays, results, scratch, grid, threads=3)
    return out["dq"], out["dk"], out["numbers"]
