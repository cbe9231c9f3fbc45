"""The step: frozen parameters, objectives of one's own, and what its state holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import member, model, program, sharding, trees
from hybridlm.errors import ConfigError
from hybridlm.objectives import next_token
from tests import tiny


def prepared(text, **fields):
    """(resolved config, definition, program, a state, a function that takes a step)."""
    config = configs.resolve(tiny.config(text, **fields))
    definition, mesh = model.build(config), sharding.make_mesh(config.mesh)
    source = member.build_data(config, "train")
    built = program.build(config, definition, mesh, source.token_bytes)
    step = lambda state, index: built.step(state, sharding.put_batch(source.batch(index), mesh))
    return config, definition, built, built.init(jax.random.key(0)), step


FROZEN = ("embedding", "layers.0.*", "layers.*.mlp.*")


@pytest.mark.once
def test_what_is_frozen_stays_and_has_no_state(text):
    """Against a run that trains everything: what is not frozen gets the same gradient in the first step."""
    fields = {"model__pattern": "retnet*3 full", "optimizer__clip_norm": 0.0}
    _, definition, _, state, step = prepared(text, optimizer__freeze=FROZEN, **fields)
    _, whole, _, every, step_every = prepared(text, **fields)
    assert len(definition.layout.items()) == 4 and str(definition.layout) == "retnet retnet*2 full"
    before = jax.tree.map(np.asarray, model.unstack(definition, state["params"]))
    all_before = jax.tree.map(np.asarray, model.unstack(whole, every["params"]))
    jax.tree.map(np.testing.assert_array_equal, before, all_before)  # names and values know no plan
    frozen = {n for n in before if n == "embedding" or n.startswith("layers.0.") or ".mlp." in n}
    assert frozen and len(frozen) < len(before)
    held = trees.flatten(jax.tree.map(np.asarray, state["opt_state"]))
    for name in model.shapes(definition):
        canonical = model.stack.unstack(definition.layout, {name: None}, lambda leaf, place: None)
        assert any(one.endswith(name) for one in held) != bool(set(canonical) & frozen), name
    after, metrics = step(state, 0)
    all_after, all_metrics = step_every(every, 0)
    np.testing.assert_allclose(metrics["loss"], all_metrics["loss"], rtol=1e-6)
    apart = lambda d, state: jax.tree.map(np.asarray, model.unstack(d, state["params"]))
    after, all_after = apart(definition, after), apart(whole, all_after)
    for name in before:
        if name in frozen:
            np.testing.assert_array_equal(after[name], before[name])
        else:
            assert not np.array_equal(after[name], before[name]), name
            np.testing.assert_allclose(after[name], all_after[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("freeze", "problem"),
    [
        (("layers.7.*",), "is the name of no parameter"),
        (("*",), "leaves nothing to train"),
        (("!head",), r"'!head': takes out what nothing before it freezes. All but these: '\*, !head'"),
        (("embedding", "!layers.*"), "takes out what nothing before it"),
        (("*", "!layers.0.*", "!layers.0.*"), "takes out what nothing before it"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(text, freeze, problem):
    with pytest.raises(ConfigError, match=problem):
        model.build(configs.resolve(tiny.config(text, optimizer__freeze=freeze)))


@pytest.mark.parametrize("name", ["head", "embedding_norm", "final_norm.bias", "shared"])
def test_what_the_model_has_not_cannot_be_frozen(text, name):
    """With tied embeddings there is no head: what was frozen so was trained."""
    with pytest.raises(ConfigError, match="is the name of no parameter"):
        model.build(configs.resolve(tiny.config(text, optimizer__freeze=(name,), model__tie_embeddings=True)))
    both = tiny.config(text, optimizer__freeze=("embedding", "head"), model__tie_embeddings=True)
    assert model.is_frozen(model.build(configs.resolve(both)), "embedding")


def test_names_below_a_norm_may_be_taken_out(text):
    freeze = ("embedding_norm.*", "!embedding_norm.bias")
    norms = {"model__embedding_norm": True, "model__norm": "layer"}
    normed = lambda freeze: tiny.config(text, optimizer__freeze=freeze, **norms)
    model.build(configs.resolve(normed(freeze)))
    with pytest.raises(ConfigError, match="takes out what nothing before it"):
        model.build(configs.resolve(normed(freeze[1:])))


@dataclasses.dataclass(frozen=True)
class SmoothedConfig(next_token.Config):
    """temperature: that the objective divides its loss by; a stand-in for a user's own."""

    temperature: float = 2.0


class Smoothed(next_token.Objective):
    config_class = SmoothedConfig

    def loss(self, params, frozen, batch, wanted=()):
        total, sums = super().loss(params, frozen, batch, wanted)
        return total / self.config.temperature, sums


def test_an_objective_from_outside(text):
    """Half the loss has half the gradient, and is told as the same loss."""
    norms = []
    for kind in ("next_token", "tests.test_program:Smoothed"):
        config = tiny.config(text)
        config.objective = configs.objective(kind)
        resolved = configs.resolve(config)
        assert configs.resolve(configs.ConfigDict(resolved.to_dict())) == resolved
        mesh, source = sharding.make_mesh(resolved.mesh), member.build_data(resolved, "train")
        built = program.build(resolved, model.build(resolved), mesh, None)
        _, metrics = built.step(built.init(jax.random.key(0)), sharding.put_batch(source.batch(0), mesh))
        norms.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert norms[1] == pytest.approx((norms[0][0], norms[0][1] / 2), rel=1e-5)


def test_a_definition_is_built_once(text, monkeypatch):
    """Whoever asks, and however often: it follows from the config."""
    config = configs.resolve(tiny.config(text))
    assert model.build(config) is model.build(configs.resolve(configs.ConfigDict(config.to_dict())))
    assert model.abstract(model.build(config))[0] is model.abstract(model.build(config))[0]
    assert jnp.dtype(model.build(config).dtype) == jnp.float32


def test_what_draws_the_first_parameters():
    """jax's kernel on one device, which several would not share; the setting does not outlast the call."""
    setting = lambda key: jax.config.jax_threefry_gpu_kernel_lowering
    meshes = [jax.sharding.AbstractMesh((size,), ("data",)) for size in (1, 2)]
    assert [program.drawing(setting, mesh)(None) for mesh in meshes] == [True, False]
    assert setting(None) is False
