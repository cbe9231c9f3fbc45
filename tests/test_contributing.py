"""The recipes in CONTRIBUTING.md and docs/outside.md work as written: they train, pack and decode."""

import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from hybridlm import config as configs
from hybridlm import mixers, model
from hybridlm.rows import Rows, single_document

ROOT = Path(__file__).parents[1]
OUTSIDE = (ROOT / "docs/outside.md").read_text()
GUIDES = {"simple_gla": (ROOT / "CONTRIBUTING.md").read_text(), "my_mixers:MovingAverage": OUTSIDE}
SETTINGS = {"simple_gla": {"num_heads": 2, "head_dim": 8}, "my_mixers:MovingAverage": {}}


@pytest.fixture(params=[pytest.param("simple_gla", marks=pytest.mark.once), "my_mixers:MovingAverage"])
def recipe(request, tmp_path, monkeypatch) -> tuple[str, str]:
    """(kind, the guide's text on it), with the file of its step 1 where the guide wants it."""
    section = GUIDES[request.param]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    name = re.search(r"Write `(?:hybridlm/mixers/)?(\w+)\.py`", section)[1]
    (tmp_path / f"{name}.py").write_text(code)
    if request.param == "simple_gla":  # in a folder that the package also looks in
        monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
        assert name in mixers.kinds()
    else:
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
    return request.param, section


def test_the_commands_of_the_recipe_run(recipe, capsys):
    kind, section = recipe
    command = re.search(r"```bash\n(python train.py.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    arguments = [a.replace("configs/", f"{ROOT}/configs/") for a in arguments]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    assert kind in printed and "mine" in printed


@pytest.mark.parametrize("recipe", ["my_mixers:MovingAverage"], indirect=True)
def test_the_check_of_the_guide_passes(recipe):
    _, check = re.findall(r"```python\n(.*?)```", recipe[1], re.DOTALL)
    exec(check, {})


def test_the_new_mixer_learns_packs_and_decodes(recipe):
    kind, _ = recipe
    config = configs.default()
    config.mixers = {"mine": configs.mixer(kind, **SETTINGS[kind])}
    config.model.update(pattern="mine*2", d_model=16, vocab_size=32, mlp_hidden=16, dtype="float32")
    config.data.path = "python-stdlib:"
    definition = model.build(configs.resolve(config))
    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    tokens, rows = jnp.arange(12)[None], single_document(1, 12)

    @jax.jit
    def early(params, tokens):
        """Gradient of a function of the first six outputs, and those outputs."""
        states = lambda p: model.merge(definition, p)(tokens, rows)[0][:, :6]
        return jax.grad(lambda p: (jnp.sum(states(p) ** 2), states(p)), has_aux=True)(params)

    grads, states = early(params, tokens)
    np.testing.assert_array_equal(states, early(params, tokens.at[:, 6:].set(0))[1])  # causal, in its bits
    mixer = {name: grad for name, grad in grads.items() if ".mixer." in name}
    assert all(np.isfinite(grad).all() and np.any(grad) for grad in mixer.values())

    @jax.jit
    def decoded(params):
        lm = model.merge(definition, params)
        hidden, cache = lm(tokens[:, :5], Rows(*(x[:, :5] for x in rows)), lm.init_cache(1, 12))
        blocks, found = lm.unstacked(), [hidden]
        for t in range(5, 12):
            state, cache = lm.step(tokens[:, t], Rows(*(x[:, t] for x in rows)), cache, blocks)
            found.append(state[:, None])
        return jnp.concatenate(found, 1)

    run = jax.jit(lambda p, rows: model.merge(definition, p)(tokens, rows)[0])
    whole = run(params, rows)
    np.testing.assert_allclose(decoded(params), whole, rtol=1e-4, atol=1e-5)
    two = Rows(jnp.repeat(jnp.array([[1, 2]]), 6, axis=1), jnp.tile(jnp.arange(6), 2)[None])
    alone = Rows(jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None])
    swapped = jnp.concatenate([tokens[:, 6:], tokens[:, :6]], 1)
    apart = jax.jit(lambda p: model.merge(definition, p)(swapped, alone)[0])(params)
    np.testing.assert_allclose(run(params, two)[:, 6:], apart[:, :6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("no_such_module:Mixer", "cannot be imported (ModuleNotFoundError"),
        ("json:dumps", "names no settings"),
        ("my-kda:Mixer", "dotted names of Python"),
        ("kad", "Did you mean 'kda'?"),
    ],
)
def test_a_kind_that_cannot_be_had(kind, problem):
    with pytest.raises(configs.ConfigError) as caught:
        configs.mixer(kind)
    assert problem in str(caught.value) and caught.value.field.endswith("kind")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("exits", "raise SystemExit(0)", "cannot be imported (SystemExit: 0). It fails at line 1 of "),
        ("other", "Mixen = int", "the module has no Mixer. Did you mean 'Mixen'?"),
        (
            "no_type",
            "x: dict = dataclasses.field(default_factory=dict)",
            "(TypeError: a field cannot be a dict)",
        ),
        ("any_tuple", "x: tuple = ()", "no config can give (TypeError: a field cannot be a tuple)"),
        ("pair", "x: tuple[int, str] = (1, 'a')", "no config can give (TypeError: a field cannot be"),
        ("nowhere", "x: 'Nowhere' = 3", "no config can give (NameError"),
        ("no_default", "_: dataclasses.KW_ONLY\n    x: int", "no config can give (TypeError"),
        ("no_methods", "x: int = 3", "does not define __call__, __init__, cost"),
    ],
)
def test_a_kind_from_outside_that_no_config_can_give(name, text, problem, tmp_path, monkeypatch):
    whole = f"""import dataclasses
from hybridlm import mixers

@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    {text}

class Mixer(mixers.TokenMixer):
    config_class = Config
"""
    (tmp_path / f"outside_{name}.py").write_text(whole if ":" in text else text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(configs.ConfigError) as caught:
        configs.mixer(f"outside_{name}:Mixer")
    assert problem in str(caught.value) and caught.value.field.endswith("kind")


def test_a_mixer_without_a_cache_says_that_it_cannot_generate():
    class Mine(mixers.TokenMixer):
        def __init__(self):
            pass

        def __call__(self, x_BTD, context, cache=None):
            return x_BTD, cache

    with pytest.raises(configs.ConfigError, match=r"'Mine': defines no init_cache.* cannot generate"):
        Mine().init_cache(1, 2, "float32")
