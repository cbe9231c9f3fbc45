"""The named pieces that the Hopper kernels share: tiles, products, gates and masks.

All kernels work on chunks of C = 64 tokens with warpgroup tiles in the WGMMA register layout. Two habits
keep them short. No gate and no norm is ever multiplied into a tile of q or k: per head they are numbers per
token, so they scale the rows or columns of float32 products instead. And products keep their left operand
in registers, so a chain of products needs no trip through shared memory.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import compilation
from pallas_kernels.dispatch import interpreted
from pallas_kernels.linear_attention.call import L2NORM_EPS, varying

C = 64  # tokens in a chunk: one warpgroup tile
LOG2E = math.log2(math.e)
F32, BF16 = jnp.float32, jnp.bfloat16
SMEM_BYTES = 227 * 1024  # of a block of threads

# Rows of a chunk's `gates` [8, C]. Token i reads the state S0 before the chunk with weight e_i = exp(G_i)
# if it is of the document that enters the chunk, else 0; its write is in the state after it with weight f_i
# = exp(G_C - G_i) if it is of the document that leaves, else 0. G: sums of log-decays from the chunk's
# start.
READ_K, READ_Q, WRITE, CARRY, SUM, NORM_K, NORM_Q, BETA = range(8)
# e / |k|, scale e / |q|, f / |k|, exp(G_C) or 0 for all tokens, G log2(e), 1 / |k|, scale / |q|, beta
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one number per row of a tile
COLS = WGMMA.reduce(0)  # one number per column


def kernel(body: Callable, *, name: str, interpret: Any, **options: Any) -> Callable:
    """`plgpu.kernel` with Lane semantics (Warpgroup inference breaks transposed and row-shifted views).

    No barrier is put around each store to shared memory: the body has commit_smem (a fence and a barrier of
    the warpgroup) between a store and what reads it, and between a read and what overwrites it.
    """
    params = plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    )
    if interpret is True:
        interpret = plgpu.InterpretGPUParams(detect_races=True)

    def traced(*refs: Any, **scratch: Any) -> None:
        if not interpret:
            unnumbered(name)
            plain_host()
        with interpreted(bool(interpret)):
            body(*refs, **scratch)

    run = plgpu.kernel(
        traced, compiler_params=params, interpret=interpret or None, kernel_name=name, **options
    )

    def call(*arrays: jax.Array) -> Any:
        # Under shard_map with check_vma a kernel forgets along which mesh axes its results vary.
        axes = frozenset().union(*map(varying, arrays))
        cast = lambda x: lax.pcast(x, tuple(axes - varying(x)), to="varying")
        results = run(*arrays) if interpret else compilation.kernel(run, *arrays)
        return jax.tree.map(cast, results) if axes else results

    return call


def unnumbered(name: str) -> None:
    """Names what is dumped of a kernel ``name``, unless something is dumped.

    jax 0.11.2 numbers kernels for that as they are lowered, and the number is part of what tells them apart:
    the same kernel would be compiled again in every program of a process, and a program never found in a
    cache unless just as many were lowered before it.
    """

    @plgpu.inline_mgpu()
    def unnumber(context: Any) -> None:
        if not any(variable.startswith("MOSAIC_GPU_DUMP") for variable in os.environ):
            context.module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)

    unnumber()


def plain_host() -> None:
    """Keeps LLVM's vectoriser off the host's code of a kernel, which fills TMA's descriptors.

    It takes half of the time that LLVM spends there, looking for pairs among hundreds of stores of constants.
    """

    @plgpu.inline_mgpu()
    def keep_off(context: Any) -> None:
        for one in context.module.body:
            if one.operation.name == "func.func" and len(one.regions[0].blocks):  # not a runtime function's
                flags = [ir.StringAttr.get("noimplicitfloat")]  # nothing that goes by vectors
                one.attributes["llvm.passthrough"] = ir.ArrayAttr.get(flags)

    keep_off()


def present(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is not None of the arrays, results or buffers of a kernel with variants."""
    return {name: value for name, value in options.items() if value is not None}


