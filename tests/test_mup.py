"""muP: sizes that do not move with the width, factors by type of layer, and nothing at the base width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm import config as configs
from hybridlm import groups, mixers, model, mup, optimizer, program, schema, sharding
from hybridlm.convert import families
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from pallas_kernels import auto_means

BASE, STEPS, VOCAB = 64, 4, 32


def resolved(width, base=BASE, pattern="full", mamba=None, **fields):
    """Heads of 16, so that their number grows; float32."""
    c = configs.default()
    c.model.update(
        pattern=pattern, d_model=width, vocab_size=VOCAB, mlp_hidden=2 * width, mup_base_width=base
    )
    c.model.update(dtype="float32", remat="none")
    sizes = {"num_heads": width // 16, "head_dim": 16}
    c.mixers = {"full": configs.mixer("attention", **sizes), "kda": configs.mixer("kda", **sizes)}
    if mamba is not None:
        c.mixers["mamba"] = configs.mixer("mamba", **mamba)
    c.train.update(steps=100, batch_size=4, seq_len=16)
    c.optimizer.update(learning_rate=0.01, schedule="constant", **fields)
    c.data = configs.data("mqar")
    return configs.resolve(c)


LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
OWN = ("mamba2", "mlstm", "rglru", "rwkv6", "rwkv7")  # with deviations of their own
NEW = (*OWN, "mamba", "based", "comba", "feature_map", "gated_delta_net2")
OLD = (
    "attention", "delta_net", "delta_product", "gated_delta_net", "gated_delta_product", "gla", "hgrn",
    "hgrn2", "kda", "lightning", "mla", "retnet",
)  # fmt: skip
slow = lambda *values: [pytest.param(value, marks=pytest.mark.slow) for value in values]
ELEMENTWISE = ("mixer.A_log", "_gate.bias", "conv.kernel")  # stacks of vectors


def widened(width, kinds, name="adamw", **model_fields):
    """A layer of each kind and no MLPs, sizes of heads and ranks held; embedding and head are not trained."""
    c = configs.default()
    c.model.update(
        pattern=" ".join(f"{kind}/none" for kind in kinds), num_layers=len(kinds), d_model=width,
        vocab_size=VOCAB, mup_base_width=BASE, dtype="float32", remat="none", **model_fields,
    )  # fmt: skip
    c.mixers = {}
    for kind in kinds:
        known = {field.name for field in dataclasses.fields(mixers.config_class(kind))}
        held = {"num_heads": width // 16, "head_dim": 16, "n_groups": width // 64, "dt_rank": 8} | LATENT
        held |= dict.fromkeys(("decay_rank", "rate_rank", "gate_rank", "value_rank"), 8)
        if kind not in ("attention", "mla", "based"):  # others count them themselves
            del held["num_heads"]
        held = {field: value for field, value in held.items() if field in known and field != "v_head_dim"}
        held |= {"v_head_dim": 16} if kind == "mla" else {}
        c.mixers[kind] = configs.mixer(kind, **held)
    c.optimizer.update(name=name, learning_rate=0.01, schedule="constant", freeze=("embedding", "head"))
    c.data = configs.data("mqar")
    return configs.resolve(c)


def grown(name, small, large):
    """How many times the inputs of a layer's matrix grow, from shapes; None for what is none."""
    is_matrix = name.startswith("layers.") and len(large.shape) > 1 and not name.endswith(ELEMENTWISE)
    return large.shape[-2] // small.shape[-2] if is_matrix else None


@pytest.mark.parametrize("kinds", [NEW, *slow(OLD)])
def test_every_kind_by_its_shapes(kinds):
    """What has four times the inputs, and nothing else, learns at a quarter of the rate."""
    small, large = (model.build(widened(width, kinds)) for width in (BASE, 4 * BASE))
    rates = groups.widths(large, schema.Optimizer(name="adamw"))
    before, seen = model.canonical_shapes(small), 0
    for name, leaf in model.canonical_shapes(large).items():
        if growth := grown(name, before[name], leaf):
            assert growth in (1, 4) and rates[name][0] == 1 / growth, name
            seen += growth == 4
    assert seen > 3 * len(kinds)


@pytest.mark.slow
def test_initial_values_that_follow_their_inputs_are_left_alone():
    """Kinds with deviations of their own: of matrices whose inputs grow they go with inputs^-1/2, once."""
    params = []
    for width in (BASE, 4 * BASE):
        definition = model.build(widened(width, OWN))
        fresh = jax.jit(lambda key, d=definition: model.init(d, key))(jax.random.key(0))
        params.append(model.unstack(definition, fresh))
    small, large = params
    for name, leaf in large.items():
        if grown(name, small[name], leaf) == 4:
            expected = float(small[name].std()) / 2
            assert float(leaf.std()) == pytest.approx(expected, rel=0.15), name


