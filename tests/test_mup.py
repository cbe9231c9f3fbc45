"""muP: sizes that do not move with the width, factors by type of layer, and nothing at the base width."""

import jax
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import groups, model, mup, program, schema, sharding
from hybridlm.convert import families
from hybridlm.rows import single_document

BASE, STEPS, VOCAB = 64, 4, 32


def resolved(width, base=BASE, pattern="full", **fields):
    """Heads of 16, so that their number grows; float32."""
    c = configs.default()
    c.model.update(
        pattern=pattern, d_model=width, vocab_size=VOCAB, mlp_hidden=2 * width, mup_base_width=base
    )
    c.model.update(dtype="float32", remat="none")
    sizes = {"num_heads": width // 16, "head_dim": 16}
    c.mixers = {"full": configs.mixer("attention", **sizes), "kda": configs.mixer("kda", **sizes)}
    c.train.update(steps=100, batch_size=4, seq_len=16)
    c.optimizer.update(learning_rate=0.01, schedule="constant", **fields)
    c.data = configs.data("mqar")
    return configs.resolve(c)


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
