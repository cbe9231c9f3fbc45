"""The causal depthwise short convolution with its SiLU: one pass over memory forward, one backward.

A thread owns a few channels and walks along the tokens with the last few inputs in registers: no shared
memory, no barrier, and the gradient of the taps is a running sum in the thread. A block of threads takes
`RUN` tokens of `128 * CHANNELS` channels and reads the few neighbouring tokens it needs again.

Shape legend: B batch, T time, F features, W taps.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.call import alike
from pallas_kernels.hopper import TESTED_JAX, blocks, device_reason
from pallas_kernels.hopper.blocks import F32

THREADS = 128  # of a block
RUN = 64  # tokens of a block
GROUP = 8  # tokens that a thread loads at once
WIDTHS = (2, 3, 4)


def refusal(x: jax.Array, kernel: jax.Array, interpret: bool) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    (batch, _, features), width = x.shape, kernel.shape[0]
    if jax.__version__ not in TESTED_JAX:
        return f"jax {jax.__version__} (tested: {', '.join(TESTED_JAX)})"
    if (x.dtype, kernel.dtype) != (jnp.bfloat16, jnp.float32):
        return f"dtypes {x.dtype} of x and {kernel.dtype} of the taps (bfloat16 and float32 only)"
    if width not in WIDTHS:
        return f"{width} taps (2 to 4)"
    if features % (THREADS * 2):
        return f"{features} features (a multiple of {THREADS * 2})"
    return None if interpret else device_reason() or "not yet checked on hardware"


def short_conv(
    x: jax.Array, kernel: jax.Array, positions: jax.Array, *, silu: bool, interpret: bool
) -> jax.Array:
    """See `pallas_kernels.short_conv`."""
    length = x.shape[1]
    reach = jnp.minimum(positions, jnp.arange(length, dtype=positions.dtype)).astype(jnp.int32)
    padded = blocks.round_up(length, RUN)
    x, kernel, reach = alike((blocks.pad_time(x, padded), kernel, blocks.pad_time(reach, padded)))
    return _short_conv(x, kernel, reach, silu, interpret)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _short_conv(x: jax.Array, kernel: jax.Array, reach: jax.Array, silu: bool, interpret: bool) -> jax.Array:
    return convolve(x, kernel, reach, silu=silu, interpret=interpret)


def _forward(x: jax.Array, kernel: jax.Array, reach: jax.Array, silu: bool, interpret: bool) -> tuple:
    return convolve(x, kernel, reach, silu=silu, interpret=interpret), (x, kernel, reach)


def _backward(silu: bool, interpret: bool, kept: tuple, dy: jax.Array) -> tuple:
    dx, dkernel = gradients(*kept, dy, silu=silu, interpret=interpret)
    return dx, dkernel, np.zeros(kept[2].shape, jax.dtypes.float0)


_short_conv.defvjp(_forward, _backward)


def convolve(
    x: jax.Array, kernel: jax.Array, reach: jax.Array, *, silu: bool, interpret: Any,
    run: int = 64, channels: int = 4, GROUP: int = 8, ahead: bool = False,
) -> jax.Array:
    """act(sum_back kernel[W-1-back] x[t-back]) over back <= reach[t]: [B, T, F] in bf16.

    x: [B, T, F] bf16, T a multiple of `run`.  kernel: [W, F] float32.  reach: [B, T] int32, at most t.
    """
    batch, length, features = x.shape
    width = kernel.shape[0]
    channels = channels if features % (THREADS * channels) == 0 else 2

    def body(x_ref: Any, kernel_ref: Any, reach_ref: Any, y_ref: Any) -> None:
        b, start, row, vector, store_row = _place(run, channels)
        taps = [vector(kernel_ref.at[width - 1 - back]) for back in range(width)]
        before = tuple(row(x_ref, jnp.maximum(start - back, 0)).astype(F32) for back in range(1, width))

        def fetch(first: Any) -> tuple:
            at = [jnp.minimum(first + i, length - 1) if ahead else first + i for i in range(GROUP)]
            return tuple(row(x_ref, t) for t in at), tuple(reach_ref[b, t] for t in at)

        def group(g: jax.Array, state: tuple) -> tuple:
            first = start + g * GROUP
            before, fetched = state
            rows, reaches = fetched if ahead else fetch(first)
            fetched = fetch(first + GROUP) if ahead else ()
            for i in range(GROUP):
                window = (rows[i].astype(F32), *before)
                y = _dot(_masked(window, reaches[i]), taps)
                if silu:
                    y *= _sigmoid(y)
                store_row(y_ref, first + i, y)
                before = window[:-1]
            return before, fetched

        lax.fori_loop(0, run // GROUP, group, (before, fetch(start) if ahead else ()))

    return _kernel(
        body, "short_conv", jax.ShapeDtypeStruct(x.shape, x.dtype), x.shape, run, channels, interpret
    )(x, kernel, reach)


def gradients(
    x: jax.Array, kernel: jax.Array, reach: jax.Array, dy: jax.Array, *, silu: bool, interpret: Any,
    run: int = 64, channels: int = 4, GROUP: int = 8, ahead: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Gradients (dx [B, T, F] bf16, dkernel [W, F] float32) of `convolve`."""
    batch, length, features = x.shape
    width = kernel.shape[0]
    channels = channels if features % (THREADS * channels) == 0 else 2
    back_to = width - 1
    # dx at a token is complete `back_to` tokens later, where -1 says that the row is over.
    reach = jnp.pad(reach, ((0, 0), (0, back_to)), constant_values=-1)

    def body(x_ref: Any, kernel_ref: Any, reach_ref: Any, dy_ref: Any, dx_ref: Any, dkernel_ref: Any) -> None:
        b, start, row, vector, store_row = _place(run, channels)
        n = lax.axis_index("n")
        taps = [vector(kernel_ref.at[width - 1 - back]) for back in range(width)]
        zero = taps[0] * 0.0

        def token(x: Any, dy: Any, reach: Any, state: tuple, counts: Any) -> tuple:
            """One token on: state is the inputs before it, dx of those so far, dkernel so far."""
            before, dx, dkernel = state
            window = (x.astype(F32), *before)
            seen = _masked(window, reach)
            d = dy.astype(F32)
            if silu:
                y = _dot(seen, taps)
                gate = _sigmoid(y)
                d *= gate + y * gate * (1.0 - gate)
            d = jnp.where(reach >= 0, d, 0.0)
            counted = d if counts is None else jnp.where(counts, d, 0.0)
            dkernel = tuple(sum_ + counted * s for sum_, s in zip(dkernel, seen, strict=True))
            given = [d * taps[0]] + [jnp.where(reach >= back, d, 0.0) * taps[back] for back in range(1, width)]
            dx = (given[0], *(sum_ + g for sum_, g in zip(dx, given[1:], strict=True)))
            return dx[-1], (window[:-1], dx[:-1], dkernel)

        def load(ref: Any, t: Any) -> Any:
            return row(ref, jnp.minimum(t, length - 1))

        before = tuple(row(x_ref, jnp.maximum(start - back, 0)).astype(F32) for back in range(1, width))
        state = (before, (zero,) * back_to, (zero,) * width)
        for i in range(back_to):  # counted by the block before, if there is one
            t = start + i
            _, state = token(row(x_ref, t), row(dy_ref, t), reach_ref[b, t], state, n == 0)

        def fetch(first: Any) -> tuple:
            at = [first + back_to + i for i in range(GROUP)]
            return (tuple(load(x_ref, t) for t in at), tuple(load(dy_ref, t) for t in at),
                    tuple(reach_ref[b, jnp.minimum(t, length + back_to - 1) if ahead else t] for t in at))

        def group(g: jax.Array, state: tuple) -> tuple:
            first = start + g * GROUP
            state, fetched = state
            xs, dys, reaches = fetched if ahead else fetch(first)
            fetched = fetch(first + GROUP) if ahead else ()
            for i in range(GROUP):
                dx, state = token(xs[i], dys[i], reaches[i], state, None)
                store_row(dx_ref, first + i, dx)
            return state, fetched

        (_, _, dkernel), _ = lax.fori_loop(0, run // GROUP, group, (state, fetch(start) if ahead else ()))
        for back in range(width):
            vector(dkernel_ref.at[b, n, width - 1 - back], dkernel[back])

    dx, dkernel = _kernel(
        body,
        "short_conv_gradients",
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, length // run, width, features), F32),
        ],
        x.shape, run, channels, interpret,
    )(x, kernel, reach, dy)
    return dx, jnp.sum(dkernel, axis=(0, 1))


