"""Chunked cross-entropy against the plain formula in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import loss


def plain(hidden, head, targets, z_loss):
    """Sum over targets >= 0 of -log softmax + z_loss log(Z)^2, with all logits at once."""
    logits = hidden.astype(jnp.float64) @ head.astype(jnp.float64)
    log_z = jax.nn.logsumexp(logits, -1)
    nll = log_z - jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(targets >= 0, nll + z_loss * log_z**2, 0))


@pytest.mark.parametrize("length", [1, 7, 24])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_plain_formula_with_many_chunks(monkeypatch, length, z_loss):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 3 * 11 * 4)  # four tokens a chunk
    rng = np.random.default_rng(length)
    hidden = rng.normal(size=(3, length, 5)).astype(np.float32)
    head = rng.normal(size=(5, 11)).astype(np.float32)
    targets = rng.integers(-1, 11, size=(3, length)).astype(np.int32)

    ours = lambda h, w: loss.cross_entropy(h, w, targets, z_loss=z_loss)
    value, pullback, sums = jax.vjp(ours, hidden, head, has_aux=True)
    with jax.enable_x64(True):
        expected, grads = jax.value_and_grad(lambda h, w: plain(h, w, targets, z_loss), (0, 1))(
            hidden.astype(np.float64), head.astype(np.float64)
        )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(pullback(jnp.float32(1)), grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours(hidden, head)[0], value, rtol=1e-6)  # undifferentiated path
    assert int(sums.tokens) == (targets >= 0).sum()
    assert int(sums.correct) == ((hidden @ head).argmax(-1) == targets).sum()
    np.testing.assert_allclose(value, sums.cross_entropy + z_loss * sums.log_z_squared, rtol=1e-6)


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
