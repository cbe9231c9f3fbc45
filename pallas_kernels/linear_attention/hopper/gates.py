"""A chunk's numbers per token, from its log-decays, documents and norms, as warpgroups compute them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.inputs import Inputs, Vectors

Pair = tuple[jax.Array, jax.Array]


def write_gates(
    inputs: Inputs, vectors: Vectors, numbers: Any, gates: Any, *, q: Any = None, k: Any = None, every: bool
) -> tuple[Any, Pair | None, Pair | None]:
    """Fills rows of `gates` [8, C] (see blocks) in shared memory; the rows of q and of k only if given.

    numbers: the chunk's `vectors`.  q, k: tiles in shared memory, or lists of their parts.  every: also the
    rows SUM, NORM_K, NORM_Q and BETA where the forward could do without. Returns scale / |q_i| by row, the
    sums of log-decays and the documents, these by row and by column or None. The caller's next commit_smem
    makes the rows visible.
    """
    one = plgpu.layout_cast(jnp.full((C,), 1.0, F32), blocks.ROWS)
    read = write = norm_k = one
    carry: Any = 1.0
    norm_q = sums = segment = None
    if vectors.has("log_decay"):
        sum_row = blocks.cumulative(blocks.col_vector(vectors.get("log_decay", numbers)) * blocks.LOG2E)
        gates.at[blocks.SUM][...] = sum_row
    elif every:
        gates.at[blocks.SUM][...] = one * 0.0
    if k is not None:
        if inputs.l2norm:
            norm_k = blocks.inverse_norms(k if isinstance(k, list) else [k])
        if inputs.l2norm or every:
            gates.at[blocks.NORM_K][...] = norm_k
    plgpu.commit_smem()
    if vectors.has("log_decay"):
        sums = sum_row, blocks.col_vector(gates.at[blocks.SUM])
        last = gates[blocks.SUM, C - 1]
        read, write, carry = jnp.exp2(sum_row), jnp.exp2(last - sum_row), jnp.exp2(last)
    if vectors.has("segment"):
        ids = vectors.get("segment", numbers)
        segment = blocks.row_and_col(ids)
        entering, leaving = vectors.get("entering", numbers)[0], ids[C - 1]
        read = jnp.where(segment[0] == entering, read, 0.0)
        write = jnp.where(segment[0] == leaving, write, 0.0)
        carry = jnp.where(entering == leaving, carry, 0.0)
    if k is not None:
        gates.at[blocks.READ_K][...] = read * norm_k
        gates.at[blocks.WRITE][...] = write * norm_k
    gates.at[blocks.CARRY][...] = one * carry
    if every:
        gates.at[blocks.BETA][...] = (
            blocks.row_vector(vectors.get("beta", numbers)) if vectors.has("beta") else one
        )
    if q is not None:
        parts = q if isinstance(q, list) else [q]
        norm_q = (blocks.inverse_norms(parts) if inputs.l2norm else one) * inputs.scale
        gates.at[blocks.READ_Q][...] = read * norm_q
        if every:
            gates.at[blocks.NORM_Q][...] = norm_q
    return norm_q, sums, segment


def log_decay_gradient(d_sum: jax.Array, d_end: jax.Array, shift: Any = 0) -> jax.Array:
    """Numbers per row from numbers per column: log_decay_t is part of G_i for every i >= t, and of G_C.

    d_sum: gradient of G_i.  d_end: numbers whose sum is the gradient of G_C.  shift: 0, or a zero unknown to
    the compiler, which then cannot keep the mask in registers over a loop.
    """
    later = blocks.col_index() >= blocks.row_index() + shift
    return jnp.sum(jnp.where(later, blocks.by_col(d_sum), 0.0) + blocks.by_col(d_end), axis=1)
