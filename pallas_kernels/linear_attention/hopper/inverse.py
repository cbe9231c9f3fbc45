"""The inverse of a unit lower triangular tile, within the registers of a warpgroup.

In the WGMMA layout warp w holds rows 16 w to 16 w + 15 of a tile. A block of 16 x 16 there is an accumulator
of the tensor cores' synchronous product (mma.sync m16n8k16) and, rounded to float16, its left operand; with
the 8 x 8 parts transposed (movmatrix) it is its right operand. So every warp works on its own rows in
registers, and six blocks pass from warp to warp through shared memory, lane by lane: two barriers, no fence.
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

from pallas_kernels.dispatch import interpreted
from pallas_kernels.linear_attention.hopper.blocks import BF16, F32, WGMMA, C

ROWS = 16  # of a warp, and the size of its blocks
F16 = jnp.float16
SLOTS = 6
X_00, X_11, X_22, L_20, L_21, X_10 = range(SLOTS)  # the blocks that pass between warps


def exchange() -> Any:
    """The shared memory that `unit_lower_inverse` wants; used again only after a barrier of the warpgroup."""
    return plgpu.SMEM((2 * SLOTS * 4 * 32,), jnp.int32)


def unit_lower_inverse(lower: jax.Array, exchange: Any) -> tuple[jax.Array, jax.Array]:
    """(I + L)^-1 - I in two bf16, L the part of `lower` [C, C] below the diagonal, by block doubling.

    With X the inverse of the diagonal blocks of size s and B the blocks of L just below them, the inverse
    of the blocks of size 2s is X - X B X. Each level is exact in exact arithmetic, and rounding does not grow
    as it does in a Neumann product (powers of L that cancel). Operands are sums of two float16, sums float32:
    for equal keys and beta near 2 a rounding of L by 2^-12 would be felt in each later token of the chunk.
    """
    minus = lower * -1.0
    high = lax.optimization_barrier(minus.astype(F16))
    low = (minus - high.astype(F32)).astype(F16)
    if interpreted.value:
        cut = lambda x: [x[:, j : j + ROWS].reshape(-1, ROWS, ROWS) for j in range(0, C, ROWS)]
        blocks = _inverse(Parts(Interpreted()), list(zip(cut(high), cut(low), strict=True)))
        join = lambda blocks: jnp.concatenate([block.reshape(C, ROWS) for block in blocks], axis=1)
        return join(blocks[0]), join(blocks[1])

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA, plgpu.RefType()),
        return_type=(plgpu.ShapeDtypeStruct((C, C), BF16, layout=WGMMA),) * 2,
    )
    def invert(_: Any, high: Any, low: Any, memory: Any) -> Any:
        def cut(tile: Any) -> list:
            pairs = [utils.bitcast(x, i32()) for x in tile.registers.flat]  # by 8 columns, then by 8 rows
            return [pairs[j : j + 4] for j in range(0, 16, 4)]

        def join(blocks: list) -> Any:
            registers = np.empty(high.registers.size, dtype=object)
            registers[:] = [utils.bitcast(x, type_) for block in blocks for x in block]
            registers = registers.reshape(high.registers.shape)
            return mgpu.FragmentedArray(_registers=registers, _layout=high.layout, _is_signed=None)

        type_ = ir.VectorType.get((2,), ir.BF16Type.get())
        blocks = _inverse(Parts(Warp(memory)), list(zip(cut(high), cut(low), strict=True)))
        return tuple(map(join, blocks))

    return invert(high, low, exchange)


def _inverse(m: Any, minus: list) -> tuple[list, list]:
    """The blocks of X - I in the rows of each warp, in two bf16, from those of N = -L; m: a `Parts`.

    Blocks of 16: X_10 = X_11 N_10 X_00 in warp 1, X_32 = X_33 N_32 X_22 in warp 3. Blocks of 32, in warps
    i = 2, 3: X_i0 = Y_i0 X_00 + Y_i1 X_10 and X_i1 = Y_i1 X_11 with Y_ij = X_ii N_ij + X_i2 N_2j (i = 3).
    """
    own = m.by_warp(minus)
    x = diagonal(m, own)
    left = m.rounded(x)
    right = m.right(left)
    below = [m.right(minus[0]), m.right(minus[1])]
    for slot, block, warp in ((X_00, right, 0), (X_11, right, 1), (X_22, right, 2)):
        m.put(slot, block, warp)
    for slot, block in zip((L_20, L_21), below, strict=True):
        m.put(slot, block, 2)
    none = m.zeros(own)
    y = m.rounded(m.product(left, m.right(m.by_warp([none, minus[0], none, minus[2]]))))
    m.barrier()
    z = m.product(y, m.get(X_00, X_00, X_00, X_22))  # X_10, X_32, 0 in the even warps
    left_z = m.rounded(z)
    m.put(X_10, m.right(left_z), 1)
    y = [m.product(left, block) for block in below]
    y = [m.rounded(m.product(left_z, m.get(slot), y[j])) for j, slot in enumerate((L_20, L_21))]
    first, second = m.product(y[0], m.get(X_00)), m.product(y[1], m.get(X_11))
    m.barrier()
    first = m.product(y[1], m.get(X_10), first)
    parts = zip(*map(m.results, (m.less_identity(x), z, first, second)), strict=True)

    def columns(x: Any, z: Any, first: Any, second: Any) -> list:
        none = m.zeros(x)
        rows = [x, z, first, first], [none, x, second, second], [none, none, x, z], [none, none, none, x]
        return [m.by_warp(list(column)) for column in rows]

    high, low = (columns(*part) for part in parts)
    return high, low


def diagonal(m: Any, minus: tuple) -> Any:
    """The inverse X of the block of 16 of each warp, from N = -L; m: a `Parts`."""
    x = m.identity_plus(m.links(minus, 1))
    for size in (2, 4, 8):
        left = m.rounded(x)
        y = m.rounded(m.product(left, m.right(m.links(minus, size))))
        x = m.product(y, m.right(left), x)
    return x


class Parts:
    """Blocks of 16 bits in two parts, (high, low), on a machine ``m`` for blocks in one."""

    def __init__(self, m: Any):
        self.m = m
        self.barrier, self.results, self.less_identity = m.barrier, m.results, m.less_identity

    def links(self, block: tuple, size: int) -> tuple:
        return tuple(self.m.links(part, size) for part in block)

    def identity_plus(self, block: tuple) -> Any:
        return self.m.identity_plus(*block)

    def rounded(self, block: Any) -> tuple:
        high = self.m.rounded(block)
        return high, self.m.rounded(self.m.difference(block, self.m.widened(high)))

    def right(self, block: tuple) -> tuple:
        return tuple(map(self.m.right, block))

    def product(self, a: tuple, b: tuple, start: Any = None) -> Any:
        """But for the product of the low parts."""
        start = self.m.product(a[1], b[0], *[] if start is None else [start])
        return self.m.product(a[0], b[0], self.m.product(a[0], b[1], start))

    def zeros(self, like: Any) -> Any:
        return tuple(map(self.m.zeros, like)) if isinstance(like, tuple) else self.m.zeros(like)

    def by_warp(self, blocks: list) -> Any:
        if not isinstance(blocks[0], tuple):
            return self.m.by_warp(blocks)
        return tuple(self.m.by_warp([block[part] for block in blocks]) for part in range(2))

    def put(self, slot: int, block: tuple, warp: int) -> None:
        for part in range(2):
            self.m.put(slot + part * SLOTS, block[part], warp)

    def get(self, *slots: int) -> tuple:
        return tuple(self.m.get(*(slot + part * SLOTS for slot in slots)) for part in range(2))


class Interpreted:
    """A block is an array [4 warps, 16, 16]."""

    def __init__(self) -> None:
        self.memory: dict[int, jax.Array] = {}
        self.row = lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0)
        self.col = lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1)

    def links(self, block: jax.Array, size: int) -> jax.Array:
        keep = (((self.row ^ self.col) & -size) == size) & (self.row > self.col)
        return jnp.where(keep, block, jnp.zeros_like(block))

    def identity_plus(self, high: jax.Array, low: jax.Array) -> jax.Array:
        return jnp.where(self.row == self.col, 1.0, high.astype(F32) + low.astype(F32))

    def less_identity(self, block: jax.Array) -> jax.Array:
        return jnp.where(self.row == self.col, 0.0, block)

    def rounded(self, block: jax.Array) -> jax.Array:
        return block.astype(F16)

    def widened(self, block: jax.Array) -> jax.Array:
        return block.astype(F32)

    def difference(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a - b

    def results(self, block: jax.Array) -> tuple[jax.Array, jax.Array]:
        high = lax.optimization_barrier(block.astype(BF16))
        return high, (block - high.astype(F32)).astype(BF16)

    def right(self, block: jax.Array) -> jax.Array:
        return block

    def product(self, a: jax.Array, b: jax.Array, start: Any = 0.0) -> jax.Array:
        return start + jnp.matmul(a.astype(F32), b.astype(F32), precision=lax.Precision.HIGHEST)

    def zeros(self, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like)

    def by_warp(self, blocks: list) -> jax.Array:
        return jnp.stack([block[warp] for warp, block in enumerate(blocks)])

    def put(self, slot: int, block: jax.Array, warp: int) -> None:
        self.memory[slot] = block[warp]

    def get(self, *slots: int) -> jax.Array:
        return jnp.stack([self.memory[slot] for slot in (slots * 4)[:4]])

    def barrier(self) -> None:
        pass


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def integer(n: int) -> Any:
    return mgpu.c(n, i32())


def equal(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def _below(a: Any, n: int) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ult, a, integer(n))


class Warp:
    """What a thread does. It holds of a block the rows r and r + 8 in the columns 2c, 2c + 1, 2c + 8, 2c + 9.

    A block is a list of registers: of its 8 x 8 parts (0, 0), (1, 0), (0, 1), (1, 1) in turn, one with a
    pair of 16 bits or two of float32.
    """

    def __init__(self, memory: Any):
        lane = arith.andi(utils.thread_idx(), integer(31))
        self.warp = arith.andi(utils.warp_idx(), integer(3))
        self.r, self.c = arith.shrui(lane, integer(2)), arith.andi(lane, integer(3))
        base = llvm.ptrtoint(i32(), utils.memref_ptr(memory))
        self.address = arith.addi(base, arith.muli(lane, integer(16)))
        self.zero = integer(0)

    def links(self, block: list, size: int) -> list:
        """Of a block, what links an odd block of this size to the even one before it; the rest is 0."""
        if size == 8:
            return [self.zero, block[1], self.zero, self.zero]
        half = arith.shrui(self.r, integer(1))
        if size == 1:
            keep = arith.andi(equal(half, self.c), equal(arith.andi(self.r, integer(1)), integer(1)))
        elif size == 2:
            even = equal(arith.andi(self.c, integer(1)), integer(0))
            keep = arith.andi(equal(half, arith.addi(self.c, integer(1))), even)
        else:
            keep = arith.andi(arith.cmpi(arith.CmpIPredicate.uge, self.r, integer(4)), _below(self.c, 2))
        first, last = (arith.select(keep, block[part], self.zero) for part in (0, 3))
        return [first, self.zero, self.zero, last]

    def identity_plus(self, high: list, low: list) -> list:
        """I + the links of size 1, whose columns are even; the pairs' other halves are of the diagonal."""
        f32 = ir.F32Type.get()
        zero, one = mgpu.c(0.0, f32), mgpu.c(1.0, f32)
        first, second = self._diagonal()
        out = [zero] * 8
        for part in (0, 3):
            ptx = "{.reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low;}"
            link, rest = (utils.inline_ptx(ptx, block[part], result_types=f32) for block in (high, low))
            link = arith.addf(link, rest)
            out[2 * part : 2 * part + 2] = [arith.select(first, one, link), arith.select(second, one, zero)]
        return out

    def less_identity(self, block: list) -> list:
        zero, (first, second) = mgpu.c(0.0, ir.F32Type.get()), self._diagonal()
        out = list(block)
        for part in (0, 3):
            out[2 * part] = arith.select(first, zero, block[2 * part])
            out[2 * part + 1] = arith.select(second, zero, block[2 * part + 1])
        return out

    def _diagonal(self) -> tuple:
        """Whether it meets the thread's first, its second column in an 8 x 8 part."""
        first = equal(self.r, arith.muli(self.c, integer(2)))
        return first, equal(self.r, arith.addi(arith.muli(self.c, integer(2)), integer(1)))

    def rounded(self, block: list) -> list:
        return self._pairs(block, "cvt.rn.f16x2.f32 $0, $2, $1;")

    def widened(self, block: list) -> list:
        ptx = "{.reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;}"
        f32 = ir.F32Type.get()
        return [x for pair in block for x in utils.inline_ptx(ptx, pair, result_types=[f32, f32])]

    def difference(self, a: list, b: list) -> list:
        return [arith.subf(x, y) for x, y in zip(a, b, strict=True)]

    def results(self, block: list) -> tuple[list, list]:
        """As a sum of two bf16."""
        round_ = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        high = self._pairs(block, round_)
        return high, self._pairs(self.difference(block, self.widened_bf16(high)), round_)

    def widened_bf16(self, block: list) -> list:
        ptx, f32 = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", ir.F32Type.get()
        return [x for pair in block for x in utils.inline_ptx(ptx, pair, result_types=[f32, f32])]

    def _pairs(self, block: list, ptx: str) -> list:
        return [utils.inline_ptx(ptx, *block[i : i + 2], result_types=i32()) for i in range(0, 8, 2)]

    def right(self, block: list) -> list:
        ptx = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
        turn = lambda x: utils.inline_ptx(ptx, x, result_types=i32(), convergent=True)
        return [x if x is self.zero else turn(x) for x in block]

    def product(self, a: list, b: list, start: list | None = None, kind: str = "f16") -> list:
        start = start or [mgpu.c(0.0, ir.F32Type.get())] * 8
        return self.half(a, b[:2], start[:4], kind) + self.half(a, b[2:], start[4:], kind)

    def half(self, a: list, b: list, start: list, kind: str) -> list:
        """The first 8 columns of a product, b: the parts of its right operand in them."""
        ptx = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        types = [ir.F32Type.get()] * 4
        return list(utils.inline_ptx(ptx, *a, *b, *start, result_types=types, convergent=True))

    def zeros(self, like: list) -> list:
        return [self.zero] * len(like)

    def by_warp(self, blocks: list) -> list:
        """blocks[w] in warp w."""
        out = blocks[-1]
        for warp in (2, 1, 0):
            if blocks[warp] is not blocks[warp + 1]:
                early = _below(self.warp, warp + 1)
                out = [arith.select(early, x, y) for x, y in zip(blocks[warp], out, strict=True)]
        return out

    def put(self, slot: int, block: list, warp: int) -> None:
        """Stores a warp's block for the others, after the next barrier."""
        address = arith.addi(self.address, integer(slot * 512))
        ptx = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
        utils.inline_ptx(ptx, address, *block, predicate=equal(self.warp, integer(warp)))

    def get(self, *slots: int) -> list:
        """The block of a slot, or of the slot of this warp."""
        (offset,) = (
            self.by_warp([[integer(slot * 512)] for slot in slots])
            if len(slots) > 1
            else [integer(512 * slots[0])]
        )
        ptx = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
        address = arith.addi(self.address, offset)
        return list(utils.inline_ptx(ptx, address, result_types=[i32()] * 4, has_side_effects=True))

    def barrier(self) -> None:
        utils.warpgroup_barrier()
