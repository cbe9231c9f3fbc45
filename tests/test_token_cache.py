"""The token cache, appended to in pieces, against a naive float64 softmax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_softmax_attention import POSITIONS, make_arrays, naive

from hybridlm.rows import Rows
from hybridlm.token_cache import TokenCache, attend_held, hold, slots
from pallas_kernels import auto_means
from pallas_kernels.softmax_attention import over_slots, xla
from pallas_kernels.softmax_attention import slots as by_slots


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


@pytest.mark.parametrize("count", [14, 12, 1])
def test_slots_in_blocks_equal_the_whole(count, monkeypatch):
    """The last tokens over all, with sinks and forget gates, in blocks that divide neither queries nor slots;
    blocks of slots that are empty, here of NaN, are not read."""
    monkeypatch.setattr(xla, "MAX_BLOCK", 4)
    monkeypatch.setattr(xla, "SCORES", 40)
    q, k, v = make_arrays()
    rng = np.random.default_rng(1)
    sinks, log_forget = np.float32(rng.normal(size=6)), -np.float32(rng.exponential(size=(2, 23, 6)))
    expected = naive(q, k, v, POSITIONS, 0.4, 0, sinks, log_forget)
    sums, index = np.cumsum(log_forget, axis=1), np.arange(23, dtype=np.int32)
    empty = 0 if count == 1 else np.nan  # a single query reads all
    widths = lambda x, size: [(0, 0), (0, size), *[(0, 0)] * (x.ndim - 2)]
    filled = [np.pad(np.pad(x, widths(x, 7)), widths(x, 23), constant_values=empty) for x in (k, v, sums)]
    run = jax.jit(partial(over_slots, scale=0.4, sinks_H=sinks))
    places = index[-count:], (index - POSITIONS)[:, -count:], np.arange(53, dtype=np.int32)
    q, sums = q[:, -count:], sums[:, -count:]
    o = run(q, *filled[:2], *places, forgotten_BTH=sums, forgotten_BSH=filled[2])
    np.testing.assert_allclose(o, expected[:, -count:], atol=2e-6)


@pytest.mark.parametrize(
    "documents, count, whole",
    [("one", 14, (0, 2)), ("many", 14, (2, 2)), ("padded", 14, (2, 2)), ("padded", 6, (2, 4))],
)
def test_whole_blocks_of_slots_by_a_kernel(documents, count, whole, monkeypatch):
    """What all of a chunk's queries see, from the first whole block behind the padding to the last before the
    chunk, is one part; of several documents, none is."""
    monkeypatch.setattr(xla, "MAX_BLOCK", 4)
    monkeypatch.setattr(xla, "SCORES", 16)  # blocks of 4 slots
    monkeypatch.setattr(by_slots, "_by_kernel", lambda call: True)  # which computes it in XLA here
    padded = [np.r_[:pad, : 23 - pad] for pad in (2, 6)]
    positions = {"one": np.stack([np.arange(23)] * 2), "many": POSITIONS, "padded": np.stack(padded)}[
        documents
    ]
    q, k, v = make_arrays()
    sinks = np.float32(np.random.default_rng(1).normal(size=6))
    index, room = np.arange(23, dtype=np.int32), [(0, 0), (0, 30), (0, 0), (0, 0)]
    first = (index - positions)[:, -count:]
    arrays = q[:, -count:], np.pad(k, room), np.pad(v, room)
    o = jax.jit(partial(over_slots, scale=0.4, sinks_H=sinks))(*arrays, index[-count:], first, np.arange(53))
    np.testing.assert_allclose(o, naive(q, k, v, positions, 0.4, 0, sinks)[:, -count:], atol=2e-6)
    low, start = jnp.max(jnp.asarray(first), axis=1), jnp.int32(23 - count)
    _, blocks = by_slots._before(*arrays, low, start, jnp.arange(53), 4, 0.4)
    assert tuple(map(int, blocks)) == whole


@pytest.mark.gpu
@pytest.mark.parametrize("padding, whole", [(0, (0, 3)), (130, (1, 3))])
def test_cudnn_over_slots_equals_blocks(padding, whole):
    """A chunk in the middle of a cache, in bfloat16: by cuDNN up to its own blocks, and in blocks alone."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, *s)), jnp.bfloat16) for s in ((2048, 8, 128), *[(16384, 2, 128)] * 2)
    )
    low = jnp.asarray([0, padding], jnp.int32)
    places = 7000 + jnp.arange(2048), jnp.broadcast_to(low[:, None], (2, 2048)), jnp.arange(16384)
    run = lambda: jax.jit(partial(over_slots, scale=0.09))(q, k, v, *places)
    with auto_means("xla"):
        expected = run()
    found = by_slots._before(q, k, v, low, places[0][0], places[2], 2048, 0.09)
    assert tuple(map(int, found[1])) == whole
    np.testing.assert_allclose(run().astype(jnp.float32), expected.astype(jnp.float32), atol=4e-3)
