"""The token cache, appended to in pieces, against a naive float64 softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_softmax_attention import POSITIONS, make_arrays, naive

from hybridlm.rows import Rows
from hybridlm.token_cache import TokenCache, attend_held, hold, slots


@partial(jax.jit, static_argnames="window")
def extend(q, k, v, positions, cache, window):
    cache, held = hold(cache, (k, v), window)
    return attend_held(q, *held.tokens, held, Rows(positions, positions), scale=0.4, window=window), cache


@pytest.mark.parametrize("pieces", [[1] * 23, [4, 9, 1, 1, 8], [23]])
@pytest.mark.parametrize("window", [0, 6])
def test_cache_in_pieces_equals_the_whole(pieces, window):
    arrays = make_arrays()
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
    for tokens in (1, 23, 65536, 65537, 66560, 262144 + 64, 2**20, 2**20 + 64):
        size = slots(tokens)
        power = 1024 if tokens < 1 << 17 else tokens // 128
        assert size == tokens if tokens <= 65536 else tokens <= size < tokens * 65 / 64
        assert tokens <= 65536 or size & -size >= power
