"""Learning rates by names (optimizer.groups), in the step, against Adam by hand."""

import jax
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import groups, model, trees
from hybridlm.errors import ConfigError
from tests import tiny
from tests.test_program import prepared

GROUPS = ("layers.*.mlp.*=0.5", "layers.1.mlp.*=3/0", "embedding=0.25/2", "layers.2.mixer.q_proj.*=0")
RATE, DECAY = 0.1, 0.5
FIELDS = {
    "model__pattern": "retnet*3", "optimizer__schedule": "constant", "optimizer__warmup_steps": 0,
    "optimizer__clip_norm": 0.0, "optimizer__learning_rate": RATE, "optimizer__weight_decay": DECAY,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"))


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
    """The first step from the same state with and without them: u = -rate (f (direction + decay d p))."""
    fields = FIELDS | {"optimizer__name": name}
    _, definition, _, state, step = prepared(text, **fields)
    _, _, _, other, step_groups = prepared(text, optimizer__groups=GROUPS, **fields)
    assert trees.flatten(state["opt_state"]).keys() == trees.flatten(other["opt_state"]).keys()  # may change
    apart = lambda state: jax.tree.map(np.asarray, model.unstack(definition, state["params"]))
    before, meta = apart(state), model.metadata(definition)
    decays = {c for n in meta if meta[n].decay for c in model.stack.unstack(
        definition.layout, {n: None}, lambda leaf, place: None)}  # fmt: skip
    after, grouped = apart(step(state, 0)[0]), apart(step_groups(other, 0)[0])
    for one, p in before.items():
        decay = DECAY if one in decays else 0.0
        direction = (after[one] - p) / -RATE - decay * p
        rate, more = wanted(one)
        expected = p - RATE * rate * (direction + decay * more * p)
        np.testing.assert_allclose(grouped[one], expected, rtol=1e-5, atol=2e-6, err_msg=one)


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
