"""Every chunk alone: the gradients of the arguments, from those of what `chunks` made of them.

Of the delta rule, or with a decay per channel; the rest is `additive`'s.

With r = A^T d w and x = A^T d u, dL = -(r w^T + x u^T) strictly below the diagonal. The gradient of a decay's
logarithm is the sum over all that it scales of value times gradient; of that of a norm 1 / |q| likewise.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.triton.arrays import run
from pallas_kernels.linear_attention.triton.channels import channels, solved
from pallas_kernels.linear_attention.triton.chunks import Chunks
from pallas_kernels.linear_attention.triton.inputs import Inputs, Spec
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, dot, grid
from pallas_kernels.linear_attention.triton.tokens import Tokens, ends, load, part, slices


class Gradients(NamedTuple):
    """q, k: [B, T, HV, K] bf16, one a value head.  v: [B, T, HV, V] bf16.  beta: [B, HV, T] float32.

    sum: of the sums of log-decays, [B, HV, T] float32.  steps: [B, T, HV, K] float32.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array | None = None
    beta: jax.Array | None = None
    sum: jax.Array | None = None
    steps: jax.Array | None = None


def gradients(
    spec: Spec, inputs: Inputs, made: Chunks, d: dict[str, jax.Array], dvalues: jax.Array
) -> Gradients:
    """d: of `moves`.  dvalues: of `Reversed`."""
    names = ["queries", "keys", "scores", "total", *("w", "u", "inverse", "kk") * spec.delta]
    values = d | {name: getattr(made, name) for name in names} | ({"dvalues": dvalues} if spec.delta else {})
    of_keys = ("dqk", "q_row", "k_row", *("dkk",) * spec.delta) if spec.channel else ("q", "k")
    out = (*of_keys, *("v", "beta") * spec.delta, *("sum",) * ("sum" in inputs.rows))
    results: Any = run(spec, functools.partial(_kernel, spec), "gradients", [inputs, values], out)
    if spec.channel:
        wanted = ("total", "inverse", "dqueries", "dkeys", "dtotal", "dw")
        passed = {name: values[name] for name in wanted if name in values}
        results |= channels(spec, inputs, passed | {name: results.pop(name) for name in of_keys})
    return Gradients(**({"v": dvalues} | results))


def _kernel(spec: Spec, refs: Any, made: dict[str, Any], out: dict[str, Any]) -> None:
    i, j = grid()
    token = load(spec, refs)
    dscores = jnp.where(token.visible, made["dscores"][...].astype(F32), 0.0)
    pair = dscores * made["scores"][...].astype(F32)
    q_row, k_row = jnp.sum(pair, axis=1), jnp.sum(pair, axis=0)
    up_to, after = q_row - k_row, jnp.zeros((C,), F32)  # of a decay per head
    dkk: Any = None
    A_T: Any = None
    if spec.delta:
        A_T = made["inverse"][...].T
        dL, dbeta_v = _inverse(token, refs, made, out, A_T)
        dL = jnp.where(token.visible & (i > j), dL, 0.0)
        kk, dkk = made["kk"][...].astype(F32), token.beta[:, None] * dL
        pair = dkk * kk
        rows, columns = jnp.sum(pair, axis=1), jnp.sum(pair, axis=0)
        k_row, up_to = k_row + rows + columns, up_to + rows - columns

    def moved(n: Any, rows: tuple[Any, ...]) -> tuple[Any, ...]:
        q_row, k_row, up_to, after, *dbeta = rows
        read = jnp.sum(made["queries"][part(n)].astype(F32) * made["dqueries"][part(n)].astype(F32), axis=1)
        written = jnp.sum(made["keys"][part(n)].astype(F32) * made["dkeys"][part(n)].astype(F32), axis=1)
        q_row, k_row, up_to, after = q_row + read, k_row + written, up_to + read, after + written
        if spec.delta:
            prefix = ends(refs.steps[part(n)], spec.interpret)[0] if spec.channel else 1.0
            held = refs.k[part(n)].astype(F32) * prefix * token.reads[:, None]
            held = jnp.sum(held * solved(A_T, made["dw"][part(n)]), axis=1)
            k_row, up_to = k_row + token.beta * held, up_to + token.beta * held
            dbeta = [dbeta[0] + held]
        return q_row, k_row, up_to, after, *dbeta

    start: tuple[Any, ...] = (q_row, k_row, up_to, after)
    if spec.delta:
        start = (*start, dbeta_v + jnp.sum(dL * kk, axis=1))
    q_row, k_row, up_to, after, *dbeta = slices(refs.q, moved, start)
    if spec.delta:
        out["beta"][...] = dbeta[0]
    if "sum" in out:
        total = jnp.sum(made["total"][...] * made["dtotal"][...]) + jnp.sum(after)
        last = jax.lax.broadcasted_iota(jnp.int32, (C,), 0) == C - 1
        out["sum"][...] = up_to - after + jnp.where(last, total, 0.0)

    # q and k without norms; those are factors of the rows and columns of the products' gradients
    dqk = dscores * (spec.scale * token.q_unit)[:, None] * token.k_unit[None, :]
    dkk_raw: Any = dkk * token.k_unit[:, None] * token.k_unit[None, :] if spec.delta else None
    if spec.channel:
        out["dqk"][...], out["q_row"][...], out["k_row"][...] = (dqk + dqk.T).astype(BF16), q_row, k_row
        if spec.delta:
            out["dkk"][...] = (dkk_raw + dkk_raw.T).astype(BF16)
        return
    if token.decay is not None:
        dqk = dqk * token.decay
        dkk_raw = dkk_raw * token.decay

    def keys(n: Any, _: None) -> None:
        dq = made["dqueries"][part(n)].astype(F32) * token.queries[:, None]
        dk = made["dkeys"][part(n)].astype(F32) * token.keys[:, None]
        q, k = refs.q[part(n)].astype(F32), refs.k[part(n)].astype(F32)
        dq, dk = dq + dot(dqk, k), dk + dot(dqk, q, (0, 0))
        read = solved(A_T, made["dw"][part(n)]) * (token.reads * token.beta)[:, None]
        dk = dk + dot(dkk_raw + dkk_raw.T, k) + read
        if spec.l2norm:  # d of 1 / |q| is -q / |q|^3
            dq -= q * (q_row * token.q_unit * token.q_unit)[:, None]
            dk -= k * (k_row * token.k_unit * token.k_unit)[:, None]
        out["q"][part(n)], out["k"][part(n)] = dq.astype(BF16), dk.astype(BF16)

    slices(refs.q, keys, None)


def _inverse(
    token: Tokens, refs: Any, made: dict[str, Any], out: dict[str, Any], A_T: Any
) -> tuple[Any, Any]:
    """dL, of which the strictly lower part counts; dv; and the part of dbeta that comes from v."""

    def keys(n: Any, dL: Any) -> Any:
        return dL - dot(solved(A_T, made["dw"][part(n)]), made["w"][part(n)], (1, 1))

    def values(n: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        dL, dbeta = carry
        x = solved(A_T, made["dvalues"][part(n)])
        out["v"][part(n)] = (x * token.beta[:, None]).astype(BF16)
        dbeta += jnp.sum(x * refs.v[part(n)].astype(F32), axis=1)
        return dL - dot(x, made["u"][part(n)], (1, 1)), dbeta

    dL = slices(refs.q, keys, jnp.zeros((C, C), F32))
    return slices(refs.v, values, (dL, jnp.zeros((C,), F32)))
