"""What one_pass*.py's warpgroups do with the pairs of tokens of a chunk of 16: `prepare` has left them."""

from collections.abc import Callable
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
from pallas_kernels.linear_attention.hopper.inverse import ROWS, i32, integer

BF16 = jnp.bfloat16
INVERSE, SCORES = range(2)  # in a chunk's pairs


def pairs(stages: int) -> Any:
    """Shared memory for A - I and the scores of the chunks of `stages` tiles, as right operands."""
    return plgpu.SMEM((stages, C // ROWS, 2 * 4 * 32), jnp.int32)


def values_of(read: jax.Array, value: jax.Array, beta: jax.Array, pairs: Any, *, interpret: Any) -> jax.Array:
    """V'^T = (beta (V - K S))^T A^T of a chunk in bf16 [64 values, 16 tokens].

    read: (K S)^T beside (Q S)^T [64, 32].  value: V^T, beta: by column, both [64, 16] float32.
    pairs: [256], of the chunk.
    """
    if interpret:
        x = (value - read[:, :ROWS]) * beta
        return (x + _times(x.astype(BF16), pairs, INVERSE)).astype(BF16)
    return _run(_values, pairs, read, value, beta)


def outputs_of(read: jax.Array, values: jax.Array, pairs: Any, *, interpret: Any) -> jax.Array:
    """o^T = (Q S + P V')^T of a chunk, as `values_of` has them."""
    if interpret:
        return (read[:, -ROWS:] + _times(values, pairs, SCORES)).astype(BF16)
    return _run(_outputs, pairs, read, values)


def additive_gradients_of(read: jax.Array, do: jax.Array, pairs: Any, *, interpret: Any) -> jax.Array:
    """dV^T = (K dS + P^T dO)^T of a chunk in bf16 [64 values, 16 tokens]; arguments as in `gradients_of`."""
    if interpret:
        return (read + _times(do, pairs, SCORES, turned=False)).astype(BF16)
    return _run(_additive_gradients, pairs, read, do)


def gradients_of(read: jax.Array, do: jax.Array, beta: jax.Array, pairs: Any, *, interpret: Any) -> jax.Array:
    """dV^T = beta (K dS + P^T dO)^T A of a chunk, and beside it dO^T, in bf16 [64 values, 2 x 16 tokens].

    read: (K dS)^T, beta: by column, both float32; do: dO^T bf16; all [64, 16].
    pairs: as `prepare` leaves them for the reverse pass.
    """
    if interpret:
        x = read + _times(do, pairs, SCORES, turned=False)
        x = (x + _times(x.astype(BF16), pairs, INVERSE, turned=False)) * beta
        return jnp.concatenate([x.astype(BF16), do], axis=1)
    return _run(_gradients, pairs, read, do, beta, columns=2 * ROWS)


def _times(a: jax.Array, pairs: Any, which: int, turned: bool = True) -> jax.Array:
    words = pairs[...].reshape(2, 128)[which]
    b = lax.bitcast_convert_type(words, BF16).reshape(ROWS, ROWS).astype(F32)
    return jnp.matmul(a.astype(F32), b.T if turned else b, precision=lax.Precision.HIGHEST)


def _run(function: Callable, pairs: Any, *tiles: jax.Array, columns: int = ROWS) -> jax.Array:
    """A tile [64, columns] in bf16, of the registers of tiles: numbers, or pairs of bf16."""
    result = plgpu.ShapeDtypeStruct((C, columns), BF16, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[WGMMA] * len(tiles)), return_type=result)
    def run(_: Any, pairs: Any, *tiles: Any) -> Any:
        return _array(function(Warp(pairs), *map(_registers, tiles)))

    return run(pairs, *tiles)


def _registers(tile: Any) -> list:
    """Numbers in turn of a thread's columns, rows r and r + 8, or such pairs of bf16."""
    if tile.mlir_dtype == ir.BF16Type.get():
        return [utils.bitcast(pair, i32()) for pair in tile.registers.flat]
    return [llvm.extractelement(pair, integer(i)) for pair in tile.registers.flat for i in range(2)]


def _values(m: Any, read: list, value: list, beta: list) -> list:
    x = [arith.mulf(arith.subf(v, r), b) for v, r, b in zip(value, read[:8], beta, strict=True)]
    return m.in_bf16(m.product(m.in_bf16(x), m.turned(m.get(INVERSE)), x, kind="bf16"))


def _outputs(m: Any, read: list, values: list) -> list:
    return m.in_bf16(m.product(values, m.turned(m.get(SCORES)), read[-8:], kind="bf16"))


def _additive_gradients(m: Any, read: list, do: list) -> list:
    return m.in_bf16(m.product(do, m.get(SCORES), read, kind="bf16"))


def _gradients(m: Any, read: list, do: list, beta: list) -> list:
    x = m.product(do, m.get(SCORES), read, kind="bf16")
    x = m.product(m.in_bf16(x), m.get(INVERSE), x, kind="bf16")
    return [*m.in_bf16([arith.mulf(number, b) for number, b in zip(x, beta, strict=True)]), *do]


def packed(blocks_: jax.Array) -> jax.Array:
    """[..., 16, 16] bf16 as [..., 16, 8] int32."""
    return lax.bitcast_convert_type(blocks_.reshape(*blocks_.shape[:-1], 8, 2), jnp.int32)


def _array(blocks_: list) -> Any:
    """Blocks in pairs of bf16, one beside the other, as a tile of 64 rows."""
    type_ = ir.VectorType.get((2,), ir.BF16Type.get())
    layout = WGMMA.to_mgpu()
    registers = np.empty(len(blocks_), dtype=object)
    registers[:] = [utils.bitcast(x, type_) for x in blocks_]
    registers = registers.reshape(layout.registers_shape((C, len(blocks_) // 4 * ROWS)))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


class Warp(inverse.Warp):
    """Blocks of 16 by 16 as in inverse.py, of a warp's own chunk."""

    def __init__(self, memory: Any):
        super().__init__(memory)
        self.lane = arith.andi(utils.thread_idx(), integer(31))

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
        address = arith.addi(address_of(memory), arith.muli(row, integer(4)))
        first, second = map(self.shared, (address, arith.addi(address, integer(32))))
        return [first, first, second, second] * 2

    def shared(self, address: Any) -> Any:
        """A float32 in shared memory."""
        ptx = "ld.shared.f32 $0, [$1];"
        return utils.inline_ptx(ptx, address, result_types=ir.F32Type.get(), has_side_effects=True)


def address_of(memory: Any) -> Any:
    return llvm.ptrtoint(i32(), utils.memref_ptr(memory))
