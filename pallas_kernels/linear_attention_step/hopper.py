"""The Hopper backend of the single-token step: a warpgroup has 64 values of a head, S in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32, C
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.linear_attention_step import kernels
from pallas_kernels.linear_attention_step.call import StepCall
from pallas_kernels.linear_attention_step.kernels import refusal as supports

__all__ = ["linear_attention_step", "runs_on", "self_test", "supports"]


def linear_attention_step(call: StepCall) -> tuple[jax.Array, jax.Array]:
    """As the reference, and its gradients."""
    return kernels.step(_step, call)


def self_test() -> str | None:
    """See `requirements.self_test`."""
    return requirements.self_test("linear_attention_step", lambda: kernels.trial(_step))


def _step(state: jax.Array, rows: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `kernels.Kernel`."""
    heads, key_dim, value_dim = state.shape
    tile = (key_dim, C)

    def body(*refs: Any) -> None:
        named = dict(zip([*rows, "state", "o"], refs, strict=True))
        n, columns = lax.axis_index("n"), pl.ds(lax.axis_index("v") * C, C)

        def load(source: Any, layout: Any) -> jax.Array:
            return plgpu.load(source, layout=layout, optimized=False)

        by_key = lambda name: blocks.by_row(load(named[name].at[n], blocks.ROWS), tile)
        by_value = lambda name: load(named[name].at[n, columns], blocks.COLS)
        held = load(named["state"].at[n, :, columns], blocks.WGMMA)
        key, value = by_key("k"), by_value("v")
        if "decay" in rows:
            held = held * by_key("decay")
        if "beta" in rows:  # a sum over rows crosses warps: safe, as the block is one warpgroup
            value = (value - jnp.sum(held * key, axis=0)) * by_value("beta")
        held = held + key * blocks.by_col(value, tile)
        named["state"].at[n, :, columns][...] = held
        named["o"].at[n, columns][...] = jnp.sum(held * by_key("q"), axis=0)

    ref = jax.new_ref(state)  # written in place
    (o,) = blocks.kernel(
        body,
        name="step",
        interpret=interpret,
        out_type=[jax.ShapeDtypeStruct((heads, value_dim), F32)],
        grid=(value_dim // C, heads),
        grid_names=("v", "n"),
        num_threads=1,
        thread_name="wg",
    )(*rows.values(), ref)
    return o, jax.freeze(ref)
