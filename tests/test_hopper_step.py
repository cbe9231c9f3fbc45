"""The single-token kernel against the float64 recurrence: interpreted, compiled ahead of time, on a GPU."""

import functools

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from pallas_kernels.linear_attention import reference
from pallas_kernels.linear_attention_step import hopper
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
    return hopper.linear_attention_step(StepCall(q, k, v, state, *gates, **options))


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
def test_interpreted(name, capfd):
    check(name, lambda update, x: update(*x, interpret=True))
    assert "RACE DETECTED" not in capfd.readouterr().out


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


@pytest.mark.aot
def test_a_loop_updates_the_state_in_place():
    x = arguments((16,), 8, 8, 128, 128, True, True)

    def decode(x):
        state, q, *rest = x
        token = lambda _, carry: step(carry[1], carry[0], *rest, scale=0.1, qk_l2norm=True)
        return jax.lax.fori_loop(0, 8, token, (q.astype(jnp.float32), state))

    (kernel,) = hopper_aot.compile_for_hopper(decode, jax.eval_shape(lambda: x))
    assert kernel.spills == 0
