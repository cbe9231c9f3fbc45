"""The forward without gradients in one kernel (one_pass.py) where it is exact; else the two of channel.py.

Which tokens one pass gets right is known to the device when it is done: all of a head before the first that
is hard (two_parts.py) or that an anchor at its chunk's start does not reach. Only if there is such a token
the two kernels run, for what comes from it on. So outputs do not depend on later tokens, in no bit.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper import table
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass import OnePass


def serves(inputs: Inputs) -> bool:
    """Whether the call is one for `one_pass_forward`, by its shapes and types."""
    i = inputs
    if i.beta is None or i.log_decay is None or i.log_decay.dtype != jnp.bfloat16:
        return False
    plain = i.segment is None and i.over is None
    return plain and table.one_pass(i.k.shape, i.v.shape)


def one_pass_forward(inputs: Inputs, *, final: bool, otherwise: Callable[[], Scanned]) -> Scanned:
    """o and, if `final`, the state after the last token; otherwise: the same by the two kernels."""
    out = OnePass(inputs, final)()
    length = inputs.k.shape[1]
    wrong = jnp.min(out.first_wrong, -1)  # [B, HV]
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
    _, o, last = lax.while_loop(lambda carried: carried[0], again, (some, out.o, out.final))
    return Scanned(o=o, final=last)
