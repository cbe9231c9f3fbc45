"""The single-token kernel against the float64 recurrence: interpreted, compiled ahead of time, on a GPU."""

import functools

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_aot

from pallas_kernels import Device, explain, linear_attention_step
from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention_step import triton
from pallas_kernels.linear_attention_step.call import StepCall

CASES = {  # batch, H, HV, K, V, decay per key channel (None: none), delta
    "kda": ((2,), 1, 2, 128, 64, True, True),
    "gated deltanet, V 256": ((1,), 2, 2, 64, 256, False, True),
    "K 256": ((1,), 1, 1, 256, 64, True, True),
    "additive, no batch axis": ((), 1, 1, 64, 64, None, False),
}


def arguments(batch, heads, value_heads, key_dim, value_dim, channel, delta):
    """state, q, k, v, log_decay, beta as `reference.update` takes them."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(*batch, *shape)), jnp.float32)
    decay = None
    if channel is not None:
        decay = -jnp.abs(normal(value_heads, key_dim) if channel else normal(value_heads))
    q, k = (normal(heads, key_dim).astype(jnp.bfloat16) for _ in range(2))
    beta = jax.nn.sigmoid(normal(value_heads)) if delta else None
    v = normal(value_heads, value_dim).astype(jnp.bfloat16)
    return normal(value_heads, key_dim, value_dim), q, k, v, decay, beta


def step(state, q, k, v, *gates, **options):
    return triton.linear_attention_step(StepCall(q, k, v, state, *gates, **options))


def check(name, run):
    x = arguments(*CASES[name])
    options = dict(scale=0.1, qk_l2norm=CASES[name][-1])
    got = run(functools.partial(step, **options), x)
    with jax.enable_x64(True):
        exact = [None if a is None else jnp.asarray(np.asarray(a, np.float64)) for a in x]
        want = reference.update(*exact, **options)
    for value, truth in zip(got, want, strict=True):
        np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "kda"))
def test_interpreted(name):
    check(name, lambda update, x: update(*x, interpret=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    check(name, lambda update, x: jax.jit(update)(*x))


def test_gradient_is_that_of_the_recurrence():
    x = arguments(*CASES["kda"])
    update = functools.partial(step, scale=0.1, qk_l2norm=True, interpret=True)
    plain = functools.partial(reference.update, scale=0.1, qk_l2norm=True)
    loss = lambda f: lambda state: sum(jnp.sum(y**2) for y in f(state, *x[1:]))
    got, want = jax.grad(loss(update))(x[0]), jax.grad(loss(plain))(x[0])
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_vmapped_and_inside_shard_map():
    """Over heads that `jax.vmap` adds; results vary over the mesh."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = arguments(*CASES["kda"])
    run = functools.partial(step, scale=0.1, qk_l2norm=True, interpret=True)
    for got, want in zip(jax.vmap(run)(*x), run(*x), strict=True):
        np.testing.assert_array_equal(got, want)
    spec = jax.sharding.PartitionSpec("d")
    traced = functools.partial(step, scale=0.1)
    sharded = jax.shard_map(lambda *x: traced(*x), mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.eval_shape(sharded, *x)[1].shape == x[0].shape


def test_what_the_kernel_refuses():
    state, q, k, v, *_ = arguments(*CASES["kda"])
    run = functools.partial(explain, linear_attention_step, backend="triton", device=Device("gpu", "8.0"))
    assert run(q, k, v, state=state)[0].backend == "triton"
    with pytest.raises(ValueError, match="V = 32"):
        run(q, k, v[..., :32], state=state[..., :32])


def decode(state, q, *rest):
    """Eight tokens in a loop."""
    token = lambda _, carry: step(carry[1], carry[0], *rest, scale=0.1, qk_l2norm=True)
    return jax.lax.fori_loop(0, 8, token, (q.astype(jnp.float32), state))


@pytest.mark.aot
@pytest.mark.parametrize("capability", triton_aot.TARGETS)
@pytest.mark.parametrize("dim", [128, 256])
def test_a_loop_updates_the_state_in_place_without_spills(capability, dim, tmp_path):
    x = jax.eval_shape(lambda: arguments((16,), 8, 8, dim, dim, True, True))
    found = triton_aot.compile_for(capability, decode, x, tmp_path)
    assert found["step"].spills == 0 and found["step"].registers <= 128, found
    [sequence] = (tmp_path / "dump").glob("*thunk_sequence.txt")
    loop = sequence.read_text().split("body:")[1]
    assert "step" in loop and "kCopy" not in loop  # the state is written in place
