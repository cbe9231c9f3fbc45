"""The portable backend: the same walk as Hopper's, in Pallas's Triton lowering, for NVIDIA GPUs since Ampere.

Shape legend: B batch, T time, F features, W taps.
"""

import math
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels import agreement
from pallas_kernels.dispatch import Device
from pallas_kernels.linear_attention.triton.launch import launch
from pallas_kernels.linear_attention.triton.tiles import F32
from pallas_kernels.short_conv import kernels, walk
from pallas_kernels.short_conv.call import ConvCall
from pallas_kernels.short_conv.kernels import Kernels
from pallas_kernels.short_conv.walk import RUN, Strip

LEAST, MOST = 64, 512  # features of a block, a power of two
WARP = 128  # features of a warp, or LEAST: a thread's loads are four bf16 wide, or two


def supports(call: ConvCall) -> str | None:
    """None if the kernels compute this call, else the reason why not."""
    batch, _, features = call.x.shape
    if features and batch * features // _tile(features) > 65535:
        return f"{batch} sequences of {features} features (at most 65535 blocks of {_tile(features)})"
    return kernels.refusal(call, LEAST)


def short_conv(call: ConvCall) -> jax.Array:
    """See `pallas_kernels.short_conv`."""
    return kernels.short_conv(Kernels(convolve, gradients), call)


runs_on = Device.before_ampere


def self_test() -> str | None:
    """See `agreement.self_test`."""
    return agreement.self_test("short_conv", lambda: kernels.trial(short_conv))


def convolve(x: jax.Array, taps: jax.Array, reach: jax.Array, silu: bool, interpret: bool) -> jax.Array:
    """See `Kernels`."""
    return _run("short_conv", (x, taps, reach), {"y": x}, silu, interpret)["y"]


def gradients(
    x: jax.Array, taps: jax.Array, reach: jax.Array, dy: jax.Array, silu: bool, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """See `Kernels`."""
    batch, length, features = x.shape
    parts = jax.ShapeDtypeStruct((batch, length // RUN, taps.shape[0], features), F32)
    out = _run("short_conv_gradients", (x, taps, reach, dy), {"dx": x, "dtaps": parts}, silu, interpret)
    return out["dx"], out["dtaps"]


def _run(
    name: str, given: tuple[jax.Array, ...], out: dict[str, Any], silu: bool, interpret: bool
) -> dict[str, jax.Array]:
    """given: x, taps, reach and, for gradients, dy.  out: shapes by name."""
    batch, length, features = given[0].shape
    width = given[1].shape[0]
    tile = _tile(features)
    tokens = pl.BlockSpec((None, length, tile), lambda n, f, b: (b, 0, f))
    specs = {
        "taps": pl.BlockSpec((width, tile), lambda n, f, b: (0, f)),
        "reach": pl.BlockSpec((None, given[2].shape[1]), lambda n, f, b: (b, 0)),
        "dtaps": pl.BlockSpec((None, None, width, tile), lambda n, f, b: (b, n, 0, f)),
    }
    step = walk.convolve if "y" in out else walk.gradients

    def body(*refs: Any) -> None:
        *read, written = refs
        step(_strip(length), width, silu, *read, *(written[what] for what in out))

    return launch(
        body,
        name,
        grid=(length // RUN, features // tile, batch),
        in_specs=[tokens, specs["taps"], specs["reach"], tokens][: len(given)],
        out_specs={what: specs.get(what, tokens) for what in out},
        out_shape={what: jax.ShapeDtypeStruct(x.shape, x.dtype) for what, x in out.items()},
        warps=max(1, tile // WARP),
        interpret=interpret,
    )(*given)


def _tile(features: int) -> int:
    """Features of a block."""
    return math.gcd(features, MOST)


def _strip(length: int) -> Strip:
    def put(ref: Any, row: Any, value: jax.Array) -> None:
        ref[row, :] = value.astype(ref.dtype)

    row = lambda ref, n: ref[n, :]
    number = lambda ref, t: ref[t]
    return Strip(pl.program_id(0) * RUN, length, load=row, store=put, tap=row, reach=number, put=put)
