"""Gradients written out for fewer passes over memory, against JAX's own of the same formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import remat
from hybridlm.layers import PASSED, STREAM, Linear, RMSNorm, side_by_side
from hybridlm.linear_mixer import softplus_decay
from hybridlm.loss import cross_entropy
from hybridlm.rms import rms, scaled_rms

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


def test_a_norm_has_one_axis_of_rows_on_one_device():
    """XLA then has fewer tilings to try; over several, axes that are cut stay apart. The same bits."""
    x, scale, gate = normal(0, 2, 5, 3, 8), normal(1, 3, 8), normal(2, 2, 5, 3, 8)
    plain = lambda *args: scaled_rms.__wrapped__(*args, 1e-6)  # without its gradient
    for devices, rows in ((1, (10,)), (2, (2, 5))):
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((devices,), ("data",))):
            jaxpr = jax.make_jaxpr(plain)(x, scale, gate)
        summed = [one.invars[0].aval.shape for one in jaxpr.eqns if one.primitive.name == "reduce_sum"]
        assert summed == [(*rows, 3, 8)]
    apart = jax.jit(lambda x, scale, gate: rms(x, 1e-6) * scale * gate)
    np.testing.assert_array_equal(jax.jit(plain)(x, scale, gate), apart(x, scale, gate))


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
