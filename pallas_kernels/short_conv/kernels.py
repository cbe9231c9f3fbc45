"""What surrounds the kernels, whatever they are written in: refusals, padding, gradient, self-test."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention.call import alike
from pallas_kernels.padding import pad_time, round_up
from pallas_kernels.short_conv import reference
from pallas_kernels.short_conv.call import ConvCall
from pallas_kernels.short_conv.walk import RUN

WIDTHS = (2, 3, 4)
SMALL = (1, 100, 256), (4, 256), (1, 100, 256)  # shapes of the self-test: x, taps, dy


class Kernels(NamedTuple):
    """Of x [B, T, F] bf16, T a multiple of `RUN`; taps [W, F] float32; reach [B, T] int32, at most t.

    convolve(x, taps, reach, silu, interpret): act(sum of taps[W - 1 - back] * x[t - back] over back <=
        reach[t]), as x.
    gradients(x, taps, reach, dy, silu, interpret): of x, and those of the taps by run [B, T / RUN, W, F]
        float32; this reach has W - 1 more tokens, of -1: the row is over.
    """

    convolve: Callable[..., jax.Array]
    gradients: Callable[..., tuple[jax.Array, jax.Array]]


def refusal(call: ConvCall, multiple: int) -> str | None:
    """Why kernels for a ``multiple`` of features do not compute a call, or None."""
    (batch, length, features), width = call.x.shape, call.kernel.shape[0]
    if call.history is not None:
        return "inputs before the first token"
    if (call.x.dtype, call.kernel.dtype) != (jnp.bfloat16, jnp.float32):
        return f"dtypes {call.x.dtype} of x and {call.kernel.dtype} of the taps (bfloat16 and float32 only)"
    if width not in WIDTHS:
        return f"{width} taps (2 to 4)"
    if 0 in call.x.shape:
        return "an empty call"
    if features % multiple:
        return f"{features} features (a multiple of {multiple})"
    if max(batch, round_up(length, RUN) // RUN) > 65535:
        return f"{batch} sequences of {length} tokens (at most 65535 of {65535 * RUN})"
    return None


def short_conv(kernels: Kernels, call: ConvCall) -> jax.Array:
    """See `pallas_kernels.short_conv`."""
    length = call.x.shape[1]
    reach = jnp.minimum(call.positions, jnp.arange(length, dtype=call.positions.dtype)).astype(jnp.int32)
    padded = round_up(length, RUN)
    x, taps, reach = alike((pad_time(call.x, padded), call.kernel, pad_time(reach, padded)))
    return _short_conv(kernels, x, taps, reach, call.silu, call.interpret)[:, :length]


def trial(compute: Callable[[ConvCall], jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(a backend's, the token loop's) results and gradients of a small call, by name."""
    x, kernel, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SMALL))
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    positions = (jnp.arange(x.shape[1]) % 50)[None]  # a document ends inside a block of threads

    def run(compute: Callable[[ConvCall], jax.Array]) -> list[jax.Array]:
        y, pull = jax.vjp(lambda x, kernel: compute(ConvCall(x, kernel, positions, silu=True)), x, kernel)
        return [y, *pull(dy)]

    pairs = zip(("y", "dx", "dkernel"), run(compute), run(reference.short_conv), strict=True)
    return {name: (got, want) for name, got, want in pairs}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _short_conv(
    kernels: Kernels, x: jax.Array, taps: jax.Array, reach: jax.Array, silu: bool, interpret: bool
) -> jax.Array:
    return kernels.convolve(x, taps, reach, silu, interpret)


def _forward(kernels: Kernels, *arguments: Any) -> tuple:
    return kernels.convolve(*arguments), arguments[:3]


def _backward(kernels: Kernels, silu: bool, interpret: bool, kept: tuple, dy: jax.Array) -> tuple:
    x, taps, reach = kept
    ahead = jnp.pad(reach, ((0, 0), (0, taps.shape[0] - 1)), constant_values=-1)
    dx, dtaps = kernels.gradients(x, taps, ahead, dy, silu, interpret)
    return dx, jnp.sum(dtaps, axis=(0, 1)), np.zeros(reach.shape, jax.dtypes.float0)


_short_conv.defvjp(_forward, _backward)
