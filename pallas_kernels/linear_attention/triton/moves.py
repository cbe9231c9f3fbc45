"""Every chunk alone: the gradients of what `chunks` made, from both scans.

d queries = dO S^T, d keys = V' dS^T, d w = -dV' S^T, d scores = dO V'^T, d total = sum over V of S dS
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.chunks import block
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.reverse import Reversed
from pallas_kernels.linear_attention.triton.scan import Scanned
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot
from pallas_kernels.linear_attention.triton.tokens import SLICE, part, slices


class Moves(NamedTuple):
    """Shapes and dtypes as in `Chunks`; w is None for an additive update."""

    queries: jax.Array
    keys: jax.Array
    scores: jax.Array
    total: jax.Array
    w: jax.Array | None = None


def moves(spec: Spec, scanned: Scanned, back: Reversed, do: jax.Array) -> Moves:
    B, T, HV, _ = do.shape
    K = back.states.shape[4]
    given: dict[str, Any] = {
        "do": do,
        "states": scanned.states,
        "values": scanned.values,
        "dstates": back.states,
    }
    keys = jax.ShapeDtypeStruct((B, T, HV, K), BF16)
    out = {
        "queries": keys,
        "keys": keys,
        "scores": jax.ShapeDtypeStruct((B, HV, T, C), BF16),
        "total": jax.ShapeDtypeStruct((B, HV, T // C, K), F32),
    }
    if spec.delta:
        given["dvalues"], out["w"] = back.values, keys
    results = launch(
        _kernel,
        "moves",
        grid=(T // C, HV, B),
        in_specs=[{name: block(name.removeprefix("d"), x.shape) for name, x in given.items()}],
        out_specs={name: block(name, x.shape) for name, x in out.items()},
        out_shape=out,
        interpret=spec.interpret,
    )(given)
    return Moves(**results)


def _kernel(refs: dict[str, Any], out: dict[str, Any]) -> None:
    zeros = jnp.zeros((C, SLICE), F32)

    def scores(n: Any, total: Any) -> Any:
        return total + dot(refs["do"][part(n)], refs["values"][part(n)], (1, 1))

    out["scores"][...] = slices(refs["do"], scores, jnp.zeros((C, C), F32)).astype(BF16)

    def keys(m: Any, _: None) -> None:
        def add(n: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
            queries, keys, total, *w = sums
            at = (pl.ds(n * SLICE, SLICE), pl.ds(m * SLICE, SLICE))
            state, dstate = refs["states"][at], refs["dstates"][at]
            queries += dot(refs["do"][part(n)], state)
            keys += dot(refs["values"][part(n)], dstate)
            total += jnp.sum(state.astype(F32) * dstate.astype(F32), axis=0)
            return queries, keys, total, *(x - dot(refs["dvalues"][part(n)], state) for x in w)

        start = (zeros, zeros, jnp.zeros((SLICE,), F32), *((zeros,) if "w" in out else ()))
        queries, keys, total, *w = slices(refs["do"], add, start)
        out["queries"][part(m)], out["keys"][part(m)] = queries.astype(BF16), keys.astype(BF16)
        out["total"][part(m)[1]] = total
        if w:
            out["w"][part(m)] = w[0].astype(BF16)

    slices(out["queries"], keys, None)
