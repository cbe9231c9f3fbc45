"""One kernel a pass (one_pass.py, one_pass_reverse.py) for KDA and GLA where it is exact; else channel.py.

Which tokens one pass gets right is known to the device when it is done: all of a head before the first that
is hard (two_parts.py). Only if there is such a token the two kernels run, for what comes from it on. So
outputs do not depend on later tokens, in no bit. What the gradients want, and the reverse scan, then are
wholly the other kernels'. Additive calls have no such token.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.hopper import channel_math, one_pass_steps, table, two_parts
from pallas_kernels.linear_attention.hopper.blocks import C
from pallas_kernels.linear_attention.hopper.channel_tiles import SPAN, ChannelSaved, Tiles
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.inputs import Inputs
from pallas_kernels.linear_attention.hopper.one_pass import OnePass, OnePassed
from pallas_kernels.linear_attention.hopper.one_pass_reverse import ReversePass
from pallas_kernels.linear_attention.hopper.requirements import TESTED

LEAST_WALK = 2  # tiles
SHORT = 8  # tokens of half a chunk of 16
_Exact = tuple[Scanned, ChannelSaved | None]


def serves(inputs: Inputs) -> bool:
    """Whether the call is one for `one_pass_forward`, by its shapes and types.

    On a jax on which no GPU has run its tests it is not: the self-test is of smaller calls.
    """
    i = inputs
    if i.log_decay is None or i.over is not None or i.strong:
        return False
    return (i.interpret or jax.__version__ in TESTED) and table.one_pass(i.k.shape, i.v.shape)


def one_pass_forward(inputs: Inputs, *, final: bool, otherwise: Callable[[], Scanned]) -> Scanned:
    """o and, if `final`, the state after the last token; otherwise: the same by the two kernels.

    Here and below inputs are those of `one_pass_steps.as_read`.
    """
    return _exact(
        OnePass(inputs, None, final)(), None, lambda: (otherwise(), None), delta=inputs.beta is not None
    )[0]


def one_pass_kept(
    inputs: Inputs, *, final: bool, otherwise: Callable[[], _Exact]
) -> tuple[Scanned, ChannelSaved | None]:
    """As `one_pass_forward`, with what the gradients want, of whose tiles only norms and carry."""
    out = OnePass(inputs, _to_hard(inputs), final, keep=True)()
    carry = jnp.moveaxis(out.carry, 3, 0)
    first, last = carry[0] * carry[1], carry[2] * carry[3]
    # Sums of half a block are the furthest from its middle.
    over = lambda *sums: jnp.min(functools.reduce(jnp.minimum, sums), -1) < 2.0**-channel_math.RANGE
    least, beyond = out.norms[..., SPAN, :], (over(*carry), over(first, last))
    starts = one_pass_steps.starts(inputs, C)
    if starts is not None:
        some = starts[:, None, C - 1 :: C] > 0
        beyond = jax.tree.map(functools.partial(jnp.where, some), _beyond(least), beyond)
    eight = jnp.min(least, -1) < -channel_math.RANGE
    span = jnp.where(beyond[0], jnp.where(eight, 2.0, 16.0), jnp.where(beyond[1], 32.0, 64.0))
    norms = jnp.where(jnp.arange(3)[:, None] == SPAN, span[..., None, None], out.norms)
    kept = ChannelSaved(_numbers(norms, first * last), out.states, out.values)
    done, saved = _exact(out, kept, otherwise, delta=inputs.beta is not None)
    assert saved is not None
    return done, saved._replace(steps=one_pass_steps.made(inputs))


def _beyond(least: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether 16, and 32, tokens of a tile may forget more than 2^-`RANGE`, [B, HV, T/C]: where a document
    starts the carry does not say that. Sums of the least of eight tokens are below the least sum.

    least: of each token, [B, HV, T/C, C], as `prepare` says.
    """
    eights = least[..., SHORT - 1 :: SHORT]
    sixteens = eights[..., ::2] + eights[..., 1::2]
    sums = sixteens, sixteens[..., ::2] + sixteens[..., 1::2]
    first, second = (jnp.min(x, -1) < -channel_math.RANGE for x in sums)
    return first, second


def one_pass_reverse(
    inputs: Inputs,
    wrong: jax.Array,
    do: jax.Array,
    d_state: jax.Array | None,
    *,
    otherwise: Callable[[], tuple],
) -> tuple:
    """dS^T after each chunk, dV and dS^T of the first state, as `reverse_scan` has them; otherwise: by it.

    wrong: of `ChannelSaved`.
    """
    some: Any = jnp.min(wrong) < inputs.k.shape[1]
    few, tiles = LEAST_WALK, inputs.k.shape[1] // C
    if inputs.beta is None:
        return ReversePass(inputs, None, do, d_state)()
    out = ReversePass(inputs, jnp.where(jnp.broadcast_to(some, wrong.shape), few, tiles), do, d_state)()
    return lax.while_loop(
        lambda carried: carried[0], lambda carried: (carried[0] & False, *otherwise()), (some, *out)
    )[1:]


def _to_hard(inputs: Inputs) -> jax.Array | None:
    """Tiles of each head to the first that has a hard token, where beta says that: `Walk.count`."""
    if not inputs.l2norm or inputs.beta is None:
        return None
    tiles = inputs.k.shape[1] // C
    hard = jnp.max(inputs.beta.reshape(*inputs.beta.shape[:2], tiles, C), -1) > two_parts.LARGEST
    first = jnp.min(jnp.where(hard, jnp.arange(1, tiles + 1), tiles), -1)
    return jnp.maximum(first, LEAST_WALK).astype(jnp.int32)


def _numbers(norms: jax.Array, carry: jax.Array) -> Tiles:
    none: Any = None
    return Tiles(none, none, carry, none, norms=norms)


def _exact(
    out: OnePassed, kept: ChannelSaved | None, otherwise: Callable[[], _Exact], *, delta: bool
) -> _Exact:
    if not delta:
        return Scanned(o=out.o, final=out.final), kept and kept._replace(wrong=out.first_wrong[..., 0])
    length = out.o.shape[1]
    wrong = jnp.min(out.first_wrong, -1)  # [B, HV]
    token = lax.broadcasted_iota(jnp.int32, (1, length, 1), 1).astype(wrong.dtype)

    def again(carried: tuple) -> tuple:
        _, o, last, _ = carried
        exact, saved = otherwise()
        o = jnp.where((token >= wrong[:, None])[..., None], exact.o, o)
        if last is not None:
            last = jnp.where((wrong < length)[..., None, None], exact.final, last)
        if saved is not None:
            saved = ChannelSaved(_numbers(saved.tiles.norms, saved.tiles.carry), saved.states, saved.values)
        return carried[0] & False, o, last, saved

    # At most once; a loop, since what a `lax.cond` hands on is copied.
    some: Any = jnp.min(wrong) < length
    _, o, last, kept = lax.while_loop(lambda carried: carried[0], again, (some, out.o, out.final, kept))
    return Scanned(o=o, final=last), None if kept is None else kept._replace(wrong=wrong)
