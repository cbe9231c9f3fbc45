"""Gradients written out for fewer passes over memory, against JAX's own of the same formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hybridlm import config as configs
from hybridlm import model, remat
from hybridlm.block import Block, Factors
from hybridlm.layers import PASSED, Linear, RMSNorm, side_by_side
from hybridlm.linear_mixer import softplus_decay
from hybridlm.loss import cross_entropy
from hybridlm.mixers import Site
from hybridlm.mlps import swiglu
from hybridlm.rms import STREAM, told_product, told_rms

normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)


def agree(ours, theirs, *args, tolerance=2e-6):
    """Value and all gradients of two functions, in a random direction; in float32."""
    y, pull = jax.vjp(ours, *args)
    wanted, reference = jax.vjp(theirs, *args)
    direction = normal(99, *y.shape)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))
    jax.tree.map(close, (y, pull(direction)), (wanted, reference(direction)))


@pytest.mark.parametrize("channels", [(), (8,)])
def test_a_decay_of_softplus(channels):
    """One decay a head, or one a channel with A_log of the head."""

    def plain(x, A_log, dt_bias):
        return -jnp.exp(A_log) * jax.nn.softplus(x + dt_bias)

    A_log, dt_bias = normal(1, 3, *(1 for _ in channels)), normal(2, 3, *channels)
    agree(softplus_decay, plain, normal(0, 2, 5, 3, *channels), A_log, dt_bias)
    agree(softplus_decay, plain, normal(0, 2, 3, *channels), A_log, dt_bias)


def test_norms_of_groups_and_of_heads():
    """With one scale for all heads, or its own for each channel; with a gate and without."""

    def plain(x, scale, gate):
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale
        return y if gate is None else y * gate

    def module(x, scale, gate, groups=1):
        norm = RMSNorm(scale.size, rngs=nnx.Rngs(params=0), groups=groups)
        norm.scale[...] = scale.reshape(-1)
        return norm(x, gate)

    x, scale, gate = normal(0, 2, 5, 3, 8), normal(1, 8), normal(2, 2, 5, 3, 8)
    agree(module, plain, x, scale, gate)
    agree(lambda x, scale: module(x, scale, None), lambda x, scale: plain(x, scale, None), x, scale)
    scale = normal(1, 3, 8)
    flat = lambda a: a.reshape(2, 5, 24)
    grouped = lambda x, scale, gate: module(flat(x), scale, flat(gate), 3)
    agree(grouped, lambda *args: flat(plain(*args)), x, scale, gate)


def normed_swiglu(x, scale, gate, up, down):
    """In the dtype of what it is given; eps is large enough to show."""
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.1) * scale
    return (jax.nn.silu(y @ gate) * (y @ up)) @ down


def test_a_norm_that_is_told_of_its_gradient():
    """Whose sums over a row come from the products behind it: against float64."""

    def ours(x, scale, gate, up, down):
        y, told = told_rms(x, scale, 0.1)
        return told_product(y @ gate, y @ up, told) @ down

    args = normal(0, 2, 5, 16), normal(1, 16), normal(2, 16, 24), normal(3, 16, 24), normal(4, 24, 16)
    direction = normal(99, 2, 5, 16)
    found, pull = jax.vjp(ours, *args)
    with jax.enable_x64(True):
        exact, back = jax.vjp(normed_swiglu, *(np.asarray(x, np.float64) for x in args))
        wanted = exact, *back(np.asarray(direction, np.float64))
    for one, reference in zip((found, *pull(direction)), wanted, strict=True):
        scale = np.abs(np.asarray(reference)).max()
        np.testing.assert_allclose(one, reference, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("fields", "of_block", "tells"),
    [
        ({}, {}, True),
        ({"model__norm_unit_offset": True}, {}, True),
        ({}, {"post_norm": True}, False),
        ({}, {"stream": (("mlp", (1.0, 1.0)),)}, False),
        ({}, {"lora": (Factors("mlp.up", 2, 1.0),)}, False),
        ({"model__norm": "layer"}, {}, False),
        ({"model__dtype": "bfloat16", "model__matmul": "fp8"}, {}, False),
    ],
)
def test_blocks_whose_mlp_tells(fields, of_block, tells, monkeypatch):
    """With the same gradients as where it does not; the norm's factor is kept where the stream is."""
    settings = {"model__pattern": "retnet", "model__d_model": 128, "model__mlp_hidden": 256}
    config = configs.resolve(tiny.config("unused", **settings, **fields))
    definition = model.in_training(model.build(config), config)
    spec = definition.layers[0]._replace(**of_block)
    block = Block(definition.model, spec, Site(128), rngs=nnx.Rngs(params=0))
    assert (block._told(jnp.ones((1, 2, 128))) is not None) == tells
    if not tells:
        return
    graph, params = nnx.split(block)
    params = jax.tree.map(lambda x: x + 0.1 * normal(7, *x.shape), params)

    def half(policy):
        run = lambda params, x: nnx.merge(graph, params)._mlp(x, None, None)[0]
        return jax.checkpoint(run, policy=remat.POLICIES[policy])

    for policy, factors in (("most", 1), ("kernels", 1), ("full", 2)):
        pull = lambda params, x, policy=policy: jax.vjp(half(policy), params, x)[1](x)
        assert str(jax.make_jaxpr(pull)(params, jnp.ones((1, 2, 128)))).count("= rsqrt ") == factors

    def plain(*args):
        with monkeypatch.context() as patch:
            patch.setattr(swiglu.Mlp, "tells", False)
            return half("full")(*args)

    agree(half("most"), plain, params, normal(0, 2, 5, 128))


