"""The Hopper backend, in Pallas Mosaic GPU: one pass over memory forward, one backward; `walk` says how.

Shape legend: B batch, T time, F features, W taps.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.hopper import blocks, requirements
from pallas_kernels.linear_attention.hopper.blocks import F32
from pallas_kernels.linear_attention.hopper.requirements import runs_on
from pallas_kernels.short_conv import kernels, walk
from pallas_kernels.short_conv.call import ConvCall
from pallas_kernels.short_conv.kernels import Kernels
from pallas_kernels.short_conv.op import WHOLE
from pallas_kernels.short_conv.walk import RUN, Strip

__all__ = ["runs_on", "self_test", "short_conv", "supports"]

THREADS = 128  # of a block
CHANNELS = (4, WHOLE // THREADS)  # of a thread, the first that divides the features


def supports(call: ConvCall) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    return kernels.refusal(call, WHOLE)


def short_conv(call: ConvCall) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.short_conv`."""
    return kernels.short_conv(Kernels(convolve, gradients, WHOLE), call)


def self_test() -> str | None:
    """See `requirements.self_test`."""
    return requirements.self_test("short_conv", lambda: kernels.trial(short_conv))


def convolve(
    x: jax.Array, taps: jax.Array, reach: jax.Array, widths: Sequence[int], silu: bool, interpret: Any
) -> tuple[jax.Array, ...]:
    """See `Kernels`."""

    def body(strip: Strip, part: int, x_ref: Any, taps_ref: Any, reach_ref: Any, *y_refs: Any) -> None:
        walk.convolve(strip, taps.shape[0], silu, x_ref, taps_ref, reach_ref, y_refs[part])

    out_types = [jax.ShapeDtypeStruct((*x.shape[:2], width), x.dtype) for width in widths]
    return tuple(_kernel(body, "short_conv", out_types, x.shape, widths, interpret)(x, taps, reach))


def gradients(
    x: jax.Array, taps: jax.Array, reach: jax.Array, dys: Sequence[jax.Array], silu: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """See `Kernels`."""
    batch, length, features = x.shape
    width = taps.shape[0]

    def body(strip: Strip, part: int, x_ref: Any, taps_ref: Any, reach_ref: Any, *refs: Any) -> None:
        walk.gradients(strip, width, silu, x_ref, taps_ref, reach_ref, refs[part], *refs[-2:])

    out_types = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((batch, length // RUN, width, features), F32),
    ]
    widths = [dy.shape[2] for dy in dys]
    return _kernel(body, "short_conv_gradients", out_types, x.shape, widths, interpret)(x, taps, reach, *dys)


def _strip(length: int, channels: int, first: Any) -> Strip:
    """first: the tile of features that their part begins with."""
    b, n, f = (lax.axis_index(name) for name in ("b", "n", "f"))
    tile = THREADS * channels
    columns, own = pl.ds(f * tile, tile), pl.ds((f - first) * tile, tile)
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=channels)

    def load(at: Any, ref: Any, t: Any) -> jax.Array:
        return plgpu.load(ref.at[b, t, at], layout=layout)

    def store(at: Any, ref: Any, t: Any, value: jax.Array) -> None:
        ref[b, t, at] = value.astype(ref.dtype)

    def put(ref: Any, w: int, value: jax.Array) -> None:
        ref[b, n, w, columns] = value

    return Strip(
        start=n * RUN,
        length=length,
        load=functools.partial(load, columns),
        store=functools.partial(store, columns),
        load_own=functools.partial(load, own),
        store_own=functools.partial(store, own),
        tap=lambda ref, w: plgpu.load(ref.at[w, columns], layout=layout),
        reach=lambda ref, t: ref[b, t],
        put=put,
    )


def _channels(widths: Sequence[int]) -> int:
    """Neighbouring channels of a thread: its loads are that many bf16 wide."""
    return next(channels for channels in CHANNELS if not any(w % (THREADS * channels) for w in widths))


def _kernel(
    body: Callable[..., None], name: str, out_type: Any, shape: tuple, widths: Sequence[int], interpret: Any
) -> Any:
    """body: (strip, the number of its part, refs); the code is there once for each part."""
    batch, length, features = shape
    channels = _channels(widths)
    ends = list(itertools.accumulate(width // (THREADS * channels) for width in widths))

    def of_parts(*refs: Any) -> None:
        f = lax.axis_index("f")
        for part, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            run = lambda part=part, first=first: body(_strip(length, channels, first), part, *refs)
            run() if len(widths) == 1 else pl.when((f >= first) & (f < end))(run)

    return blocks.kernel(
        of_parts,
        name=name,
        interpret=interpret,
        manual_barriers=True,
        out_type=out_type,
        grid=(batch, length // RUN, features // (THREADS * channels)),
        grid_names=("b", "n", "f"),
    )
