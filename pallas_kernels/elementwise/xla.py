"""The recurrence by an associative scan with its own gradient, on any device.

Backward is the same recurrence run from the end, so only the inputs and h are kept:
    dh_t = do_t + exp(g_{t+1}) dh_{t+1},   dx_t = dh_t,   dg_t = dh_t exp(g_t) h_{t-1}
The scan's tree joins token t with tokens before it only, in an order that depends on t alone: later inputs
do not move earlier outputs in any bit.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.elementwise.call import Call
from pallas_kernels.elementwise.pieces import join


def elementwise_recurrence(call: Call) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.elementwise_recurrence`."""
    dtype = call.compute_dtype
    x, log_decay = call.x.astype(dtype), call.log_decay.astype(dtype)
    h = _recurrence(dataclasses.replace(call, x=x, log_decay=log_decay))
    return h.astype(call.output_dtype), h[:, -1]


@jax.custom_vjp
def _recurrence(call: Call) -> jax.Array:
    decay = jnp.exp(call.log_decay)
    return _scan(call.x.at[:, 0].add(decay[:, 0] * call.state), decay, call.starts)


def _forward(call: Call) -> tuple[jax.Array, tuple[Call, jax.Array]]:
    h = _recurrence(call)
    return h, (call, h)


def _backward(kept: tuple[Call, jax.Array], dh: jax.Array) -> tuple[Call]:
    call, h = kept
    decay = jnp.exp(call.log_decay)
    after = lambda x: jnp.flip(jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1), 1)
    resets = None if call.starts is None else after(call.starts)
    dx = jnp.flip(_scan(jnp.flip(dh, 1), after(decay), resets), 1)
    before = jnp.concatenate([call.state[:, None], h[:, :-1]], axis=1)
    dlog_decay = dx * before * decay
    dstarts: Any = None
    if call.starts is not None:
        dlog_decay = jnp.where(call.starts[..., None], 0, dlog_decay)
        dstarts = np.zeros(call.starts.shape, jax.dtypes.float0)
    dstate = dx[:, 0] * decay[:, 0]
    return (dataclasses.replace(call, x=dx, log_decay=dlog_decay, starts=dstarts, state=dstate),)


_recurrence.defvjp(_forward, _backward)


def _scan(x: jax.Array, decay: jax.Array, starts: jax.Array | None) -> jax.Array:
    """h [B, T, F] from zeros: of every token's prefix, what it does to a state of zeros."""
    resets = None if starts is None else starts[..., None]
    return jax.lax.associative_scan(join, (decay, x, resets), axis=1)[1]