def change(width, kinds, name="adamw", steps=STEPS):
    """Mean absolute change of the final hidden states in ``steps`` updates on one batch, in one program."""
    config = widened(width, kinds, name)
    definition = model.build(config)
    meta = model.metadata(definition)
    trained = {name: one for name, one in meta.items() if one.trained}
    update = optimizer.build(config.optimizer, 100, trained, groups.factors(definition, config.optimizer))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 17)).astype(np.int32)

    @jax.jit
    def run(key):
        params = model.init(definition, key)
        fixed = {name: params.pop(name) for name in meta.keys() - trained.keys()}

        def loss(params):
            lm = model.merge(definition, params | fixed)
            hidden, _ = lm.forward(tokens[:, :-1], single_document(2, 16))
            logits = hidden @ lm.head_matrix()
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), hidden

        def step(carry, _):
            params, state = carry
            gradients, hidden = jax.grad(loss, has_aux=True)(params)
            updates, state = update.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), hidden

        _, hidden = jax.lax.scan(step, (params, update.init(params)), None, length=steps + 1)
        return jnp.abs(hidden[-1] - hidden[0]).mean()

    return float(run(jax.random.key(0)))


@pytest.mark.parametrize("kind", ["rglru", *slow(*(kind for kind in NEW + OLD if kind != "rglru"))])
@pytest.mark.once
def test_coordinates_of_a_kind(kind):
    """What a layer of it adds to the residual stream moves at width 256 as at 64."""
    with auto_means("reference"):  # token by token: a program that compiles in three quarters of the time
        assert 0.67 < change(4 * BASE, [kind]) / change(BASE, [kind]) < 1.5


def test_ranks_that_grow_are_refused():
    with pytest.raises(ConfigError, match=r"mixers.mamba.dt_rank = 0: grows .* rank of the base width, 4\."):
        resolved(4 * BASE, pattern="mamba", mamba={})


def moved(width, **fields):
    """Mean absolute change of what the layer records, and of the logits, in STEPS updates on one batch."""
    config = resolved(width, **fields)
    definition, mesh = model.build(config), sharding.make_mesh(schema.Mesh(1, 1, 1))
    built = program.build(config, definition, mesh, None)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (4, 17)).astype(np.int32)
    rows = single_document(4, 16)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], **rows._asdict()}

    @jax.jit
    def look(params):
        lm = model.merge(definition, params)
        hidden, records = lm.forward(batch["tokens"], rows, wanted=("q",))
        return records | {"logits": hidden @ lm.head_matrix()}

    state = built.init(jax.random.key(0))
    before = jax.device_get(look(state["params"]))
    for _ in range(STEPS):
        state, _ = built.step(state, sharding.put_batch(jax.tree.map(np.asarray, batch), mesh))
    after = jax.device_get(look(state["params"]))
    return {name: np.abs(after[name] - before[name]).mean() for name in after}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.slow
def test_coordinates(name):
    """From width 64 to 512 what a few steps change stays the same with it, and grows without it."""
    small, large = moved(64, name=name), moved(512, name=name)
    for one in small:
        assert 0.5 < large[one] / small[one] < 2, (one, small, large)
    plain = moved(512, base=0) if name == "adamw" else {}
    for one in plain:
        assert plain[one] / small[one] > 2.5, (one, small, plain)


def test_factors_by_type_of_layer():
    """Table 8 of the paper, at four times the base width, in a layer of KDA with low ranks and taps."""
    config = resolved(4 * BASE, pattern="kda")
    found = groups.factors(model.build(config), config.optimizer)
    rates = {name.rpartition("segments.0.0.")[2]: factors for name, factors in found.items()}
    inner = {f"mlp.{name}.kernel" for name in ("gate", "up", "down")}
    inner |= {f"mixer.{name}.kernel" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "b_proj")}
    assert inner <= rates.keys() and set(rates.values()) == {(0.25, 4.0)}
    assert not any(
        part in name for name in rates for part in ("embedding", "head", "conv", "norm", "_b_proj.k")
    )
    muon = groups.factors(model.build(config), schema.Optimizer(name="muon"))
    assert {muon[name] for name in muon if "mlp" in name} == {(0.5, 2.0)}
    both = groups.factors(model.build(config), schema.Optimizer(groups=("layers.*.mlp.up.*=0.5/3",)))
    assert next(both[name] for name in both if ".up." in name) == (0.125, 12.0)


def test_initial_values():
    """Deviation 0.02 times width^-1/2 where inputs grow; the embedding's and the head's stay."""
    deviation = {}
    for width in (BASE, 4 * BASE):
        definition = model.build(resolved(width))
        params = model.unstack(
            definition, jax.jit(lambda k, d=definition: model.init(d, k))(jax.random.key(0))
        )
        deviation[width] = {name: float(leaf.std()) for name, leaf in params.items() if leaf.ndim > 1}
    for name, std in deviation[4 * BASE].items():
        expected = 0.01 if name.startswith("layers.") else 0.02
        assert std == pytest.approx(expected, rel=0.05), name
    assert all(std == pytest.approx(0.02, rel=0.05) for std in deviation[BASE].values())


def test_at_the_base_width_only_attention_differs():
    """By 8 / K instead of K^-1/2: the same at K = 64."""
    config = resolved(BASE)
    assert groups.factors(model.build(config), config.optimizer) == {}
    assert mup.logit_scale(64, True) == mup.logit_scale(64, False) == 0.125
    assert mup.logit_scale(256, True) == 0.03125


def test_no_public_format_says_it():
    _, reason = families.public_format(resolved(4 * BASE))
    assert "model.mup_base_width" in reason
