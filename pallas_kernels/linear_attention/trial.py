"""A small call of a family of kernels, forward and backward, beside the token loop."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention.call import Call

Results = dict[str, tuple[jax.Array, jax.Array]]


class Kind(NamedTuple):
    """decay: "none", one a "head" or a "channel".  delta: the update; keys, values: head dims."""

    decay: str
    delta: bool
    keys: int = 64
    values: int = 64


KINDS = [Kind(decay, delta) for decay in ("head", "channel") for delta in (False, True)]
LENGTH, HEADS = 130, 1  # T of no whole chunks


def kind(call: Call) -> Kind:
    """The kind of a call."""
    ranks = {3: "head", 4: "channel"}
    decay = "none" if call.log_decay is None else ranks[call.log_decay.ndim]
    return Kind(decay, call.beta is not None, call.q.shape[3], call.v.shape[3])


def small_call(kind: Kind) -> Call:
    """Random arguments, with two documents in a chunk."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)
    tokens = (1, LENGTH, HEADS)
    q, k, v = (normal(*tokens, dim).astype(jnp.bfloat16) for dim in (kind.keys, kind.keys, kind.values))
    gate = normal(*tokens, kind.keys) if kind.decay == "channel" else normal(*tokens)
    return Call(
        q=q,
        k=k,
        v=v,
        log_decay=None if kind.decay == "none" else -jax.nn.softplus(gate),
        beta=jax.nn.sigmoid(normal(*tokens)) if kind.delta else None,
        initial_state=normal(1, HEADS, kind.keys, kind.values),
        segment_ids=(jnp.arange(LENGTH)[None] >= 70).astype(jnp.int32),
        scale=kind.keys**-0.5,
        qk_l2norm=True,
        output_final_state=True,
    )


def results(compute: Callable) -> Results:
    """`compare` of all kinds."""
    return {name: pair for kind in KINDS for name, pair in compare(compute, kind).items()}


def compare(compute: Callable, kind: Kind, interpret: bool = False) -> Results:
    """(those of a backend's function ``compute``, the reference's) outputs and gradients by name."""
    call = dataclasses.replace(small_call(kind), interpret=interpret)
    got, want = (_values_and_gradients(f, call) for f in (compute, reference.linear_attention))
    family = f"{kind.decay} {'delta' if kind.delta else 'additive'}"
    return {f"{family} {name}": (got[name], want[name]) for name in want}


def _values_and_gradients(compute: Callable, call: Call) -> dict[str, jax.Array]:
    @jax.jit
    def run(call: Call) -> dict[str, jax.Array]:
        (o, state), pull = jax.vjp(compute, call)
        (d,) = pull((jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape), 0.01 * state))
        names = ("q", "k", "v", "log_decay", "beta", "initial_state")
        gradients = {f"d{name}": getattr(d, name) for name in names if getattr(d, name) is not None}
        return {"o": o, "state": state} | gradients

    return run(call)
