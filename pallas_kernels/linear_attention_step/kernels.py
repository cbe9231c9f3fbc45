"""What surrounds the kernels, whatever they are written in: their inputs, the gradient, the self-test.

A kernel reads the state once and writes it once, in place. Everything per key or per value (norms, scale, exp
of the decay) is made by XLA before, in float32; it is 1/128 of the state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention.call import l2_normalize
from pallas_kernels.linear_attention_step.call import StepCall

KEY_DIMS = (64, 128, 256)
SLICE = 64  # of the values of a head, that a block of threads takes
F32 = jnp.float32
# (state [N, K, V] float32, `_rows`, interpret) -> (o [N, V], the state after the token)
Kernel = Callable[[jax.Array, dict[str, jax.Array], bool], tuple[jax.Array, jax.Array]]


def refusal(call: StepCall) -> str | None:
    """Why kernels do not compute this step, or None."""
    *_, key_dim, value_dim = call.state.shape
    if call.state.dtype != F32:
        return f"a {call.state.dtype} state (float32 only)"
    if 0 in call.state.shape:
        return "an empty call"
    if key_dim not in KEY_DIMS or value_dim % SLICE:
        return f"head dims K = {key_dim}, V = {value_dim} (K 64, 128 or 256, V a multiple of 64)"
    return None


def step(kernel: Kernel, call: StepCall) -> tuple[jax.Array, jax.Array]:
    """As the reference, and its gradients."""
    options: dict[str, Any] = dict(scale=call.scale, qk_l2norm=call.qk_l2norm)

    @jax.custom_vjp
    def run(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        return _update(kernel, *arrays, **options, interpret=call.interpret)

    def backward(arrays: tuple, cotangents: tuple) -> tuple:
        return jax.vjp(functools.partial(reference.update, **options), *arrays)[1](cotangents)

    run.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return run(*call.arrays)


def trial(kernel: Kernel) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(the ``kernel``'s, the reference's) results of a small step, by name."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(2, 64, 64), (2, 64), (2, 64), (2, 64), (2, 64), (2,)]
    state, q, k, v, gate, rate = (jax.random.normal(*x, F32) for x in zip(keys, shapes, strict=True))
    options: dict[str, Any] = dict(scale=0.125, qk_l2norm=True)
    arrays = state, q, k, v, -jax.nn.softplus(gate), jax.nn.sigmoid(rate)
    got = jax.jit(functools.partial(_update, kernel, **options, interpret=False))(*arrays)
    want = jax.jit(functools.partial(reference.update, **options))(*arrays)
    return {name: (a, b) for name, a, b in zip(("o", "state"), got, want, strict=True)}


def _update(
    kernel: Kernel, state: jax.Array, *given: Any, scale: float, qk_l2norm: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As `reference.update`."""
    key_dim, value_dim = state.shape[-2:]
    o, after = kernel(
        state.reshape(-1, key_dim, value_dim),
        _rows(state.shape, *given, scale=scale, qk_l2norm=qk_l2norm),
        interpret,
    )
    return o.reshape(given[2].shape), after.reshape(state.shape)


def _rows(
    shape: tuple[int, ...],
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    beta: Any,
    *,
    scale: float,
    qk_l2norm: bool,
) -> dict[str, jax.Array]:
    """Of all N heads, float32: q, k and, if any, `decay` [N, K]; v and, for the delta rule, `beta` [N, V]."""
    *_, heads, key_dim, value_dim = shape
    q, k = q.astype(F32), k.astype(F32)
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    group = heads // k.shape[-2]
    q, k = (jnp.repeat(x, group, axis=-2).reshape(-1, key_dim) for x in (q * scale, k))
    rows = dict(q=q, k=k, v=v.astype(F32).reshape(-1, value_dim))
    if log_decay is not None:
        per_key = log_decay if log_decay.ndim == v.ndim else log_decay[..., None]
        decay = jnp.exp(per_key.astype(F32))
        rows["decay"] = jnp.broadcast_to(decay, (*decay.shape[:-1], key_dim)).reshape(-1, key_dim)
    if beta is not None:
        rate = jnp.broadcast_to(beta.astype(F32)[..., None], v.shape)
        rows["beta"] = rate.reshape(-1, value_dim)
    return rows
