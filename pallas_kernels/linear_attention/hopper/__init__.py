"""The Hopper backend of `linear_attention`: Pallas Mosaic GPU kernels (sm_90a), forward and backward.

No decay, one decay per head or one per key channel; additive or delta. docs/kernels.md explains the algorithm
and has the numbers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import trial
from pallas_kernels.linear_attention.call import Call, differentiable
from pallas_kernels.linear_attention.hopper import requirements, table, wide
from pallas_kernels.linear_attention.hopper.backward import gradients
from pallas_kernels.linear_attention.hopper.channel import channel_forward
from pallas_kernels.linear_attention.hopper.channel_tiles import ChannelSaved
from pallas_kernels.linear_attention.hopper.forward import Saved, forward_pass
from pallas_kernels.linear_attention.hopper.inputs import LEAST_DECAY, prepare
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.linear_attention.pieces import entered

__all__ = ["linear_attention", "runs_on", "self_test", "supports"]

KEY_DIMS = (64, 128, 256)
_Saved = Saved | ChannelSaved


def supports(call: Call) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    key_dim, value_dim = call.q.shape[3], call.v.shape[3]
    dtypes = sorted({str(x.dtype) for x in (call.q, call.k, call.v)})
    if dtypes != ["bfloat16"]:
        return f"dtype {', '.join(dtypes)} of q, k, v (bfloat16 only)"
    if key_dim not in KEY_DIMS or not wide.slices(value_dim):
        return f"head dims K = {key_dim}, V = {value_dim} (K 64, 128 or 256, V a multiple of 64)"
    if key_dim == 256 and call.beta is not None and call.per_channel:
        return "K = 256 with the delta rule and a decay per channel"
    if key_dim == 256 and call.beta is None and call.qk_l2norm:
        return "K = 256 with an additive update and qk_l2norm"
    if 0 in call.v.shape:
        return "an empty call"
    if call.q.shape[1] >= 2**24:
        return f"T = {call.q.shape[1]} (below 2^24)"
    if max(call.q.shape[0], call.v.shape[2] * 2 * wide.slices(value_dim)) > 65535:
        return "more than 65535 sequences or heads"
    return None


def self_test() -> str | None:
    """See `requirements.self_test`."""
    return requirements.self_test("linear_attention", lambda: trial.results(linear_attention))


def linear_attention(call: Call) -> tuple[jax.Array, jax.Array | None]:
    if call.axis is not None and call.q.shape[3] // wide.parts(call)[0] > table.WIDEST_KEY:
        call = entered(call, final_state)  # wide heads have no pieces
    if wide.parts(call) == (1, 1):
        return _attend(call)
    return wide.join(*_attend(wide.cut(call)), call)


def final_state(call: Call) -> jax.Array:
    """The state after the last token, float32 [B, HV, K, V]."""
    _, state = linear_attention(dataclasses.replace(call, output_final_state=True))
    assert state is not None
    return state


def _primal(call: Call) -> tuple[jax.Array, jax.Array | None]:
    return _run(call, keep=False)[0]


def _forward(call: Call) -> tuple[tuple[jax.Array, jax.Array | None], tuple[Call, _Saved | None]]:
    out, saved = _run(call, keep=True)
    return out, (call, saved)


def _backward(kept: tuple[Call, _Saved], cotangents: tuple[jax.Array, jax.Array | None]) -> tuple[Call]:
    call, saved = kept
    d = gradients(prepare(call), saved, *cotangents)
    d_log_decay: Any = d.log_decay
    if call.log_decay is not None and not call.per_channel:  # exp(log_decay) is 0, and so is its gradient
        d_log_decay = jnp.where(call.log_decay <= LEAST_DECAY, 0.0, d_log_decay)
    return (call.like(q=d.q, k=d.k, v=d.v, log_decay=d_log_decay, beta=d.beta, initial_state=d.state),)


_attend = differentiable(_primal, _forward, _backward)


def _run(call: Call, keep: bool) -> tuple[tuple[jax.Array, jax.Array | None], _Saved | None]:
    run: Any = channel_forward if call.per_channel else forward_pass
    out, saved = run(prepare(call), final=call.output_final_state, keep=keep)
    state = None if out.final is None else jnp.swapaxes(out.final, 2, 3)
    return (out.o[:, : call.q.shape[1]], state), saved
