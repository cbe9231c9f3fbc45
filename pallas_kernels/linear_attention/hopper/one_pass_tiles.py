"""What the warps of a warpgroup do with chunks of 16 tokens, a warp each: one_pass.py's pairs of tokens.

A tile of 64 tokens is four such chunks; the rows of a WGMMA tile that a warp holds are one of them. k and q
lie one behind the other by 8 tokens (`stack`), so that one product reads the state for both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.linear_attention.hopper import inverse
from pallas_kernels.linear_attention.hopper.blocks import F32, WGMMA, C
from pallas_kernels.linear_attention.hopper.inverse import ROWS, equal, i32, integer

BF16 = jnp.bfloat16
KEYS, QUERIES = range(2)  # in a stack
INVERSE, SCORES = range(2)  # in a chunk's pairs
TILE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
THIN = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32))  # right operands of 16 tokens


def pairs(stages: int) -> Any:
    """Shared memory for A - I and the scores of the chunks of `stages` tiles, as right operands."""
    return plgpu.SMEM((stages, C // ROWS, 2 * 4 * 32), jnp.int32)


def stack(ref: Any, value: jax.Array, which: int, *, interpret: Any) -> None:
    """Stores [64, 64] bf16 as a part of a stack [128, 64]: rows 8 i to 8 i + 7 from row 16 i + 8 which on."""
    if interpret:
        for i in range(0, C, 8):
            ref[2 * i + 8 * which : 2 * i + 8 * which + 8] = value[i : i + 8]
        return

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(TILE)))
    def write(_: Any, registers: Any, tile: Any) -> None:
        part = utils.memref_slice(utils.memref_unfold(tile, 0, (None, 2)), (slice(None), which))
        registers.store_tiled(part, swizzle=128)

    write(value, ref)


def last_rows(ref: Any, value: jax.Array, *, interpret: Any) -> None:
    """ref [4, 64] = the last row of each chunk of a tile [64, 64] float32."""
    if interpret:
        ref[...] = value[ROWS - 1 :: ROWS]
        return

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))
    def write(_: Any, tile: Any, memory: Any) -> None:
        m = Warp(memory)
        stride = ir.MemRefType(memory.type).get_strides_and_offset()[0][0]
        address = arith.addi(m.base, arith.muli(m.warp, integer(4 * stride)))
        address = arith.addi(address, arith.muli(m.c, integer(8)))
        last = equal(m.r, integer(7))
        ptx = "st.shared.v2.f32 [$0], {$1, $2};"
        for column, pair in enumerate(tile.registers.flat[1::2]):
            place = arith.addi(address, integer(32 * column))
            utils.inline_ptx(ptx, place, *_numbers(pair), predicate=last)

    write(value, ref)


def store_pairs(stacks: Any, inverses: Any, beta: Any, diagonal: Any, out: Any, *, interpret: Any) -> None:
    """Of each chunk of a tile A - I, A = (I + L)^-1, and the scores.

    L_ij = beta_i x_i.y_j and the scores z_i.y_j for j < i; the diagonal of the scores is given.

    stacks: [2, 128, 64], of x and z, by halves of the channels.  inverses: y [2, 64, 64].  Others: [64].
    out: of `pairs` [4, 256].
    """
    if interpret:
        cut = lambda ref: jnp.concatenate([ref[0], ref[1]], axis=1).astype(F32)
        x, z = jnp.moveaxis(cut(stacks).reshape(4, 2, 2, 8, -1), 2, 0).reshape(2, 4, ROWS, -1)
        y = cut(inverses).reshape(4, ROWS, -1)
        product = lambda a: jnp.einsum("wic,wjc->wij", a, y, precision=lax.Precision.HIGHEST)
        below = jnp.tril(jnp.ones((ROWS, ROWS), F32), -1) > 0
        minus = -beta[...].reshape(4, ROWS, 1) * jnp.where(below, product(x), 0.0)
        m = inverse.Parts(inverse.Interpreted())
        high = lax.optimization_barrier(minus.astype(jnp.float16))
        low = (minus - high.astype(F32)).astype(jnp.float16)
        high, _ = m.results(m.less_identity(inverse.diagonal(m, (high, low))))
        own = jnp.eye(ROWS) * diagonal[...].reshape(4, ROWS, 1)
        scores = jnp.where(below, product(z), own).astype(BF16)
        packed = [_packed(block).reshape(4, 128) for block in (high, scores)]
        out[...] = jnp.concatenate(packed, axis=1)
        return

    refs = (plgpu.RefType(TILE), plgpu.RefType(THIN)) + (plgpu.RefType(),) * 3

    @plgpu.inline_mgpu(arg_types=refs)
    def run(_: Any, stacks: Any, inverses: Any, beta: Any, diagonal: Any, out: Any) -> None:
        _store_pairs(Warp(out), stacks, inverses, beta, diagonal)

    run(stacks, inverses, beta, diagonal, out)


def _store_pairs(m: Any, stacks: Any, inverses: Any, beta: Any, diagonal: Any) -> None:
    lower = scores = [mgpu.c(0.0, ir.F32Type.get())] * 8
    for step in range(8):
        x, z, y = m.operands(stacks, inverses, step)
        lower = m.product(x, m.turned(y), lower, kind="bf16")
        scores = m.product(z, m.turned(y), scores, kind="bf16")
    zero = mgpu.c(0.0, ir.F32Type.get())
    minus = [arith.subf(zero, arith.mulf(x, b)) for x, b in zip(lower, m.by_row(beta), strict=True)]
    parts = inverse.Parts(m)
    x = inverse.diagonal(parts, parts.rounded(m.below(minus)))
    m.put_own(INVERSE, m.in_bf16(m.less_identity(x)))
    scores = m.with_diagonal(m.below(scores), m.by_row(diagonal))
    m.put_own(SCORES, m.in_bf16(scores))


def finish(
    read: jax.Array, value: jax.Array, beta: jax.Array, pairs: Any, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """V'^T = (beta (V - K S))^T A^T in bf16 and o^T = (Q S + P V')^T of a chunk, [64 values, 16 tokens].

    read: (K S)^T and (Q S)^T as stacked [64, 32].  value: V^T, beta: by column, both [64, 16] float32.
    pairs: [256], of the chunk.
    """
    if interpret:
        by_eight = read.reshape(C, 2, 2, 8)
        read_k, read_q = by_eight[:, :, 0].reshape(C, ROWS), by_eight[:, :, 1].reshape(C, ROWS)
        lower, scores = _unpacked(pairs[...].reshape(2, 128))
        x = (value - read_k) * beta
        times = lambda a, b: jnp.matmul(a.astype(F32), b.T.astype(F32), precision=lax.Precision.HIGHEST)
        x = x + times(x.astype(BF16), lower)
        values = x.astype(BF16)
        return values, (read_q + times(values, scores)).astype(BF16)

    result = plgpu.ShapeDtypeStruct((C, ROWS), BF16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA, WGMMA, plgpu.RefType()), return_type=(result, result))
    def run(_: Any, read: Any, value: Any, beta: Any, pairs: Any) -> Any:
        numbers = [
            [x for pair in tile.registers.flat for x in _numbers(pair)] for tile in (read, value, beta)
        ]
        return tuple(map(_array, _finish(Warp(pairs), *numbers)))

    return run(read, value, beta, pairs)


def _finish(m: Any, read: list, value: list, beta: list) -> tuple[list, list]:
    """In pairs of bf16; read and the others: numbers in turn of a thread's columns, rows r and r + 8."""
    parts = [read[i : i + 4] for i in range(0, 16, 4)]
    read_k, read_q = (parts[which] + parts[2 + which] for which in (KEYS, QUERIES))
    x = [arith.mulf(arith.subf(v, r), b) for v, r, b in zip(value, read_k, beta, strict=True)]
    x = m.product(m.in_bf16(x), m.turned(m.get(INVERSE)), x, kind="bf16")
    values = m.in_bf16(x)
    return values, m.in_bf16(m.product(values, m.turned(m.get(SCORES)), read_q, kind="bf16"))


