"""Every chunk alone: the gradients of what `chunks` made, from both scans.

d queries = dO S^T, d keys = V' dS^T, d w = -dV' S^T, d scores = dO V'^T, d total = sum over V of S dS
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.arrays import run
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.scan import Reversed, Scanned
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot
from pallas_kernels.linear_attention.triton.tokens import SLICE, part, slices


def moves(spec: Spec, scanned: Scanned, back: Reversed, do: jax.Array) -> dict[str, jax.Array]:
    """dqueries, dkeys, dscores, dtotal and, of the delta rule, dw: shapes and dtypes as in `Chunks`."""
    given = {"do": do, "states": scanned.states, "values": scanned.values, "dstates": back.states}
    if spec.delta:
        given["dvalues"] = back.values
    names = ("dqueries", "dkeys", "dscores", "dtotal", *("dw",) * spec.delta)
    return run(spec, _kernel, "moves", [given], names)


def _kernel(refs: dict[str, Any], out: dict[str, Any]) -> None:
    def scores(n: Any, total: Any) -> Any:
        return total + dot(refs["do"][part(n)], refs["values"][part(n)], (1, 1))

    out["dscores"][...] = slices(refs["do"], scores, jnp.zeros((C, C), F32)).astype(BF16)

    def keys(m: Any, _: None) -> None:
        queries, keys, total, *w = by_states(m, refs, refs["values"])
        out["dqueries"][part(m)], out["dkeys"][part(m)] = queries.astype(BF16), keys.astype(BF16)
        out["dtotal"][part(m)[1]] = total
        if w:
            out["dw"][part(m)] = w[0].astype(BF16)

    slices(out["dqueries"], keys, None)


def by_states(m: Any, refs: dict[str, Any], values: Any) -> tuple[Any, ...]:
    """Float32, of the m-th slice of keys: dO S^T, V' dS^T, the sum over V of S dS and, with dV', -dV' S^T.

    values: V'.  refs: do, states, dstates and, for the delta rule, dvalues.
    """

    def add(n: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        queries, keys, total, *w = sums
        at = (pl.ds(n * SLICE, SLICE), pl.ds(m * SLICE, SLICE))
        state, dstate = refs["states"][at], refs["dstates"][at]
        queries += dot(refs["do"][part(n)], state)
        keys += dot(values[part(n)], dstate)
        total += jnp.sum(state.astype(F32) * dstate.astype(F32), axis=0)
        return queries, keys, total, *(x - dot(refs["dvalues"][part(n)], state) for x in w)

    zeros = jnp.zeros((C, SLICE), F32)
    start = (zeros, zeros, jnp.zeros((SLICE,), F32), *((zeros,) if "dvalues" in refs else ()))
    return slices(values, add, start)
