"""Chunked cross-entropy against the plain formula in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import loss, loss_blocks


def plain(hidden, head, targets, z_loss, cap=0.0):
    """Sum over targets >= 0 of -log softmax + z_loss log(Z)^2, with all logits at once."""
    logits = hidden.astype(jnp.float64) @ head.astype(jnp.float64)
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(targets >= 0, nll + z_loss * log_z**2, 0))


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize(("z_loss", "cap"), [(0.0, 0.0), (0.1, 2.0)])
def test_equals_plain_formula_with_many_chunks(monkeypatch, length, z_loss, cap):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 3 * 11 * 4)  # four tokens a chunk
    rng = np.random.default_rng(length)
    hidden = rng.normal(size=(3, length, 5)).astype(np.float32)
    head = rng.normal(size=(5, 11)).astype(np.float32)
    targets = rng.integers(-1, 11, size=(3, length)).astype(np.int32)

    ours = lambda h, w: loss.cross_entropy(h, w, targets, z_loss=z_loss, cap=cap)
    value, pullback, sums = jax.vjp(ours, hidden, head, has_aux=True)
    with jax.enable_x64(True):
        of_plain = jax.jit(jax.value_and_grad(lambda h, w: plain(h, w, targets, z_loss, cap), (0, 1)))
        expected, grads = of_plain(hidden.astype(np.float64), head.astype(np.float64))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(pullback(jnp.float32(1)), grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours(hidden, head)[0], value, rtol=1e-6)  # undifferentiated path
    assert int(sums.tokens) == (targets >= 0).sum()
    assert int(sums.correct) == ((hidden @ head).argmax(-1) == targets).sum()
    np.testing.assert_allclose(value, sums.cross_entropy + z_loss * sums.log_z_squared, rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "dtype", "tall", "far"),
    [
        (7, "float32", False, 0.0),  # 21 tokens, padded to 22; 19 ids in blocks of 8, 8, 3
        (2, "float32", True, 90.0),  # the first ids say nothing of the largest logit
        (9, "bfloat16", True, 0.0),
        (4, "bfloat16", False, 90.0),
    ],
)
def test_blocks_of_ids_equal_the_plain_formula(monkeypatch, length, dtype, tall, far):
    monkeypatch.setattr(loss, "MOST_ELEMENTS", 0)
    monkeypatch.setattr(loss_blocks, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(loss_blocks, "LANES", 8)
    rng = np.random.default_rng(length)
    hidden = jnp.asarray(rng.normal(size=(3, length, 22)), dtype).at[..., 0].set(1)
    head = rng.normal(size=(22, 19))
    head[0, 12] += far
    head = jnp.asarray(head, dtype).astype(jnp.float32)
    targets = rng.integers(-1, 19, size=(3, length)).astype(np.int32)
    value, grads = jax.jit(
        jax.value_and_grad(
            lambda h, w: loss.cross_entropy(h, w.T if tall else w, targets, z_loss=0.1, tall=tall)[0], (0, 1)
        )
    )(hidden, head.T if tall else head)
    with jax.enable_x64(True):
        wide = (np.asarray(hidden, np.float64), np.asarray(head, np.float64))
        expected, wanted = jax.jit(jax.value_and_grad(lambda h, w: plain(h, w, targets, 0.1), (0, 1)))(*wide)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip((grads[0], grads[1].T if tall else grads[1]), wanted, strict=True):
        size = 1e-5 if dtype == "float32" else 1e-2
        np.testing.assert_allclose(np.float64(got), want, rtol=size, atol=size * np.abs(want).max())


def test_scores_per_token_equal_log_softmax(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 2 * 7 * 4)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 9, 5)).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)
    targets = rng.integers(-1, 7, size=(2, 9)).astype(np.int32)
    log_prob, correct = loss.per_token(hidden, head, targets)
    logits = hidden @ head
    want = np.take_along_axis(jax.nn.log_softmax(logits), np.maximum(targets, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob, np.where(targets >= 0, want, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(correct, logits.argmax(-1) == targets)


def test_rows_without_targets_have_no_gradient():
    hidden, head = jnp.ones((2, 4, 3)), jnp.ones((3, 6))
    targets = jnp.array([[-1] * 4, [0, 1, 2, 3]])
    grad = jax.grad(lambda h: loss.cross_entropy(h, head, targets)[0])(hidden)
    assert not np.any(grad[0]) and np.any(grad[1])


def test_a_tie_is_not_correct():
    hidden, targets = jnp.ones((1, 2, 3)), jnp.array([[0, 1]])
    tied = jnp.ones((3, 4))
    assert int(loss.cross_entropy(hidden, tied, targets)[1].correct) == 0
    assert int(loss.cross_entropy(hidden, tied.at[0, 1].add(1), targets)[1].correct) == 1


def test_no_array_holds_all_logits():
    """The compiled gradient over 16384 tokens x 8192 words allocates less than one copy of those logits."""
    loss_sum = lambda h, w, t: loss.cross_entropy(h, w, t)[0]
    shapes = (
        jax.ShapeDtypeStruct((8, 2048, 16), jnp.float32),
        jax.ShapeDtypeStruct((16, 8192), jnp.float32),
        jax.ShapeDtypeStruct((8, 2048), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss_sum, (0, 1))).lower(*shapes).compile()
    all_logits = 8 * 2048 * 8192 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_logits
