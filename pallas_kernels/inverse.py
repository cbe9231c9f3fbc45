"""(I + L)^-1 for the delta rule, by recursion over blocks."""

import jax
import jax.numpy as jnp
from jax.lax import Precision


@jax.custom_vjp
def solve_unit_lower(L_NCC: jax.Array, rhs_NCD: jax.Array) -> jax.Array:
    """(I + strictly_lower(L))^-1 rhs, batched over N, C a power of two; nothing else of L is read.

    The inverse is built up from blocks of one, [[P, 0], [B, Q]]^-1 = [[P^-1, 0], [-Q^-1 B P^-1, Q^-1]], which
    is as stable as forward substitution; a power series of L is not: its terms grow without bound when keys
    repeat.
    Always in full precision. Residuals of the gradient: the inverse and the solution.
    """
    return _forward(L_NCC, rhs_NCD)[0]


def _forward(L: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    inverse = inverse_unit_lower(L)
    solution = _matmul(inverse, rhs)
    return solution, (inverse, solution)


def _backward(residuals: tuple[jax.Array, jax.Array], bar: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse, solution = residuals
    rhs_bar = _matmul(inverse.mT, bar)
    return -jnp.tril(_matmul(rhs_bar, solution.mT), -1), rhs_bar


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
    for block in blocks:
        s = block.shape[-1]
        pairs = inverse.reshape(-1, 2, s, s)
        first, second = pairs[:, 0], pairs[:, 1]
        below = -block if s == 1 else -_matmul(_matmul(second, block), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
    return inverse


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=Precision.HIGHEST)
