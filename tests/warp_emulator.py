"""The PTX of hopper/inverse.py and hopper/one_pass*.py in numpy: a register is an array of 128 threads."""

import functools
import itertools
import types

import numpy as np

THREADS = np.arange(128)
GROUP, PAIR = (
    np.arange(32) // 4,
    2 * (np.arange(32) % 4),
)  # of a thread in its warp: row, first column of 8 x 8
WARPS = [slice(w, w + 32) for w in range(0, 128, 32)]


def place(part):
    """Rows and first columns, by thread, of part (8 columns, 8 rows of each warp) of a 64 x 64 tile."""
    column, half = part
    return 16 * (THREADS // 32) + 8 * half + (THREADS % 32) // 4, 8 * column + 2 * (THREADS % 4)


def pair(low, high):
    """Two float16 in a register."""
    low, high = (np.asarray(x, np.float16).view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | high << 16


def bf16(register):
    return [(register << shift & np.uint32(0xFFFF0000)).view(np.float32) for shift in (16, 0)]


def halves(register):
    return [(register >> shift).astype(np.uint16).view(np.float16) for shift in (0, 16)]


def _bf16_pair(low, high):
    bits = [x.view(np.uint32) for x in (low, high)]
    low, high = (b + 0x7FFF + (b >> 16 & 1) >> 16 for b in bits)
    return low | high << 16


def _matrix(registers, warp, order, numbers=halves):
    """The 8 x 8 parts at `order`, [(row, column)], that a warp holds in pairs."""
    out = np.zeros((16, 16))
    for register, (i, j) in zip(registers, order, strict=True):
        for e, x in enumerate(numbers(register)):
            out[8 * i + GROUP, 8 * j + PAIR + e] = x[warp]
    return out


def _transpose(register):
    out = np.zeros((2, 128), np.float16)
    for warp in WARPS:
        tile = _matrix([register], warp, [(0, 0)])[:8, :8].T
        out[0, warp], out[1, warp] = tile[GROUP, PAIR], tile[GROUP, PAIR + 1]
    return pair(*out)


def _shuffled(x, lane):
    return np.concatenate([x[warp][lane[warp]] for warp in WARPS])


def _multiply(*registers, numbers=halves):
    a, b, c = registers[:4], registers[4:6], registers[6:]
    out = np.zeros((4, 128), np.float32)
    for warp in WARPS:
        left = _matrix(a, warp, [(0, 0), (1, 0), (0, 1), (1, 1)], numbers)
        right = _matrix(b, warp, [(0, 0), (0, 1)], numbers)[
            :8
        ].T  # its columns are spread like the rows of the left
        product = left @ right
        for i in range(4):
            out[i, warp] = c[i][warp] + product[8 * (i // 2) + GROUP, PAIR + i % 2]
    return list(out)


def _loop(bound, carried, body):
    """Warps that are done keep what they have; what they store must be as it was."""
    for i in range(bound.max()):
        new = body(np.full(128, i, np.uint32), carried)
        carried = [np.where(i < bound, x, y) for x, y in zip(new, carried, strict=True)]
    return carried


class Memory:
    """Shared memory: words of 32 bits by address."""

    def __init__(self):
        self.words = np.zeros(1 << 15, np.uint32)

    def fill(self, address, values):
        """Puts a numpy array of 16 or 32 bits there."""
        words = np.ascontiguousarray(values).view(np.uint32).ravel()
        self.words[address // 4 : address // 4 + words.size] = words

    def store(self, address, *block, predicate=True):
        for thread in np.flatnonzero(np.broadcast_to(predicate, 128)):
            start = address[thread] // 4
            self.words[start : start + len(block)] = [x[thread] for x in block]

    def store_numbers(self, address, *numbers, predicate):
        self.store(address, *(np.float32(x).view(np.uint32) for x in numbers), predicate=predicate)

    def load(self, address):
        return [self.words[address // 4 + i] for i in range(4)]

    def load_word(self, address):
        return self.words[address // 4]

    def load_number(self, address):
        return self.words[address // 4].view(np.float32)

    def load_matrices(self, address):
        """Lane 8 m + r has the address of row r of matrix m; lane t gets pair t % 4 of row t // 4."""
        return [self.words[place] for place in self._matrices(address)]

    def load_turned(self, address):
        return [_transpose(register) for register in self.load_matrices(address)]

    def store_matrices(self, address, *block):
        for place, register in zip(self._matrices(address), block, strict=True):
            self.words[place] = register

    def _matrices(self, address):
        lanes = np.arange(32)
        rows = lambda matrix: np.concatenate([address[warp][8 * matrix + lanes // 4] for warp in WARPS])
        return [rows(matrix) // 4 + np.tile(lanes % 4, 4) for matrix in range(4)]


def patch(monkeypatch, *modules):
    """Makes the modules' MLIR builders compute at once. Returns their `Memory`; references are addresses."""
    memory = Memory()
    instructions = {
        "cvt.rn.f16x2.f32": pair,
        "cvt.rn.bf16x2.f32": _bf16_pair,
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;": lambda x: [
            bits.view(np.float32) for bits in (x << 16, x & np.uint32(0xFFFF0000))
        ],
        "{.reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16": lambda x: np.float32(halves(x)[0]),
        "{.reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16": lambda x: map(np.float32, halves(x)),
        "movmatrix.sync.aligned.m8n8.trans.b16": _transpose,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": _multiply,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": functools.partial(_multiply, numbers=bf16),
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": memory.load_matrices,
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": memory.load_turned,
        "stmatrix.sync.aligned.m8n8.x4.shared.b16": memory.store_matrices,
        "max.NaN.bf16x2": lambda a, b: _bf16_pair(*map(np.maximum, bf16(a), bf16(b))),
        "mov.b32": lambda x: x,
        "neg.bf16x2": lambda x: x ^ np.uint32(0x80008000),
        "ex2.approx.ftz.f32": np.exp2,
        "rsqrt.approx.ftz.f32": lambda x: 1 / np.sqrt(x),
        "shfl.sync.bfly.b32 $0, $1, 1,": lambda x: x[THREADS ^ 1],
        "shfl.sync.bfly.b32 $0, $1, 2,": lambda x: x[THREADS ^ 2],
        "shfl.sync.idx.b32": _shuffled,
        "ld.shared.f32": memory.load_number,
        "ld.global.nc.b32": memory.load_word,
        "st.shared.v4.b32": memory.store,
        "st.shared.v2.f32": memory.store_numbers,
        "st.shared.f32": memory.store_numbers,
        "ld.shared.v4.b32": memory.load,
        "bar.warp.sync": lambda: None,
    }

    def inline_ptx(ptx, *operands, predicate=None, **_):
        (run,) = (run for start, run in instructions.items() if ptx.startswith(start))
        return run(*operands) if predicate is None else run(*operands, predicate=predicate)

    dtypes = {"i32": np.uint32, "i64": np.uint32, "f32": np.float32}
    number = lambda value, kind: np.full(128, value, dtypes[kind])
    names = types.SimpleNamespace
    replacements = dict(
        ir=names(IntegerType=names(get_signless=lambda bits: f"i{bits}"), F32Type=names(get=lambda: "f32")),
        arith=names(
            andi=np.bitwise_and,
            addi=np.add,
            muli=np.multiply,
            shrui=np.right_shift,
            addf=np.add,
            subf=np.subtract,
            mulf=np.multiply,
            negf=np.negative,
            minimumf=np.minimum,
            xori=np.bitwise_xor,
            extui=lambda kind, x: x,
            fptosi=lambda kind, x: x.astype(np.int64).astype(np.uint32),
            sitofp=lambda kind, x: np.asarray(x, np.float32),
            cmpf=lambda compare, a, b: compare(a, b),
            CmpFPredicate=names(OLT=np.less, OEQ=np.equal),
            select=np.where,
            cmpi=lambda compare, a, b: compare(a, b),
            CmpIPredicate=names(eq=np.equal, ult=np.less, uge=np.greater_equal, ugt=np.greater),
        ),
        llvm=names(ptrtoint=lambda kind, pointer: pointer),
        mgpu=names(c=number),
        utils=names(
            thread_idx=lambda: THREADS.astype(np.uint32),
            warp_idx=lambda: (THREADS // 32).astype(np.uint32),
            memref_ptr=lambda memory: number(memory or 0, "i32"),
            warpgroup_barrier=lambda: None,
            inline_ptx=inline_ptx,
            fori=lambda bound, carried: lambda body: names(results=_loop(bound, carried, body)),
        ),
    )
    for module, (name, replacement) in itertools.product(modules, replacements.items()):
        monkeypatch.setattr(module, name, replacement, raising=False)
    return memory
