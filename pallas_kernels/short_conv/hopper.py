"""The causal depthwise short convolution with its SiLU: one pass over memory forward, one backward.

A thread owns a few channels and walks along the tokens with the last few inputs in registers: no shared
memory, no barrier, and the gradient of the taps is a running sum in the thread. A block of threads takes
`RUN` tokens and reads the few neighbouring tokens that it needs once more.

Shape legend: B batch, T time, F features, W taps.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.call import alike
from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.short_conv import reference
from pallas_kernels.short_conv.call import ConvCall
from pallas_kernels.short_conv.op import WHOLE

__all__ = ["runs_on", "self_test", "short_conv", "supports"]

THREADS = 128  # of a block
RUN = 64  # tokens of a block
CHANNELS = (4, WHOLE // THREADS)  # of a thread, the first that divides the features
GROUP, GROUP_BACK = 8, 4  # tokens that a thread loads at once, forward and backward
WIDTHS = (2, 3, 4)
SMALL = (1, 100, 256), (4, 256), (1, 100, 256)  # shapes of the self-test: x, taps, dy


def supports(call: ConvCall) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    (batch, length, features), width = call.x.shape, call.kernel.shape[0]
    if call.history is not None:
        return "inputs before the first token"
    if (call.x.dtype, call.kernel.dtype) != (jnp.bfloat16, jnp.float32):
        return f"dtypes {call.x.dtype} of x and {call.kernel.dtype} of the taps (bfloat16 and float32 only)"
    if width not in WIDTHS:
        return f"{width} taps (2 to 4)"
    if 0 in call.x.shape:
        return "an empty call"
    if features % WHOLE:
        return f"{features} features (a multiple of {WHOLE})"
    if max(batch, pl.cdiv(length, RUN)) > 65535:
        return f"{batch} sequences of {length} tokens (at most 65535 of {65535 * RUN})"
    return None


def short_conv(call: ConvCall) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.short_conv`. Parts that are no whole tiles of threads are cut from one result."""
    length = call.x.shape[1]
    whole = any(width % WHOLE for width in call.widths)
    widths = (call.x.shape[2],) if whole or not call.widths else call.widths
    reach = jnp.minimum(call.positions, jnp.arange(length, dtype=call.positions.dtype)).astype(jnp.int32)
    padded = blocks.round_up(length, RUN)
    x, kernel, reach = alike((blocks.pad_time(call.x, padded), call.kernel, blocks.pad_time(reach, padded)))
    ys = [y[:, :length] for y in _short_conv(x, kernel, reach, widths, call.silu, call.interpret)]
    return call.apart(ys[0]) if whole else tuple(ys)


