"""The Hopper backend, in Pallas Mosaic GPU: one pass over memory forward, one backward; `walk` says how.

Shape legend: B batch, T time, F features, W taps.
"""

import functools
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
from pallas_kernels.short_conv.walk import RUN, Strip

__all__ = ["runs_on", "self_test", "short_conv", "supports"]

THREADS = 128  # of a block
CHANNELS = (4, 2)  # of a thread, the first that divides the features


def supports(call: ConvCall) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    return kernels.refusal(call, THREADS * CHANNELS[-1])


def short_conv(call: ConvCall) -> jax.Array:
    """See `pallas_kernels.short_conv`."""
    return kernels.short_conv(Kernels(convolve, gradients), call)


def self_test() -> str | None:
    """See `requirements.self_test`."""
    return requirements.self_test("short_conv", lambda: kernels.trial(short_conv))


# Equal calls, as of q, k and v, are then one in a program: traced and lowered once.
@functools.partial(jax.jit, static_argnames=("silu", "interpret"), inline=True)
def convolve(x: jax.Array, taps: jax.Array, reach: jax.Array, silu: bool, interpret: Any) -> jax.Array:
    """See `Kernels`."""

    def body(*refs: Any) -> None:
        walk.convolve(_strip(x.shape), taps.shape[0], silu, *refs)

    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _kernel(body, "short_conv", out_type, x.shape, interpret)(x, taps, reach)


@functools.partial(jax.jit, static_argnames=("silu", "interpret"), inline=True)
def gradients(
    x: jax.Array, taps: jax.Array, reach: jax.Array, dy: jax.Array, silu: bool, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """See `Kernels`."""
    batch, length, features = x.shape
    width = taps.shape[0]

    def body(*refs: Any) -> None:
        walk.gradients(_strip(x.shape), width, silu, *refs)

    out_types = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((batch, length // RUN, width, features), F32),
    ]
    return _kernel(body, "short_conv_gradients", out_types, x.shape, interpret)(x, taps, reach, dy)


def _strip(shape: tuple[int, ...]) -> Strip:
    b, n, f = (lax.axis_index(name) for name in ("b", "n", "f"))
    channels = _channels(shape[2])
    tile = THREADS * channels
    columns = pl.ds(f * tile, tile)
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=channels)

    def store(ref: Any, t: Any, value: jax.Array) -> None:
        ref[b, t, columns] = value.astype(ref.dtype)

    def put(ref: Any, w: int, value: jax.Array) -> None:
        ref[b, n, w, columns] = value

    return Strip(
        start=n * RUN,
        length=shape[1],
        load=lambda ref, t: plgpu.load(ref.at[b, t, columns], layout=layout),
        store=store,
        tap=lambda ref, w: plgpu.load(ref.at[w, columns], layout=layout),
        reach=lambda ref, t: ref[b, t],
        put=put,
    )


def _channels(features: int) -> int:
    """Neighbouring channels of a thread: its loads are that many bf16 wide."""
    return next(channels for channels in CHANNELS if features % (THREADS * channels) == 0)


def _kernel(body: Any, name: str, out_type: Any, shape: tuple, interpret: Any) -> Any:
    batch, length, features = shape
    return blocks.kernel(
        body,
        name=name,
        interpret=interpret,
        out_type=out_type,
        grid=(batch, length // RUN, features // (THREADS * _channels(features))),
        grid_names=("b", "n", "f"),
    )
