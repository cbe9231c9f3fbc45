"""The studies' many-runs-in-one program against each run by itself, written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import mad_compression, mqar_study, vmapped
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm import optimizer
from tests import tiny

SMALL = {"model__d_model": 8, "model__vocab_size": 40, "train__batch_size": 4}


def test_a_run_is_a_run_alone():
    """Two rates and two seeds at once: each is what its own parameters, gradients and updates give."""
    rows = mqar_study.rows(16, 2, 30, 16, 40, "train")
    made = vmapped.config([("attention", {"head_dim": 8})], steps=10, **SMALL)
    runs = vmapped.Runs(made, rows, [1e-2, 1e-3], 2, steps_per_call=5)
    assert [step for step, _ in runs.train(say=lambda text: None, seconds=0.0)] == [5]
    curve = runs.train(say=lambda text: None)
    assert [step for step, _ in curve] == [5, 10]

    config = configs.resolve(made)
    definition = lm.build(config)
    tx = optimizer.build(config.replace(optimizer__learning_rate=1e-3).optimizer, 10, lm.metadata(definition))
    params = lm.init(definition, jax.random.key(1))
    state, order = tx.init(params), vmapped.batches(30, 4)

    @jax.jit
    def update(params, state, batch):
        loss = lambda p: (lambda total, sums: total / sums["tokens"])(*tiny.loss_fn(definition, p, batch))
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(10):
        chosen = next(order)
        params, state = update(params, state, {name: x[chosen] for name, x in rows.items()})
    together = runs.state["params"]["embedding"]
    np.testing.assert_allclose(together[3], params["embedding"], rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(together[0] - together[1]).max()) > 1e-3

    _, sums = jax.jit(functools.partial(tiny.loss_fn, definition))(params, rows)
    runs_of_30 = runs.accuracy(rows)  # which no batch of rows divides
    vmapped.EVALUATED, before = 16 * 8, vmapped.EVALUATED
    try:
        np.testing.assert_allclose(runs.accuracy(rows), runs_of_30)
    finally:
        vmapped.EVALUATED = before
    np.testing.assert_allclose(runs_of_30[3], sums["correct"] / (30 * 2), atol=1e-6)


@pytest.mark.parametrize("name", mqar_study.STUDY)
def test_states_have_the_published_sizes(name):
    """Elements of two layers, short convolutions included: 18k, 34k, 66k in Zoology's figure."""
    layers, published = mqar_study.STUDY[name]
    elements = mqar_study.state_elements(layers, 128)
    if "k)" in published:
        assert elements == pytest.approx(1e3 * float(published.split("(")[1].rstrip("k)")), rel=0.05)
    assert elements <= 70_000


@pytest.mark.slow
def test_compression_goes_through_one_state():
    """MAD's sixth task: rows are its; two tokens are learned; what the mark does not see cannot be named."""
    rows = mad_compression.rows(256, 3, 4, seed=0)
    assert (rows["targets"] == rows["tokens"]).all()
    assert (rows["tokens"][:, -1] == 3).all() and set(np.unique(rows["tokens"][:, :-1])) == {0, 1, 2}
    sizes = {"model__d_model": 16, "mlp_hidden": 16, "train__batch_size": 64}
    made = mad_compression.config(("delta_net", {"num_heads": 1, "head_dim": 16}), 4, steps=250, **sizes)
    runs = vmapped.Runs(made, rows, [1e-2], 1, steps_per_call=50)
    runs.train(say=lambda text: None)
    assert runs.accuracy(rows)[0] > 0.9  # guessing: 1/3 + 2/9

    definition = lm.build(configs.resolve(made))
    params = {name: leaf[0] for name, leaf in runs.state["params"].items()}
    readout = lambda params: next(
        iter(
            lm.merge(definition, params)
            .forward(rows["tokens"], lm.Rows(rows["segment_ids"], rows["positions"]), ("readout",))[1]
            .values()
        )
    )
    told = readout(params)
    blind = readout(params | {"embedding": jnp.zeros_like(params["embedding"])})
    assert float(jnp.abs(told - told[:1]).max()) > 0.1 and float(jnp.abs(blind - blind[:1]).max()) == 0
