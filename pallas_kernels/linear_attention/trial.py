"""A small call of each family of kernels, forward and backward, beside the token loop."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention.call import Call

Results = dict[str, tuple[jax.Array, jax.Array]]


KINDS = [(per_channel, delta) for per_channel in (False, True) for delta in (False, True)]
LENGTH, HEADS, DIM = 130, 1, 64  # T of no whole chunks


def small_call(per_channel: bool, delta: bool) -> Call:
    """Random arguments, with two documents in a chunk."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)
    q, k, v = (normal(1, LENGTH, HEADS, DIM).astype(jnp.bfloat16) for _ in range(3))
    gate = normal(1, LENGTH, HEADS, DIM) if per_channel else normal(1, LENGTH, HEADS)
    return Call(
        q=q,
        k=k,
        v=v,
        log_decay=-jax.nn.softplus(gate),
        beta=jax.nn.sigmoid(normal(1, LENGTH, HEADS)) if delta else None,
        initial_state=normal(1, HEADS, DIM, DIM),
        segment_ids=(jnp.arange(LENGTH)[None] >= 70).astype(jnp.int32),
        scale=DIM**-0.5,
        qk_l2norm=True,
        output_final_state=True,
    )


def results(compute: Callable) -> Results:
    """(those of a backend's function ``compute``, the reference's) outputs and gradients by name."""
    return {name: pair for kind in KINDS for name, pair in compare(compute, *kind).items()}


def compare(compute: Callable, per_channel: bool, delta: bool, interpret: bool = False) -> Results:
    call = dataclasses.replace(small_call(per_channel, delta), interpret=interpret)
    got, want = (_values_and_gradients(f, call) for f in (compute, reference.linear_attention))
    kind = f"{'channel' if per_channel else 'head'} {'delta' if delta else 'additive'}"
    return {f"{kind} {name}": (got[name], want[name]) for name in want}


def _values_and_gradients(compute: Callable, call: Call) -> dict[str, jax.Array]:
    @jax.jit
    def run(call: Call) -> dict[str, jax.Array]:
        (o, state), pull = jax.vjp(compute, call)
        (d,) = pull((jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape), 0.01 * state))
        names = ("q", "k", "v", "log_decay", "beta", "initial_state")
        gradients = {f"d{name}": getattr(d, name) for name in names if getattr(d, name) is not None}
        return {"o": o, "state": state} | gradients

    return run(call)
