"""Mixture of experts against a loop over tokens and experts in float64, and as part of a stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config as configs
from hybridlm import cost, fields, member, mixers, model, program, sharding, trees
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.mlps import moe, swiglu
from hybridlm.rows import Rows, single_document
from tests import tiny

D = 8
QWEN = moe.Config(num_experts=6, top_k=2, hidden=4, shared_hidden=4, shared_gate=True, balance_loss=0.1)
KIMI = moe.Config(
    num_experts=6, top_k=2, hidden=4, router="sigmoid", selection_bias=True, scale=2.5,
    num_groups=3, top_groups=2, shared_hidden=4, balance_loss=0.1,
)  # fmt: skip


def layer(config: moe.Config) -> moe.Mlp:
    mlp = moe.Mlp(config, mixers.Site(D), rngs=nnx.Rngs(params=0))
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(nnx.state(mlp), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf[...] = jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32)
    return mlp


def token_by_token(config: moe.Config, w: dict, x_ND: np.ndarray) -> tuple[np.ndarray, float]:
    """(y, load-balancing loss), every expert of every token written out."""
    silu = lambda x: x / (1 + np.exp(-x))
    expert = lambda gate, up, down, x: (silu(x @ gate) * (x @ up)) @ down
    y, chosen, share = np.zeros_like(x_ND), np.zeros(config.num_experts), np.zeros(config.num_experts)
    for n, x in enumerate(x_ND):
        logits = x @ w["router"]["kernel"]
        p = 1 / (1 + np.exp(-logits)) if config.router == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        score = p + w["selection_bias"] if config.selection_bias else p.copy()
        groups = score.reshape(config.num_groups, -1)
        by_group = np.argsort(-np.sort(groups)[:, -2:].sum(-1))
        for group in by_group[config.top_groups :]:
            groups[group] = -np.inf  # a view of score
        experts = np.argsort(-score)[: config.top_k]
        weights = config.scale * p[experts] / p[experts].sum()
        for e, weight in zip(experts, weights, strict=True):
            y[n] += weight * expert(w["gate"][e], w["up"][e], w["down"][e], x)
        shared = expert(*(w["shared"][name]["kernel"] for name in ("gate", "up", "down")), x)
        y[n] += shared / (1 + np.exp(-x @ w["shared_gate"]["kernel"])) if config.shared_gate else shared
        chosen[experts] += 1 / len(x_ND)
        share += p / p.sum() / len(x_ND)
    return y, config.balance_loss * config.num_experts * float(chosen @ share)


@pytest.mark.parametrize("config", [QWEN, KIMI], ids=["qwen", "kimi"])
def test_against_a_loop(config: moe.Config) -> None:
    mlp, rng = layer(config), np.random.default_rng(1)
    x = rng.normal(size=(2, 9, D)).astype(np.float32)
    segments = np.ones((2, 9), np.int32)
    segments[1, 5:] = 0  # padding: computed like any token, counted in no balance
    context = Context(Rows(jnp.asarray(segments), jnp.asarray(segments)), wanted=("*",))
    y = mlp(jnp.asarray(x), context)
    balance, load = context.records["loss.balance"], context.records["load"]
    assert load.sum() == config.top_k * (segments > 0).sum()
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(mlp)))
    want, _ = token_by_token(config, weights, x.reshape(-1, D).astype(np.float64))
    np.testing.assert_allclose(y, want.reshape(x.shape), rtol=2e-5, atol=1e-5)
    _, want_balance = token_by_token(config, weights, x[segments > 0].astype(np.float64))
    np.testing.assert_allclose(balance, want_balance, rtol=1e-5)


def test_gradients_against_every_expert_computed_densely() -> None:
    """No token is dropped and no gradient is lost in the sorting."""
    config = dataclasses.replace(KIMI, balance_loss=0.0)
    graph, state = nnx.split(layer(config))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, D)), jnp.float32)
    rows = single_document(2, 9)

    def sorted_experts(state, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x, Context(rows))))

    def dense_experts(state, x):
        mlp = nnx.merge(graph, state)
        choice, weight = mlp._choose(mlp._probabilities(x))
        per_expert = jnp.sum(jax.nn.one_hot(choice, 6) * weight[..., None], -2)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, mlp.gate[...]))
        hidden *= jnp.einsum("btd,edf->btef", x, mlp.up[...])
        y = jnp.einsum("btef,efd,bte->btd", hidden, mlp.down[...], per_expert) + mlp.shared(x, Context(rows))
        return jnp.sum(jnp.sin(y))

    got, want = (jax.jit(jax.grad(f, (0, 1)))(state, x) for f in (sorted_experts, dense_experts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def stack(pattern: str, **fields):
    config = configs.default()
    config.mixers = {"retnet": configs.mixer("retnet", num_heads=1, head_dim=8)}
    config.mlps = {
        "moe": configs.mlp("moe", num_experts=4, hidden=8),
        "narrow": configs.mlp("swiglu", hidden=8),
    }
    config.data.path = "python-stdlib:"
    config.model.update(pattern=pattern, d_model=D, vocab_size=16, mlp_hidden=16, dtype="float32", **fields)
    return configs.resolve(config)


@pytest.mark.once
def test_in_a_stack() -> None:
    """The balance loss reaches the loss, from every segment of the plan; parameters are counted."""
    config = stack("(retnet/moe*2 retnet/narrow)*3 retnet/moe")
    definition = model.build(config)
    assert len(definition.layout.segments) == 2
    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    batch = {"tokens": tokens, "targets": tokens.at[0, 3:].set(-1)}
    batch |= dict(zip(("segment_ids", "positions"), single_document(2, 6), strict=True))
    total, sums = jax.jit(lambda p: tiny.loss_fn(definition, p, batch))(params)
    np.testing.assert_allclose(total, sums["loss_sum"] + sums["balance_loss_sum"], rtol=1e-6)
    assert sums["balance_loss_sum"] == pytest.approx(9 * 0.01 * 2, rel=0.2)  # top_k in balance, 9 targets
    per_expert = 3 * D * 8
    assert cost.parameters(config) == sum(leaf.size for leaf in params.values())
    assert cost.parameters(config) - cost.active_parameters(config) == 7 * 2 * per_expert


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("retnet/mo", "no MLP named 'mo' in mlps, at character 8. Did you mean 'moe'?"),
        ("retnet/", "found '/'"),
    ],
)
def test_unknown_mlps_are_refused(pattern: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.pattern") as caught:
        stack(pattern)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 9}, {"num_groups": 3}, {"num_groups": 2, "top_groups": 3}, {"num_groups": 4, "top_k": 3},
        {"shared_gate": True}, {"router": "tanh"}, {"scale": 0.0}, {"hidden": 0}, {"balance_loss": -1.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        fields.build(moe.Config, settings).check(D)
    assert swiglu.Config().idle(D) == 0


@pytest.mark.slow
def test_the_selection_bias_follows_its_rule_and_evens_the_load(tmp_path) -> None:
    """arXiv 2408.15664, algorithm 1: beside a run without the rule, from a router that prefers one expert."""

    def trained(rate: float) -> tuple[np.ndarray, np.ndarray]:
        """(selection bias after 90 steps, choices of each expert in the last 30)."""
        config = tiny.config(tiny.write_text(tmp_path), model__pattern="retnet/moe")
        settings = dict(num_experts=4, top_k=1, hidden=8, router="sigmoid", balance_loss=0.0)
        config.mlps = {"moe": configs.mlp("moe", selection_bias=True, bias_rate=rate, **settings)}
        config.train.microbatches = 2
        resolved = configs.resolve(config)
        definition = model.build(resolved)
        mesh = sharding.make_mesh(resolved.mesh)
        built = program.build(resolved, definition, mesh, None)
        source = member.build_data(resolved, "train")
        state = built.init(jax.random.key(0))
        router, bias = (f"segments.0.0.mlp.{name}" for name in ("router.kernel", "selection_bias"))
        assert not any(bias in name for name in trees.flatten(state["opt_state"]))
        state["params"][router] += jnp.zeros_like(state["params"][router]).at[..., 0].set(1.0)
        total = np.zeros(4)
        for step in range(90):
            batch = source.batch(step)
            loads = np.asarray(load(definition, state["params"], batch))
            before = np.asarray(state["params"][bias])[0, 0]
            state, _ = built.step(state, sharding.put_batch(batch, mesh))
            expected = before + rate * np.sign(loads.mean() - loads)
            np.testing.assert_allclose(state["params"][bias][0, 0], expected, atol=1e-6)
            total += loads * (step >= 60)
        return np.asarray(state["params"][bias])[0, 0], total

    @functools.partial(jax.jit, static_argnums=0)
    def load(definition, params, batch):
        rows = Rows(batch["segment_ids"], batch["positions"])
        return model.merge(definition, params).forward(batch["tokens"], rows, ("load",))[1]["layers.0.load"]

    (_, uneven), (bias, even) = trained(0.0), trained(0.02)
    worst = lambda total: total.max() / total.mean()
    assert worst(uneven) > 2 > 1.6 > worst(even), (worst(uneven), worst(even))
    assert bias.min() < 0 < bias.max()
