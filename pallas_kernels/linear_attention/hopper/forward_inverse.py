"""The triangular inverses of the delta rule, every chunk on its own: a block of threads is one warpgroup."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors


def chunk_inverses(inputs: Inputs) -> two_parts.Inverse:
    """A - I, A = (I + L)^-1.

    L_ij = beta_i k_i.k_j exp(G_i - G_j) for pairs j < i of one document. Whoever multiplies by A starts the
    accumulator with the other operand: so the unit diagonal passes it on in float32, not rounded to bf16.
    """
    batch, length, heads, key_dim = inputs.k.shape
    value_heads = inputs.v.shape[2]
    group, halves = value_heads // heads, key_dim // C
    vectors = Vectors(inputs, ("log_decay", "beta", "segment"))
    interpret = inputs.interpret

    def body(*refs: Any, k_s: Any, in_s: Any, sum_s: Any, ready: Any, **scratch: Any) -> None:
        k_ref, *vector_refs, high_ref, low_ref, hard_ref = refs
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows = pl.ds(n * C, C)
        for half in range(halves):
            source = k_ref.at[b, rows, blocks.div(head, group), pl.ds(half * C, C)]
            plgpu.copy_gmem_to_smem(source, k_s.at[half], ready)
        vectors.copy(vector_refs, in_s, ready, b, head, rows)
        plgpu.barrier_wait(ready)

        sums = segment = None
        if vectors.has("log_decay"):
            steps = blocks.col_vector(vectors.get("log_decay", in_s)) * blocks.LOG2E
            sum_row = blocks.cumulative(steps)
            sum_s.at[0][...] = sum_row
        keys = [k_s.at[half] for half in range(halves)]
        two_parts.find_hard(inputs, vectors.get("beta", in_s), keys, scratch)
        if inputs.l2norm:
            norm = blocks.inverse_norms(keys)
            sum_s.at[1][...] = norm
        plgpu.commit_smem()
        row_scale = blocks.row_vector(vectors.get("beta", in_s))
        if vectors.has("log_decay"):
            sums = sum_row, blocks.col_vector(sum_s.at[0])
        if vectors.has("segment"):
            ids = vectors.get("segment", in_s)
            segment = blocks.row_vector(ids), blocks.col_vector(ids)
        lower = blocks.matmul((k_s.at[0], k_s.at[0].T), interpret=interpret)
        for half in range(1, halves):
            lower = blocks.matmul((k_s.at[half], k_s.at[half].T, lower), interpret=interpret)
        if inputs.l2norm:
            row_scale *= norm
            lower *= blocks.by_col(blocks.col_vector(sum_s.at[1]))
        lower *= blocks.by_row(row_scale)
        if sums is not None:  # above the diagonal, which the inverse ignores, the least keeps it finite
            lower *= jnp.exp2(jnp.minimum(blocks.by_row(sums[0]) - blocks.by_col(sums[1]), 0.0))
        if segment is not None:
            lower = jnp.where(blocks.by_row(segment[0]) == blocks.by_col(segment[1]), lower, 0.0)
        out = two_parts.Inverse(high_ref, low_ref, hard_ref)  # the keys were last read two barriers before
        tiles = k_s.at[0], k_s.at[1]
        two_parts.store_inverse(lower, *tiles, scratch, out, (b, head, n), interpret=interpret)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = blocks.kernel(
        body,
        name="chunk_inverses",
        interpret=interpret,
        manual_barriers=True,
        out_type=list(two_parts.result(batch, value_heads, length)),
        grid=(batch, value_heads, length // C),
        grid_names=("b", "h", "n"),
        scratch_types=dict(
            k_s=blocks.smem((max(halves, 2), C, C), jnp.bfloat16),
            in_s=plgpu.SMEM((len(vectors), C), F32),
            sum_s=plgpu.SMEM((2, C), F32),
            ready=plgpu.Barrier(num_arrivals=halves + len(vectors)),
            **two_parts.scratch(),
        ),
    )(inputs.k, *vectors.arrays)
    return two_parts.Inverse(*out)
