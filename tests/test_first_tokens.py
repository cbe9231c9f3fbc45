"""A sliding window that keeps a document's first tokens in sight, against attention under a dense mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_softmax_attention import POSITIONS, make_arrays

from hybridlm import config as configs
from hybridlm import first_tokens, mixers
from hybridlm.context import Context
from hybridlm.convert import families
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend, record_largest, visible
from hybridlm.token_cache import TokenCache, packed_indices
from pallas_kernels import softmax_attention
from pallas_kernels.softmax_attention import blockwise, cudnn, xla
from pallas_kernels.softmax_attention.call import AttentionCall

WINDOW, COUNT, SCALE = 4, 3, 0.4
ROWS = Rows(jnp.asarray(np.cumsum(POSITIONS == 0, axis=1)), jnp.asarray(POSITIONS))


def mask(positions: np.ndarray, window: int, count: int) -> np.ndarray:
    """[B, T, T]: keys of the same document, not later, in the window or among the first."""
    document = np.cumsum(positions == 0, axis=1)
    ago = positions[:, :, None] - positions[:, None, :]
    return (
        (document[:, :, None] == document[:, None])
        & (ago >= 0)
        & ((ago < window) | (positions[:, None] < count))
    )


def logits(q: jax.Array, k: jax.Array) -> jax.Array:
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    seen = mask(POSITIONS, WINDOW, COUNT)[:, None]
    return jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) * SCALE, -jnp.inf)


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(logits(q, k)), v)


@pytest.mark.parametrize("block", [8, pytest.param(1024, marks=pytest.mark.slow)])
def test_values_and_gradients(block, monkeypatch):
    """Packed documents shorter than the window, than the window and the first tokens, and longer."""
    monkeypatch.setattr(xla, "MAX_BLOCK", block)
    arrays, do = make_arrays(), np.random.default_rng(1).normal(size=(2, 23, 6, 3))
    ours = functools.partial(attend, rows=ROWS, scale=SCALE, window=WINDOW, sink_tokens=COUNT)
    o, pull = jax.vjp(jax.jit(lambda q, k, v: ours(q, k, v)), *arrays)
    with jax.enable_x64(True):
        expected, pull_dense = jax.vjp(dense, *map(np.float64, arrays))
        wanted = pull_dense(jnp.asarray(do))
        exact = functools.partial(softmax_attention, segment_ids=ROWS.segment_ids, scale=SCALE)
        told = exact(*map(np.float64, arrays), window=WINDOW, sink_tokens=COUNT, backend="reference")
    np.testing.assert_allclose(o, expected, atol=2e-6)
    np.testing.assert_allclose(told, expected, rtol=1e-12, atol=1e-14)
    for got, want in zip(pull(jnp.float32(do)), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize("pieces", [[2, 7, 1, 1, 12], pytest.param([1] * 23, marks=pytest.mark.slow)])
def test_cache_in_pieces(pieces):
    """Documents that begin in a piece, go on from one before, or end: window + first tokens are kept."""
    arrays = make_arrays()
    zeros = lambda size: tuple(jnp.zeros((2, size, 2, dim)) for dim in (4, 3))
    cache = first_tokens.SinkCache(TokenCache(zeros(WINDOW), jnp.int32(0)), zeros(COUNT))

    @jax.jit
    def extend(q, k, v, positions, cache):
        rows = Rows(positions, positions)
        index_T, first_BT = packed_indices(rows, cache.recent.length, WINDOW)
        cache, held = first_tokens.hold(cache, (k, v), rows, WINDOW, COUNT)
        o = blockwise(q, *held.tokens, index_T, first_BT, held.index_S, scale=SCALE, first=held.first)
        return o, cache

    outputs, at = [], 0
    for piece in pieces:
        part = [x[:, at : at + piece] for x in (*arrays, POSITIONS)]
        o, cache = extend(*part, cache)
        outputs.append(o)
        at += piece
    with jax.enable_x64(True):
        expected = dense(*map(np.float64, arrays))
    np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=2e-6)


def test_what_is_seen_and_how_large_it_is():
    """The cost counts the mask's ones; the largest logits are those of pairs that are seen."""
    for length, window, count in ((23, 4, 3), (6, 4, 3), (3, 4, 2), (40, 8, 1)):
        ones = mask(np.arange(length)[None], window, count).sum()
        assert visible(length, window, count) * length == pytest.approx(ones)
    q, k, v = make_arrays()
    assert cudnn.supports(AttentionCall(q, k, v, None, SCALE, WINDOW, sink_tokens=1)) == "it has sink tokens"
    context = Context(ROWS, 0, 1, wanted=("max.logit",))
    record_largest(context, q, k, scale=SCALE, window=WINDOW, sink_tokens=COUNT)
    np.testing.assert_allclose(context.records["max.logit"], jnp.max(logits(q, k), axis=(0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"window": 4, "forget_gate": True}])
def test_what_they_do_not_go_with(settings):
    config = mixers.config_class("attention")(kind="attention", sink_tokens=4, **settings)
    with pytest.raises(ConfigError) as caught:
        config.check(64)
    assert caught.value.field == "sink_tokens"
    gates = {"log_forget": -jnp.ones((2, 23, 6))} if "forget_gate" in settings else {}
    with pytest.raises(ValueError, match="sink_tokens = 4: needs a window, and no log_forget"):
        softmax_attention(*make_arrays(), sink_tokens=4, window=settings.get("window", 0), **gates)


def test_shared_keys_and_public_formats_have_none():
    fields = {"model.pattern": "swa*2", "mixers.swa.sink_tokens": "4", "mixers.swa.kind": "attention"}
    load = lambda **more: configs.resolve(configs.load("configs/quickstart.py", fields | more))
    assert "sink_tokens 4, not 0" in families.public_format(load(**{"mixers.swa.window": "64"}))[1]
    with pytest.raises(ConfigError, match="sink_tokens"):
        load(**{"mixers.swa.window": "64", "model.pattern": "swa:a swa@a"})