def _packed(blocks_: jax.Array) -> jax.Array:
    """[..., 16, 16] bf16 as [..., 16, 8] int32."""
    return lax.bitcast_convert_type(blocks_.reshape(*blocks_.shape[:-1], 8, 2), jnp.int32)


def _unpacked(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, BF16).reshape(-1, ROWS, ROWS)


def _numbers(pair: Any) -> list:
    return [llvm.extractelement(pair, integer(i)) for i in range(2)]


def _array(block: list) -> Any:
    """A block in pairs of bf16 as a tile [64, 16]."""
    type_ = ir.VectorType.get((2,), ir.BF16Type.get())
    layout = WGMMA.to_mgpu()
    registers = np.empty(4, dtype=object)
    registers[:] = [utils.bitcast(x, type_) for x in block]
    registers = registers.reshape(layout.registers_shape((C, ROWS)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


class Warp(inverse.Warp):
    """Blocks of 16 by 16 as in inverse.py, of a warp's own chunk."""

    def __init__(self, memory: Any):
        super().__init__(memory)
        self.lane = arith.andi(utils.thread_idx(), integer(31))
        self.base = _address(memory)

    def turned(self, block: list) -> list:
        """The right operand that is the transpose of a block."""
        return [block[0], block[2], block[1], block[3]]

    def in_bf16(self, block: list) -> list:
        return self._pairs(block, "cvt.rn.bf16x2.f32 $0, $2, $1;")

    def put_own(self, slot: int, block: list) -> None:
        offset = arith.addi(arith.muli(self.warp, integer(1024)), integer(slot * 512))
        ptx = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
        utils.inline_ptx(ptx, arith.addi(self.address, offset), *block)

    def below(self, block: list) -> list:
        """Of a block of float32, what is below its diagonal."""
        zero, first = mgpu.c(0.0, ir.F32Type.get()), arith.muli(self.c, integer(2))
        than = arith.CmpIPredicate.ugt
        keep = [arith.cmpi(than, self.r, arith.addi(first, integer(i))) for i in range(2)]
        out = list(block)
        for part in (0, 3):
            out[2 * part : 2 * part + 2] = [
                arith.select(flag, x, zero)
                for flag, x in zip(keep, block[2 * part : 2 * part + 2], strict=True)
            ]
        out[4:6] = [zero, zero]
        return out

    def with_diagonal(self, block: list, numbers: list) -> list:
        out, flags = list(block), self._diagonal()
        for part in (0, 3):
            for i in (2 * part, 2 * part + 1):
                out[i] = arith.select(flags[i % 2], numbers[i], block[i])
        return out

    def by_row(self, memory: Any) -> list:
        """Numbers [64] float32, of a block's rows, for the eight places that a thread has."""
        row = arith.addi(arith.muli(self.warp, integer(ROWS)), self.r)
        address = arith.addi(_address(memory), arith.muli(row, integer(4)))
        f32, ptx = ir.F32Type.get(), "ld.shared.f32 $0, [$1];"
        first, second = (
            utils.inline_ptx(ptx, at, result_types=f32, has_side_effects=True)
            for at in (address, arith.addi(address, integer(32)))
        )
        return [first, first, second, second] * 2

    def operands(self, stacks: Any, inverses: Any, step: int) -> list:
        """x, z and y of channels 16 step to 16 step + 15 as left operands."""
        half, column = divmod(step, 4)
        # Matrices in turn: tokens 0-7, 8-15 of the first 8 channels, of the next 8; a lane addresses a row.
        eight = arith.andi(arith.shrui(self.lane, integer(3)), integer(1))
        row, piece = arith.andi(self.lane, integer(7)), arith.shrui(self.lane, integer(4))
        tile = arith.addi(arith.muli(self.warp, integer(2)), eight)

        def load(memory: Any, *offsets: Any) -> list:
            address = _address(memory)
            for offset in offsets:
                address = arith.addi(address, offset)
            ptx = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
            types = [i32()] * 4
            return list(
                utils.inline_ptx(ptx, address, result_types=types, has_side_effects=True, convergent=True)
            )

        def swizzled(piece: Any, bits: Any, width: int) -> tuple:
            place = arith.muli(arith.xori(piece, bits), integer(16))
            return place, arith.muli(row, integer(width))

        inner = swizzled(arith.addi(piece, integer(2 * column)), row, 128)
        x, z = (
            load(
                stacks,
                *inner,
                arith.muli(tile, integer(2048)),
                integer(half * 16384 + which * 1024),
            )
            for which in (KEYS, QUERIES)
        )
        inner = swizzled(piece, arith.shrui(row, integer(2)), 32)
        offset = arith.muli(tile, integer(1024)), integer(half * 8192 + column * 256)
        return [x, z, load(inverses, *inner, *offset)]


def _address(memory: Any) -> Any:
    return llvm.ptrtoint(i32(), utils.memref_ptr(memory))
