"""Parameters of softmax attention in the place of another mixer's (hybridlm.mapping, init_from)."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config as configs
from hybridlm import init_from, mapping, mixers, model
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows

D, H, G, K = 24, 6, 2, 4
SIZES = {"num_heads": H, "head_dim": K}


def built(pattern, **kinds):
    c = configs.default()
    c.model.update(pattern=pattern, d_model=D, vocab_size=32, mlp_hidden=32, dtype="float32", remat="none")
    c.mixers = {name: configs.mixer(kind, **settings) for name, (kind, settings) in kinds.items()}
    c.data = configs.data("copying", task="palindrome")
    return model.build(configs.resolve(c))


GQA = ("attention", SIZES | {"num_kv_heads": G})


@functools.cache
def teacher(yarn=(), logit_scale=0.0):
    definition = built("full*2", full=(GQA[0], GQA[1] | {"yarn": yarn, "logit_scale": logit_scale}))
    params = jax.jit(lambda: model.init(definition, jax.random.key(0)))()
    return definition, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)


def loaded(definition, gates="near", **of_teacher):
    """(parameters, report) of ``definition`` started from the teacher."""
    source, params = teacher(**of_teacher)
    arrays = {name: np.asarray(leaf) for name, leaf in model.unstack(source, params).items()}
    fresh = jax.jit(lambda: model.init(definition, jax.random.key(1)))()
    return init_from.load(init_from.Source(source, arrays, lambda path: None, None), definition, fresh, gates)


@functools.cache
def expected():
    return logits(*teacher())


def logits(definition, params):
    """Of rows of two documents and padding."""
    tokens = jax.random.randint(jax.random.key(2), (2, 20), 0, 32)
    segments = jnp.repeat(jnp.array([[1] * 9 + [2] * 9 + [0] * 2]), 2, 0)
    positions = jnp.repeat(jnp.array([[*range(9), *range(9), 0, 0]]), 2, 0)
    run = jax.jit(lambda params: model.logits(definition, params, tokens, Rows(segments, positions)))
    return np.asarray(run(params))[:, :18]


MLA = {
    "num_heads": H,
    "v_head_dim": K,
    "qk_rope_head_dim": G * K,
    "qk_nope_head_dim": 3,
    "latent_norm": False,
}


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        ("full*2", {"full": GQA}),
        pytest.param(
            "full swa", {"full": GQA, "swa": ("attention", GQA[1] | {"window": 9})}, marks=pytest.mark.once
        ),
        pytest.param("full mha", {"full": GQA, "mha": ("attention", SIZES)}, marks=pytest.mark.once),
        ("mla*2", {"mla": ("mla", MLA | {"kv_lora_rank": 10, "rope_groups": G})}),
    ],
)
def test_exact(pattern, kinds):
    """Every layer kept; a window as long as the documents; heads repeated; TransMLA's first step."""
    definition = built(pattern, **kinds)
    params, report = loaded(definition)
    assert not report.why and not report.new and not report.dropped
    np.testing.assert_allclose(logits(definition, params), expected(), atol=1e-5, rtol=1e-5)


def test_exact_where_attention_has_a_scale_of_its_own():
    definition = built("mla*2", mla=("mla", MLA | {"kv_lora_rank": 10, "rope_groups": G}))
    params, report = loaded(definition, logit_scale=1.5)
    assert not report.why and not report.new
    want = logits(*teacher(logit_scale=1.5))
    np.testing.assert_allclose(logits(definition, params), want, atol=1e-5, rtol=1e-5)
    assert np.abs(want - expected()).max() > 1e-3


def test_exact_where_rotations_are_stretched():
    """Latents and keys turn and are scaled alike; an MLA of other rotations is none."""
    yarn = (4.0, 6.0, 2.0, 1.0, 1.0, 0.5)
    made = lambda yarn: built(
        "mla*2", mla=("mla", MLA | {"kv_lora_rank": 10, "rope_groups": G, "yarn": yarn})
    )
    params, report = loaded(made(yarn), yarn=yarn)
    assert not report.why and not report.new
    np.testing.assert_allclose(logits(made(yarn), params), logits(*teacher(yarn=yarn)), atol=1e-5, rtol=1e-5)
    assert np.abs(logits(*teacher(yarn=yarn)) - expected()).max() > 1e-3
    assert "yarn=(4.0, 6.0" in loaded(made(()), yarn=yarn)[1].why["layer 0"]


def test_fewer_key_heads():
    """The mean of neighbours, by a loop."""
    definition = built("full*2", full=("attention", SIZES | {"num_kv_heads": 1}))
    params, report = loaded(definition)
    new = model.unstack(definition, params)["layers.1.mixer.k_proj.kernel"]
    old = model.unstack(*teacher())["layers.1.mixer.k_proj.kernel"]
    expected = np.stack([(old[:, i] + old[:, K + i]) / 2 for i in range(K)], axis=1)
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    assert report.mapped["layers.1.mixer.k_proj.kernel"] == "k_proj.kernel, the mean of 2 heads"


