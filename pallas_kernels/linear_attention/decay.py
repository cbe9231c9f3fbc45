"""Decayed inner products inside a chunk, exact for any decay.

With w_ij = exp(g_{j+1} + ... + g_i) per channel, the chunk needs A_ij = sum_d x_id y_jd w_ijd for i > j. As
a quotient exp(G_i) / exp(G_j) of cumulative sums w_ij overflows, as exp(G_i - G_j) it cancels. Here the
pair (i, j) is served by the one level of a binary tree at which j lies in a block and i in the next: w_ij
is the decay after j to the end of j's block times the decay from the start of i's block up to i. All
factors are products of numbers in [0, 1], each level is a batch of matrix products, and the gradient of g
is a sum over exactly the pairs that span the token, so nothing cancels there either. A decay of -inf (a
reset) is allowed.

Shape legend: N independent chunks, C chunk length (a power of two), R kinds of row, D channels, M = N*C/2s.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision

Level = tuple[int, jax.Array, jax.Array]

FORGET = -1e4  # a log-decay whose exponential is 0 in float64 too


def decay_matrix(g_NC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For one decay a token: exp(g_{j+1} + ... + g_i) at [i, j], else 0, [N, C, C]; prefix, suffix [N, C].

    prefix and suffix as in `decayed_products`. The sums are matrix products of terms of one sign, no
    differences.
    """
    C = g_NC.shape[1]
    lower = jnp.tril(jnp.ones((C, C), g_NC.dtype))
    g_NC = jnp.maximum(g_NC, FORGET)  # 0 * -inf would be NaN in the product
    later_NCC = g_NC[:, :, None] * jnp.tril(lower, -1)[None]
    sums_NCC = jnp.matmul(lower, later_NCC, precision=Precision.HIGHEST)
    decay_NCC = jnp.where(lower[None] > 0, jnp.exp(sums_NCC), 0)
    return decay_NCC, jnp.exp(g_NC[:, :1]) * decay_NCC[:, :, 0], decay_NCC[:, -1]


