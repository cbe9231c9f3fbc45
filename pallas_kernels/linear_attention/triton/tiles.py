"""What the kernels of this folder share: products of tiles, and the levels of a chunk's pairs of tokens.

Every pair (i, j), j < i, of a chunk's C tokens is of the one level s = 2^n (1, 2, 4, ... C/2) at which j lies
in a block of s tokens and i in the next of the same pair. All tiles have C rows; masks take their parts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import here
from pallas_kernels.linear_attention.triton.launch import warpgroup_products

C = 64
LEVELS = (C - 1).bit_length()
F32, BF16 = jnp.float32, jnp.bfloat16


def dot(a: Any, b: Any, over: tuple[int, int] = (1, 0)) -> Any:
    """The product of two tiles summed ``over`` an axis of each, float32; bf16 operands."""
    dims = (((over[0],), (over[1],)), ((), ()))
    a, b = a.astype(BF16), b.astype(BF16)
    if here().platform == "cpu":  # interpreted; XLA has not all such products there
        a, b = a.astype(F32), b.astype(F32)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=F32)


def split(a: Any) -> tuple[Any, Any]:
    """``a`` as the sum of two bf16, right to 2^-17."""
    high = a.astype(BF16)
    return high, (a - high.astype(F32)).astype(BF16)


def fine_dot(a: Any, b: Any) -> Any:
    """a @ b with operands of two bf16 each: relative error 2^-16."""
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    return dot(a_low, b_high) + dot(a_high, b_low) + dot(a_high, b_high)


def exp(x: Any, interpret: bool) -> Any:
    """Two instructions, of which `jnp.exp` is eight and `jnp.exp2` five; below 2^-126 it is 0.

    Where products take registers `jnp.exp2` has to do: with the former ptxas spills more.
    """
    exponent = x * math.log2(math.e)
    if interpret or not warpgroup_products():
        return jnp.exp2(exponent)
    [result] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[exponent],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, F32)],
    )
    return result


def grid() -> tuple[Any, Any]:
    """The row and the column of every place of a C by C tile."""
    shape = (C, C)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def pairs(n: Any) -> Any:
    """Where (row, column) is a pair of level 2^n; made of numbers a row, which leaves registers free."""
    i, j = _rows_and_columns()
    first = (i >> n) - 1 << n  # of the block before the row's
    return (j >= first) & (j < first + ((i >> n & 1) << n))


def inverse_less_one(L: Any) -> Any:
    """(I + L)^-1 - I for a strictly lower L, by doubling of inverted diagonal blocks: X - X B X.

    As stable as forward substitution; a power series of L would not be.
    """
    i, j = grid()

    def double(n: Any, X: Any) -> Any:
        return X - fine_dot(X, fine_dot(jnp.where(pairs(n), L, 0.0), X))

    X = jnp.where(i == j, 1.0, 0.0) - jnp.where(pairs(0), L, 0.0)
    return jnp.where(i > j, jax.lax.fori_loop(1, LEVELS, double, X), 0.0)


def masks() -> np.ndarray:
    """[3, LEVELS, C, C] of 0 and 1, which kernels read: making one takes hundreds of instructions a thread.

    0: S, such that S @ g are the sums of steps between a token and the border of its pair of blocks: of the
    second block from the border up to and including it, of the first block after it.  1: S transposed.
    2: `pairs`, or its transposed.
    """
    n, i, t = np.ogrid[:LEVELS, :C, :C]
    before = (i >> (n + 1) << (n + 1)) + (1 << n) - 1  # the last token before the border
    which = (t > np.minimum(i, before)) & (t <= np.maximum(i, before))
    return np.stack([which, which.swapaxes(1, 2), (i >> n ^ 1) == t >> n])


def _rows_and_columns() -> tuple[Any, Any]:
    return jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0), jax.lax.broadcasted_iota(jnp.int32, (1, C), 1)


def sums(where: Any, steps: tuple[Any, ...]) -> Any:
    """Sums over the tokens ``where`` [C, C] of steps given as a sum of bf16 tiles [C, K]."""
    ones = where if where.dtype == BF16 else where.astype(F32).astype(BF16)
    total = dot(ones, steps[0])
    for rest in steps[1:]:
        total += dot(ones, rest)
    return total
