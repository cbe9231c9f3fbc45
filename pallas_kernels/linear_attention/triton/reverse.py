"""The chunks in reverse order: the transposed gradient of the state stays in registers, float32.

dV' = scores^T dO + keys dS
dS <- total dS + queries^T dO - w^T dV'
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.chunks import Chunks
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.scan import head_blocks, over_chunks, slice_of, state_block
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot


class Reversed(NamedTuple):
    """values: dV' [B, T, HV, V] bf16.  states: dS^T after each chunk [B, HV, T/C, V, K] bf16.

    first: dS before the first token, [B, HV, K, V] float32.
    """

    values: jax.Array
    states: jax.Array
    first: jax.Array


def reverse(spec: Spec, made: Chunks, do: jax.Array, dstate: jax.Array | None) -> Reversed:
    B, T, HV, V = do.shape
    K = made.keys.shape[3]
    width = slice_of(K)
    given = {name: getattr(made, name) for name in ("queries", "keys", "w", "scores", "total")}
    given |= {"do": do, "dstate": dstate}
    blocks = head_blocks(T, K, width)
    out = {
        "values": jax.ShapeDtypeStruct((B, T, HV, V), BF16),
        "states": jax.ShapeDtypeStruct((B, HV, T // C, V, K), BF16),
        "first": jax.ShapeDtypeStruct((B, HV, K, V), F32),
    }
    blocks |= {"do": blocks["values"], "dstate": state_block(K, width), "first": state_block(K, width)}
    return Reversed(**over_chunks(_kernel, "reverse", spec, given, out, blocks))


def _kernel(refs: dict[str, Any], out: dict[str, Any]) -> None:
    T, K = refs["keys"].shape
    width = refs["do"].shape[1]

    def step(n: Any, dstate_VK: Any) -> Any:
        c = T // C - 1 - n
        at = pl.ds(c * C, C)
        held, do = dstate_VK.astype(BF16), refs["do"][at, :].T
        out["states"][c] = held
        values = dot(do, refs["scores"][at, :]) + dot(held, refs["keys"][at, :], (1, 1))
        values = values.astype(BF16)
        out["values"][at, :] = values.T
        dstate_VK = dstate_VK * refs["total"][c][None, :] + dot(do, refs["queries"][at, :])
        return dstate_VK - dot(values, refs["w"][at, :]) if "w" in refs else dstate_VK

    start = refs["dstate"][...].T if "dstate" in refs else jnp.zeros((width, K), F32)
    out["first"][...] = jax.lax.fori_loop(0, T // C, step, start).T
