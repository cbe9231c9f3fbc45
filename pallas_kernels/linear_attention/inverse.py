"""(I + L)^-1 for the delta rule, by recursion over blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def solve_unit_lower(L_NCC: jax.Array, rhs_NCD: jax.Array, precision: Precision) -> jax.Array:
    """(I + strictly_lower(L))^-1 rhs, batched over N, C a power of two; nothing else of L is read.

    The inverse is built up from blocks of one, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]], which
    is as stable as forward substitution; a power series of L is not: its terms grow without bound when keys
    repeat. It is always computed in full precision; ``precision`` is that of its products with the right-hand
    side and with cotangents. Residuals of the gradient: the inverse and the solution.
    """
    return _forward(L_NCC, rhs_NCD, precision)[0]


def _forward(L: jax.Array, rhs: jax.Array, precision: Precision) -> tuple:
    inverse = inverse_unit_lower(L)
    solution = jnp.matmul(inverse, rhs, precision=precision)
    return solution, (inverse, solution)


def _backward(precision: Precision, residuals: tuple, bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solution = residuals
    rhs_bar = jnp.matmul(inverse.mT, bar, precision=precision)
    return -jnp.tril(jnp.matmul(rhs_bar, solution.mT, precision=precision), -1), rhs_bar


solve_unit_lower.defvjp(_forward, _backward)


def inverse_unit_lower(L_NCC: jax.Array) -> jax.Array:
    """(I + strictly_lower(L))^-1 [N, C, C]."""
    blocks: list[jax.Array] = []  # [N * C / 2s, s, s] for s = 1, 2, 4 ...: below each pair of diagonal blocks
    rest, s = L_NCC, L_NCC.shape[-1] // 2
    while s:
        blocks.insert(0, rest[:, s:, :s])
        rest = jnp.stack([rest[:, :s, :s], rest[:, s:, s:]], axis=1).reshape(-1, s, s)
        s //= 2
    inverse = jnp.ones_like(rest)
    product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)
    for block in blocks:
        s = block.shape[-1]
        pairs = inverse.reshape(-1, 2, s, s)
        first, second = pairs[:, 0], pairs[:, 1]
        below = -block if s == 1 else -product(product(second, block), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
    return inverse
