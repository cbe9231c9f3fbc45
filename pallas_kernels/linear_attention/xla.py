"""Chunkwise linear attention in plain JAX, for any device.

A chunk of C tokens starts from the state S and, with u the values that are really written,
    u = (I + beta A^kk)^-1 beta (v - (k prefix) S)      (additive: u = v)
    o = (q prefix) S + A^qk u
    S' = Diag(prefix_C) S + (k suffix)^T u
where A^xy_ij = sum_d x_id y_jd exp(g_{j+1..i})_d for j <= i (A^kk: j < i), and prefix and suffix are the
decays from the chunk's start and to its end (Kimi Linear, arXiv 2510.26692, eq. 6-9; decay.py has the exact
products). A document's start is a decay of exactly zero, which numbers that are not finite do not cross.

Accuracy with the delta rule: where the keys of many tokens are equal, nothing decays and beta is exactly 2,
each token reflects the state and nothing ever fades, so that a rounding of k.k in float32 is felt in every
later token: float32 outputs are off by 2e-7 T to 7e-7 T (T 2048: 4e-4 to 6e-4), however the chunk's system
is solved (by recursion, row by row, triangular solve, refined: all the same). At beta 1.9 they are right to
1e-5, and to half of that by substitution.

Groups of chunks are processed one after the other; in a group, all that does not need the state is batched.
The backward pass runs the groups in reverse and recomputes each: the residuals are the arguments and one
state a group.

Shape legend: as call.py, and n groups, G chunks a group, C chunk length, N = G*B*HV.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import Precision

from pallas_kernels.dispatch import here
from pallas_kernels.linear_attention.call import Call, l2_normalize
from pallas_kernels.linear_attention.decay import decay_ends, decay_matrix, decayed_products
from pallas_kernels.linear_attention.inverse import solve_unit_lower

CHUNK = 64
# Heads times chunks in a group. CPU: small enough for the caches. Others: large enough to fill the device.
GROUP_SIZE_CPU = 32
GROUP_SIZE = 2048


class _Arrays(NamedTuple):
    """The differentiable arguments: [B, T, heads, features]; in a group [G, B, heads, C, features]."""

    q: jax.Array | None  # None if only the state is wanted
    k: jax.Array
    v: jax.Array
    g: jax.Array  # heads is HV or 1, features K or 1
    beta: jax.Array | None


class _Spec(NamedTuple):
    """What is static: tokens a chunk, chunks a group, and how to compute."""

    chunk: int
    group: int
    scale: float
    qk_l2norm: bool
    dtype: jnp.dtype
    precision: Precision


def linear_attention(call: Call) -> tuple[jax.Array, jax.Array | None]:
    """See `pallas_kernels.linear_attention`. Differentiable once; memory is linear in T."""
    if call.axis is not None:
        from pallas_kernels.linear_attention import pieces  # which are made of `final_state`

        call = pieces.entered(call)
    o, state = _run(call, outputs=True)
    assert o is not None
    return o, state if call.output_final_state else None


def final_state(call: Call) -> jax.Array:
    """The state after the last token [B, HV, K, V] alone; q is not read."""
    return _run(call, outputs=False)[1]


def _run(call: Call, outputs: bool) -> tuple[jax.Array | None, jax.Array]:
    batch, length, heads, _ = call.v.shape
    if batch == 0:
        return (call.v if outputs else None), call.state()
    g = call.log_decay
    if g is None:
        g = call.zeros((batch, length, 1))
    g = g.reshape(*g.shape[:3], -1)
    beta = None if call.beta is None else call.beta[..., None]
    arrays, state = _Arrays(call.q if outputs else None, call.k, call.v, g, beta), call.state()
    starts_BT, spoilt = call.starts(), None
    if starts_BT is not None:
        usable, state_usable = jax.tree.map(jnp.isfinite, (arrays, state))
        usable = usable._replace(g=usable.g | (arrays.g == -jnp.inf))
        spoilt = _spoilt(usable, state_usable, starts_BT)
        clean = functools.partial(jax.tree.map, lambda ok, x: jnp.where(ok, x, 0))
        arrays, state = clean(usable, arrays), clean(state_usable, state)
        arrays = arrays._replace(g=jnp.where(starts_BT[..., None, None], -jnp.inf, arrays.g))
    full = any(x.dtype in (jnp.float32, jnp.float64) for x in (call.q, call.k, call.v))
    chunk = min(CHUNK, max(16, 1 << (length - 1).bit_length()))
    chunks = math.ceil(length / chunk)
    groups = math.ceil(chunks * batch * heads / (GROUP_SIZE_CPU if here().platform == "cpu" else GROUP_SIZE))
    spec = _Spec(
        chunk=chunk,
        group=math.ceil(chunks / groups),
        scale=call.scale,
        qk_l2norm=call.qk_l2norm,
        dtype=call.compute_dtype,
        precision=Precision.HIGHEST if full else Precision.DEFAULT,
    )
    o, state = _attend(spec, arrays, state)
    if spoilt is not None:
        o_bad, state_bad = (jnp.where(bad, jnp.nan, 0) for bad in spoilt)
        o = None if o is None else o + o_bad[..., None].astype(o.dtype)
        state = state + state_bad[..., None, None].astype(state.dtype)
    return o, state


def _spoilt(usable: _Arrays, state_usable: jax.Array, starts_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which outputs, [B, T, HV], and final states, [B, HV], depend on a number that is not ``usable``.

    Such a number spoils its document from its token on, but zero times it is no zero: it would get past a
    reset, as it would past the other zeros of a chunk. So it is taken out first, and its results spoilt last.
    """
    heads = usable.v.shape[2]

    def bad(ok: jax.Array) -> jax.Array:
        return jnp.repeat(~jnp.all(ok, axis=-1), heads // ok.shape[2], axis=2)

    written = functools.reduce(jnp.logical_or, map(bad, jax.tree.leaves(usable._replace(q=None))))
    written = written.at[:, 0].set(written[:, 0] | ~jnp.all(state_usable, axis=(2, 3)))
    position_T = jnp.arange(starts_BT.shape[1], dtype=jnp.int32)[None]
    first_BT = lax.cummax(jnp.where(starts_BT, position_T, 0), axis=1)
    last_BTH = lax.cummax(jnp.where(written, position_T[..., None], -1), axis=1)
    after = last_BTH >= first_BT[..., None]
    return after if usable.q is None else after | bad(usable.q), after[:, -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, arrays: _Arrays, state: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    return _attend_forward(spec, arrays, state)[0]


def _attend_forward(spec: _Spec, arrays: _Arrays, state: jax.Array) -> tuple:
    def step(state: jax.Array, group: _Arrays) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        after, o = _group(spec, group, state)
        return after, (o, state)

    final, (o, states) = jax.lax.scan(step, state, _split(spec, arrays))
    return (None if o is None else _merge(o, arrays.v.shape), final), (arrays, states)


def _attend_backward(spec: _Spec, residuals: tuple, cotangents: tuple) -> tuple:
    arrays, states = residuals
    o_bar, state_bar = cotangents

    def step(state_bar: jax.Array, xs: tuple) -> tuple[jax.Array, _Arrays]:
        group, state, o_bar = xs
        _, vjp = jax.vjp(functools.partial(_group, spec), group, state)
        group_bar, state_bar = vjp((state_bar, o_bar))
        return state_bar, group_bar

    xs = (_split(spec, arrays), states, _split(spec, o_bar))
    state_bar, groups_bar = jax.lax.scan(step, state_bar, xs, reverse=True)
    return jax.tree.map(lambda bar, x: _merge(bar, x.shape), groups_bar, arrays), state_bar


_attend.defvjp(_attend_forward, _attend_backward)


def _split(spec: _Spec, arrays: Any) -> Any:
    """[B, T, heads, features] -> [n, G, B, heads, C, features], padded with tokens that change nothing."""

    def split(x: jax.Array) -> jax.Array:
        batch, length, heads, features = x.shape
        span = spec.group * spec.chunk
        x = jnp.pad(x, ((0, 0), (0, -length % span), (0, 0), (0, 0)))
        return x.reshape(batch, -1, spec.group, spec.chunk, heads, features).transpose(1, 2, 0, 4, 3, 5)

    return jax.tree.map(split, arrays)


def _merge(x_nGBHCD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_split` for an array of ``shape``."""
    batch, length, heads, features = shape
    return x_nGBHCD.transpose(2, 0, 1, 4, 3, 5).reshape(batch, -1, heads, features)[:, :length]


def _group(spec: _Spec, arrays: _Arrays, state: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """G chunks from ``state`` [B, HV, K, V]; returns (the state after them, o [G, B, HV, C, V] or None)."""
    G, B, HV, C, V = arrays.v.shape
    matmul = functools.partial(jnp.matmul, precision=spec.precision)
    flat = lambda x: x.astype(spec.dtype).reshape(-1, C, x.shape[-1])

    def per_head(x: jax.Array, scale: float = 1.0) -> jax.Array:
        x = x.astype(spec.dtype)
        x = l2_normalize(x) if spec.qk_l2norm else x
        return flat(jnp.repeat(x * scale, HV // x.shape[2], axis=2))

    q, k = None if arrays.q is None else per_head(arrays.q, spec.scale), per_head(arrays.k)
    v, g = flat(arrays.v), flat(arrays.g)
    rows = [x for x in (q, None if arrays.beta is None else k) if x is not None]
    if g.shape[-1] > 1:
        if rows:
            products, prefix, suffix = decayed_products(jnp.stack(rows, axis=2), k, g, spec.precision)
        else:
            prefix, suffix = decay_ends(g)
        A = [products[:, :, r] for r in range(len(rows))]
    else:
        decay, prefix, suffix = decay_matrix(g[..., 0])
        repeat = lambda x: flat(
            jnp.repeat(x.reshape(G * B, -1, *x.shape[1:]), HV // arrays.g.shape[2], axis=1)
        )
        decay, prefix, suffix = repeat(decay), repeat(prefix[..., None]), repeat(suffix[..., None])
        A = [decay * matmul(row, k.mT) for row in rows]
    if arrays.beta is None:
        read, values = None, v
    else:
        beta = flat(arrays.beta)
        rhs = beta * jnp.concatenate([k * prefix, v], axis=-1)
        solution = solve_unit_lower(beta * A[-1], rhs, spec.precision)
        read, values = solution[..., :-V], solution[..., -V:]
    total = jnp.broadcast_to(prefix[:, -1], (G * B * HV, k.shape[-1]))
    chunks = jax.tree.map(lambda x: x.reshape(G, B * HV, *x.shape[1:]), (read, values, k * suffix, total))
    after, states, written = _states(spec.precision, state.reshape(B * HV, *state.shape[2:]), *chunks)
    if q is None:
        return after.reshape(state.shape), None
    o = matmul(q * prefix, states.reshape(-1, *state.shape[2:])) + matmul(A[0], written.reshape(-1, C, V))
    return after.reshape(state.shape), o.reshape(arrays.v.shape).astype(arrays.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _states(*arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _states_forward(*arguments)[0]


def _states_forward(
    precision: Precision,
    state: jax.Array,
    read: jax.Array | None,
    values: jax.Array,
    keys: jax.Array,
    total: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple]:
    """The sequential part, chunk by chunk: written = values - read S; S' = Diag(total) S + keys^T written.

    state [N, K, V]; read, keys [G, N, C, K]; values [G, N, C, V]; total [G, N, K], here with N = B*HV.
    Returns (final state, the states before each chunk [G, N, K, V], written [G, N, C, V]) and what is kept.
    """
    matmul = functools.partial(jnp.matmul, precision=precision)

    def step(state: jax.Array, xs: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        read, values, keys, total = xs
        written = values if read is None else values - matmul(read, state)
        return total[..., None] * state + matmul(keys.mT, written), (state, written)

    final, (states, written) = jax.lax.scan(step, state, (read, values, keys, total))
    return (final, states, written), (read, keys, total, states, written)


def _states_backward(precision: Precision, residuals: tuple, cotangents: tuple) -> tuple:
    read, keys, total, states, written = residuals
    matmul = functools.partial(jnp.matmul, precision=precision)
    final_bar, states_bar, written_bar = cotangents

    def step(after_bar: jax.Array, xs: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        read, keys, total, state_bar, written_bar = xs
        written_bar = written_bar + matmul(keys, after_bar)
        before_bar = state_bar + total[..., None] * after_bar
        if read is not None:
            before_bar = before_bar - matmul(read.mT, written_bar)
        return before_bar, (after_bar, written_bar)

    xs = (read, keys, total, states_bar, written_bar)
    state_bar, (after_bar, written_bar) = jax.lax.scan(step, final_bar, xs, reverse=True)
    read_bar = None if read is None else -matmul(written_bar, states.mT)
    keys_bar = matmul(written, after_bar.mT)
    return state_bar, read_bar, written_bar, keys_bar, jnp.sum(states * after_bar, axis=-1)


_states.defvjp(_states_forward, _states_backward)