LINEAR = {
    "gated_delta_net": {"output_gate": "sigmoid"},
    "kda": {"lower_bound": -5.0},
    "gla": {},
    "delta_product": {},
    "mlstm": {},
    "mamba2": {"n_groups": H, "state_size": K},
    "comba": {},
    "gated_delta_net2": {"output_gate": "none"},
}


def mapped(kind, settings, gates="near"):
    """(what becomes of layer 1 of the teacher, why not, the teacher's layer)"""
    definition = built("full new", full=GQA, new=(kind, settings))
    every = model.canonical_shapes(definition).items()
    shapes = {name.split("mixer.")[1]: one.shape for name, one in every if "1.mixer." in name}
    rng = np.random.default_rng(0)
    sizes = {"q_proj.kernel": H, "k_proj.kernel": G, "v_proj.kernel": G}
    old = {name: rng.normal(size=(D, heads * K)).astype(np.float32) for name, heads in sizes.items()}
    old["o_proj.kernel"] = rng.normal(size=(H * K, D)).astype(np.float32)
    theirs, ours = (layer.config for layer in definition.layers)
    made, problem = mapping.mixer(theirs, ours, mapping.Layer(D, old.get, shapes, gates))
    assert all(one.value.shape == shapes[name] for name, one in made.items())
    return made, problem, old


