"""How the kernels of this folder are called."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import here


def warpgroup_products() -> bool:
    """Whether the GPU has products of 64 rows to a warpgroup, which read shared memory, not registers."""
    return here().capability in ("9.0", "10.0", "10.3")


def warps_of_chunks() -> int:
    """Warps for tiles of 64 rows: Hopper's products would be repeated by more than four."""
    return 4 if here().capability == "9.0" else 8


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    in_specs: list[Any],
    out_specs: dict[str, pl.BlockSpec],
    out_shape: dict[str, jax.ShapeDtypeStruct],
    warps: int | None = None,
    stages: int = 1,
    slices: int = 1,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> Callable[..., dict[str, jax.Array]]:
    """`pallas_call` over a grid (n, heads, batch).

    The last two are one axis of the grid: a GPU has three, and `jax.vmap` adds one.  aliases: the numbers of
    arrays, of all in their order, that results are written over, by name.  slices: programs for each n, which
    are given the same blocks.
    """
    heads = grid[1]

    def joined(spec: pl.BlockSpec) -> pl.BlockSpec:
        place = spec.index_map
        assert place is not None
        return pl.BlockSpec(spec.block_shape, lambda n, row: place(n // slices, row % heads, row // heads))

    is_spec = lambda x: isinstance(x, pl.BlockSpec)

    def call(*arrays: Any) -> dict[str, jax.Array]:
        # Inside shard_map results vary over the axes over which all arguments do (`call.alike`).
        kind = jax.typeof(jax.tree.leaves(arrays)[0]).manual_axis_type
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind)
        return pl.pallas_call(
            kernel,
            grid=(grid[0] * slices, heads * grid[2]),
            in_specs=jax.tree.map(joined, in_specs, is_leaf=is_spec),
            out_specs=jax.tree.map(joined, out_specs, is_leaf=is_spec),
            out_shape=jax.tree.map(like, out_shape),
            compiler_params=plgpu.CompilerParams(num_warps=warps or warps_of_chunks(), num_stages=stages),
            interpret=interpret,
            name=name,
            input_output_aliases=aliases or {},
        )(*arrays)

    return call
