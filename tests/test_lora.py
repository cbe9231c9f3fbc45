"""Low-rank factors beside matrices: what is trained, saved, merged and exported (hybridlm.lora)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config as configs
from hybridlm import init_from, loop, model, trainer, weights
from hybridlm.convert import incoming, outgoing
from hybridlm.errors import ConfigError, Stopped
from hybridlm.layers import Linear
from hybridlm.rows import Rows
from tests import tiny

pytestmark = pytest.mark.once  # test_optimizer and test_layers have what jax does of it
LORA = ("layers.*.mixer.[qo]_proj.kernel = 3/6", "layers.1.mlp.up.kernel=2")


def plain(text):
    c = tiny.config(text, model__pattern="full*2", train__steps=4)
    c.mixers.full.head_dim = 4  # as public transformers have it
    return c


def with_factors(text):
    c = plain(text)
    c.model.lora = LORA
    c.optimizer.update(freeze=("*", "!*.lora_?"), weight_decay=0.5, learning_rate=0.05)
    c.checkpoint.update(every_steps=2, keep_last=9)
    return configs.resolve(c)


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    trainer.train(with_factors(text), workdir)
    return workdir


def logits(definition, params):
    tokens = jnp.arange(24).reshape(2, 12) % 250
    rows = Rows(jnp.ones_like(tokens), jnp.arange(12) * jnp.ones_like(tokens))
    return np.asarray(jax.jit(lambda p: model.logits(definition, p, tokens, rows))(params))


def test_only_factors_are_trained(text, run):
    """B = 0 is the model without factors; what is in both stays bit for bit, and has no optimiser state."""
    base, after = model.build(configs.resolve(plain(text))), weights.load(run)
    params = jax.jit(lambda: model.init(base, jax.random.key(0)))()
    old, new = model.unstack(base, params), model.unstack(after.definition, after.params)
    factors = sorted(name for name in new if name not in old)
    assert len(factors) == 2 * (2 * 2 + 1) and all(name.endswith(("lora_a", "lora_b")) for name in factors)
    assert new["layers.1.mlp.up.lora_a"].shape == (16, 2) and new["layers.0.mixer.o_proj.lora_b"].shape == (
        3,
        16,
    )
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    assert all(np.abs(new[name]).max() > 0 for name in factors)
    meta = model.metadata(after.definition)
    assert all(meta[name].trained == (".lora_" in name) for name in meta)
    start = {name: jnp.zeros_like(x) if name.endswith("lora_b") else x for name, x in after.params.items()}
    np.testing.assert_array_equal(logits(after.definition, start), logits(base, params))


@pytest.mark.slow
def test_resumed(text, run, tmp_path, monkeypatch):
    save = loop.Loop.save

    def stop(self, at, *args):
        save(self, at, *args)
        if at == 2:
            raise Stopped("as if killed")

    monkeypatch.setattr(loop.Loop, "save", stop)
    with pytest.raises(Stopped):
        trainer.train(with_factors(text), tmp_path)
    monkeypatch.undo()
    trainer.train(with_factors(text), tmp_path)
    assert tiny.lines(tmp_path) == tiny.lines(run)


def test_merged(text, run, tmp_path):
    """A run that starts from it, a teacher and an export have its factors in their matrices."""
    one = weights.load(run)
    expected = logits(one.definition, one.params)
    assert not init_from.described(run).model.lora
    with init_from.source(run) as other:
        fresh = jax.jit(lambda: model.init(other.definition, jax.random.key(0)))()
        params, report = init_from.load(other, other.definition, fresh)
        assert len(other.arrays) == len(report.loaded) and not report.new and not report.dropped
        np.testing.assert_allclose(logits(other.definition, params), expected, atol=2e-5)
        again, report = init_from.load(other, one.definition, jax.tree.map(jnp.copy, one.params))
        assert sorted(report.new) == sorted(n for n in model.unstack(one.definition, again) if "lora" in n)
    outgoing.export_hf(run, tmp_path / "hf")
    incoming.import_hf(tmp_path / "hf", tmp_path / "run")
    back = weights.load(tmp_path / "run", model__dtype="float32")
    np.testing.assert_allclose(logits(back.definition, back.params), expected, atol=2e-5)


def test_matrix():
    """What MLA absorbs is what a call computes."""
    layer = Linear(4, 3, rngs=nnx.Rngs(0))
    layer.add_factors(2, 0.5, nnx.Rngs(1))
    layer.lora_b[...] = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(layer(jnp.eye(4)), layer.matrix(jnp.float32), rtol=1e-6)
    whole = layer.kernel[...] + 0.5 * np.einsum("ir,ro->io", layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(layer.matrix(jnp.float32), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("layers.*.mixer.q_proj.kernel", "must be PATTERN=RANK"),
        ("layers.*.mixer.q_proj.kernel=0", "must be PATTERN=RANK"),
        ("layers.7.mixer.q_proj.kernel=8", "no matrix in a layer that can have some"),
        ("embedding=8", "no matrix in a layer"),
    ],
)
def test_refused(text, given, problem):
    with pytest.raises(ConfigError, match=rf"model.lora = '{given[:8]}.*{problem}"):
        model.build(configs.resolve(tiny.config(text, model__lora=(given,))))


def test_no_factors_where_logits_are_clipped(text):
    fields = {"model__lora": ("layers.1.mixer.q_proj.kernel=2",), "optimizer__qk_clip": 100.0}
    with pytest.raises(ConfigError, match="cannot be trained with"):
        model.build(configs.resolve(tiny.config(text, **fields)))