def launch(
    inputs: Any,
    name: str,
    body: Callable,
    arrays: Mapping[str, Any],
    results: Mapping[str, Any],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Results by name of `kernel` for body(refs, smem): dicts of arrays and results, and of buffers.

    inputs: an `Inputs`, for its `interpret`.  arrays, results, scratch: what is None is absent.
    threads: warpgroups of a block, axis "wg"; None for one, without that axis. They end together: none may
        leave while another still issues wgmma (an illegal instruction on hardware).
    """
    arrays, results, scratch = present(arrays), present(results), present(scratch)
    if threads is not None and threads > 1:
        scratch |= dict(done=plgpu.Barrier(num_arrivals=threads))

    def named(*refs: Any, **smem: Any) -> None:
        body(dict(zip([*arrays, *results], refs, strict=True)), smem)
        if "done" in smem:
            meet(smem["done"])

    out = kernel(
        named,
        name=name,
        interpret=inputs.interpret,
        out_type=list(results.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        **({} if threads is None else dict(num_threads=threads, thread_name="wg")),
    )(*arrays.values())
    return dict(zip(results, out, strict=True))


def refill(fill: Callable, free: Any, count: Any, stages: int) -> None:
    """fill(n, slot) for n below ``count``, as soon as its slot of ``stages`` is free; ends when all are free.

    For a warpgroup that issues copies: it may not leave before the last have been read.
    count: an int, or a number on the device of at least ``stages``.
    """
    ending = last(count, stages)
    for n in range(len(ending)):
        fill(n, n)

    @pl.loop(stages, count)
    def _(n: Any) -> None:
        slot = rem(n, stages)
        plgpu.barrier_wait(free.at[slot])
        fill(n, slot)

    for n in ending:
        plgpu.barrier_wait(free.at[rem(n, stages)])


def last(count: Any, most: int) -> list:
    """The last numbers below ``count``, ``most`` of them or all; a count on the device is at least that."""
    return [count - n for n in range(min(most, count) if isinstance(count, int) else most, 0, -1)]


def stages(chunks: int, stage: int, fixed: int) -> int:
    """How many buffers of ``stage`` bytes, two to four, for ``chunks``, where ``fixed`` bytes are others'."""
    return max(2, min(4, chunks, (SMEM_BYTES - fixed) // stage))


def smem(shape: Sequence[int], dtype: Any, width: int | None = None) -> Any:
    """A shared-memory tile that TMA fills and wgmma reads: tiled and swizzled along the last axis.

    width: swizzled like tiles that are so wide; wgmma wants both its operands swizzled alike.
    """
    return plgpu.SMEM(tuple(shape), dtype, transforms=_arrangement(width or shape[-1], dtype)[0])


def _arrangement(width: int, dtype: Any) -> tuple[tuple, int]:
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(width * bits)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)), swizzle


def store(ref: Any, value: jax.Array, *, transposed: bool = False, width: int | None = None) -> None:
    """ref[...] = value (or value^T) for a tile from `smem`, with no barrier.

    Unlike Pallas's own store it does not load the old contents (which no compiler removes): half the traffic.
    """
    if interpreted.value:
        (ref.T if transposed else ref)[...] = value
        return
    transforms, swizzle = _arrangement(width or ref.shape[-1], value.dtype)

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(transforms)))
    def write(_: Any, registers: Any, tile: Any) -> None:
        if transposed:
            tile = mgpu.memref_transpose(tile, (1, 0, 3, 2))
        registers.store_tiled(tile, swizzle=swizzle)

    write(value, ref)


def send(tile: Any, value: jax.Array, target: Any) -> None:
    """target[...] = value in bfloat16, by way of a tile that all copies but the last have left."""
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what the tile held has left
    store(tile, value.astype(BF16))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)


def state(ref: Any, shape: tuple[int, int], place: tuple) -> jax.Array:
    """The part of a float32 array in global memory that a warpgroup holds; zeros where ``ref`` is None."""
    if ref is None:
        return zeros(shape)
    return plgpu.load(ref.at[place], layout=WGMMA, optimized=False)


def write(ref: Any, value: jax.Array) -> None:
    """ref[...] = value for a tile in registers and any part of an array in global memory.

    Newer versions of Pallas refuse rows that fill no whole 32-byte sectors, unless told that it is meant.
    """
    if interpreted.value or not hasattr(plgpu, "store"):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)


def tile(ref: Any, dtype: Any = F32) -> jax.Array:
    """A shared-memory tile as registers."""
    return plgpu.load(ref, layout=WGMMA).astype(dtype)


def div(x: jax.Array, n: int) -> jax.Array:
    return lax.div(x, jnp.asarray(n, x.dtype))


def rem(x: Any, n: int) -> Any:
    return x % n if isinstance(x, int) else lax.rem(x, jnp.asarray(n, x.dtype))


def row_vector(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=ROWS)


def col_vector(ref: Any) -> jax.Array:
    return plgpu.load(ref, layout=COLS)


def row_and_col(ref: Any) -> tuple[jax.Array, jax.Array]:
    """A vector as a number per row and as one per column."""
    return row_vector(ref), col_vector(ref)


def by_row(vector: jax.Array, shape: tuple[int, int] = (C, C)) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [0])


