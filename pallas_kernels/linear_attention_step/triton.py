"""The portable backend of the single-token step: a block of threads has 64 values of a head in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.triton import requirements
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.requirements import runs_on
from pallas_kernels.linear_attention_step import kernels
from pallas_kernels.linear_attention_step.call import StepCall
from pallas_kernels.linear_attention_step.kernels import SLICE

__all__ = ["linear_attention_step", "runs_on", "self_test", "supports"]


def supports(call: StepCall) -> str | None:
    """None if the kernel computes this step, else the reason why not."""
    if call.state.shape[-1] // SLICE > 65535:
        return f"V = {call.state.shape[-1]} (at most {65535 * SLICE})"
    return kernels.refusal(call)


def linear_attention_step(call: StepCall) -> tuple[jax.Array, jax.Array]:
    """As the reference, and its gradients."""
    return kernels.step(_step, call)


def self_test() -> str | None:
    """See `requirements.self_test`."""
    return requirements.self_test("linear_attention_step", lambda: kernels.trial(_step))


def _step(state: jax.Array, rows: dict[str, jax.Array], interpret: bool) -> tuple[jax.Array, jax.Array]:
    """See `kernels.Kernel`."""
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

    like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
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
