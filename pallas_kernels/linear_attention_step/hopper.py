"""The single-token step: the state is read once and written once, in place.

One warpgroup takes 64 values of a head: S, K by 64, in registers. Everything per key or per value (norms,
scale, exp of the decay) is made by XLA before, in float32; it is 1/128 of the state.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention.call import l2_normalize
from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.linear_attention_step.call import StepCall

__all__ = ["linear_attention_step", "runs_on", "self_test", "supports"]

KEY_DIMS = (64, 128, 256)


def supports(call: StepCall) -> str | None:
    """None if the kernel computes this step, else the reason why not."""
    *_, key_dim, value_dim = call.state.shape
    if call.state.dtype != F32:
        return f"a {call.state.dtype} state (float32 only)"
    if 0 in call.state.shape:
        return "an empty call"
    if key_dim not in KEY_DIMS or value_dim % C:
        return f"head dims K = {key_dim}, V = {value_dim} (K 64, 128 or 256, V a multiple of 64)"
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


def self_test() -> str | None:
    """See `requirements.self_test`."""

    def results() -> dict[str, tuple[jax.Array, jax.Array]]:
        keys = jax.random.split(jax.random.key(0), 6)
        shapes = [(2, 64, 64), (2, 64), (2, 64), (2, 64), (2, 64), (2,)]
        state, q, k, v, gate, rate = (jax.random.normal(*x, F32) for x in zip(keys, shapes, strict=True))
        options: dict[str, Any] = dict(scale=0.125, qk_l2norm=True)
        arrays = state, q, k, v, -jax.nn.softplus(gate), jax.nn.sigmoid(rate)
        got = jax.jit(functools.partial(_update, **options, interpret=False))(*arrays)
        want = jax.jit(functools.partial(reference.update, **options))(*arrays)
        return {name: (a, b) for name, a, b in zip(("o", "state"), got, want, strict=True)}

    return requirements.self_test("linear_attention_step", results)


def _update(
    state: jax.Array, *given: Any, scale: float, qk_l2norm: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As `reference.update`."""
    q, k, v, log_decay, beta = given
    key_dim, value_dim = state.shape[-2:]
    q, k = q.astype(F32), k.astype(F32)
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    group = state.shape[-3] // k.shape[-2]
    q, k = (jnp.repeat(x, group, axis=-2).reshape(-1, key_dim) for x in (q * scale, k))
    arrays = dict(q=q, k=k, v=v.astype(F32).reshape(-1, value_dim))
    if log_decay is not None:
        per_key = log_decay if log_decay.ndim == v.ndim else log_decay[..., None]
        decay = jnp.exp(per_key.astype(F32))
        arrays["decay"] = jnp.broadcast_to(decay, (*decay.shape[:-1], key_dim)).reshape(-1, key_dim)
    if beta is not None:
        rate = jnp.broadcast_to(beta.astype(F32)[..., None], v.shape)
        arrays["beta"] = rate.reshape(-1, value_dim)
    tile = (key_dim, C)

    def body(*refs: Any) -> None:
        named = dict(zip([*arrays, "state", "o"], refs, strict=True))
        n, columns = lax.axis_index("n"), pl.ds(lax.axis_index("v") * C, C)

        def load(source: Any, layout: Any) -> jax.Array:
            return plgpu.load(source, layout=layout, optimized=False)

        by_key = lambda name: blocks.by_row(load(named[name].at[n], blocks.ROWS), tile)
        by_value = lambda name: load(named[name].at[n, columns], blocks.COLS)
        held = load(named["state"].at[n, :, columns], blocks.WGMMA)
        key, value = by_key("k"), by_value("v")
        if log_decay is not None:
            held = held * by_key("decay")
        if beta is not None:  # a sum over rows crosses warps: safe, as the block is one warpgroup
            value = (value - jnp.sum(held * key, axis=0)) * by_value("beta")
        held = held + key * blocks.by_col(value, tile)
        named["state"].at[n, :, columns][...] = held
        named["o"].at[n, columns][...] = jnp.sum(held * by_key("q"), axis=0)

    heads = q.shape[0]
    ref = jax.new_ref(state.reshape(heads, key_dim, value_dim))  # written in place
    (o,) = blocks.kernel(
        body,
        name="step",
        interpret=interpret,
        out_type=[jax.ShapeDtypeStruct((heads, value_dim), F32)],
        grid=(value_dim // C, heads),
        grid_names=("v", "n"),
        num_threads=1,
        thread_name="wg",
    )(*arrays.values(), ref)
    return o.reshape(v.shape), jax.freeze(ref).reshape(state.shape)
