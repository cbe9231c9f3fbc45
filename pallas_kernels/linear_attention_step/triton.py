"""The kernel of the single-token step: a block of threads has 64 values of a head, S in registers.

It reads the state once and writes it once, in place. Everything per key or per value (norms, scale, exp of
the decay) is made by XLA before, in float32; it is 1/128 of the state.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import agreement
from pallas_kernels.dispatch import Device
from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention.call import l2_normalize
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention_step.call import StepCall

KEY_DIMS = (64, 128, 256)
SLICE = 64  # of the values of a head, that a block of threads takes
F32 = jnp.float32


def supports(call: StepCall) -> str | None:
    """None if the kernel computes this step, else the reason why not."""
    *_, key_dim, value_dim = call.state.shape
    if call.state.dtype != F32:
        return f"a {call.state.dtype} state (float32 only)"
    if 0 in call.state.shape:
        return "an empty call"
    if key_dim not in KEY_DIMS or value_dim % SLICE:
        return f"head dims K = {key_dim}, V = {value_dim} (K 64, 128 or 256, V a multiple of 64)"
    if value_dim // SLICE > 65535:
        return f"V = {value_dim} (at most {65535 * SLICE})"
    return None


def linear_attention_step(call: StepCall) -> tuple[jax.Array, jax.Array]:
    """As the reference, and its gradients."""
    options: dict[str, Any] = dict(scale=call.scale, qk_l2norm=call.qk_l2norm)

    @jax.custom_vjp
    def run(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        return _update(*arrays, **options, interpret=call.interpret)

    def backward(arrays: tuple, cotangents: tuple) -> tuple:
        return jax.vjp(functools.partial(reference.update, **options), *arrays)[1](cotangents)

    run.defvjp(lambda *arrays: (run(*arrays), arrays), backward)
    return run(*call.arrays)


runs_on = Device.before_ampere


def self_test() -> str | None:
    """See `agreement.self_test`."""
    return agreement.self_test("linear_attention_step", _trial)


def _trial() -> dict[str, tuple[jax.Array, jax.Array]]:
    """(the kernel's, the reference's) results of a small step, by name."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(2, 64, 64), (2, 64), (2, 64), (2, 64), (2, 64), (2,)]
    state, q, k, v, gate, rate = (jax.random.normal(*x, F32) for x in zip(keys, shapes, strict=True))
    options: dict[str, Any] = dict(scale=0.125, qk_l2norm=True)
    arrays = state, q, k, v, -jax.nn.softplus(gate), jax.nn.sigmoid(rate)
    got = jax.jit(functools.partial(_update, **options, interpret=False))(*arrays)
    want = jax.jit(functools.partial(reference.update, **options))(*arrays)
    return {name: (a, b) for name, a, b in zip(("o", "state"), got, want, strict=True)}


def _update(
    state: jax.Array, *given: Any, scale: float, qk_l2norm: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As `reference.update`."""
    rows = _rows(state.shape, *given, scale=scale, qk_l2norm=qk_l2norm)
    o, after = _step(state.reshape(-1, *state.shape[-2:]), rows, interpret)
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


def _step(state: jax.Array, rows: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, jax.Array]:
    """(o [N, V], the state after the token) of a state [N, K, V] and `_rows`, all float32."""
    heads, key_dim, value_dim = state.shape
    by_key = pl.BlockSpec((None, key_dim), lambda n, v, _: (n, 0))
    by_value = pl.BlockSpec((None, SLICE), lambda n, v, _: (n, v))
    of_state = pl.BlockSpec((None, key_dim, SLICE), lambda n, v, _: (n, 0, v))
    specs = {name: by_value if name in ("v", "beta") else by_key for name in rows}

    def body(refs: dict[str, Any], state: Any, out: dict[str, Any]) -> None:
        held, key, value = state[...], refs["k"][...][:, None], refs["v"][...]
        if "decay" in refs:
            held = held * refs["decay"][...][:, None]
        if "beta" in refs:
            value = (value - jnp.sum(held * key, axis=0)) * refs["beta"][...]
        held = held + key * value[None, :]
        out["state"][...] = held
        out["o"][...] = jnp.sum(held * refs["q"][...][:, None], axis=0)

    like = lambda shape: jax.ShapeDtypeStruct(shape, F32)
    out = launch(
        body,
        "step",
        grid=(heads, value_dim // SLICE, 1),
        in_specs=[specs, of_state],
        out_specs={"o": by_value, "state": of_state},
        out_shape={"o": like((heads, value_dim)), "state": like(state.shape)},
        warps=key_dim // 16,
        aliases={len(rows): 1},
        interpret=interpret,
    )(rows, state)
    return out["o"], out["state"]
