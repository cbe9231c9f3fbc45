import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm import optimizer, schema
from hybridlm.model import Meta

STEPS = 40


def settings(**changes):
    return schema.Optimizer(**changes)


def expected_rate(update, *, schedule, peak, warmup, final, fraction):
    """Closed form, in float64, of the learning rate of the ``update``-th update (from 1)."""
    if update <= warmup:
        return peak * update / warmup
    if schedule == "cosine":
        angle = math.pi * (update - warmup) / (STEPS - warmup)
        return peak * (final + (1 - final) * (1 + math.cos(angle)) / 2)
    if schedule == "wsd" and update > STEPS - fraction * STEPS:
        return peak * (1 - (1 - final) * (update - (STEPS - fraction * STEPS)) / (fraction * STEPS))
    return peak


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules(schedule, warmup):
    config = settings(
        schedule=schedule, learning_rate=0.3, warmup_steps=warmup, final_ratio=0.1, decay_fraction=0.25
    )
    rates = jax.vmap(optimizer.schedule(config, STEPS))(jnp.arange(STEPS))
    numbers = {"schedule": schedule, "peak": 0.3, "warmup": warmup, "final": 0.1, "fraction": 0.25}
    expected = [expected_rate(update, **numbers) for update in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates, expected, rtol=2e-6)
    assert not optimizer.unwarmed(config, 7)
    if warmup:
        assert f"ends at {float(rates[5]):.3g}, not 0.3" in optimizer.unwarmed(config, 6)


# Two stacked layers of one matrix, one norm and one short convolution, beside an embedding and a head.
METADATA = {
    "embedding": Meta(("vocab", "embed"), True),
    "head": Meta(("embed", "vocab"), True),
    "layers": {
        0: {
            "conv": Meta((None, None, "taps", "heads"), True),
            "kernel": Meta((None, None, "embed", "heads"), True),
            "scale": Meta((None, None, None), False),
        }
    },
}
SHAPES = {
    "embedding": (11, 6),
    "head": (6, 11),
    "layers": {0: {"conv": (2, 1, 4, 8), "kernel": (2, 1, 6, 8), "scale": (2, 1, 6)}},
}


def tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda leaf: isinstance(leaf, tuple)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=is_shape
    )


def run(tx, updates=3):
    params = tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(1, updates + 1):
        change, state = update(tree(seed), state, params)
        params = optax.apply_updates(params, change)
    return params


def test_adamw_is_optax_with_a_mask():
    config = settings(learning_rate=0.01, clip_norm=1.0, warmup_steps=2)
    mask = jax.tree.map(lambda meta: meta.decay, METADATA, is_leaf=lambda leaf: isinstance(leaf, Meta))
    rate = optimizer.schedule(config, STEPS)
    plain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    )
    got, expected = run(optimizer.build(config, STEPS, METADATA)), run(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)


def test_muon_orthogonalises_each_hidden_matrix_alone():
    config = settings(name="muon", learning_rate=0.01, clip_norm=0.0, schedule="constant")
    got = run(optimizer.build(config, STEPS, METADATA))
    adamw = run(
        optimizer.build(settings(learning_rate=0.01, clip_norm=0.0, schedule="constant"), STEPS, METADATA)
    )
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(got[name], adamw[name])
    for name in ("conv", "scale"):
        np.testing.assert_array_equal(got["layers"][0][name], adamw["layers"][0][name])
    # optax's own Muon on each matrix by itself; consistent_rms is the same scaling.
    alone = optax.contrib.muon(0.01, weight_decay=0.1, consistent_rms=optimizer.MUON_RMS)
    for layer in range(2):
        params = {"w": tree(0)["layers"][0]["kernel"][layer, 0]}
        state = alone.init(params)
        for seed in range(1, 4):
            change, state = alone.update({"w": tree(seed)["layers"][0]["kernel"][layer, 0]}, state, params)
            params = optax.apply_updates(params, change)
        np.testing.assert_allclose(got["layers"][0]["kernel"][layer, 0], params["w"], rtol=1e-5, atol=1e-6)


def test_no_decay_leaves_only_follow_the_gradient():
    """With zero gradients only weight decay moves a parameter: by learning rate * decay, or not at all."""
    for name in ("adamw", "muon"):
        config = settings(name=name, learning_rate=0.1, weight_decay=0.5, schedule="constant")
        tx = optimizer.build(config, STEPS, METADATA)
        params = tree(0)
        change, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        moved = jax.tree.map(lambda c, p: np.asarray(c / p), change, params)
        np.testing.assert_array_equal(moved["layers"][0].pop("scale"), 0)
        for leaf in jax.tree.leaves(moved):
            np.testing.assert_allclose(leaf, -0.05, rtol=1e-5)


def test_clipping_does_not_change_the_shape_of_the_state():
    clipped, free = (
        optimizer.build(settings(clip_norm=norm), STEPS, METADATA).init(tree(0)) for norm in (1.0, 0.0)
    )
    assert [k for k, _ in jax.tree_util.tree_leaves_with_path(clipped)] == [
        k for k, _ in jax.tree_util.tree_leaves_with_path(free)
    ]


def test_where_an_update_may_overflow():
    """Ordinary settings are tame, whatever factors lower the rate; what bounds no update is not."""
    layers = np.array([0.5, 3.0], np.float32)[:, None]
    tame = lambda peak=1e-3, factors=None, **fields: optimizer.tame(settings(**fields), peak, factors or {})
    assert tame() and tame(factors={"a": (0.1, 0.0), "b": (layers, 1.0)}) and tame(name="muon", b1=0.95)
    assert not tame(1.1) and not tame(0.4, {"a": (layers, 1.0)}) and not tame(b1=0.99)
    assert not tame(0.5, {"a": (1.0, layers)}, weight_decay=2.0) and not tame(eps=1e-25)
    # The first update of any gradient, and of one that comes back from nothing, stays below what is said.
    tx = optimizer.build(settings(warmup_steps=0, clip_norm=0.0, eps=1e-20), STEPS, METADATA)
    for size in (1e-38, 1e-19, 1e-8, 1e18):
        grads = jax.tree.map(lambda x, size=size: size * jnp.ones_like(x), tree(0))
        updates, _ = tx.update(grads, tx.init(tree(0)), tree(0))
        assert all(np.abs(leaf).max() < 0.02 for leaf in jax.tree.leaves(updates))
