"""What the delta rule wants of a chunk before its state is known, for one decay per head: every chunk alone.

A block of threads is one warpgroup; K is a sum over parts of 64 channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BETA, BF16, F32, NORM_K, C
from pallas_kernels.linear_attention.hopper.gates import write_gates
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors


class HeadTiles(NamedTuple):
    """Made once a head, however many slices of V its scans take.

    gates: [B, HV, T/C, 8, C] float32, all rows (see blocks).
    scores: P, scale q_i.k_j exp(G_i - G_j), j <= i of one document, [B, HV, T, C] bf16.
    """

    gates: jax.Array
    scores: jax.Array
    inverses: two_parts.Inverse

    @property
    def named(self) -> dict[str, jax.Array]:
        """The arrays by the names that they have among a kernel's."""
        return dict(gates=self.gates, scores=self.scores, **self.inverses._asdict())


def chunk_inverses(inputs: Inputs) -> two_parts.Inverse:
    """A - I, A = (I + L)^-1.

    L_ij = beta_i k_i.k_j exp(G_i - G_j) for pairs j < i of one document. Whoever multiplies by A starts the
    accumulator with the other operand: so the unit diagonal passes it on in float32, not rounded to bf16.
    """
    batch, length, heads, value_heads, key_dim, _ = inputs.sizes
    parts = key_dim // C
    vectors = Vectors(inputs, ("log_decay", "beta", "segment"))
    scratch = dict(
        k=blocks.smem((max(parts, 2), C, C), BF16),
        inputs=plgpu.SMEM((len(vectors), C), F32),
        sums=plgpu.SMEM((2, C), F32),
        ready=plgpu.Barrier(num_arrivals=parts + len(vectors)),
        **two_parts.scratch(),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows, in_s, sums_s = pl.ds(n * C, C), s["inputs"], s["sums"]
        keys = [s["k"].at[part] for part in range(parts)]
        for part, key in enumerate(keys):
            source = refs["k"].at[b, rows, blocks.div(head, value_heads // heads), pl.ds(part * C, C)]
            plgpu.copy_gmem_to_smem(source, key, s["ready"])
        vectors.copy(refs, in_s, s["ready"], b, head, rows)
        plgpu.barrier_wait(s["ready"])

        if vectors.has("log_decay"):
            sum_row = blocks.cumulative(blocks.col_vector(vectors.get("log_decay", in_s)) * blocks.LOG2E)
            sums_s.at[0][...] = sum_row
        two_parts.find_hard(inputs, vectors.get("beta", in_s), keys, s)
        if inputs.l2norm:
            norm = blocks.inverse_norms(keys)
            sums_s.at[1][...] = norm
        plgpu.commit_smem()
        row_scale = blocks.row_vector(vectors.get("beta", in_s))
        if vectors.has("log_decay"):
            sum_col = blocks.col_vector(sums_s.at[0])
        if vectors.has("segment"):
            segment = blocks.row_and_col(vectors.get("segment", in_s))
        lower = blocks.matmul((keys[0], keys[0].T))
        for key in keys[1:]:
            lower = blocks.matmul((key, key.T, lower))
        if inputs.l2norm:
            row_scale *= norm
            lower *= blocks.by_col(blocks.col_vector(sums_s.at[1]))
        lower *= blocks.by_row(row_scale)
        if vectors.has(
            "log_decay"
        ):  # above the diagonal, which the inverse ignores, the least keeps it finite
            lower *= jnp.exp2(jnp.minimum(blocks.by_row(sum_row) - blocks.by_col(sum_col), 0.0))
        if vectors.has("segment"):
            lower = jnp.where(blocks.by_row(segment[0]) == blocks.by_col(segment[1]), lower, 0.0)
        # The keys were last read two barriers before.
        two_parts.store_inverse(lower, s["k"].at[0], s["k"].at[1], s, refs, (b, head, n))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    arrays, results = (
        dict(k=inputs.k, **vectors.named),
        two_parts.result(batch, value_heads, length)._asdict(),
    )
    grid = dict(b=batch, h=value_heads, n=length // C)
    out = blocks.launch(inputs, "chunk_inverses", body, arrays, results, scratch, grid)
    return two_parts.Inverse(**out)


def head_tiles(inputs: Inputs) -> HeadTiles:
    """Any K that is a multiple of 64."""
    batch, length, heads, value_heads, key_dim, _ = inputs.sizes
    parts, chunks = key_dim // C, length // C
    vectors = Vectors(inputs, ("log_decay", "beta", "segment", "entering"))
    results: dict[str, Any] = dict(
        gates=jax.ShapeDtypeStruct((batch, value_heads, chunks, 8, C), F32),
        scores=jax.ShapeDtypeStruct((batch, value_heads, length, C), BF16),
        **two_parts.result(batch, value_heads, length)._asdict(),
    )
    scratch = dict(
        q=blocks.smem((parts, C, C), BF16),
        k=blocks.smem((max(parts, 2), C, C), BF16),
        inputs=plgpu.SMEM((len(vectors), C), F32),
        gates=plgpu.SMEM((8, C), F32),
        ready=plgpu.Barrier(num_arrivals=2 * parts + len(vectors)),
        **two_parts.scratch(),
    )

    def body(refs: dict[str, Any], s: dict[str, Any]) -> None:
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows, key_head = pl.ds(n * C, C), blocks.div(head, value_heads // heads)
        in_s, gate_s, ready = s["inputs"], s["gates"], s["ready"]
        for part in range(parts):
            source = b, rows, key_head, pl.ds(part * C, C)
            plgpu.copy_gmem_to_smem(refs["k"].at[source], s["k"].at[part], ready)
            plgpu.copy_gmem_to_smem(refs["q"].at[source], s["q"].at[part], ready)
        vectors.copy(refs, in_s, ready, b, head, rows)
        plgpu.barrier_wait(ready)

        q, k = ([s[name].at[part] for part in range(parts)] for name in "qk")
        two_parts.find_hard(inputs, vectors.get("beta", in_s), k, s)
        norm_q, sums, segment = write_gates(inputs, vectors, in_s, gate_s, q=q, k=k, every=True)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(gate_s, refs["gates"].at[b, head, n])
        scores, lower = blocks.sums_of_products(
            ([(x, y.T) for x, y in zip(q, k, strict=True)], (C, C)), ([(x, x.T) for x in k], (C, C))
        )
        decay = blocks.pair_decay(blocks.causal(segment), sums)
        if inputs.l2norm:
            decay *= blocks.by_col(blocks.col_vector(gate_s.at[NORM_K]))
        row_scale = blocks.row_vector(gate_s.at[BETA]) * blocks.row_vector(gate_s.at[NORM_K])
        lower *= decay * blocks.by_row(row_scale)
        plgpu.commit_smem()  # every warp has read q, and the keys
        blocks.store(q[0], (scores * decay * blocks.by_row(norm_q)).astype(BF16))
        two_parts.store_inverse(lower, s["k"].at[0], s["k"].at[1], s, refs, (b, head, n))
        plgpu.copy_smem_to_gmem(q[0], refs["scores"].at[b, head, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    arrays, grid = dict(q=inputs.q, k=inputs.k, **vectors.named), dict(b=batch, h=value_heads, n=chunks)
    out = blocks.launch(inputs, "delta_head_tiles", body, arrays, results, scratch, grid)
    return HeadTiles(out.pop("gates"), out.pop("scores"), two_parts.Inverse(**out))
