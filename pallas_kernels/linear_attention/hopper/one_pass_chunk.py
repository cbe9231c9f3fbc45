"""What a warp holds and does of its chunk of 16 tokens while it prepares that (one_pass_prepare.py)."""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.linear_attention.call import L2NORM_EPS
from pallas_kernels.linear_attention.hopper import channel_math
from pallas_kernels.linear_attention.hopper.blocks import LOG2E, C
from pallas_kernels.linear_attention.hopper.inverse import ROWS, equal, i32, integer
from pallas_kernels.linear_attention.hopper.one_pass_tiles import BF16, Warp, address_of

LEAST = channel_math.LEAST / LOG2E
CHANNELS = 128


class Widths(NamedTuple):
    """Channels in a row of the tiles that right operands are made of, of q and k, and of log-decays: as many
    as the tokens that are summed over, or 64 where channels are.  half: log-decays are float16, in base 2."""

    qk: int
    g: int
    reverse: bool = False
    half: bool = False


FORWARD = Widths(64, ROWS)
REVERSE, ADDITIVE_REVERSE = Widths(2 * ROWS, 64, True), Widths(ROWS, 64, True)


class Tile(NamedTuple):
    """64 tokens in shared memory.  qk: of every chunk k, then q, [4 x 32, 128] bf16; g: log-decays [64, 128]
    bf16, or the bits of float16; carry: [4, 128] float32; pairs: `one_pass_tiles.pairs` [4, 256]; beta: [64]
    or None (additive); norms: [3, 64] or None; starts: how many documents start in a token's chunk, up to it,
    [64] float32 or None."""

    qk: Any
    g: Any
    carry: Any
    pairs: Any
    beta: Any = None
    norms: Any = None
    starts: Any = None


class Raw(NamedTuple):
    """The tile in global memory, [64, 128] bf16 each; bytes from a token to the next of k and q, of g."""

    k: Any
    q: Any
    g: Any
    strides: tuple[int, int]


