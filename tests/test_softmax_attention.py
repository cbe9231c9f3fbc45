"""Blockwise attention and its token cache against a naive float64 softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import softmax_attention
from hybridlm.rows import Rows
from hybridlm.softmax_attention import TokenCache, append, attend, blockwise, fused, packed_indices, slots

POSITIONS = np.stack([np.r_[np.arange(5), np.arange(1), np.arange(17)], np.r_[np.arange(3), np.arange(20)]])


def naive(q, k, v, positions, scale, window):
    """Token by token: which keys are of the same document, not later and in the window."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    document = np.cumsum(positions == 0, axis=1)
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t in np.ndindex(*q.shape[:2]):
        seen = [
            s for s in range(t + 1) if document[b, s] == document[b, t] and (not window or t - s < window)
        ]
        scores = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        o[b, t] = np.einsum("hs,shv->hv", weights / weights.sum(-1, keepdims=True), v[b, seen])
    return o


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 23, 6, 4), "k": (2, 23, 2, 4), "v": (2, 23, 2, 3)}
    return [np.float32(rng.normal(size=shape)) for shape in shapes.values()]


@pytest.mark.parametrize("block", [1024, 8, "fused"])
@pytest.mark.parametrize("window", [0, 6])
def test_against_naive_softmax(arrays, block, window, monkeypatch):
    monkeypatch.setattr(softmax_attention, "MAX_BLOCK", block)
    rows = Rows(None, jnp.asarray(POSITIONS))

    @jax.jit
    def run(q, k, v):
        if block == "fused":  # the rewriting for cuDNN, in XLA's arithmetic
            return fused(q, k, v, rows, 0.4, window, "xla")
        return attend(q, k, v, rows, scale=0.4, window=window)

    # The document codes of `fused` add up to 1000 to the scores, which costs their last digits.
    tolerance = 1e-3 if block == "fused" else 2e-6
    expected = naive(*arrays, POSITIONS, 0.4, window)
    np.testing.assert_allclose(run(*arrays), expected, atol=tolerance)
    rng = np.random.default_rng(1)
    do = rng.normal(size=expected.shape)
    grads = jax.jit(jax.grad(lambda *a: (run(*a) * np.float32(do)).sum(), (0, 1, 2)))(*arrays)
    directions = [rng.normal(size=x.shape) for x in arrays]

    def along(n, step):  # the naive loss, its nth input moved
        moved = [
            x + step * d if m == n else x for m, (x, d) in enumerate(zip(arrays, directions, strict=True))
        ]
        return (naive(*moved, POSITIONS, 0.4, window) * do).sum()

    for n, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        slope = (along(n, 1e-5) - along(n, -1e-5)) / 2e-5
        np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-4, atol=5 * tolerance)


def test_long_rows_never_hold_all_scores():
    shape = jax.ShapeDtypeStruct((1, 32768, 2, 16), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def loss(q, k, v, positions):
        return attend(q, k, v, Rows(positions, positions), scale=1.0).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32768**2 * 4 / 16  # of one head's T x T float32


@partial(jax.jit, static_argnames="window")
def extend(q, k, v, positions, cache, window):
    index_T, first_BT = packed_indices(Rows(positions, positions), cache.length, window)
    cache, keys, index_S = append(cache, (k, v), window)
    return blockwise(q, *keys, index_T, first_BT, index_S, scale=0.4), cache


@pytest.mark.parametrize("pieces", [[1] * 23, [4, 9, 1, 1, 8], [23]])
@pytest.mark.parametrize("window", [0, 6])
def test_cache_in_pieces_equals_the_whole(arrays, pieces, window):
    size = window or 30
    cache = TokenCache(tuple(jnp.zeros((2, size, 2, dim)) for dim in (4, 3)), jnp.int32(0))
    outputs, at = [], 0
    for piece in pieces:
        q, k, v = (x[:, at : at + piece] for x in arrays)
        positions = jnp.asarray(POSITIONS[:, at : at + piece])
        output, cache = extend(q, k, v, positions, cache, window)
        assert cache.tokens[0].shape[1] == size
        outputs.append(output)
        at += piece
    np.testing.assert_allclose(np.concatenate(outputs, 1), naive(*arrays, POSITIONS, 0.4, window), atol=2e-6)


def test_long_caches_are_whole_blocks():
    """With room for every token, a sixty-fourth to spare at most, and short ones exact."""
    for tokens in (1, 23, 65536, 65537, 66560, 262144 + 64):
        size = slots(tokens)
        assert size == tokens if tokens <= 65536 else size % 1024 == 0 and tokens <= size < tokens * 65 / 64