def _place(run: int, channels: int) -> tuple:
    b, n, f = (lax.axis_index(name) for name in ("b", "n", "f"))
    tile = THREADS * channels
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=channels)
    cols = pl.ds(f * tile, tile)

    def vector(ref: Any, value: Any = None) -> Any:
        if value is None:
            return plgpu.load(ref.at[cols], layout=layout)
        ref[cols] = value

    def row(ref: Any, t: Any) -> Any:
        return plgpu.load(ref.at[b, t, cols], layout=layout)

    def store_row(ref: Any, t: Any, value: Any) -> None:
        ref[b, t, cols] = value.astype(ref.dtype)

    return b, n * run, row, vector, store_row


def _masked(window: tuple, reach: Any) -> list:
    """The inputs 0, 1, ... tokens back that are of the token's document, zeros for the others."""
    return [window[0]] + [jnp.where(reach >= back, window[back], 0.0) for back in range(1, len(window))]


def _dot(window: Any, taps: Any) -> Any:
    total = window[0] * taps[0]
    for x, tap in zip(window[1:], taps[1:], strict=True):
        total += x * tap
    return total


def _sigmoid(x: Any) -> Any:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -blocks.LOG2E))  # two fast instructions, no division
    return root * root


def _kernel(body, name, out_type, shape, run, channels, interpret):
    batch, length, features = shape
    return blocks.kernel(
        body,
        name=name,
        interpret=interpret,
        manual_barriers=True,
        out_type=out_type,
        grid=(batch, length // run, features // (THREADS * channels)),
        grid_names=("b", "n", "f"),
    )
