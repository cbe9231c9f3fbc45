"""model.matmul = "fp8": which matrices, what it leaves alone, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config as configs
from hybridlm import fp8, model, program, sharding
from hybridlm.errors import ConfigError
from hybridlm.layers import Linear
from hybridlm.model import LM
from tests import tiny


def resolved(**fields):
    """A tiny model in bf16 whose layers' products are in 8 bits."""
    given = {"dtype": "bfloat16", "matmul": "fp8", "d_model": 32, "mlp_hidden": 64}
    whole = {f"model__{name}": value for name, value in given.items()} | fields
    return configs.resolve(tiny.config("python-stdlib:", **whole))


def test_only_large_products_of_training_are_in_8_bits():
    config = configs.default()
    config.data = configs.data("text", path="python-stdlib:")
    config.model.update(pattern="hgrn2/none kda mamba2/moe mla/none", d_model=1024, matmul="fp8")
    config = configs.resolve(config)
    definition = model.build(config)
    by: dict[str, set[str]] = {}
    for name, reason in fp8.reasons(config.model, definition.layers).items():
        by.setdefault(reason, set()).add(name)
    mlp = {f"kda mlp.{name}" for name in ("gate", "up", "down")}
    assert by[""] >= mlp | {f"kda mixer.{side}_proj" for side in "qkvo"} | {"mla/none mixer.o_proj"}
    assert by[""] >= {"hgrn2/none mixer.q_proj", "mamba2/moe mixer.g_proj"}
    decays = {"hgrn2/none mixer.k_proj", "kda mixer.b_proj", "mamba2/moe mixer.dt_proj"}
    assert by["gates"] == decays | {"mamba2/moe mlp.router"}
    assert by["low ranks"] > {"kda mixer.f_a_proj", "kda mixer.g_b_proj", "mla/none mixer.kv_b_proj"}
    said = fp8.said(config.model, definition.layers)
    assert said.startswith("fp8 (emulated") and "low ranks: kda mixer." in said

    def marked(definition):
        graph = nnx.eval_shape(lambda: LM(definition, rngs=nnx.Rngs(0)))
        return [module.fp8 for _, module in nnx.iter_modules(graph) if isinstance(module, Linear)]

    training = model.in_training(definition, config)
    assert not any(marked(definition)) and sum(marked(training)) == len(by[""])
    assert model.shapes(definition) == model.shapes(training)


def test_refusals_before_anything_is_compiled():
    with pytest.raises(ConfigError, match=r"model.matmul = 'fp8'.*dtype=float32.*Set model.dtype=bfloat16"):
        resolved(model__dtype="float32")
    narrow = resolved(model__d_model=24, model__mlp_hidden=56)
    with pytest.raises(ConfigError, match=r"model.matmul = 'fp8'.*no matrix of the layers.*multiples of 16"):
        model.build(narrow)
    odd = resolved(model__mlp_hidden=56)
    assert "not multiples of 16: retnet mlp.down" in fp8.said(odd.model, model.build(odd).layers)


@pytest.fixture(scope="module")
def batches():
    """Two batches of rows that grow by 1 to 3 a token."""
    rng, shape, found = np.random.default_rng(0), (8, 16), []
    for _ in range(2):
        tokens = np.cumsum(rng.integers(1, 4, (8, 17)), axis=1) % 64
        row = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones(shape)}
        row["positions"] = np.broadcast_to(np.arange(16), shape)
        found.append({name: jnp.asarray(value, jnp.int32) for name, value in row.items()})
    return found


class Run:
    """The program of a config on one device, with its first state."""

    def __init__(self, config):
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self.built = program.build(config, model.build(config), self.mesh, None)
        with jax.set_mesh(self.mesh):
            self.state = self.built.init(jax.random.key(0))

    def step(self, batch):
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.built.step(self.state, batch)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    def validate(self, params, batch):
        with jax.set_mesh(self.mesh):
            sums = self.built.evaluate(params, batch)
        return float(sums["loss_sum"] / sums["tokens"])


@pytest.mark.once
def test_trains_as_bf16_does(batches):
    """30 steps, with microbatches, rematerialisation and averaged weights; then one of infinities."""
    fields = {"train__microbatches": 2, "model__remat": "dots", "optimizer__ema": 0.9}
    exact, ours = Run(resolved(model__matmul="dtype", **fields)), Run(resolved(**fields))
    assert set(ours.state) == set(exact.state)  # scales have no state
    losses = np.array([[run.step(batches[i % 2])[0] for run in (exact, ours)] for i in range(30)])
    assert losses[-1, 0] < losses[0, 0] - 1
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], rtol=0.02)
    assert (losses[:, 1] != losses[:, 0]).any()
    params = jax.device_get(ours.state["params"])
    assert ours.validate(params, batches[0]) == exact.validate(params, batches[0])  # validation is exact
    name = next(name for name in params if name.endswith("o_proj.kernel"))
    ours.state["params"][name] = ours.state["params"][name].at[..., 0, 0].set(jnp.inf)
    before = jax.device_get(ours.state["params"])
    assert not np.isfinite(ours.step(batches[0])[1]) and int(ours.state["step"]) == 30
    assert all(np.array_equal(before[name], ours.state["params"][name]) for name in before)
