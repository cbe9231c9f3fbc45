"""One transformer block in several layers: a parameter once, and what follows. Values: test_convert.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layers import close

from hybridlm import config as configs
from hybridlm import cost, model
from hybridlm.convert import families
from hybridlm.convert.family import same_model
from hybridlm.errors import ConfigError
from hybridlm.rows import single_document
from tests.tiny import loss_fn

SIZES = dict(num_heads=2, head_dim=8, hidden=12, adapter_rank=2, attention_adapters=True)
OF = dict(of="retnet")
MAMBA2 = dict(num_heads=2, head_dim=8, state_size=4, norm_eps=1e-5)


def config(pattern, optimizer=(), block=(), **settings):
    c = configs.default()
    c.mixers.mamba2.update(MAMBA2)
    c.mixers.retnet.update(num_heads=1, head_dim=4)
    c.mixers.full.update(num_heads=1, head_dim=8)
    for name in ("sharedblock", "other"):
        c.mixers[name] = configs.mixer("shared_block", **SIZES | dict(block))
    c.model.update(pattern=pattern, d_model=8, vocab_size=23, dtype="float32", norm_eps=1e-5, remat="none")
    c.model.update({"tie_embeddings": True} | settings)
    c.optimizer.update(dict(optimizer))
    c.data = configs.data("mqar", num_pairs=3)
    c.train.seq_len = 12
    return configs.resolve(c)


def build(pattern, **settings):
    return model.build(config(pattern, **settings))


def random(definition):
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1), jnp.float32)
    return {name: draw(leaf) for name, leaf in sorted(model.canonical_shapes(definition).items())}


TOKENS = np.random.default_rng(1).integers(0, 23, (2, 13))
BATCH = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], **single_document(2, 12)._asdict()}


def gradients(definition, flat):
    """(loss, gradients by canonical name)."""
    params = model.restack(definition, flat)
    loss = lambda params: loss_fn(definition, params, BATCH)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, model.unstack(definition, grads)


def test_a_block_has_the_gradients_of_all_its_layers():
    """...the sum of those of two blocks of the same numbers."""
    one, two = (build(f"(sharedblock {name})*2", block=OF) for name in ("sharedblock", "other"))
    flat = random(one)
    again = {n.replace("shared.sharedblock", "shared.other"): v for n, v in flat.items() if n[:6] == "shared"}
    assert len(again) == 9 and set(flat) | set(again) == set(model.canonical_shapes(two))
    (loss, got), (expected, apart) = gradients(one, flat), gradients(two, flat | again)
    close(loss, expected, 1e-6)
    for name, grad in got.items():
        other = (
            apart.get(name.replace("shared.sharedblock", "shared.other"), 0) if name[:6] == "shared" else 0
        )
        assert np.abs(grad).max() > 0
        close(grad, apart[name] + other, 2e-5)


def test_depth_adds_layers_and_no_block():
    """...and no more to compile; each pass through the block counts."""
    deep = lambda n: build(f"(retnet sharedblock)*{n}", block=OF)
    shapes = [model.canonical_shapes(deep(n)) for n in (1, 3)]
    shared = [{name for name in one if name.startswith("shared.")} for one in shapes]
    assert shared[0] == shared[1]
    run = lambda n: jax.make_jaxpr(lambda p: loss_fn(deep(n), p, BATCH)[0])(model.shapes(deep(n)))
    assert len(str(run(3)).splitlines()) == len(str(run(5)).splitlines())
    once, twice = config("(mamba2 sharedblock)*2"), config("mamba2 sharedblock mamba2 other")
    assert cost.train_flops_per_token(once) == cost.train_flops_per_token(twice)
    block = cost.parameters(twice) - cost.parameters(once)
    assert block == sum(model.canonical_shapes(model.build(once))[name].size for name in shared[0])
    row = cost.layers(once)[1]
    assert row.full and row.active_parameters - row.parameters == block


@pytest.mark.parametrize(
    "settings, field, said",
    [
        (dict(post_norm=("sharedblock",)), "model.post_norm", "itself"),
        (dict(stream_norm=("*=1",)), "model.stream_norm", "norms the stream of sharedblock"),
        (dict(pattern="full sharedblock", optimizer=dict(name="muon", qk_clip=10.0)), "optimizer.qk_clip",
         "layers that share"),
        (dict(block=dict(adapter_rank=0)), "mixers.sharedblock.adapter_rank", "attention_adapters"),
        (dict(block=dict(head_dim=3)), "mixers.sharedblock.head_dim", "even"),
        (dict(block=dict(num_heads=0, head_dim=12)), "mixers.sharedblock.num_heads", "12"),
        (dict(block=dict(of="full")), "mixers.sharedblock.of", "kind attention"),
    ],
)  # fmt: skip
def test_refused(settings, field, said):
    with pytest.raises(ConfigError) as caught:
        config(**{"pattern": "sharedblock"} | settings)
    assert caught.value.field == field and said in str(caught.value)


def test_zamba2_says_blocks_in_turns():
    """...by the names that transformers 5.24 gives the tensors of such a model."""
    turns = "mamba2/none sharedblock/none other/none sharedblock/none other/none"
    told = config(turns)
    assert families.public_format(told) == ("zamba2", "")
    definition = model.build(told)
    values = families.written(definition)[1]
    assert values["num_mem_blocks"] == 2 and values["layers_block_type"][:2] == ["linear_attention", "hybrid"]
    names = set(families.plan(definition, families.FAMILIES["zamba2"], values).shapes)
    block = "model.layers.{}.shared_transformer."
    adapters = block + "feed_forward.gate_up_proj_adapter_list.{}.{}.weight"
    expected = {adapters.format(1 + use % 2, use, half) for use in range(4) for half in (0, 1)}
    assert expected == {name for name in names if "gate_up_proj_adapter" in name}
    assert {block.format(i) + "self_attn.linear_k_adapter_list.3.1.weight" for i in (2,)} < names
    assert {name for name in names if name.endswith("self_attn.o_proj.weight")} == {
        block.format(i) + "self_attn.o_proj.weight" for i in (1, 2)
    }
    for other, said in (
        (turns.replace("sharedblock/none other", "sharedblock/none sharedblock", 1), "the block of layer"),
        (turns.replace("other", "sharedblock"), ""),
        (turns.replace("/none", ""), "mlp"),
    ):
        found, why = families.public_format(config(other))
        assert said in why and bool(found) == (not said)
    assert "tied head" in families.public_format(config(turns, tie_embeddings=False))[1]
    assert "the block of layer 1, not of layer 2" in same_model(
        definition, build(turns.replace("other", "sharedblock"))
    )


@pytest.mark.once
def test_released_sizes():
    """What transformers 5.24 counts in models as large as Zamba2-2.7B and, with more adapters, as 1.2B."""
    hybrid = ["hybrid" if i % 6 == 5 and i < 36 else "mamba" for i in range(38)]
    for count, values in (
        (2662214560, dict(hidden_size=2560, num_hidden_layers=54, num_mem_blocks=2, n_mamba_heads=80)),
        (1215064704, dict(hidden_size=2048, num_hidden_layers=38, layers_block_type=hybrid, mamba_d_state=128,
                          n_mamba_heads=64, use_shared_attention_adapter=True)),
    ):  # fmt: skip
        read = families.FAMILIES["zamba2"].architecture({"vocab_size": 32000} | values).config()
        assert cost.parameters(read) == count