def test_products_side_by_side():
    """As one and each on its own."""
    make = lambda width, kernel: Linear(16, width, rngs=nnx.Rngs(params=0), init=lambda *_: kernel)
    x, kernels = normal(0, 2, 5, 16), [normal(i, 16, width) for i, width in enumerate((8, 4, 1))]

    def of(x, *kernels, together):
        linears = [make(kernel.shape[1], kernel) for kernel in kernels]
        parts = side_by_side(x, linears) if together else [linear(x) for linear in linears]
        return jnp.concatenate(parts, axis=-1)

    agree(functools.partial(of, together=True), functools.partial(of, together=False), x, *kernels)
    doubled = [make(4, kernels[1]), make(4, kernels[1])]
    doubled[1].multiplier = 2.0
    once, twice = side_by_side(x, doubled)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)


def test_scores_in_one_pass_where_logits_are_far_apart():
    """Each row's largest logit is somewhere else; one is the target's, one row has no target."""
    logits = np.random.default_rng(0).normal(size=(6, 50)) * 1e3
    logits[2, 7] = 9e3
    targets = np.array([0, 3, 7, -1, 49, 20])
    largest = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
    wanted = (log_z - logits[np.arange(6), targets])[targets >= 0].sum()
    run = lambda hidden: cross_entropy(hidden, jnp.eye(50), jnp.asarray(targets)[None])
    total, sums = run(jnp.asarray(logits, jnp.float32)[None])
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    assert (float(sums.tokens), float(sums.correct)) == (5, (logits.argmax(-1) == targets).sum())
    slope = jax.grad(lambda hidden: run(hidden)[0])(jnp.asarray(logits, jnp.float32)[None])[0]
    p = np.exp(logits - log_z[:, None]) - (np.arange(50) == targets[:, None])
    np.testing.assert_allclose(slope, p * (targets >= 0)[:, None], atol=2e-4)


def test_what_only_passes_is_kept_by_most():
    """How often a named cosine, the stream's sine and the tangent between are computed: once where kept."""

    def layer(x, w):
        x = jax.ad_checkpoint.checkpoint_name(jnp.sin(x @ w), STREAM)
        return jnp.sum(jax.ad_checkpoint.checkpoint_name(jnp.cosh(x), PASSED) @ w)

    found = {}
    for policy in ("most", "kernels", "full"):
        run = jax.checkpoint(layer, policy=remat.POLICIES[policy])
        text = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(jnp.ones((4, 4)), jnp.ones((4, 4))))
        found[policy] = text.count("= sin "), text.count("= cosh ")
    assert found == {"most": (1, 1), "kernels": (1, 2), "full": (2, 2)}
