"""The chunks in order and in reverse, values in slices: the transposed state stays in registers, float32.

In reverse it is the gradient of the state:
    dV' = scores^T dO + keys dS
    dS <- total dS + queries^T dO - w^T dV'
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.arrays import run
from pallas_kernels.linear_attention.triton.chunks import Chunks
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot


class Scanned(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S after the last token, [B, HV, K, V] float32.

    For the gradient: states, S^T before each chunk [B, HV, T/C, V, K] bf16; values, V' [B, T, HV, V] bf16.
    """

    o: jax.Array | None
    final: jax.Array | None
    states: jax.Array | None
    values: jax.Array | None


class Reversed(NamedTuple):
    """values: dV' [B, T, HV, V] bf16.  states: dS^T after each chunk [B, HV, T/C, V, K] bf16.

    first: dS before the first token, [B, HV, K, V] float32.
    """

    values: jax.Array
    states: jax.Array
    first: jax.Array


def scan(spec: Spec, made: Chunks, state: jax.Array | None, keep: bool) -> Scanned:
    names = ("queries", "keys", "scores", "total", "u", "w")
    given = {name: getattr(made, name) for name in names} | {"state": state}
    wanted = ("o", "final", *("states",) * keep, *("values",) * (keep and spec.delta))
    kept: dict[str, Any] = {"states": None, "values": made.u if keep else None}
    return Scanned(**(kept | _over_chunks(spec, _scan, "scan", given, wanted)))


def reverse(spec: Spec, made: Chunks, do: jax.Array, dstate: jax.Array | None) -> Reversed:
    given = {name: getattr(made, name) for name in ("queries", "keys", "w", "scores", "total")}
    given |= {"do": do, "dstate": dstate}
    return Reversed(**_over_chunks(spec, _reverse, "reverse", given, ("values", "states", "first")))


def _over_chunks(
    spec: Spec, kernel: Callable[..., None], name: str, given: dict[str, Any], wanted: Sequence[str]
) -> dict[str, jax.Array]:
    """Results by name of ``kernel`` for each slice of values, head and sequence; what is None is absent."""
    given = {what: x for what, x in given.items() if x is not None}
    few = spec.sizes["K"] <= 128
    cut = {"V": 64 if few else 32}  # values that one block of threads takes
    # Tiles of the next chunk are loaded ahead where two chunks' fit into 99 KiB.
    options = dict(warps=4 if few else 8, stages=2 if few else 1)
    return run(spec, kernel, name, [given], wanted, cut, **options)


def _scan(refs: dict[str, Any], out: dict[str, Any]) -> None:
    T, K = refs["keys"].shape
    width = refs["u"].shape[1]

    def step(c: Any, state_VK: Any) -> Any:
        at = pl.ds(c * C, C)
        held = state_VK.astype(BF16)
        if "states" in out:
            out["states"][c] = held
        values = refs["u"][at, :].T
        if "w" in refs:
            values = (values.astype(F32) - dot(held, refs["w"][at, :], (1, 1))).astype(BF16)
            if "values" in out:
                out["values"][at, :] = values.T
        o = dot(held, refs["queries"][at, :], (1, 1)) + dot(values, refs["scores"][at, :], (1, 1))
        out["o"][at, :] = o.astype(BF16).T
        return state_VK * refs["total"][c][None, :] + dot(values, refs["keys"][at, :])

    start = refs["state"][...].T if "state" in refs else jnp.zeros((width, K), F32)
    out["final"][...] = jax.lax.fori_loop(0, T // C, step, start).T


def _reverse(refs: dict[str, Any], out: dict[str, Any]) -> None:
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
