"""The recipe in CONTRIBUTING.md works as written: its file, in a fresh package path, trains and decodes."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from hybridlm import config as configs
from hybridlm import mixers, model
from hybridlm.rows import single_document

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """The guide's text, with the file of its step 1 in place (in a folder that the package also looks in)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add a mixer") :]
    name = re.search(r"`hybridlm/mixers/(\w+)\.py`", section)[1]
    (tmp_path / f"{name}.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    assert name in mixers.kinds()
    return section


def test_the_commands_of_the_recipe_run(recipe, capsys):
    command = re.search(r"```bash\n(.*?)```", recipe, re.DOTALL)[1].replace("\\\n", " ")
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "simple_gla" in printed and "mine" in printed


def test_the_new_mixer_has_a_gradient_and_is_causal(recipe):
    config = configs.default()
    config.mixers = {"mine": configs.mixer("simple_gla", num_heads=2, head_dim=8)}
    config.model.update(
        pattern="mine", num_layers=1, d_model=16, vocab_size=32, mlp_hidden=16, dtype="float32"
    )
    definition = model.build(config)
    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    tokens, rows = jnp.arange(12)[None], single_document(1, 12)

    @jax.jit
    def early(params, tokens):
        """Gradient of a function of the first six outputs, and those outputs."""
        states = lambda p: model.merge(definition, p)(tokens, rows)[0][:, :6]
        return jax.grad(lambda p: (jnp.sum(states(p) ** 2), states(p)), has_aux=True)(params)

    grads, states = early(params, tokens)
    np.testing.assert_array_equal(states, early(params, tokens.at[:, 6:].set(0))[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.any(grads["segments"][0][0]["mixer"]["a_proj"]["kernel"])
