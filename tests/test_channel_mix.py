"""RWKV's channel mixing against its equations in float64: packed, padded on the left, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.context import Context
from hybridlm.mixers import Site
from hybridlm.mlps import channel_mix
from hybridlm.rows import Rows

D, LENGTHS, PAD = 6, (3, 1, 5), 2


def equations(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One document, [T, D]."""
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    shift = lambda name: x + (before - x) * w[name]
    y = np.maximum(shift("mix_k") @ w["key.kernel"], 0) ** 2 @ w["value.kernel"]
    if "mix_r" in w:
        y = y / (1 + np.exp(-shift("mix_r") @ w["receptance.kernel"]))
    return y


@pytest.mark.parametrize("receptance", [False, True])
def test_equations(receptance: bool) -> None:
    config = channel_mix.Config(kind="channel_mix", hidden=5, receptance=receptance)
    graph, state = nnx.split(channel_mix.Mlp(config, Site(D), rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state)
    w = {".".join(path): np.float64(one.get_value()) for path, one in nnx.to_flat_state(state)}
    mlp, x = nnx.merge(graph, state), rng.normal(size=(1, PAD + sum(LENGTHS), D)).astype(np.float32)
    ends = np.cumsum(LENGTHS)[:-1]
    want = np.concatenate([equations(w, np.float64(part)) for part in np.split(x[0, PAD:], ends)])
    ids = np.concatenate([np.zeros(PAD), np.repeat([1, 2, 1], LENGTHS)]).astype(np.int32)[None]
    places = np.concatenate([np.arange(n) for n in (PAD, *LENGTHS)]).astype(np.int32)[None]
    rows = Rows(jnp.asarray(ids), jnp.asarray(places))
    with jax.default_matmul_precision("highest"):
        whole, none = mlp(jnp.asarray(x), Context(rows), None)
        cache, parts = mlp.init_cache(1, jnp.float32), []
        cut = lambda array, start, end: jax.tree.map(lambda a: a[:, start:end], array)
        first, cache = mlp(x[:, :4], Context(cut(rows, 0, 4)), cache)  # ends within a document
        for t in range(4, x.shape[1]):
            y, cache = mlp.step(x[:, t], Context(Rows(ids[:, t], places[:, t])), cache)
            parts.append(y[:, None])
    assert none is None
    for got in (whole, np.concatenate([first, *parts], axis=1)):
        np.testing.assert_allclose(got[0, PAD:], want, rtol=2e-5, atol=1e-5)
