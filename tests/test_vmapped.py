"""The studies' many-runs-in-one program against the model's own loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mad_compression, mqar_study, vmapped
from hybridlm import model as lm


def test_loss_and_accuracy_are_the_models_own():
    """On packed rows of several slices: loss at the labels alone, documents apart."""
    parts = [
        mqar_study.rows(length, pairs, 6, 64, 80, "train") for length, pairs in ((16, 2), (32, 8), (64, 8))
    ]
    rows = vmapped.data(parts)
    layers = [("gated_delta_net", {"num_heads": 1, "head_dim": 8}), ("attention", {"head_dim": 8})]
    model = vmapped.definition(layers, d_model=16, vocab=80, mlp_hidden=0)
    params = jax.jit(lambda key: lm.init(model, key))(jax.random.key(0))
    params["embedding"] *= 20  # far from uniform
    got_loss, got_hits = jax.jit(lambda p: vmapped.loss_and_hits(vmapped.language_model(model), p, rows))(
        params
    )

    whole = {name: jnp.concatenate([batch[name] for batch, _ in parts]) for name in parts[0][0]}
    _, sums = jax.jit(lambda p: lm.loss_fn(model, p, whole))(params)
    assert float(sums["tokens"]) == 6 * (2 + 8 + 8)
    np.testing.assert_allclose(got_loss, sums["loss_sum"] / sums["tokens"], rtol=1e-5)
    np.testing.assert_allclose(got_hits, sums["correct"] / sums["tokens"], rtol=1e-6)


def test_a_run_is_a_run_alone():
    """Two rates and two seeds at once give the parameters of each by itself."""
    rows = vmapped.data([mqar_study.rows(16, 2, 32, 16, 40, "train")])
    model = vmapped.definition([("attention", {"head_dim": 8})], d_model=8, vocab=40, mlp_hidden=0)

    def trained(rates, seeds):
        runs = vmapped.runs(
            vmapped.language_model(model), rates=rates, seeds=seeds, batch_size=4, steps_per_call=5
        )
        runs = vmapped.compiled(runs, rows, vmapped.first_rows(rows, 8))
        result = vmapped.train(runs, rows, steps=10, seconds=1e9, say=lambda text: None)
        assert result.steps == 10 and [step for step, _ in result.curve] == [5, 10]
        correct = vmapped.count_correct(runs, result.params, rows, 8)
        assert correct.shape == (len(rates) * len(seeds), 32) and correct.max() <= 2
        return result.params["embedding"]

    together = trained((1e-2, 1e-3), (0, 1))
    np.testing.assert_allclose(together[3], trained((1e-3,), (1,))[0], rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(together[0] - together[1]).max()) > 1e-3


@pytest.mark.parametrize("name", mqar_study.STUDY)
def test_states_have_the_published_sizes(name):
    """Elements of two layers, short convolutions included: 18k, 34k, 66k in Zoology's figure."""
    layers, published = mqar_study.STUDY[name]
    elements = mqar_study.state_elements(layers, 128)
    if "k)" in published:
        assert elements == pytest.approx(1e3 * float(published.split("(")[1].rstrip("k)")), rel=0.05)
    assert elements <= 70_000


def test_compression_goes_through_one_state():
    """MAD's sixth task: rows are its; two tokens are learned; what the mark does not see cannot be named."""
    rows = mad_compression.rows(256, 3, 4, seed=0)
    assert (np.asarray(rows.labels) == np.asarray(rows.tokens)).all()
    assert (np.asarray(rows.tokens[:, -1]) == 3).all() and set(np.unique(rows.tokens[:, :-1])) == {0, 1, 2}
    layers = [("delta_net", {"num_heads": 1, "head_dim": 16})]
    model = vmapped.definition(layers, d_model=16, vocab=4, mlp_hidden=16)
    problem = mad_compression.problem(model, 4)
    runs = vmapped.runs(problem, rates=[1e-2], seeds=[0], batch_size=64, steps_per_call=50)
    runs = vmapped.compiled(runs, rows, vmapped.first_rows(rows, 64))
    result = vmapped.train(runs, rows, steps=250, seconds=1e9, say=lambda text: None)
    correct = vmapped.count_correct(runs, result.params, rows, 64).sum() / (256 * 3)
    assert correct > 0.9  # guessing: 1/3 + 2/9
    params = jax.tree.map(lambda x: x[0], result.params)
    hidden, _, _ = problem.readout(params, rows)
    blank = jax.tree.map(jnp.zeros_like, params[0]), params[1]
    same, _, _ = problem.readout(blank, rows)
    assert float(jnp.abs(hidden - hidden[:1]).max()) > 0.1 and float(jnp.abs(same - same[:1]).max()) == 0
