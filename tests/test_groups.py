"""Learning rates by names (optimizer.groups) against updates without them."""

import jax
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import groups, model, optimizer, trees
from hybridlm.errors import ConfigError
from tests import tiny

GROUPS = ("layers.*.mlp.*=0.5", "layers.1.mlp.*=3/0", "embedding=0.25/2", "layers.2.mixer.q_proj.*=0")
RATE, DECAY = 0.1, 0.5
FIELDS = {
    "model__pattern": "retnet*3", "optimizer__schedule": "constant", "optimizer__warmup_steps": 0,
    "optimizer__clip_norm": 0.0, "optimizer__learning_rate": RATE, "optimizer__weight_decay": DECAY,
}  # fmt: skip


def wanted(name):
    """(rate, decay) of a parameter, by what GROUPS says in words."""
    if name.startswith("layers.1.mlp."):
        return 3.0, 0.0
    if ".mlp." in name:
        return 0.5, 1.0
    if name == "layers.2.mixer.q_proj.kernel":
        return 0.0, 1.0
    return (0.25, 2.0) if name == "embedding" else (1.0, 1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_multiplied(text, name):
    """With them and without, from the same gradients: u = -rate (f (direction + decay d p))."""
    config = configs.resolve(
        tiny.config(text, optimizer__groups=GROUPS, **FIELDS | {"optimizer__name": name})
    )
    definition = model.build(config)
    rng, shapes, meta = np.random.default_rng(0), model.shapes(definition), model.metadata(definition)
    draw = lambda: {n: rng.normal(size=one.shape).astype(np.float32) for n, one in shapes.items()}
    params, grads = draw(), draw()

    def update(factors):
        tx = optimizer.build(config.optimizer, 10, meta, factors)
        state = tx.init(params)
        change, _ = jax.jit(tx.update)(grads, state, params)
        apart = model.unstack(definition, change)
        return trees.flatten(state).keys(), {n: np.asarray(leaf) for n, leaf in apart.items()}

    names, plain = update(None)
    names_too, grouped = update(groups.factors(definition, config.optimizer))
    assert names == names_too  # a resumed run may change its mind
    decays = model.unstack(definition, {n: np.full(shapes[n].shape, meta[n].decay) for n in shapes})
    for one, p in model.unstack(definition, params).items():
        decay = DECAY * decays[one]
        direction = plain[one] / -RATE - decay * p
        rate, more = wanted(one)
        expected = -RATE * rate * (direction + decay * more * p)
        np.testing.assert_allclose(grouped[one], expected, rtol=1e-4, atol=1e-5, err_msg=one)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            ("layers.*.mpl.*=0.5",),
            r"'layers.\*.mpl.\*': matches no parameter .* The nearest are layers\.\d\.mlp",
        ),
        (("embeding=1",), "'embeding': matches no parameter that is trained. The nearest are embedding, "),
        (("layers.9.*=1",), r"'layers.9.\*': matches no parameter"),
        (("head",), "optimizer.groups = 'head': must be PATTERN=LR or PATTERN=LR/DECAY"),
        (("head=-1",), "must be PATTERN=LR"),
        (("head=1/x",), "must be PATTERN=LR"),
    ],
)
def test_what_fits_nothing_is_refused(text, given, problem):
    with pytest.raises(ConfigError, match=problem):
        config = configs.resolve(tiny.config(text, optimizer__groups=given))
        groups.factors(model.build(config), config.optimizer)


def test_they_are_read_from_a_command_line():
    given = {"optimizer.groups": "layers.*.mlp.*=0.5, head=1e-1/0"}
    config = configs.resolve(configs.load("configs/quickstart.py", given))
    assert config.optimizer.multipliers() == [("layers.*.mlp.*", 0.5, 1.0), ("head", 0.1, 0.0)]