class Chunk(Warp):
    """Blocks of 16 tokens by 16 channels, in pairs of bf16 or in float32, of a warp's own chunk."""

    def __init__(self, tile: Tile, raw: Raw, widths: Widths = FORWARD):
        super().__init__(tile.pairs)
        self.beta, self.norm_rows, self.starts, self.widths = tile.beta, tile.norms, tile.starts, widths
        # A lane addresses a row of 8 x 8 numbers: of tokens 0-7, 8-15, then the same of the next channels.
        row, piece = arith.andi(self.lane, integer(7)), arith.shrui(self.lane, integer(4))
        eight = arith.muli(arith.andi(arith.shrui(self.lane, integer(3)), integer(1)), integer(2048))

        def places(memory: Any, chunk: int, width: int) -> list:
            """Of every sixteen channels of a row of a tile: 16 bytes are swapped with others by row."""
            start = arith.addi(address_of(memory), arith.muli(self.warp, integer(chunk)))
            start = arith.addi(arith.addi(start, eight), arith.muli(row, integer(2 * width)))
            swap = arith.shrui(row, integer({64: 0, 32: 1, 16: 2}[width]))
            column = lambda i: arith.xori(arith.addi(piece, integer(2 * i)), swap)
            return [arith.addi(start, arith.muli(column(i), integer(16))) for i in range(width // 16)]

        self.of_keys = places(tile.qk, 8192, widths.qk)
        self.of_steps = places(tile.g, 4096, widths.g)
        carry = arith.addi(address_of(tile.carry), arith.muli(self.warp, integer(4 * CHANNELS)))
        self.of_carry = arith.addi(carry, arith.muli(self.c, integer(8)))
        self.places = tile.qk, tile.g, carry

        self.memory, self.strides = raw[:3], (raw.strides[0], *raw.strides)

        first, one = arith.muli(self.c, integer(2)), 0x3C00 if widths.half else 0x3F80
        pair = [
            arith.select(arith.cmpi(arith.CmpIPredicate.uge, self.r, column), integer(bits), self.zero)
            for column, bits in ((first, one), (arith.addi(first, integer(1)), one << 16))
        ]
        own = arith.addi(*pair)
        self.triangle = [own, integer(one << 16 | one), self.zero, own]

    def number(self, x: float) -> Any:
        return mgpu.c(x, ir.F32Type.get())

    def by_rows(self, numbers: list) -> list:
        """Numbers of the rows r and r + 8 for the eight places that a thread has."""
        first, second = numbers
        return [first, first, second, second] * 2

    def times(self, a: list, b: list) -> list:
        return [arith.mulf(x, y) for x, y in zip(a, b, strict=True)]

    def negative(self, block: list) -> list:
        """Of pairs of bf16."""
        return [utils.inline_ptx("neg.bf16x2 $0, $1;", x, result_types=i32()) for x in block]

    def last(self, number: Any) -> Any:
        """What the warp's last row has, in all rows."""
        ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        return utils.inline_ptx(ptx, number, integer(28), result_types=ir.F32Type.get(), convergent=True)

    def of_last_row(self, block: list) -> list:
        """A block of float32 that has its last row in all rows."""
        lane, ptx = arith.addi(self.c, integer(28)), "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        pairs = [
            [
                utils.inline_ptx(ptx, x, lane, result_types=ir.F32Type.get(), convergent=True)
                for x in block[i : i + 2]
            ]
            for i in (2, 6)
        ]
        return [*pairs[0] * 2, *pairs[1] * 2]

    def exp2(self, x: Any) -> Any:
        return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())

    def least(self, numbers: list) -> Any:
        out, *rest = numbers
        for x in rest:
            out = arith.minimumf(out, x)
        return out

    def least_of_row(self, x: Any) -> Any:
        for distance in (1, 2):
            ptx = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;"
            x = self.least([x, utils.inline_ptx(ptx, x, result_types=ir.F32Type.get(), convergent=True)])
        return x

    def of_diagonal(self, pair: list) -> Any:
        """Of 8 x 8 float32 that on the diagonal of a thread's row."""
        odd = equal(arith.andi(self.r, integer(1)), integer(1))
        lane = arith.addi(arith.muli(self.r, integer(4)), arith.shrui(self.r, integer(1)))
        ptx = "shfl.sync.idx.b32 $0, $1, $2, 31, -1;"
        x = arith.select(odd, *reversed(pair))
        return utils.inline_ptx(ptx, x, lane, result_types=ir.F32Type.get(), convergent=True)

    def norms(self, l2norm: bool, scale: float) -> tuple[list, list, list]:
        """What scales k and q, |k|^2 and the scores' diagonal, of the rows r and r + 8."""
        k_first, k_last, q_first, q_last = [[self.number(0.0)] * 4] * 4
        for step in range(CHANNELS // ROWS):
            k, q = self.keys(step), self.queries(step)
            # Rows of k, then of q, against the same rows of k: the diagonals are |k|^2 and q k.
            k_first = self.half([k[0], q[0], k[2], q[2]], [k[0], k[2]], k_first, "bf16")
            k_last = self.half([k[1], q[1], k[3], q[3]], [k[1], k[3]], k_last, "bf16")
            if l2norm:
                q_first = self.half(q, [q[0], q[2]], q_first, "bf16")
                q_last = self.half(q, [q[1], q[3]], q_last, "bf16")
        squares, own = ([self.of_diagonal(x[i : i + 2]) for x in (k_first, k_last)] for i in (0, 2))
        scale_ = self.number(scale)
        if not l2norm:
            return [[self.number(1.0)] * 2, [scale_] * 2], squares, self.times(own, [scale_] * 2)
        of_k = [self.inverse_root(x) for x in squares]
        of_q = [self.inverse_root(self.of_diagonal(x)) for x in (q_first[:2], q_last[2:])]
        of_q = self.times(of_q, [scale_] * 2)
        both = self.times(of_k, of_q)
        return [of_k, of_q], squares, self.times(own, both)

    def inverse_root(self, x: Any) -> Any:
        x = arith.addf(x, self.number(L2NORM_EPS))
        return utils.inline_ptx("rsqrt.approx.ftz.f32 $0, $1;", x, result_types=ir.F32Type.get())

    def sums(self, step: int) -> list:
        """G in base 2 of the channels from 16 step on."""
        return self.sums_of(self._load(self._of_steps(step), ".trans"))

    def sums_of(self, steps: list) -> list:
        """G in base 2 of log-decays as a right operand."""
        if self.widths.half:
            return self.product(self.triangle, steps, kind="f16")
        least = integer(int(np.asarray(LEAST, BF16).view(np.uint16)) * 0x10001)
        ptx = "max.NaN.bf16x2 $0, $1, $2;"
        steps = [utils.inline_ptx(ptx, x, least, result_types=i32()) for x in steps]
        totals = self.product(self.triangle, steps, kind="bf16")
        return self.times(totals, [self.number(LOG2E)] * 8)

    def keys(self, step: int) -> list:
        return self._load(self._of_keys(step, 0))

    def queries(self, step: int) -> list:
        return self._load(self._of_keys(step, 1))

    def _of_keys(self, step: int, which: int) -> Any:
        return arith.addi(self._of(self.of_keys, self.widths.qk, step), integer(4096 * which))

    def _of_steps(self, step: int) -> Any:
        return self._of(self.of_steps, self.widths.g, step)

    def _of(self, places: list, width: int, step: int) -> Any:
        across, column = divmod(step, len(places))
        return arith.addi(places[column], integer(16 * width * across))

    def _load(self, address: Any, turned: str = "") -> list:
        ptx = f"ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        options: dict = dict(result_types=[i32()] * 4, has_side_effects=True, convergent=True)
        return list(utils.inline_ptx(ptx, address, **options))

    def raw(self, step: Any) -> list:
        """k, q and log-decays as they are in global memory; step: known to the device."""
        blocks_: list = []
        for memory, stride in zip(self.memory, self.strides, strict=True):
            row = arith.addi(arith.muli(self.warp, integer(ROWS)), self.r)
            offset = arith.addi(arith.muli(row, integer(stride)), arith.muli(self.c, integer(4)))
            offset = arith.extui(i64(), arith.addi(offset, arith.muli(step, integer(2 * ROWS))))
            start = arith.addi(llvm.ptrtoint(i64(), utils.memref_ptr(memory)), offset)
            parts = [8 * stride * row + 16 * column for column, row in itertools.product((0, 1), repeat=2)]
            places = [arith.addi(start, mgpu.c(part, i64())) for part in parts]
            ptx = "ld.global.nc.b32 $0, [$1];"
            blocks_.append([utils.inline_ptx(ptx, place, result_types=i32()) for place in places])
        return blocks_

    def of_steps_at(self, step: Any) -> Any:
        """As `_of_steps`; step: known to the device."""
        few = len(self.of_steps)
        inner, across = arith.andi(step, integer(few - 1)), arith.shrui(step, integer(few.bit_length() - 1))
        # Pieces of 16 bytes are numbered in their row; a step is two.
        place = arith.xori(self.of_steps[0], arith.muli(inner, integer(32)))
        return arith.addi(place, arith.muli(across, integer(16 * self.widths.g)))

    def pairs_and(self, pairs: list, x: list, z: list, y: list) -> list:
        """And what 16 channels more give: of parts of 8 rows and columns the first columns of L, and of
        the scores, and the last corner of both."""
        first, second, corner = pairs[:4], pairs[4:8], pairs[8:]
        first = first if self.beta is None else self.half(x, [y[0], y[2]], first, "bf16")
        second = self.half(z, [y[0], y[2]], second, "bf16")
        return [*first, *second, *self.half([x[1], z[1], x[3], z[3]], [y[1], y[3]], corner, "bf16")]

    def put_copies(self, step: int, x: list, z: list) -> None:
        for which, block in list(enumerate((x, z)))[self.beta is None :]:
            self.put_at(self._of_keys(step, which), block)

    def put_written(self, step: int, block: list) -> None:
        self.put_at(self._of_steps(step), self.in_bf16(block))

    def put_at(self, address: Any, block: list) -> None:
        ptx = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
        utils.inline_ptx(ptx, address, *block, convergent=True)

    def put_norms(self, norms: list, row: int = 0) -> None:
        """Each of the rows r and r + 8, by one of the four threads that have them; row: of `norms`."""
        if self.norm_rows is None:
            return
        token = arith.addi(arith.muli(self.warp, integer(ROWS)), self.r)
        address = arith.addi(address_of(self.norm_rows), arith.muli(token, integer(4)))
        for which, pair in enumerate(norms, row):
            for eight, number in enumerate(pair):
                place = arith.addi(address, integer(4 * C * which + 32 * eight))
                utils.inline_ptx("st.shared.f32 [$0], $1;", place, number, predicate=equal(self.c, self.zero))

    def of_one_document(self, block: list) -> list:
        """Of pairs of tokens, those that no document's start is between."""
        if self.starts is None:
            return block
        place = arith.addi(arith.muli(self.warp, integer(ROWS)), arith.muli(self.c, integer(2)))
        address = arith.addi(address_of(self.starts), arith.muli(place, integer(4)))
        columns = [self.shared(arith.addi(address, integer(4 * column))) for column in (0, 1, 8, 9)]
        pairs = zip(self.by_row(self.starts), [*columns[:2] * 2, *columns[2:] * 2], block, strict=True)
        equal_ = arith.CmpFPredicate.OEQ
        return [arith.select(arith.cmpf(equal_, i, j), x, self.number(0.0)) for i, j, x in pairs]

    def part_documents(self) -> None:
        """Clears what tokens after the chunk's first start of a document would read of the state, what those
        before its last would write to it, and the carry if there is one."""
        if self.starts is None:
            return
        after = lambda x, y: arith.cmpf(arith.CmpFPredicate.OLT, y, x)
        first, _, second, *_ = self.by_row(self.starts)
        last = self.last(second)
        qk, g, carry = self.places
        # Rows were put by other threads of the warp.
        utils.inline_ptx("bar.warp.sync 0xffffffff;", convergent=True)
        for which, number in enumerate((first, second)):
            row = arith.addi(self.r, integer(8 * which))
            for x in range(self.beta is None, 2):
                start = arith.addi(address_of(qk), arith.muli(self.warp, integer(8192)))
                self.clear(start, 4096 * x, row, self.widths.qk, after(number, self.number(0.0)))
            start = arith.addi(address_of(g), arith.muli(self.warp, integer(4096)))
            self.clear(start, 0, row, self.widths.g, after(last, number))
        self.put_zeros(arith.addi(carry, arith.muli(self.lane, integer(16))), after(last, self.number(0.0)))

    def clear(self, start: Any, offset: int, row: Any, width: int, wanted: Any) -> None:
        """A row of a tile, by the four threads that have it: 16 pieces, of which some are swapped."""
        eight, inner = arith.shrui(row, integer(3)), arith.andi(row, integer(7))
        place = arith.addi(arith.muli(eight, integer(2048)), arith.muli(inner, integer(2 * width)))
        in_row = width // 8
        across, piece = self.zero, self.c
        if in_row == 2:
            across, piece = arith.shrui(self.c, integer(1)), arith.andi(self.c, integer(1))
        place = arith.addi(place, arith.muli(across, integer(16 * width)))
        place = arith.addi(arith.addi(start, place), arith.muli(piece, integer(16)))
        for first in range(0, 16, 4):
            inside = first // in_row * 16 * width + first % in_row * 16
            self.put_zeros(arith.addi(place, integer(offset + inside)), wanted)

    def put_zeros(self, address: Any, wanted: Any) -> None:
        ptx = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
        utils.inline_ptx(ptx, address, *[self.zero] * 4, predicate=wanted)

    def put_carry(self, step: int, decay: list) -> None:
        """The chunk's last row."""
        last = equal(self.r, integer(7))
        for eight in range(2):
            address = arith.addi(self.of_carry, integer(64 * step + 32 * eight))
            pair = decay[4 * eight + 2 : 4 * eight + 4]
            utils.inline_ptx("st.shared.v2.f32 [$0], {$1, $2};", address, *pair, predicate=last)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)
