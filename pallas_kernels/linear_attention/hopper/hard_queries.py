"""dq of hard chunks (`two_parts`) with sums of two bf16, written over what the chunk gradients made of it.

Since U = A beta (V - e K S) is kept in one bf16, E = scale D * (dO U^T) is made here without it:
    dO U^T = Y A^T,    Y = (dO V^T - (dO S^T) (e K)^T) beta
with A, Y and E in two parts. One warpgroup a block of threads takes a run of chunks, and is gone at once
where none of it is hard.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.call import varying
from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, C
from pallas_kernels.linear_attention.hopper.inputs import Chunks, Inputs

RUN = 16  # chunks a block of threads


def hard_queries(inputs: Inputs, inverses: two_parts.Inverse, given: Chunks, dq: jax.Array) -> jax.Array:
    """dq [B, T, HV, K] bf16, one per value head, with that of hard chunks computed again, in place."""
    _, length, heads, value_heads, key_dim, value_dim = inputs.sizes
    group, chunks, parts = value_heads // heads, length // C, key_dim // C
    documents = inputs.segment is not None

    # In place by a reference, which may not vary along axes of a mesh (`varying`): there apart.
    result = None if varying(dq) else jax.new_ref(dq)
    arrays: dict[str, Any] = dict(q=inputs.q, k=inputs.k, v=inputs.v, do=given.do, h=given.states)
    arrays |= dict(gates=given.gates, segment=inputs.segment, **two_parts.named(inverses), dq=result)
    scratch = dict(
        q=blocks.smem((parts, C, C), BF16),  # then dq
        k=blocks.smem((parts, C, C), BF16),
        values=blocks.smem((2, 2, C, C), BF16),  # of 64 values: dO, and V or S^T of 64 channels
        inverse=blocks.smem((2, C, C), BF16),
        gates=plgpu.SMEM((8, C), F32),
        segment=plgpu.SMEM((C,), F32) if documents else None,
        filled=plgpu.Barrier(num_arrivals=2 * parts + 2 + documents),
        low_filled=plgpu.Barrier(),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, first = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("n") * RUN
        gates = s["gates"]
        row = lambda name: blocks.row_vector(gates.at[name])
        col = lambda name: blocks.col_vector(gates.at[name])
        by_row, by_col = lambda name: blocks.by_row(row(name)), lambda name: blocks.by_col(col(name))
        hardness = lambda n: refs["hard"][b, head, jnp.minimum(n, chunks - 1), 0]
        channels = lambda part: pl.ds(part * C, C)

        def fill(n: Any, rows: Any) -> None:
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, s["filled"])
            for name in ("q", "k"):
                for part in range(parts):
                    copy(refs[name].at[b, rows, blocks.div(head, group), channels(part)], s[name].at[part])
            copy(refs["gates"].at[b, head, n], gates)
            copy(refs["high"].at[b, head, rows], s["inverse"].at[0])
            plgpu.copy_gmem_to_smem(refs["low"].at[b, head, rows], s["inverse"].at[1], s["low_filled"])
            if documents:
                copy(refs["segment"].at[b, rows], s["segment"])

        def over_values(rows: Any, other: Callable[[Any], Any], turned: bool = False) -> jax.Array:
            """dO times `other`, a function of the values to its array, or its transpose."""
            count = value_dim // C

            def start(j: Any) -> None:
                columns, slot = pl.ds(j * C, C), blocks.rem(j, 2)
                for place, source in enumerate((refs["do"].at[b, rows, head, columns], other(columns))):
                    plgpu.copy_gmem_to_smem(source, s["values"].at[slot, place], s["ready"].at[slot])

            def take(j: Any, total: jax.Array) -> jax.Array:
                pl.when(j + 1 < count)(lambda: start(j + 1))
                slot = blocks.rem(j, 2)
                plgpu.barrier_wait(s["ready"].at[slot])
                d_s, other_s = s["values"].at[slot, 0], s["values"].at[slot, 1]
                total = blocks.matmul((d_s, other_s.T if turned else other_s, total))
                plgpu.commit_smem()  # all have read, before the next copies
                return total

            start(jnp.int32(0))
            return lax.fori_loop(0, count, take, blocks.zeros((C, C)))

        def pairs_of(y: jax.Array) -> jax.Array:
            """E of Y."""
            high, low = s["inverse"].at[0].T, s["inverse"].at[1].T
            e = two_parts.times_inverse(y, high, low, s["low_filled"], 2)
            segment = blocks.row_and_col(s["segment"]) if documents else None
            sums = blocks.row_and_col(gates.at[blocks.SUM])
            e *= blocks.pair_decay(blocks.causal(segment), sums)
            return e * by_row(blocks.NORM_Q) * by_col(blocks.NORM_K)

        def write(n: Any) -> None:
            rows = pl.ds(n * C, C)
            fill(n, rows)
            from_state = lambda part: over_values(
                rows, lambda columns: refs["h"].at[b, head, n, columns, channels(part)]
            )
            value = over_values(rows, lambda columns: refs["v"].at[b, rows, head, columns], turned=True)
            plgpu.barrier_wait(s["filled"])

            def read(part: Any, sums: tuple) -> tuple:
                seen, scores, along = sums
                q_s, k_s = s["q"].at[part], s["k"].at[part]
                x = from_state(part)
                along += jnp.sum(blocks.tile(q_s) * x, axis=1)
                return *blocks.matmul((x.astype(BF16), k_s.T, seen), (q_s, k_s.T, scores)), along

            none = blocks.zeros((C, C))
            seen, scores, along = lax.fori_loop(0, parts, read, (none, none, jnp.sum(none, axis=1)))
            e = pairs_of((value - seen * by_col(blocks.READ_K)) * by_col(blocks.BETA))
            along = along * row(blocks.READ_Q) + jnp.sum(e * scores, axis=1)  # q.dq
            norm = row(blocks.NORM_Q) * (1 / inputs.scale)
            along *= norm * norm
            e_parts = two_parts.split(e, 2)

            @pl.loop(0, parts)
            def _(part: Any) -> None:
                q_s, k_s = s["q"].at[part], s["k"].at[part]
                start = from_state(part) * by_row(blocks.READ_Q)
                (out,) = blocks.sums_of_products(([(x, k_s) for x in e_parts], start))
                if inputs.l2norm:  # take out the part along q
                    out -= blocks.tile(q_s) * blocks.by_row(along)
                target = refs["dq"].at[b, rows, head, channels(part)]
                blocks.send(q_s, out, target)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        hardest = functools.reduce(jnp.maximum, [hardness(first + i) for i in range(min(RUN, chunks))])

        @pl.when(hardest > 0.0)
        def _() -> None:
            @pl.loop(first, jnp.minimum(first + RUN, chunks))
            def _(n: Any) -> None:
                pl.when(hardness(n) > 0.0)(lambda: write(n))

            plgpu.wait_smem_to_gmem(0)

    grid = dict(b=inputs.q.shape[0], h=value_heads, n=pl.cdiv(chunks, RUN))
    results = dict(dq=jax.ShapeDtypeStruct(dq.shape, BF16) if result is None else None)
    out = blocks.launch(inputs, "hard_queries", body, arrays, results, scratch, grid, threads=1)
    if result is not None:
        return jax.freeze(result)
    hard = jnp.swapaxes(inverses.hard.reshape(*inverses.hard.shape[:2], length), 1, 2) > 0.0
    return jnp.where(hard[..., None], out["dq"], dq)