def decay_ends(g_NCD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """prefix, suffix [N, C, D] of `decayed_products`, alone."""
    return _tree(g_NCD)[1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def decayed_products(
    x_NCRD: jax.Array, y_NCD: jax.Array, g_NCD: jax.Array, precision: Precision
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Products of rows x_i with rows y_j <= i under the log-decay g between them, for R kinds of row at once.

    Returns:
        A [N, C, R, C]: sum_d x_ird y_jd exp(g_{j+1..i})_d for j <= i (at j = i no decay), 0 elsewhere.
        prefix [N, C, D]: exp(g_0 + ... + g_i), the decay from the chunk's start up to and including token i.
        suffix [N, C, D]: exp(g_{j+1} + ... + g_{C-1}), the decay after token j to the chunk's end.
    Residuals of the gradient: the three inputs.
    """
    return _forward(x_NCRD, y_NCD, g_NCD, precision)[0]


def _forward(x: jax.Array, y: jax.Array, g: jax.Array, precision: Precision) -> tuple:
    N, C, R, _ = x.shape
    levels, prefix, suffix = _tree(g)
    A = jnp.sum(x * y[:, :, None], axis=-1).reshape(N * C, 1, R, 1)
    for s, up_to, after in levels:
        x_s, y_s = _rows(_halves(x, s)[1] * up_to[:, :, None]), _halves(y, s)[0] * after
        block = jnp.matmul(x_s, y_s.mT, precision=precision).reshape(-1, s, R, s)
        first, second = _halves(A, s)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        A = jnp.concatenate([top, jnp.concatenate([block, second], axis=-1)], axis=1)
    return (A, prefix, suffix), (x, y, g)


def _backward(precision: Precision, residuals: tuple, cotangents: tuple) -> tuple:
    x, y, g = residuals
    A_bar, prefix_bar, suffix_bar = cotangents
    N, C, R, _ = x.shape
    levels, prefix, suffix = _tree(g)
    # Cotangents of the logarithms of the tree's nodes at the current level, token by token.
    up_to_bar, after_bar = prefix * prefix_bar, suffix * suffix_bar
    x_bar, y_bar = jnp.zeros_like(x), jnp.zeros_like(y)
    for s, up_to, after in reversed(levels):
        block = _rows(A_bar[:, s:, :, :s])
        A_bar = jnp.stack([A_bar[:, :s, :, :s], A_bar[:, s:, :, s:]], axis=1).reshape(-1, s, R, s)
        x_s, y_s = _halves(x, s)[1] * up_to[:, :, None], _halves(y, s)[0] * after
        x_s_bar = jnp.matmul(block, y_s, precision=precision).reshape(x_s.shape)
        y_s_bar = jnp.matmul(block.mT, _rows(x_s), precision=precision)
        x_bar_1, x_bar_2 = _halves(x_bar, s)
        y_bar_1, y_bar_2 = _halves(y_bar, s)
        x_bar = _join(x_bar_1, x_bar_2 + x_s_bar * up_to[:, :, None], C)
        y_bar = _join(y_bar_1 + y_s_bar * after, y_bar_2, C)
        # A parent's node is its child's, times the total of the other child for one half of the tokens;
        # a child's total is the node of its last token.
        up_to_1, up_to_2 = _halves(up_to_bar, s)
        after_1, after_2 = _halves(after_bar, s)
        last = (jnp.arange(s) == s - 1)[:, None]
        up_to_1 += jnp.where(last, jnp.sum(up_to_2, axis=1, keepdims=True), 0)
        up_to_2 += jnp.where(last, jnp.sum(after_1, axis=1, keepdims=True), 0)
        up_to_2 += _sum_rows(x_s, x_s_bar)
        up_to_bar, after_bar = _join(up_to_1, up_to_2, C), _join(after_1 + y_s * y_s_bar, after_2, C)
    diagonal = A_bar.reshape(N, C, R, 1)
    x_bar += diagonal * y[:, :, None]
    y_bar += _sum_rows(jnp.broadcast_to(diagonal, x.shape), x)
    return x_bar, y_bar, up_to_bar


decayed_products.defvjp(_forward, _backward)


def _tree(g_NCD: jax.Array) -> tuple[list[Level], jax.Array, jax.Array]:
    """The levels (s, up_to, after), and the whole chunk's prefix and suffix products.

    At level s, for all pairs of neighbouring blocks of s tokens: up_to [M, s, D] is the decay from the second
    block's start up to and including each of its tokens, after [M, s, D] the decay after each token of the
    first block to this block's end.
    """
    C = g_NCD.shape[1]
    up_to = jnp.exp(g_NCD)
    after = jnp.ones_like(up_to)
    levels: list[Level] = []
    s = 1
    while s < C:
        up_to_1, up_to_2 = _halves(up_to, s)
        after_1, after_2 = _halves(after, s)
        levels.append((s, up_to_2, after_1))
        up_to = _join(up_to_1, up_to_2 * up_to_1[:, -1:], C)
        after = _join(after_1 * up_to_2[:, -1:], after_2, C)
        s *= 2
    return levels, up_to, after


def _halves(x: jax.Array, s: int) -> tuple[jax.Array, jax.Array]:
    """x [N, C, ...] in blocks of s tokens: the first and the second of each pair, [M, s, ...]."""
    pairs = x.reshape(-1, 2, s, *x.shape[2:])
    return pairs[:, 0], pairs[:, 1]


def _join(first: jax.Array, second: jax.Array, C: int) -> jax.Array:
    """The inverse of `_halves`: [N, C, ...]."""
    return jnp.stack([first, second], axis=1).reshape(-1, C, *first.shape[2:])


def _rows(x_MsRD: jax.Array) -> jax.Array:
    return x_MsRD.reshape(x_MsRD.shape[0], -1, x_MsRD.shape[-1])


def _sum_rows(a_NCRD: jax.Array, b_NCRD: jax.Array) -> jax.Array:
    """sum over R of a * b, written out: jaxlib 0.10's CPU compiler crashes on a reduction fused here."""
    kinds = (a_NCRD[:, :, r] * b_NCRD[:, :, r] for r in range(a_NCRD.shape[2]))
    return functools.reduce(jnp.add, kinds)
