"""All that a chunk needs before its state is known, for one decay per head: every chunk on its own.

Made once a head, however many slices of V its scans take: the delta rule's inverse, the scores of q and k,
and the numbers per token. A block of threads is one warpgroup; K is a sum over parts of 64 channels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, two_parts
from pallas_kernels.linear_attention.hopper.blocks import BETA, F32, NORM_K, C
from pallas_kernels.linear_attention.hopper.chunk_math import sums_of_products
from pallas_kernels.linear_attention.hopper.gates import write_gates
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors

BF16 = jnp.bfloat16


class HeadTiles(NamedTuple):
    """gates: [B, HV, T/C, 8, C] float32, all rows (see blocks).

    scores: P, scale q_i.k_j exp(G_i - G_j), j <= i of one document, [B, HV, T, C] bf16.
    """

    gates: jax.Array
    scores: jax.Array
    inverses: two_parts.Inverse

    @property
    def named(self) -> dict[str, jax.Array]:
        """The arrays by the names that they have among a kernel's."""
        return dict(gates=self.gates, scores=self.scores, **self.inverses._asdict())


def head_tiles(inputs: Inputs) -> HeadTiles:
    """Of the delta rule without decay or with one decay per head, any K that is a multiple of 64."""
    batch, length, heads, key_dim = inputs.k.shape
    value_heads = inputs.v.shape[2]
    group, parts, chunks = value_heads // heads, key_dim // C, length // C
    vectors = Vectors(inputs, ("log_decay", "beta", "segment", "entering"))
    interpret = inputs.interpret

    def body(*refs: Any, q_s: Any, k_s: Any, in_s: Any, gate_s: Any, ready: Any, **scratch: Any) -> None:
        q_ref, k_ref, *rest = refs
        vector_refs, (gates_ref, scores_ref, *inverse_refs) = rest[:-5], rest[-5:]
        b, head, n = (lax.axis_index(name) for name in ("b", "h", "n"))
        rows, key_head = pl.ds(n * C, C), blocks.div(head, group)
        for part in range(parts):
            source = b, rows, key_head, pl.ds(part * C, C)
            plgpu.copy_gmem_to_smem(k_ref.at[source], k_s.at[part], ready)
            plgpu.copy_gmem_to_smem(q_ref.at[source], q_s.at[part], ready)
        vectors.copy(vector_refs, in_s, ready, b, head, rows)
        plgpu.barrier_wait(ready)

        q, k = ([x_s.at[part] for part in range(parts)] for x_s in (q_s, k_s))
        two_parts.find_hard(inputs, vectors.get("beta", in_s), k, scratch)
        norm_q, sums, segment = write_gates(inputs, vectors, in_s, gate_s, q=q, k=k, every=True)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(gate_s, gates_ref.at[b, head, n])
        scores, lower = sums_of_products(
            ([(x, y.T) for x, y in zip(q, k, strict=True)], (C, C)),
            ([(x, x.T) for x in k], (C, C)),
            interpret=interpret,
        )
        decay = blocks.pair_decay(blocks.causal(strict=False, segment=segment), sums)
        if inputs.l2norm:
            decay *= blocks.by_col(blocks.col_vector(gate_s.at[NORM_K]))
        row_scale = blocks.row_vector(gate_s.at[BETA]) * blocks.row_vector(gate_s.at[NORM_K])
        lower *= decay * blocks.by_row(row_scale)
        plgpu.commit_smem()  # every warp has read q
        blocks.store(q[0], (scores * decay * blocks.by_row(norm_q)).astype(BF16), interpret=interpret)
        out = two_parts.Inverse(*inverse_refs)  # the keys were last read before the barrier above
        pair = k_s.at[0], k_s.at[1]
        two_parts.store_inverse(lower, *pair, scratch, out, (b, head, n), interpret=interpret)
        plgpu.copy_smem_to_gmem(q[0], scores_ref.at[b, head, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    square = jax.ShapeDtypeStruct((batch, value_heads, length, C), BF16)
    tiles = blocks.kernel(
        body,
        name="delta_head_tiles",
        interpret=interpret,
        manual_barriers=True,
        out_type=[
            jax.ShapeDtypeStruct((batch, value_heads, chunks, 8, C), F32),
            square,
            *two_parts.result(batch, value_heads, length),
        ],
        grid=(batch, value_heads, chunks),
        grid_names=("b", "h", "n"),
        scratch_types=dict(
            q_s=blocks.smem((parts, C, C), BF16),
            k_s=blocks.smem((max(parts, 2), C, C), BF16),
            in_s=plgpu.SMEM((len(vectors), C), F32),
            gate_s=plgpu.SMEM((8, C), F32),
            ready=plgpu.Barrier(num_arrivals=2 * parts + len(vectors)),
            **two_parts.scratch(),
        ),
    )(inputs.q, inputs.k, *vectors.arrays)
    gates, scores, *parts = tiles
    return HeadTiles(gates, scores, two_parts.Inverse(*parts))
