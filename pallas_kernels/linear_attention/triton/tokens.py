"""A chunk's numbers per token, as the kernels load them, and its slices of features."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.call import L2NORM_EPS
from pallas_kernels.linear_attention.triton.inputs import LEAST_DECAY, Spec
from pallas_kernels.linear_attention.triton.tiles import BF16, F32, C, exp, grid, split, sums

SLICE = 64  # of the features, taken at a time


class Tokens(NamedTuple):
    """Factors of rows of q or k, [C] float32, without the decays per channel; 1 / norms are in them.

    queries: what makes q read the chunk's state.  reads: as much for k, less beta.  keys: what makes k write
    the next state.  carry: a number, of the state.  decay: None or, of one a head, between two tokens [C, C].
    visible: the pairs j <= i of one document.
    """

    visible: Any
    queries: Any
    reads: Any
    keys: Any
    carry: Any
    q_unit: Any
    k_unit: Any
    beta: Any
    decay: Any


def load(spec: Spec, refs: Any) -> Tokens:
    i, j = grid()
    ones = jnp.full((C,), 1.0, F32)
    visible, enter, leave, carry, decay = i >= j, ones, ones, jnp.float32(1), None
    if refs.documents is not None:
        ids = refs.documents["id"][...]
        visible &= ids[:, None] == ids[None, :]
        enter, leave = refs.documents["enter"][...], refs.documents["leave"][...]
        carry = refs.documents["carry"][...]
    if "sum" in refs.rows:
        G, entered = refs.rows["sum"][...], refs.rows["enter"][...]
        decay = jnp.exp(jnp.minimum(G[:, None] - G[None, :], 0.0))
        enter, leave, carry = enter * entered, leave * refs.rows["leave"][...], carry * jnp.min(entered)
    q_unit, k_unit = (_unit_rows(x) if spec.l2norm else ones for x in (refs.q, refs.k))
    beta = refs.rows["beta"][...] if spec.delta else None
    q_factor = enter * q_unit * spec.scale
    return Tokens(visible, q_factor, enter * k_unit, leave * k_unit, carry, q_unit, k_unit, beta, decay)


def slices(ref: Any, body: Any, start: Any, width: int = SLICE) -> Any:
    """``body`` (number, carry) for each slice of the features of ``ref``."""
    return jax.lax.fori_loop(0, ref.shape[1] // width, body, start)


def part(n: Any, width: int = SLICE) -> tuple[Any, Any]:
    """The n-th slice of features, of all tokens."""
    return slice(None), pl.ds(n * width, width)


def clamped(steps: Any) -> tuple[Any, ...]:
    """Log-decays as a sum of bf16 tiles; exactly, if they are bf16."""
    at_least = jnp.maximum(steps.astype(F32), LEAST_DECAY)
    return (at_least.astype(BF16),) if steps.dtype == BF16 else split(at_least)


def ends(steps: Any, interpret: bool) -> tuple[Any, Any]:
    """The decays per channel from the chunk's start up to each token, and after it to the chunk's end."""
    i, j = grid()
    clear = clamped(steps)
    return exp(sums(i >= j, clear), interpret), exp(sums(i < j, clear), interpret)


def _unit_rows(ref: Any) -> Any:
    """1 / |row|, [C]."""

    def add(n: Any, total: Any) -> Any:
        x = ref[part(n)].astype(F32)
        return total + jnp.sum(x * x, axis=1)

    return jax.lax.rsqrt(slices(ref, add, jnp.full((C,), L2NORM_EPS, F32)))
