"""Every chunk alone, of an additive update without decays per channel: the gradients of the arguments.

As `moves` and `backward` in one: what those hand on in bf16 stays float32 here, so that a gradient is rounded
where it is an operand and at its end only.  With d scores = dO V^T:
    dq = scale e^G dO S^T + d(q k^T) k,   dk = (decay to the end) V dS^T + d(q k^T)^T q
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.triton.arrays import run
from pallas_kernels.linear_attention.triton.inputs import Inputs, Spec
from pallas_kernels.linear_attention.triton.moves import by_states
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot
from pallas_kernels.linear_attention.triton.tokens import SLICE, Tokens, load, part, slices


def additive(
    spec: Spec, inputs: Inputs, do: jax.Array, states: jax.Array, dstates: jax.Array
) -> dict[str, Any]:
    """q, k [B, T, HV, K] bf16 and, with a decay per head, sum [B, HV, T] float32, gradients by name.

    do: [B, T, HV, V] bf16.  states, dstates: of `Scanned` and `Reversed`.
    """
    given = {"do": do, "states": states, "dstates": dstates}
    names = ("q", "k", *("sum",) * ("sum" in inputs.rows))
    return run(spec, functools.partial(_kernel, spec), "additive", [inputs, given], names)


def _kernel(spec: Spec, refs: Any, given: dict[str, Any], out: dict[str, Any]) -> None:
    token = load(spec, refs)
    dqk = _products(spec, token, refs, given)

    def both(m: Any) -> tuple[Any, ...]:
        """dq, dk without what comes of norms; of dk the part from the state after; d total."""
        read, written, total = by_states(m, given, refs.v)
        written *= token.keys[:, None]
        dq = read * token.queries[:, None] + dot(dqk, refs.k[part(m)])
        return dq, written + dot(dqk, refs.q[part(m)], (0, 0)), written, total

    def write(m: Any, dq: Any, dk: Any) -> None:
        out["q"][part(m)], out["k"][part(m)] = dq.astype(BF16), dk.astype(BF16)

    def add(m: Any, sums: dict[str, Any]) -> dict[str, Any]:
        dq, dk, written, total = both(m)
        if not spec.l2norm:
            write(m, dq, dk)
        q, k = refs.q[part(m)].astype(F32), refs.k[part(m)].astype(F32)
        news: dict[str, Any] = {}
        if spec.l2norm:
            news = {"q": jnp.sum(q * dq, axis=1), "k": jnp.sum(k * dk, axis=1)}
        elif "sum" in out:
            news = {"both": jnp.sum(q * dq - k * dk, axis=1)}
        if "sum" in out:
            news["last"] = total * token.carry + jnp.sum(k * written, axis=0)
        return {name: sums[name] + new for name, new in news.items()}

    sums = dict.fromkeys(("q", "k") if spec.l2norm else ("both",) * ("sum" in out), jnp.zeros((C,), F32))
    if "sum" in out:
        sums["last"] = jnp.zeros((SLICE,), F32)
    sums = slices(refs.q, add, sums)
    if "sum" in out:
        last = jax.lax.broadcasted_iota(jnp.int32, (C,), 0) == C - 1
        change = sums["q"] - sums["k"] if spec.l2norm else sums["both"]
        out["sum"][...] = change + jnp.where(last, jnp.sum(sums["last"]), 0.0)

    def again(m: Any, _: None) -> None:
        dq, dk = both(m)[:2]  # d of 1 / |q| is -q / |q|^3
        dq -= refs.q[part(m)].astype(F32) * (sums["q"] * token.q_unit * token.q_unit)[:, None]
        dk -= refs.k[part(m)].astype(F32) * (sums["k"] * token.k_unit * token.k_unit)[:, None]
        write(m, dq, dk)

    if spec.l2norm:
        slices(refs.q, again, None)


def _products(spec: Spec, token: Tokens, refs: Any, given: dict[str, Any]) -> Any:
    """The gradient of q k^T [C, C], bf16."""

    def add(n: Any, total: Any) -> Any:
        return total + dot(given["do"][part(n)], refs.v[part(n)], (1, 1))

    dscores = slices(refs.v, add, jnp.zeros((C, C), F32))
    dqk = jnp.where(token.visible, dscores, 0.0)
    dqk = dqk * (spec.scale * token.q_unit)[:, None] * token.k_unit[None, :]
    return (dqk if token.decay is None else dqk * token.decay).astype(BF16)