def by_col(vector: jax.Array, shape: tuple[int, int] = (C, C)) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [1])


def row_index(shape: tuple[int, int] = (C, C)) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)


def col_index(shape: tuple[int, int] = (C, C)) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)


def zeros(shape: tuple[int, int]) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, F32), WGMMA)


def sums_of_products(
    *sums: tuple[Sequence[tuple], Any], meanwhile: Callable[[], None] = lambda: None
) -> tuple[jax.Array, ...]:
    """`start + a @ b + c @ d + ...` for each sum ([(a, b), (c, d), ...], start); all are in flight together.

    start: a float32 tile, or the shape of one to start from zero.  a: a 16-bit tile in registers or shared
    memory; b: in shared memory.  meanwhile: what is done until they are there. To read an accumulator is
    only to wait, with no data dependency that the compiler sees, so it may move arithmetic before the wait
    (seen on hardware as silent zeros): the optimization barrier is part of the product.
    """
    if interpreted.value:  # no wgmma on registers
        meanwhile()
        return tuple(_interpreted_sum(pairs, start) for pairs, start in sums)

    def accumulate(accs: Any) -> None:
        for acc, (pairs, _) in zip(accs, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(acc, a, b)
        meanwhile()

    if all(isinstance(start, tuple) for _, start in sums):

        def from_zero(*accs: Any) -> tuple[jax.Array, ...]:
            accumulate(accs)
            return tuple(acc[...] for acc in accs)

        out = pl.run_scoped(from_zero, *[plgpu.ACC(shape, F32) for _, shape in sums])
    else:
        starts = [zeros(start) if isinstance(start, tuple) else start for _, start in sums]
        out = pl.run_state(accumulate)(tuple(plgpu.ACC.init(start) for start in starts))
    return tuple(lax.optimization_barrier(tuple(out)))


def _interpreted_sum(pairs: Sequence[tuple], start: Any) -> jax.Array:
    out = jnp.zeros(start, F32) if isinstance(start, tuple) else start
    for a, b in pairs:
        out = out + jnp.dot(a[...].astype(F32), b[...].astype(F32), precision=lax.Precision.HIGHEST)
    return out


def matmul(*products: tuple) -> Any:
    """float32 tiles `init + a @ b` for each product (a, b) or (a, b, init): see `sums_of_products`."""
    sums = [([(a, b)], *(init or [(a.shape[0], b.shape[1])])) for a, b, *init in products]
    out = sums_of_products(*sums)
    return out[0] if len(out) == 1 else out


def inverse_norms(halves: Any) -> jax.Array:
    """1 / |x| of each row, as the op defines it: rsqrt(sum(x^2) + 1e-6).

    The tile is given as shared-memory pieces side by side (fewer registers at once).
    """
    squares: Any = None
    for half in halves:
        x = tile(half)
        part = jnp.sum(x * x, axis=1)
        squares = part if squares is None else squares + part
    return lax.rsqrt(squares + L2NORM_EPS)


def cumulative(step_col: jax.Array) -> jax.Array:
    """Inclusive running sum over the chunk: from a number per column to a number per row."""
    return jnp.sum(jnp.where(col_index() <= row_index(), by_col(step_col), 0.0), axis=1)


def causal(segment: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Pairs (i, j), j <= i, of one document; segment: its number per row and per column."""
    keep = row_index() >= col_index()
    if segment is not None:
        keep = keep & (by_row(segment[0]) == by_col(segment[1]))
    return keep


def pair_decay(keep: jax.Array, sums: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """2^(G_i - G_j) on the pairs kept, 0 elsewhere; G falls along the chunk, so nothing kept overflows."""
    if sums is None:
        return jnp.where(keep, 1.0, 0.0)
    return jnp.exp2(jnp.where(keep, by_row(sums[0]) - by_col(sums[1]), -jnp.inf))


def meet(barrier: Any) -> None:
    """Returns when as many warpgroups as ``barrier`` counts are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def role(here: Any, run: Callable[[], None], *, increase: int = 0, decrease: int = 0) -> None:
    """What the warpgroups do for which ``here`` holds, with so many registers a thread if it says one."""

    @pl.when(here)
    def _() -> None:
        if increase or decrease:
            action: Literal["increase", "decrease"] = "increase" if increase else "decrease"
            plgpu.set_max_registers(increase or decrease, action=action)
        run()


def head_major(x: jax.Array, length: int) -> jax.Array:
    """Numbers per token [B, T, HV] as float32 [B, HV, length], 0 after T: a chunk is one contiguous row."""
    x = jnp.swapaxes(x.astype(F32), 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])))
