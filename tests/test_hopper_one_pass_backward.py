"""KDA's gradients by one pass each way (hopper/one_pass*.py) against float64: interpreted, AOT, on a GPU."""

import dataclasses
import functools

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from jax.sharding import PartitionSpec as P
from test_hopper_channel_backward import TOLERANCE, expect, finest, relative_error
from test_hopper_one_pass import one_pass_case, struct_call
from test_hopper_warm_up import quick

from pallas_kernels.linear_attention import hopper
from pallas_kernels.linear_attention.hopper import channel, one_pass_forward, table
from pallas_kernels.linear_attention.hopper.channel_tiles import SPAN
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.one_pass import OnePass
from pallas_kernels.linear_attention.hopper.one_pass_reverse import ReversePass

CASES = {  # options, whether other kernels have to compute it
    "slow": (dict(gate="slow", tokens=100), False),
    "steep, groups, keys as they are": (
        dict(gate="steep", tokens=130, value_heads=2, l2norm=False, beta_max=0.01),
        False,
    ),
    "-5 at every token": (dict(gate="bound -5", tokens=128), False),
    "too steep within a chunk": (dict(gate="slow", tokens=128, value_heads=2, steep_from=72), False),
    "additive, groups, keys as they are": (
        dict(gate="mild", tokens=100, value_heads=2, delta=False, l2norm=False),
        False,
    ),
    "additive, mixed": (dict(gate="mixed", tokens=128, delta=False), False),
    "hard tokens": (dict(gate="slow", tokens=128, beta_max=2.0), True),
}
NAMES = dict(q="q", k="k", v="v", log_decay="g", beta="beta", initial_state="S0")


def kept(call):
    return channel.channel_forward(prepare(call), final=True, keep=True)[1]


def cotangents(call):
    rng = np.random.default_rng(5)
    do = jnp.asarray(rng.normal(size=call.v.shape), jnp.bfloat16)
    return do, jnp.asarray(rng.normal(size=(1, call.v.shape[2], 128, 128)), jnp.float32)


def gradients(call, do, d_state):
    attend = lambda leaves: hopper.linear_attention(dataclasses.replace(call, **leaves))
    leaves = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    return jax.vjp(attend, leaves)[1]((do, d_state))[0]


def check(call, other, bound=1.0):
    """Gradients; and what the forward keeps says where it is right, and which levels its pairs want."""
    do, d_state = cotangents(call)
    want = expect(call, do, d_state)[2]
    got = jax.jit(gradients)(call, do, d_state)
    errors = {name: relative_error(got[name], want[NAMES[name]]) for name in got}
    assert all(errors[name] < bound * TOLERANCE[name] for name in got), errors
    assert all(got[name].dtype == getattr(call, name).dtype for name in got)
    saved = jax.jit(kept)(call)
    assert bool((saved.wrong < call.q.shape[1]).any()) == other
    log_decay = np.asarray(prepare(call).log_decay.astype(jnp.bfloat16), np.float64)
    for head, n in np.ndindex(saved.tiles.norms.shape[1:3]):
        chunk = log_decay[0, 64 * n : 64 * n + 64, head]
        (span,) = np.unique(saved.tiles.norms[0, head, n, SPAN])
        assert other or span == finest(chunk) or (span == 2 and finest(chunk) < 16)
        np.testing.assert_allclose(saved.tiles.carry[0, head, n], np.exp(chunk.sum(0)), rtol=1e-3, atol=2e-4)
    return got


@pytest.mark.parametrize("name", quick(CASES))
def test_interpreted(name, capfd, monkeypatch):
    options, other = CASES[name]
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: True)
    check(dataclasses.replace(one_pass_case(**options), interpret=True), other)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.slow
def test_outputs_are_those_without_gradients(monkeypatch):
    """In every bit: so they do not depend on later tokens either."""
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: True)
    call = dataclasses.replace(one_pass_case("slow", 40, tokens=128), interpret=True)
    alone, with_gradients = (
        channel.channel_forward(prepare(call), final=True, keep=keep)[0] for keep in (False, True)
    )
    np.testing.assert_array_equal(alone.o, with_gradients.o)
    np.testing.assert_array_equal(alone.final, with_gradients.final)


@pytest.mark.parametrize("one_pass", [True, False])
def test_traces_under_shard_map_and_vmap(monkeypatch, one_pass):
    """With a state that enters, which varies along the mesh axis where a loop's own zeros do not."""
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: one_pass)
    state = jax.ShapeDtypeStruct((2, 1, 128, 128), jnp.float32)
    call = dataclasses.replace(struct_call(2, 128, 1), initial_state=state)
    output = lambda call, q: hopper.linear_attention(dataclasses.replace(call, q=q))[0]
    gradient = lambda call: jax.vjp(functools.partial(output, call), call.q)[1](call.v)[0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(jax.jit(sharded), call).shape == call.q.shape
    twice = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), call)
    assert jax.eval_shape(jax.vmap(gradient), twice).shape == (3, *call.q.shape)


@pytest.mark.aot
@pytest.mark.parametrize("delta", [True, False])
def test_compiles_with_few_spills(delta):
    """But for what is hoisted out of loops with the delta rule; every byte is counted twice."""
    call = struct_call(8, 4096, 16)
    call = call if delta else dataclasses.replace(call, beta=None)

    def both(call):
        given = prepare(call)
        count = jnp.zeros((8, 16), jnp.int32) if delta else None
        return OnePass(given, count, True, keep=True)(), ReversePass(given, count, given.v, None)()

    kept, reverse = hopper_aot.compile_for_hopper(both, call)
    assert kept.spills <= 128 * delta and reverse.spills <= 32 * delta


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, monkeypatch):
    options, other = CASES[name]
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: True)
    monkeypatch.setattr(one_pass_forward, "TESTED", (jax.__version__,))
    call = one_pass_case(**options | dict(tokens=1000))
    got, again = check(call, other, bound=2), check(call, other, bound=2)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, again))
