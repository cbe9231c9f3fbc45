"""The forward without gradients in one kernel (one_pass.py) where it is exact; else the two of channel.py.

Which tokens one pass gets right is known to the device when it is done: all of a head before the first that
is hard (two_parts.py) or that an anchor at its chunk's start does not reach. Only if there is such a token
the two kernels run, for what comes from it on. So outputs do not depend on later tokens, in no bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper import pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.blocks import C
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass import OnePass


def serves(inputs: Inputs) -> bool:
    """Whether the call is one for `one_pass_forward`, by its shapes and types."""
    i = inputs
    if i.beta is None or i.log_decay is None or i.log_decay.dtype != jnp.bfloat16:
        return False
    plain = i.segment is None and i.over is None
    return plain and table.one_pass(i.k.shape, i.v.shape) is not None


def one_pass_forward(
    inputs: Inputs, *, final: bool, otherwise: Callable[[], Scanned], choice: table.Choice | None = None
) -> Scanned:
    """o and, if `final`, the state after the last token; otherwise: the same by the two kernels."""
    choice = choice or table.one_pass(inputs.k.shape, inputs.v.shape) or table.Choice(128)
    runs, walk = choice.pieces * choice.led, None
    if choice.pieces > 1:
        inputs = dataclasses.replace(inputs, state=_starts(inputs, runs))
    elif runs > 1:
        walk = _led(inputs, runs)
    out = OnePass(inputs, final, runs, walk)()
    batch, length, _, heads, _, _ = inputs.sizes
    ends = out.final[runs - 1 :: runs] if final else None
    wrong = jnp.min(out.first_wrong.reshape(batch, runs, heads, -1), (1, 3))  # [B, HV]
    token = lax.broadcasted_iota(jnp.int32, (1, length, 1), 1).astype(wrong.dtype)

    def again(carried: tuple) -> tuple:
        _, o, last = carried
        exact = otherwise()
        o = jnp.where((token >= wrong[:, None])[..., None], exact.o, o)
        if final:
            last = jnp.where((wrong < length)[..., None, None], exact.final, last)
        return carried[0] & False, o, last

    # At most once; a loop, since what a `lax.cond` hands on is copied.
    some: Any = jnp.min(wrong) < length
    _, o, last = lax.while_loop(lambda carried: carried[0], again, (some, out.o, ends))
    return Scanned(o=o, final=last)


def _starts(inputs: Inputs, runs: int) -> jax.Array:
    """S^T before each run, as in channel.py."""
    walks = warm_up.walks(inputs, runs)
    walk = None if walks is None else jnp.insert(walks.last, 1, 0, axis=-1)
    alone = dataclasses.replace(inputs, state=None)
    ends = OnePass(alone, runs=runs, walk=walk, outputs=False)().final
    moves = OnePass(alone, runs=runs, walk=walk, outputs=False, moves=True)().final
    moves = warm_up.forget(moves.reshape(-1, runs, *moves.shape[1:]), walks)
    return pieces.chain(moves, ends, inputs.state)


def _led(inputs: Inputs, runs: int) -> jax.Array:
    """The walk of each run: first as much of what comes before it as it takes to be as if it were all."""
    lead, _ = warm_up.leads(inputs, runs)  # [B * runs, HV]
    run = inputs.k.shape[1] // C // runs
    first = jnp.tile(jnp.arange(runs, dtype=lead.dtype) * run, inputs.k.shape[0])[:, None] - lead
    return jnp.stack([first, lead, lead + run], -1)
