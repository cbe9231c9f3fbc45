"""The config that turns a Transformer into a hybrid: which layers stay, what the new ones take over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import layer_choice, mapping, model, stages, weights
from hybridlm.errors import ConfigError
from tests import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run of two layers of attention, as far as it is read here: its config."""
    workdir = tmp_path_factory.mktemp("teacher")
    (workdir / "checkpoints").mkdir()
    config = configs.resolve(tiny.config("unread", model__pattern="full*2"))
    (workdir / "config.json").write_text(configs.to_json(config))
    return workdir


@pytest.mark.parametrize("mixer", ["gdn", "kda", "gla", "mamba2", "mla", "swa"])
def test_linearise_config(teacher, mixer):
    """One argument makes a config whose new layers take all of the attention that they can."""
    config = configs.resolve(configs.load(f"configs/linearise.py:teacher={teacher},{mixer},1:1"))
    definition = model.build(config)
    begins = [begin for begin, _ in stages.split(config, configs.resolve)]
    assert config.model.pattern == f"{mixer} full" and begins == [0, 1000, 4000]
    every = model.canonical_shapes(definition).items()
    shapes = {name.split("mixer.")[1]: one.shape for name, one in every if "0.mixer." in name}
    read = lambda name: (
        np.zeros((16, 32) if name[0] in "qkv" else (32, 16)) if name[2:] == "proj.kernel" else None
    )
    layers = definition.layers
    made, why = mapping.mixer(layers[1].config, layers[0].config, mapping.Layer(16, read, shapes))
    assert not why and (made or mixer == "swa")
    frozen = configs.resolve(configs.load(f"configs/linearise.py:teacher={teacher},{mixer},0+1")).stages[
        "transfer"
    ]
    assert "layers.*.mlp.*" in frozen["optimizer"]["freeze"]


def test_layers_that_stay(tmp_path):
    """The teacher's own window and its own KDA stay as they are beside new layers of those names, whose
    settings are what the command line says; parameters of both are where they belong."""
    own = tiny.config("unread", model__pattern="swa full kda")
    own.mixers.swa = configs.mixer("attention", num_heads=2, head_dim=8, window=3)
    own.mixers.kda = configs.mixer("kda", num_heads=1, head_dim=16)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(own)))
    spec = f"configs/linearise.py:teacher={tmp_path},"
    load = lambda arg, **more: configs.resolve(configs.load(spec + arg, more))
    window = load("swa,pure", **{"mixers.swa.window": "5"})
    assert window.model.pattern == "kept_swa swa kda"
    assert (window.mixers["kept_swa"].window, window.mixers["swa"].window) == (3, 5)
    assert window.mixers["kept_swa"] == configs.resolve(own).mixers["swa"]
    linear = load("kda,pure")
    assert linear.model.pattern == "swa kda kept_kda" and linear.mixers["kda"].num_heads == 4
    assert linear.mixers["kept_kda"] == configs.resolve(own).mixers["kda"]
    assert load("gdn,pure").model.pattern == "swa gdn kda"
    own.model.pattern = "swa full*2"
    (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(own)))
    first = load("swa,2", **{"mixers.swa.window": "5"})
    (tmp_path / "config.json").write_text(configs.to_json(first))
    again = load("swa,pure", **{"mixers.swa.window": "7"})  # of a teacher that was converted itself
    assert again.model.pattern == "kept_swa kept_kept_swa swa"
    assert [again.mixers[name].window for name in again.model.pattern.split()] == [3, 5, 7]
    for layers, said in (
        ("full:a full@a", "layer 1 stays and has the keys and values of layer 0"),
        ("full/none*2", ""),
    ):
        own.model.pattern = layers
        own.mlps = {"none": configs.mlp("none")}
        (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(own)))
        if said:
            with pytest.raises(ConfigError, match=said):
                load("gdn,1+1")
        else:
            assert load("gdn,1+1").stages["transfer"]["optimizer"]["freeze"][-1] == "layers.*.mixer_norm.*"
    own.mixers.both = configs.mixer("parallel", branches=("kda", "swa"))
    own.model.pattern = "both full"
    (tmp_path / "config.json").write_text(configs.to_json(configs.resolve(own)))
    with pytest.raises(ConfigError, match="layers that stay are made of a mixer 'kda' with other settings"):
        load("kda,pure")


def test_learned_gates(teacher):
    """Both in each layer: only gates are trained in the second stage; those that share most stay, as far as
    their keys and values fit."""
    config = configs.resolve(configs.load(f"configs/linearise.py:teacher={teacher},gla,gates"))
    assert config.model.pattern == "full_or_gla*2"
    first, second = (model.metadata(model.build(one)) for _, one in stages.split(config, configs.resolve))
    assert {n.rsplit("mixer.")[1] for n, meta in second.items() if meta.trained} == {"gate"}
    assert all(".branches.gla." in name for name, meta in first.items() if meta.trained)
    definition = model.build(config)
    params = jax.jit(lambda: model.init(definition, jax.random.key(0)))()
    [gate] = [name for name in params if name.endswith("mixer.gate")]
    params[gate] = jnp.reshape(jnp.array([-1.0, 2.0]), params[gate].shape)
    run, attention = weights.Weights(config, definition, params, 1), model.build(configs.of_run(teacher))
    shares = layer_choice.gates(run)
    assert shares[0] == pytest.approx(1 / (1 + np.e)) and shares[1] == pytest.approx(1 / (1 + np.exp(-2)))
    base, added = layer_choice.kv_bytes(run, attention, context=100)
    assert base == 0 and set(added.values()) == {100 * 2 * 4 * 8 * 4}  # keys, values; heads, K, float32
    keep = layer_choice.kept(shares, added, budget=1.5 * added[0])
    assert keep == [1] and layer_choice.names(run, attention, keep) == ["gla", "full"]
    assert layer_choice.kept({0: 3.0, 1: 2.0, 2: 1.0}, {0: 5, 1: 9, 2: 4}, 9) == [0, 2]


def test_two_mixers_in_a_layer(teacher):
    config = configs.resolve(configs.load(f"configs/linearise.py:teacher={teacher},gla+swa,1:1"))
    assert config.model.pattern == "gla_swa full" and config.mixers["gla_swa"].multipliers == (0.5, 0.5)


@pytest.mark.parametrize(
    "arg",
    [
        "teacher={},gla+gla,1:1",
        "teacher={},gla+swa,gates",
        "",
        "teacher=x,gdn",
        "teacher={},gdm,3:1",
        "teacher={},mom,3:1",
        "teacher={},gdn,3",
        "teacher={},gdn,2:1",
        "teacher={},gdn,²:1",
    ],
)
def test_linearise_arguments(teacher, arg):
    with pytest.raises(ConfigError, match="must be teacher=FOLDER,MIXER,RATIO"):
        configs.load(f"configs/linearise.py:{arg.format(teacher)}")
