"""What a step computes again, against the products of compiled programs and against formulas."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from benchmarks import fusions
from hybridlm import config as configs
from hybridlm import cost, model, program, recomputation, remat, sharding
from hybridlm.run.clock import Clock


def products(hlo):
    """FLOPs of the dots of a compiled module."""
    computations, entry = fusions.parse(hlo)
    dims = lambda text: [int(d) for d in text.split(",") if d]
    shape = lambda type_: dims(re.search(r"\[([\d,]*)\]", type_)[1])

    def of(name):
        found = 0
        for one in computations[name].values():
            if one.op == "dot":
                left = shape(computations[name][one.operands[0]].type)
                contracted = dims(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1])
                found += 2 * math.prod(shape(one.type)) * math.prod(left[i] for i in contracted)
            elif one.op in ("while", "call", "fusion"):
                known = re.search(r"known_trip_count\D*(\d+)", one.rest)
                called = re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", one.rest)
                found += (int(known[1]) if known else 1) * sum(map(of, called))
        return found

    return of(entry)


@pytest.mark.once
def test_what_compiled_steps_do_more():
    """Two layers without products but of projections, in a scan: with everything kept, the MLP's first
    products, or nothing."""
    found = {}
    for policy in ("none", "mixer", "full"):
        settings = {"model__pattern": "hgrn*2", "model__num_layers": 2, "model__remat": policy}
        given = tiny.config("unused", **settings)
        given.mixers = {"hgrn": configs.mixer("hgrn")}
        config = configs.resolve(given)
        mesh = sharding.make_mesh(config.mesh)
        row = jax.ShapeDtypeStruct((config.train.batch_size, config.train.seq_len), np.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
        with jax.set_mesh(mesh):
            built = program.build(config, model.build(config), mesh, None)
            traced = built.step.trace(built.shapes, batch)
            again = recomputation.flops(traced.jaxpr.jaxpr, config)
            found[policy] = again, products(traced.lower().compile().as_text())
    kept, more, most = (found[policy][1] for policy in ("none", "mixer", "full"))
    assert (found["none"][0], found["mixer"][0], found["full"][0]) == (0, more - kept, most - kept)
    # All of the forward pass but the last product, whose result nobody asks for, and two that `mixer` keeps.
    matrix = config.model.d_model * config.model.mlp_hidden
    shapes = jax.tree.leaves(model.shapes(model.build(config)))
    weights = sum(math.prod(leaf.shape) for leaf in shapes if leaf.ndim == 4) - 2 * matrix
    tokens = config.train.batch_size * config.train.seq_len
    assert (most - kept, most - more) == (2 * tokens * weights, 2 * tokens * 2 * 2 * matrix)


@jax.custom_vjp
def kernel(x):
    return jnp.cosh(x)


kernel.defvjp(lambda x: (jnp.cosh(x), jnp.sinh(x)), lambda sinh, g: (g * sinh,), optimize_remat=True)


@pytest.mark.parametrize("policy", ["full", "dots", "kernels"])
def test_kernels_cost_what_their_mixers_say(policy):
    """A kernel between two products, three times in a scan, of which the second product is for nobody."""
    config = configs.resolve(tiny.config("unused", model__pattern="retnet*2 full"))
    settings = dataclasses.replace(config.train, batch_size=6)
    config = dataclasses.replace(config, train=settings)
    layer = jax.checkpoint(
        lambda x, w: jnp.sin(kernel(jnp.sin(x @ w))) @ w, policy=remat.POLICIES[policy], prevent_cse=False
    )
    run = lambda x, w: jnp.sum(jax.lax.scan(lambda x, _: (layer(x, w), None), x, length=3)[0])
    jaxpr = jax.jit(jax.grad(run, (0, 1))).trace(jnp.ones((5, 4)), jnp.ones((4, 4))).jaxpr.jaxpr
    states = [spec.cost(config.model.d_model, config.train.seq_len) for spec in model.build(config).layers]
    op = 6 * config.train.seq_len * sum(one.flops for one in states if not one.cache)
    product = 3 * 2 * 5 * 4 * 4
    wanted = {"full": product + op, "dots": op, "kernels": 0}
    assert recomputation.flops(jaxpr, config) == pytest.approx(wanted[policy])


def test_every_device_counts_and_one_branch():
    config = configs.resolve(tiny.config("unused"))
    mesh = AbstractMesh((4,), ("data",), (AxisType.Auto,))
    by_batch = PartitionSpec("data")

    def branches(x, w, i):
        return jax.lax.cond(i > 0, lambda: jnp.sin(x @ w @ w), lambda: jnp.sin(x @ w))

    def run(x, w, i):
        each = jax.shard_map(
            branches, in_specs=(by_batch, PartitionSpec(), PartitionSpec()), out_specs=by_batch
        )
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(each(x, w, i)))(x))

    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
        w, i = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        jaxpr = jax.jit(jax.grad(run)).trace(x, w, i).jaxpr.jaxpr
    assert recomputation.flops(jaxpr, config) == 2 * (2 * 8 * 3 * 3)


def test_the_share_of_the_peak(monkeypatch):
    """Of a step of a second on two devices: what is computed again counts in hfu alone."""
    config = configs.resolve(tiny.config("unused"))
    monkeypatch.setattr(cost, "peak_flops", lambda kind: 1e9)
    clock = Clock(config, 2, again=5e8)
    clock.steps, clock.total = 4, 4.0
    rates = clock.rates()
    per_token = cost.train_flops_per_token(config)
    assert rates["mfu"] == pytest.approx(per_token * 8 * 16 / 2e9)
    assert rates["hfu"] - rates["mfu"] == pytest.approx(0.25)