def self_test() -> str | None:
    """See `requirements.self_test`."""

    def results() -> dict[str, tuple[jax.Array, jax.Array]]:
        x, kernel, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SMALL))
        x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
        positions = (jnp.arange(x.shape[1]) % 50)[None]  # a document ends inside a block of threads

        def run(compute: Callable[[ConvCall], tuple[jax.Array, ...]]) -> list[jax.Array]:
            first = lambda x, kernel: compute(ConvCall(x, kernel, positions, silu=True))[0]
            y, pull = jax.vjp(first, x, kernel)
            return [y, *pull(dy)]

        pairs = zip(("y", "dx", "dkernel"), run(short_conv), run(reference.short_conv), strict=True)
        return {name: (got, want) for name, got, want in pairs}

    return requirements.self_test("short_conv", results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _short_conv(x: jax.Array, kernel: jax.Array, reach: jax.Array, *static: Any) -> tuple[jax.Array, ...]:
    widths, silu, interpret = static
    return convolve(x, kernel, reach, widths, silu=silu, interpret=interpret)


def _forward(x: jax.Array, kernel: jax.Array, reach: jax.Array, *static: Any) -> tuple:
    return _short_conv(x, kernel, reach, *static), (x, kernel, reach)


def _backward(widths: tuple, silu: bool, interpret: bool, kept: tuple, dys: tuple) -> tuple:
    x, kernel, reach = kept
    dx, dkernel = gradients(x, kernel, reach, dys, silu=silu, interpret=interpret)
    return dx, dkernel, np.zeros(reach.shape, jax.dtypes.float0)


_short_conv.defvjp(_forward, _backward)


def convolve(
    x: jax.Array, kernel: jax.Array, reach: jax.Array, widths: Sequence[int], *, silu: bool, interpret: Any
) -> tuple[jax.Array, ...]:
    """act(sum of kernel[W - 1 - back] * x[t - back] over back <= reach[t]): of [B, T, F] in bf16 the parts.

    x: [B, T, F] bf16, T a multiple of RUN.  kernel: [W, F] float32.  reach: [B, T] int32, at most t.
    """
    width = kernel.shape[0]

    def body(strip: "Strip", part: int, x_ref: Any, kernel_ref: Any, reach_ref: Any, *y_refs: Any) -> None:
        taps, before = strip.taps(kernel_ref), strip.before(x_ref, width)

        def group(g: jax.Array, before: tuple) -> tuple:
            tokens = [strip.start + g * GROUP + i for i in range(GROUP)]
            xs = [strip.load(x_ref, t) for t in tokens]
            reaches = [reach_ref[strip.b, t] for t in tokens]

            for t, x_t, reach_t in zip(tokens, xs, reaches, strict=True):
                window = (x_t.astype(F32), *before)
                y = _dot(_seen(window, reach_t), taps)
                strip.store(y_refs[part], t, y * _sigmoid(y) if silu else y, strip.own)
                before = window[:-1]
            return before

        lax.fori_loop(0, RUN // GROUP, group, before)

    out_types = [jax.ShapeDtypeStruct((*x.shape[:2], width), x.dtype) for width in widths]
    return tuple(_kernel(body, "short_conv", out_types, x.shape, widths, interpret)(x, kernel, reach))


def gradients(
    x: jax.Array, kernel: jax.Array, reach: jax.Array, dys: Sequence[jax.Array], *, silu: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Gradients (dx [B, T, F] bf16, dkernel [W, F] float32) of `convolve`, from those of its parts.

    dx of a token needs the W - 1 tokens after it, so a block walks W - 1 tokens behind: it stores dx of its
    own tokens, and counts in dkernel the tokens W - 1 later (the first block of a row its first ones, too).
    """
    batch, length, features = x.shape
    width = kernel.shape[0]
    ahead = width - 1
    reach = jnp.pad(reach, ((0, 0), (0, ahead)), constant_values=-1)  # -1: the row is over

    def body(strip: "Strip", part: int, x_ref: Any, kernel_ref: Any, reach_ref: Any, *refs: Any) -> None:
        dy_ref, dx_ref, dkernel_ref = refs[part], *refs[-2:]
        taps = strip.taps(kernel_ref)

        def token(x_t: Any, dy_t: Any, reach_t: Any, state: tuple, counts: Any = None) -> tuple:
            """state: the inputs before the token, what dx of the tokens before it has so far, dkernel."""
            before, dx, dkernel = state
            window = (x_t.astype(F32), *before)
            seen = _seen(window, reach_t)
            d = dy_t.astype(F32)
            if silu:
                y = _dot(seen, taps)
                gate = _sigmoid(y)
                d *= gate + y * gate * (1.0 - gate)
            d = jnp.where(reach_t >= 0, d, 0.0)
            counted = d if counts is None else jnp.where(counts, d, 0.0)
            dkernel = tuple(total + counted * x_back for total, x_back in zip(dkernel, seen, strict=True))
            shares = [tap * x for tap, x in zip(taps, _seen((d,) * width, reach_t), strict=True)]
            dx = (shares[0], *(total + share for total, share in zip(dx, shares[1:], strict=True)))
            return dx[-1], (window[:-1], dx[:-1], dkernel)

        zero = taps[0] * 0.0
        state = strip.before(x_ref, width), (zero,) * ahead, (zero,) * width
        for i in range(ahead):
            t = strip.start + i
            x_t, dy_t = strip.load(x_ref, t), strip.load(dy_ref, t, strip.own)
            _, state = token(x_t, dy_t, reach_ref[strip.b, t], state, strip.n == 0)

        def group(g: jax.Array, state: tuple) -> tuple:
            tokens = [strip.start + ahead + g * GROUP_BACK + i for i in range(GROUP_BACK)]
            inside = [jnp.minimum(t, length - 1) for t in tokens]
            xs, dys = (
                [strip.load(x_ref, t) for t in inside],
                [strip.load(dy_ref, t, strip.own) for t in inside],
            )
            reaches = [reach_ref[strip.b, t] for t in tokens]

            for t, x_t, dy_t, reach_t in zip(tokens, xs, dys, reaches, strict=True):
                dx, state = token(x_t, dy_t, reach_t, state)
                strip.store(dx_ref, t - ahead, dx)
            return state

        _, _, dkernel = lax.fori_loop(0, RUN // GROUP_BACK, group, state)
        for back in range(width):
            dkernel_ref[strip.b, strip.n, width - 1 - back, strip.columns] = dkernel[back]

    out_types = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((batch, length // RUN, width, features), F32),
    ]
    widths = [dy.shape[2] for dy in dys]
    run = _kernel(body, "short_conv_gradients", out_types, x.shape, widths, interpret)
    dx, dkernel = run(x, kernel, reach, *dys)
    return dx, jnp.sum(dkernel, axis=(0, 1))


class Strip:
    """What a block of threads works on: RUN tokens of a row from `start`, `columns` of the features.

    own: the columns in the part of the features that begins with tile ``first``.
    """

    def __init__(self, channels: int, first: int = 0):
        self.b, self.n, self.f = (lax.axis_index(name) for name in ("b", "n", "f"))
        self.start = self.n * RUN
        tile = THREADS * channels
        self.columns, self.own = pl.ds(self.f * tile, tile), pl.ds((self.f - first) * tile, tile)
        self.layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=channels)

    def load(self, ref: Any, t: Any, columns: Any = None) -> jax.Array:
        columns = self.columns if columns is None else columns
        return plgpu.load(ref.at[self.b, t, columns], layout=self.layout)

    def store(self, ref: Any, t: Any, value: jax.Array, columns: Any = None) -> None:
        ref[self.b, t, self.columns if columns is None else columns] = value.astype(ref.dtype)

    def taps(self, ref: Any) -> list[jax.Array]:
        """The taps 0, 1, ... tokens back."""
        width = ref.shape[0]
        return [
            plgpu.load(ref.at[width - 1 - back, self.columns], layout=self.layout) for back in range(width)
        ]

    def before(self, ref: Any, width: int) -> tuple[jax.Array, ...]:
        """The inputs 1, 2, ... tokens before the start; any numbers for those before the row."""
        return tuple(
            self.load(ref, jnp.maximum(self.start - back, 0)).astype(F32) for back in range(1, width)
        )


def _channels(widths: Sequence[int]) -> int:
    """Neighbouring channels of a thread: its loads are that many bf16 wide."""
    return next(channels for channels in CHANNELS if not any(w % (THREADS * channels) for w in widths))


def _kernel(body: Any, name: str, out_type: Any, shape: tuple, widths: Sequence[int], interpret: Any) -> Any:
    """body: (Strip, which part it is of, refs). The code is there once for each part."""
    batch, length, features = shape
    channels = _channels(widths)

    def of_part(*refs: Any) -> None:
        ends = list(itertools.accumulate(width // (THREADS * channels) for width in widths))
        for part, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            strip = Strip(channels, first)
            run = functools.partial(body, strip, part, *refs)
            run() if len(widths) == 1 else pl.when((strip.f >= first) & (strip.f < end))(run)

    return blocks.kernel(
        of_part,
        name=name,
        interpret=interpret,
        manual_barriers=True,
        out_type=out_type,
        grid=(batch, length // RUN, features // (THREADS * channels)),
        grid_names=("b", "n", "f"),
    )


def _seen(window: tuple, reach: Any) -> list[jax.Array]:
    """What is 0, 1, ... tokens back, with zeros beyond `reach`."""
    return [window[0]] + [jnp.where(reach >= back, window[back], 0.0) for back in range(1, len(window))]


def _dot(window: Any, taps: Any) -> jax.Array:
    total = window[0] * taps[0]
    for x, tap in zip(window[1:], taps[1:], strict=True):
        total += x * tap
    return total


def _sigmoid(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -blocks.LOG2E))  # two fast instructions, no division
    return root * root
