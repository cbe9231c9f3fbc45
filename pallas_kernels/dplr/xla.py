"""Chunkwise, in plain JAX, for any device.

A chunk of C tokens starts from the state S and, with u_t = S_{t-1}^T a_t what a reads,
    u = (I - A^ab)^-1 ((a before) S + A^ak v)
    o = (q prefix) S + A^qb u + A^qk v
    S' = Diag(prefix_C) S + (b suffix)^T u + (k suffix)^T v
where A^xy_ij = sum_d x_id y_jd exp(g_{j+1..i})_d over j <= i for x = q, and exp(g_{j+1..i-1}) over j < i for
x = a, which reads before its own token's decay: A^ay is the product of rows shifted by one, shifted back.
prefix and suffix are the decays from the chunk's start and to its end (`linear_attention.decay`), before is
the prefix of the token before.

Groups of chunks are processed one after the other; in a group, all that does not need the state is batched.
A group is computed anew in the backward pass: what is kept is the arguments and one state a group.

Shape legend: as call.py, and n groups, G chunks a group, C chunk length, N = B * H, M = G * N.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.lax import Precision

from pallas_kernels.dispatch import here
from pallas_kernels.dplr import reference
from pallas_kernels.dplr.call import Call
from pallas_kernels.linear_attention.decay import decayed_products
from pallas_kernels.linear_attention.inverse import solve_unit_lower
from pallas_kernels.linear_attention.xla import CHUNK, GROUP_SIZE, GROUP_SIZE_CPU


def dplr(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.dplr`. Memory is linear in T."""
    batch, length, heads, value_dim = call.v.shape
    if length == 1:
        return reference.dplr(call)
    full = any(x.dtype in (jnp.float32, jnp.float64) for x in (call.q, call.k, call.v))
    precision = Precision.HIGHEST if full else Precision.DEFAULT
    chunk = min(CHUNK, max(16, 1 << (length - 1).bit_length()))
    chunks = math.ceil(length / chunk)
    most = GROUP_SIZE_CPU if here().platform == "cpu" else GROUP_SIZE
    group = math.ceil(chunks / math.ceil(chunks * batch * heads / most))
    call = call.separate()

    def split(x: jax.Array) -> jax.Array:
        """[B, T, H, F] -> [n, G, N, C, F], padded with tokens that change nothing."""
        x = jnp.pad(x, ((0, 0), (0, -length % (group * chunk)), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, group, chunk, heads, x.shape[-1]).transpose(1, 2, 0, 4, 3, 5)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    arrays = tuple(map(split, (call.q * call.scale, call.k, call.v, call.a, call.b, call.log_decay)))
    step = jax.checkpoint(functools.partial(_group, precision, call.compute_dtype))
    state, o = jax.lax.scan(step, call.state.reshape(-1, *call.state.shape[2:]), arrays)
    o = o.reshape(-1, group, batch, heads, chunk, value_dim).transpose(2, 0, 1, 4, 3, 5)
    o = o.reshape(batch, -1, heads, value_dim)[:, :length]
    return o.astype(call.v.dtype), state.reshape(call.state.shape)


def _group(
    precision: Precision, dtype: jnp.dtype, state_NKV: jax.Array, arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """(the state after G chunks [N, K, V], o [G, N, C, V]); arrays: q, k, v, a, b, g [G, N, C, F]."""
    G, N, C, _ = arrays[0].shape
    matmul = functools.partial(jnp.matmul, precision=precision)
    q, k, v, a, b, g = (x.astype(dtype).reshape(G * N, C, x.shape[-1]) for x in arrays)
    rows = jnp.stack([q, _up(a)], axis=2)
    twice = lambda x, y: jnp.concatenate([x, y])
    products, prefix, suffix = decayed_products(twice(rows, rows), twice(k, b), twice(g, g), precision)
    (A_qk, A_ak), (A_qb, A_ab) = ((A[:, :, 0], _down(A[:, :, 1])) for A in jnp.split(products, 2))
    prefix, suffix = prefix[: G * N], suffix[: G * N]
    before = jnp.concatenate([jnp.ones_like(prefix[:, :1]), prefix[:, :-1]], axis=1)
    solved = solve_unit_lower(-A_ab, jnp.concatenate([a * before, matmul(A_ak, v)], axis=-1), precision)
    read_MCK, own_MCV = jnp.split(solved, (a.shape[-1],), axis=-1)
    added_MKV = matmul((k * suffix).mT, v)

    def step(state_NKV: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple]:
        read, own, b, added, total = xs
        u = own + matmul(read, state_NKV)
        return total[..., None] * state_NKV + matmul(b.mT, u) + added, (state_NKV, u)

    chunks = (read_MCK, own_MCV, b * suffix, added_MKV, prefix[:, -1])
    xs = tuple(x.reshape(G, N, *x.shape[1:]) for x in chunks)
    state_NKV, (states, u) = jax.lax.scan(step, state_NKV, xs)
    flat = lambda x: x.reshape(G * N, *x.shape[2:])
    o = matmul(q * prefix, flat(states)) + matmul(A_qb, flat(u)) + matmul(A_qk, v)
    return state_NKV, o.reshape(G, N, C, -1)


def _up(x: jax.Array) -> jax.Array:
    """Row i is row i + 1, the last 0."""
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def _down(x: jax.Array) -> jax.Array:
    """Row i is row i - 1, the first 0."""
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
