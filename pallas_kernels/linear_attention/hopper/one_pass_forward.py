"""The forward without gradients in one kernel (one_pass.py) where it is exact; else the two of channel.py.

Which tokens one pass gets right is known to the device when it is done: all of a head before the first that
is hard (two_parts.py) or that an anchor at its chunk's start does not reach. Only if there is such a token
the two kernels run, for what comes from it on. So outputs do not depend on later tokens, in no bit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper import pieces, table, warm_up
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass import OnePass


def serves(inputs: Inputs) -> bool:
    """Whether the call is one for `one_pass_forward`, by its shapes and types."""
    i = inputs
    if not table.ONE_PASS or i.beta is None or i.log_decay is None or i.log_decay.dtype != jnp.bfloat16:
        return False
    plain = i.segment is None and i.over is None
    return plain and i.sizes[4:] == (128, 128) and i.sizes[1] >= 128


def one_pass_forward(
    inputs: Inputs, *, final: bool, otherwise: Callable[[], Scanned], choice: table.Choice | None = None
) -> Scanned:
    """o and, if `final`, the state after the last token; otherwise: the same by the two kernels."""
    choice = choice or table.one_pass(inputs.k.shape, inputs.v.shape)
    runs, lead = choice.pieces * choice.led, None
    if choice.pieces > 1:
        inputs = dataclasses.replace(inputs, state=_starts(inputs, runs))
    elif runs > 1:
        lead = warm_up.leads(inputs, runs, max(2, min(8, inputs.k.shape[1] // 64 // runs // 8)))[0]
    out = OnePass(inputs, lead, pieces=runs, final=final)()
    last: Any = out.final[runs - 1 :: runs] if final else None

    batch, length, _, heads, _, _ = inputs.sizes
    wrong = jnp.min(out.first_wrong.reshape(batch, runs, heads, -1), (1, 3))  # [B, HV]
    token = lax.broadcasted_iota(jnp.int32, (1, length, 1), 1).astype(wrong.dtype)

    def again() -> tuple:
        exact = otherwise()
        o = jnp.where((token >= wrong[:, None])[..., None], exact.o, out.o)
        spoilt = (wrong < length)[..., None, None]
        return o, jnp.where(spoilt, exact.final, last) if final else None

    o, last = lax.cond(jnp.min(wrong) < length, again, lambda: (out.o, last))
    return Scanned(o=o, final=last)


def _starts(inputs: Inputs, runs: int) -> jax.Array:
    """S^T before each run, as in channel.py."""
    walks = warm_up.walks(inputs, runs, wanted=True)
    alone = dataclasses.replace(inputs, state=None)
    scan = functools.partial(OnePass, alone, pieces=runs, walk=walks and walks.last)
    moves = scan(mode="transition")().final
    moves = warm_up.forget(moves.reshape(-1, runs, *moves.shape[1:]), walks)
    return pieces.chain(moves, scan(mode="summary")().final, inputs.state)