@pytest.mark.parametrize("kind", LINEAR)
def test_matrix_states(kind):
    """Heads go where their queries are."""
    sizes = SIZES if kind == "mamba2" else SIZES | {"v_head_dim": K}
    made, problem, old = mapped(kind, sizes | LINEAR[kind])
    source = old["k_proj.kernel"]
    expected = np.concatenate([source[:, h // (H // G) * K :][:, :K] for h in range(H)], axis=1)
    np.testing.assert_array_equal(made["k_proj.kernel"].value[:, : H * K], expected)
    for name in ("q_proj.kernel", "o_proj.kernel"):
        np.testing.assert_array_equal(made[name].value, old[name])
    assert not problem and "each of 2 heads 3 times" in made["v_proj.kernel"].origin


@pytest.mark.parametrize(
    ("kind", "more"),
    [("kda", {"decay_rank": -1})]
    + [(kind, LINEAR[kind]) for kind in ("gated_delta_net", "kda", "gla", "comba", "gated_delta_net2")],
)
def test_gates_near_none(kind, more):
    config = mixers.config_class(kind)(kind=kind, **SIZES, v_head_dim=K, **more)
    mixer = mixers.load(kind)(config, mixers.Site(D), rngs=nnx.Rngs(params=0))
    for name, number in config.near_attention().items():
        owner, *rest = name.split(".")
        leaf = getattr(mixer, owner) if not rest else getattr(getattr(mixer, owner), rest[0])
        leaf.set_value(jnp.full_like(leaf[...], number))
    x = jax.random.normal(jax.random.key(0), (1, 3, D))
    q = jnp.ones((1, 3, H, K))
    decay = mixer.inputs(x, q, q, q, None).log_decay
    np.testing.assert_allclose(decay, -1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "like", "error"),
    [
        ("gated_delta_net2", "kda", 1e-5),
        pytest.param("comba", "gated_delta_net", 2e-3, marks=pytest.mark.slow),  # it decays after it reads
    ],
)
@pytest.mark.once
def test_delta_rules_start_alike(kind, like, error):
    """Near attention the gates of the newer rules are those of the older: half is erased, half is written."""
    found = []
    for one in (kind, like):
        definition = built("full new", full=GQA, new=(one, SIZES | {"v_head_dim": K, "output_gate": "none"}))
        found.append(logits(definition, loaded(definition)[0]))
    assert np.linalg.norm(found[0] - found[1]) < error * np.linalg.norm(found[1])


@pytest.mark.parametrize(
    ("kind", "pools", "more"),
    [
        ("gla", 5, {"gate_rank": 5}),
        ("gla", H * K, {"gate_rank": H * K}),
        ("kda", K, {}),
        ("kda", H * K, {"decay_rank": -1}),
        ("gated_delta_net", H, {}),
        ("comba", H, {}),
        ("gated_delta_net2", K, {}),
    ],
)
def test_decay_of_keys(kind, pools, more):
    """Liger: logsigmoid of pooled keys, over 16; every channel or head by its own pool."""
    settings = SIZES | {"v_head_dim": K, "output_gate": "none"} | more
    made, _, _ = mapped(kind, settings, "keys")
    config = mixers.config_class(kind)(kind=kind, **settings)
    mixer = mixers.load(kind)(config, mixers.Site(D), rngs=nnx.Rngs(params=0))
    for name, one in made.items():
        if "_proj" not in name or name.split(".")[0] in ("f_a_proj", "f_b_proj", "f_proj", "a_proj"):
            owner, *rest = name.split(".")
            (getattr(getattr(mixer, owner), rest[0]) if rest else getattr(mixer, owner)).set_value(one.value)
    x = jax.random.normal(jax.random.key(0), (1, 3, D))
    q = jnp.ones((1, 3, H, K))
    keys = np.asarray(x[0] @ made["k_proj.kernel"].value)  # [3, H * K]
    windows = [(i * H * K // pools, -(-(i + 1) * H * K // pools)) for i in range(pools)]
    pooled = np.stack([keys[:, a:b].mean(1) for a, b in windows], 1)
    wanted = -np.log1p(np.exp(-pooled)) / 16
    decay = np.asarray(mixer.inputs(x, q, q, q, None).log_decay)[0].reshape(3, -1)
    wanted = wanted[:, np.arange(decay.shape[1]) * pools // decay.shape[1]]
    np.testing.assert_allclose(decay, wanted, rtol=1e-4)


def test_no_decay_to_be_made_of_keys():
    with pytest.raises(ConfigError, match="init_gates = 'keys': kind 'delta_net' has no decay"):
        mapped("delta_net", SIZES | {"v_head_dim": K}, "keys")


def test_parallel_pair():
    """Each branch by itself: the window is the attention, so that alone it is the teacher."""
    kinds = {
        "full": GQA,
        "swa": ("attention", GQA[1] | {"window": 9}),
        "gla": ("gla", SIZES | {"v_head_dim": K, "output_gate": "none"}),
    }
    pair = {"branches": ("swa", "gla"), "combine": "gate"}
    definition = built("full pair", **kinds, pair=("parallel", pair))
    params, report = loaded(definition, "keys")
    assert not report.why and not report.dropped
    assert sorted(n.rsplit("mixer.")[1] for n in report.new) == ["branches.gla.o_norm.scale", "gate"]
    [gate] = [name for name in params if name.endswith("mixer.gate")]
    params[gate] = jnp.full_like(params[gate], 40.0)  # the first branch alone
    np.testing.assert_allclose(logits(definition, params), expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("hgrn", {}, "no queries, keys and values"),
        (
            "gla",
            {"num_heads": 2, "head_dim": 4, "v_head_dim": 4},
            "needs as many heads.*num_heads=6, head_dim=4",
        ),
        ("mla", {"v_head_dim": 4}, "needs num_heads=6, v_head_dim=4, qk_rope_head_dim=8"),
        ("mla", {"v_head_dim": 4, "output_gate": "head"}, "needs num_heads=6, .*, output_gate=none"),
    ],
)
def test_what_cannot_be_mapped_is_said(kind, settings, why):
    made, problem, _ = mapped(kind, settings)
    assert not made and re.search(why, problem)


@pytest.mark.parametrize("settings", [{"forget_gate": True}, {"sinks": True}, {"o_bias": True}])
def test_logits_that_mla_has_not_are_no_mla(settings):
    theirs = mixers.config_class("attention")(kind="attention", **SIZES, num_kv_heads=G, **settings)
    ours = mixers.config_class("mla")(kind="mla", **MLA)
    made, why = mapping.mixer(theirs, ours, mapping.Layer(D, lambda name: np.zeros((D, 8)), {}))
    assert made == {} and "forget_gate or sinks" in why


def test_a_layer_without_keys_of_its_own_maps_to_nothing():
    theirs = mixers.config_class("attention")(kind="attention", **SIZES)
    nothing = mapping.Layer(D, lambda name: None, {})
    made, why = mapping.mixer(theirs, mixers.config_class("gla")(kind="gla"), nothing)
    assert made == {} and "reuses the keys" in why


def test_settings_that_are_not_the_sources_are_said():
    """Shapes and kinds agree, so all is loaded, and yet it computes something else. Another mixer, and a
    norm_eps that computes nothing, are no such settings."""
    theirs = built("full*2 gla", full=GQA, gla=("gla", SIZES))
    same = built(
        "full gdn gla",
        full=(GQA[0], GQA[1] | {"norm_eps": 0.1}),
        gdn=("gated_delta_net", SIZES),
        gla=("gla", SIZES),
    )
    assert init_from.unlike(theirs, same) == []
    other = built(
        "full*2 gla", full=(GQA[0], GQA[1] | {"rope_theta": 5.0}), gla=("gla", SIZES | {"norm_eps": 0.1})
    )
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, logit_cap=3.0))
    found = ["model.logit_cap 3.0, not 0.0", "layers 0, 1: rope_theta 5.0, not 10000.0"]
    assert init_from.unlike(theirs, other) == [*found, "layers 2: norm_eps 0.1, not 1e-06"]
