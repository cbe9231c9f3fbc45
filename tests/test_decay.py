"""Decayed products against their definition, written out in float64 for all pairs of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision
from op_problems import relative_errors

from pallas_kernels.linear_attention.decay import decay_matrix, decayed_products

N, C, R, D = 2, 16, 2, 3
DECAYS = {
    "mild": lambda rng, shape: -0.1 * rng.exponential(size=shape),
    "mixed": lambda rng, shape: rng.choice([0, -1e-4, -0.3, -20, -120], size=shape),
    "strong": lambda rng, shape: np.full(shape, -20.0),
}


def definition(x, y, g):
    i, m = np.arange(C)[:, None], np.arange(C)
    spans = (m[:, None, None] <= i) & (m[:, None, None] > m)  # [m, i, j]: m decays what i sees of j
    pairs = jnp.exp(jnp.einsum("mij,nmd->nijd", spans.astype(float), g)) * (i >= m)[..., None]
    A = jnp.einsum("nird,njd,nijd->nirj", x, y, pairs)
    prefix = jnp.exp(jnp.einsum("im,nmd->nid", (m <= i).astype(float), g))
    suffix = jnp.exp(jnp.einsum("jm,nmd->njd", (m > i).astype(float), g))
    return A, prefix, suffix


def matrix(x, y, g):
    A, prefix, suffix = decay_matrix(g[..., 0])
    return A[:, :, None], prefix[..., None], suffix[..., None]


def products(x, y, g):
    return decayed_products(x, y, g, Precision.HIGHEST)


def with_gradients(f):
    def run(args, bars):
        out, vjp = jax.vjp(f, *args)
        return dict(zip(("A", "prefix", "suffix", "x", "y", "g"), (*out, *vjp(bars)), strict=True))

    return jax.jit(run)


@pytest.mark.parametrize("function", [products, matrix])
def test_values_and_gradients_equal_the_definition(function):
    tested, oracle = with_gradients(function), with_gradients(definition)
    rows, channels = (R, D) if function is products else (1, 1)
    for seed, draw in enumerate(DECAYS.values()):
        rng = np.random.default_rng(seed)
        g = np.float32(draw(rng, (N, C, channels)))
        x, y = rng.normal(size=(N, C, rows, channels)), rng.normal(size=(N, C, channels))
        if function is matrix:
            x, y = np.ones_like(x), np.ones_like(y)
        shapes = (N, C, rows, C), (N, C, channels), (N, C, channels)
        bars = tuple(np.float32(rng.normal(size=shape)) for shape in shapes)
        args = tuple(np.float32(a) for a in (x, y, g))
        got = tested(args, bars)
        with jax.enable_x64(True):
            want = oracle(*jax.tree.map(jnp.float64, (args, bars)))
        errors = relative_errors(got, want)
        if function is matrix:
            del errors["x"], errors["y"]
        assert all(error <= 1e-6 for error in errors.values()), errors
