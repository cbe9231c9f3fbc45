"""The chunks in order, values in slices: the transposed state stays in registers, float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.linear_attention.triton.chunks import Chunks
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot


class Scanned(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S after the last token, [B, HV, K, V] float32.

    Kept for the gradient: states, S^T before each chunk [B, HV, T/C, V, K] bf16; values, V' [B, T, HV, V] bf16.
    """

    o: jax.Array
    final: jax.Array
    states: jax.Array | None
    values: jax.Array | None


TRIALS = {
    f"{width} values, {warps} warps, {stages} stages": {"width": width, "warps": warps, "stages": stages}
    for width, warps, stages in (
        (64, 4, 1),
        (64, 4, 2),
        (64, 4, 3),
        (32, 4, 1),
        (32, 4, 2),
        (32, 2, 2),
        (64, 8, 2),
        (16, 2, 2),
    )
}


def slice_of(K: int) -> int:
    """Values that one block of threads takes."""
    return 64 if K <= 128 else 32


def scan(
    spec: Spec,
    made: Chunks,
    state: jax.Array | None,
    keep: bool,
    width: int = 0,
    warps: int = 4,
    stages: int = 2,
) -> Scanned:
    B, T, HV, V = made.u.shape
    K = made.keys.shape[3]
    width = width or slice_of(K)
    keys, values = tokens(T, K), tokens(T, width, sliced=True)
    states = pl.BlockSpec((None, None, K, width), lambda n, h, b: (b, h, 0, n))
    specs = {
        "queries": keys,
        "keys": keys,
        "w": keys,
        "u": values,
        "scores": pl.BlockSpec((None, None, T, C), lambda n, h, b: (b, h, 0, 0)),
        "total": pl.BlockSpec((None, None, T // C, K), lambda n, h, b: (b, h, 0, 0)),
        "state": states,
    }
    given = {name: x for name, x in (made._asdict() | {"state": state}).items() if x is not None}
    out = {
        "o": (jax.ShapeDtypeStruct((B, T, HV, V), BF16), values),
        "final": (jax.ShapeDtypeStruct((B, HV, K, V), F32), states),
    }
    if keep:
        per_chunk = pl.BlockSpec((None, None, T // C, width, K), lambda n, h, b: (b, h, 0, n, 0))
        out["states"] = (jax.ShapeDtypeStruct((B, HV, T // C, V, K), BF16), per_chunk)
        if spec.delta:
            out["values"] = (jax.ShapeDtypeStruct((B, T, HV, V), BF16), values)
    results = pl.pallas_call(
        _kernel,
        grid=(V // width, HV, B),
        in_specs=[{name: specs[name] for name in given}],
        out_specs={name: block for name, (_, block) in out.items()},
        out_shape={name: shape for name, (shape, _) in out.items()},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=spec.interpret,
        name="scan",
    )(given)
    kept = {"states": None, "values": made.u if keep else None}
    return Scanned(**(kept | results))


def tokens(T: int, features: int, sliced: bool = False) -> pl.BlockSpec:
    """All tokens of a head of [B, T, HV, features or more]: all features or the slice of this block of threads."""
    return pl.BlockSpec((None, T, None, features), lambda n, h, b: (b, 0, h, n if sliced else 0))


def _kernel(refs: dict[str, Any], out: dict[str, Any]) -> None:
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
