"""The chunks in order, values in slices: the transposed state stays in registers, float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton.chunks import Chunks
from pallas_kernels.linear_attention.triton.inputs import Spec
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot


class Scanned(NamedTuple):
    """o: [B, T, HV, V] bf16.  final: S after the last token, [B, HV, K, V] float32.

    For the gradient: states, S^T before each chunk [B, HV, T/C, V, K] bf16; values, V' [B, T, HV, V] bf16.
    """

    o: jax.Array | None
    final: jax.Array | None
    states: jax.Array | None
    values: jax.Array | None


def slice_of(K: int) -> int:
    """Values that one block of threads takes."""
    return 64 if K <= 128 else 32


def stages_of(K: int) -> int:
    """Of the scans: tiles of the next chunk are loaded ahead where two chunks' fit into 99 KiB."""
    return 2 if K <= 128 else 1


def scan(spec: Spec, made: Chunks, state: jax.Array | None, keep: bool) -> Scanned:
    B, T, HV, V = made.u.shape
    K = made.keys.shape[3]
    width = slice_of(K)
    names = ("queries", "keys", "scores", "total", "u", "w")
    given = {name: getattr(made, name) for name in names} | {"state": state}
    out = {"o": jax.ShapeDtypeStruct((B, T, HV, V), BF16), "final": jax.ShapeDtypeStruct((B, HV, K, V), F32)}
    if keep:
        out["states"] = jax.ShapeDtypeStruct((B, HV, T // C, V, K), BF16)
    if keep and spec.delta:
        out["values"] = out["o"]
    blocks = head_blocks(T, K, width)
    blocks |= {"u": blocks["values"], "o": blocks["values"]}
    blocks |= {"state": state_block(K, width), "final": state_block(K, width)}
    results = over_chunks(_kernel, "scan", spec, given, out, blocks)
    kept: dict[str, Any] = {"states": None, "values": made.u if keep else None}
    return Scanned(**(kept | results))


def over_chunks(
    kernel: Callable[..., None],
    name: str,
    spec: Spec,
    given: dict[str, Any],
    out: dict[str, jax.ShapeDtypeStruct],
    blocks: dict[str, pl.BlockSpec],
) -> dict[str, jax.Array]:
    """Results by name of ``kernel`` for each slice of values, head and sequence; what is None is absent."""
    given = {what: x for what, x in given.items() if x is not None}
    B, _, heads, K = given["keys"].shape
    V = out["states" if "states" in out else "o"].shape[3]
    return launch(
        kernel,
        name,
        grid=(V // slice_of(K), heads, B),
        in_specs=[{what: blocks[what] for what in given}],
        out_specs={what: blocks[what] for what in out},
        out_shape=out,
        warps=4 if K <= 128 else 8,
        stages=stages_of(K),
        interpret=spec.interpret,
    )(given)


def head_blocks(T: int, K: int, width: int) -> dict[str, pl.BlockSpec]:
    """All tokens of a head: of `Chunks`, and of the slice of values and states that is one program's."""
    keys = pl.BlockSpec((None, T, None, K), lambda n, h, b: (b, 0, h, 0))
    return {
        "queries": keys,
        "keys": keys,
        "w": keys,
        "scores": pl.BlockSpec((None, None, T, C), lambda n, h, b: (b, h, 0, 0)),
        "total": pl.BlockSpec((None, None, T // C, K), lambda n, h, b: (b, h, 0, 0)),
        "values": pl.BlockSpec((None, T, None, width), lambda n, h, b: (b, 0, h, n)),
        "states": pl.BlockSpec((None, None, T // C, width, K), lambda n, h, b: (b, h, 0, n, 0)),
    }


def state_block(K: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, K, width), lambda n, h, b: (b, h, 0, n))


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
