"""The portable kernels of linear attention: interpreted against float64, compiled for GPUs not here."""

import jax
import jax.numpy as jnp
import pytest
import triton_aot

from pallas_kernels import agreement, dispatch, explain, linear_attention
from pallas_kernels.dispatch import Device
from pallas_kernels.linear_attention import reference, trial, triton
from pallas_kernels.linear_attention.op import OP, normalize

B, T, H, HV, K, V = 1, 100, 1, 2, 64, 64
FAMILIES = [(decay, delta) for decay in ("none", "head", "channel") for delta in (False, True)]
SLOW = [pytest.param(*family, marks=pytest.mark.slow) for family in FAMILIES if family != ("channel", True)]

# Bytes that a thread may spill, loads and stores, by target, decay and kernel (jax 0.11.2 and 0.12.0.1).
SPILLS = {
    ("8.0", "channel"): dict(chunks=600, scan=50, reverse=50, moves=50, gradients=500),
    ("8.0", "head"): dict(chunks=250, scan=50, reverse=50, moves=50, gradients=150),
    ("8.9", "channel"): dict(chunks=600, scan=150, reverse=50, moves=50),
    ("8.9", "head"): dict(chunks=100, scan=150, reverse=50, moves=50, gradients=200),
    ("9.0", "channel"): dict(chunks=64, gradients=32),
    ("9.0", "head"): dict(gradients=160),
    ("10.0", "channel"): dict(scan=150, reverse=50, moves=50, gradients=32),
    ("10.0", "head"): dict(scan=150, reverse=50, moves=50),
}


def arguments(decay, delta):
    """Two documents and a piece of a third, some tokens that forget everything, no whole chunks."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape, jnp.float32)
    q, k, v = (normal(B, T, *s).astype(jnp.bfloat16) for s in ((H, K), (H, K), (HV, V)))
    x = {"q": q, "k": k, "v": v, "initial_state": normal(B, HV, K, V)}
    if decay != "none":
        steps = -jax.nn.softplus(normal(B, T, HV, *((K,) if decay == "channel" else ())))
        forget = jnp.where(jnp.arange(T) % 2 > 0, -jnp.inf, -300.0).reshape(T, *(1,) * (steps.ndim - 2))
        x["log_decay"] = jnp.where(jax.random.bernoulli(next(keys), 0.05, steps.shape), forget, steps)
    if delta:
        x["beta"] = jax.nn.sigmoid(normal(B, T, HV))
    return x


@pytest.mark.parametrize("decay, delta", [("channel", True), *SLOW])
def test_values_and_gradients_interpreted(decay, delta):
    x = arguments(decay, delta)
    ids = jnp.searchsorted(jnp.array([30, 40]), jnp.arange(T), side="right")[None]
    bars = jax.random.normal(jax.random.key(1), (B, T, HV, V)).astype(jnp.bfloat16), x["initial_state"] * 0.1

    def run(compute, x, interpret):
        def attend(x):
            options = {"segment_ids": ids, "qk_l2norm": True, "output_final_state": True}
            return compute(normalize(**x, **options, interpret=interpret))

        (o, state), pull = jax.vjp(attend, x)
        (gradients,) = pull((bars[0].astype(o.dtype), bars[1].astype(state.dtype)))
        return {"o": o, "state": state} | gradients

    got = jax.jit(lambda x: run(triton.linear_attention, x, True))(x)
    with jax.enable_x64(True):
        exact = {name: a.astype(jnp.float64) for name, a in x.items()}
        want = jax.jit(lambda x: run(reference.linear_attention, x, False))(exact)
        error = lambda a, b: float(jnp.linalg.norm(jnp.asarray(a, jnp.float64) - b) / jnp.linalg.norm(b))
        errors = {name: error(got[name], want[name]) for name in want}
    print(decay, delta, {name: f"{value:.1e}" for name, value in sorted(errors.items())})
    # What flash-linear-attention's tests of its chunk_gla allow (tests/ops/test_gla.py); bf16 rounds by 4e-3.
    assert all(value < (4e-3 if name == "o" else 5e-3) for name, value in errors.items()), errors


def test_what_it_refuses():
    x = {"device": Device("gpu", "8.0"), "backend": "triton"}
    bf16 = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 70, 2, *shape), dtype)
    assert explain(linear_attention, *(bf16(64),) * 3, **x)[0].backend == "triton"
    for arrays, device, reason in (
        ((bf16(64, dtype=jnp.float32),) * 3, "8.0", "dtype float32"),
        ((bf16(32),) * 3, "8.0", "K = 32"),
        ((bf16(64),) * 3, "7.5", "compute capability 7.5"),
    ):
        with pytest.raises(ValueError, match=reason):
            explain(linear_attention, *arrays, **(x | {"device": Device("gpu", device)}))
    for capability, chosen in (("7.5", "xla"), ("8.0", "triton"), ("10.0", "triton")):
        [choice] = explain(linear_attention, *(bf16(64),) * 3, device=Device("gpu", capability))
        assert choice.backend == chosen


def test_self_tests_are_asked_once_a_kind(monkeypatch):
    """Of calls on a GPU that is not here: without decay it passes, with one it fails and XLA computes."""
    asked = []

    def self_test(kind):
        asked.append(kind)
        return None if kind.decay == "none" else "wrong"

    dispatch._self_test.cache_clear()
    monkeypatch.setattr(triton, "self_test", self_test)
    monkeypatch.setattr(dispatch, "here", lambda: Device("gpu", "8.6"))
    x = arguments("head", False)
    plain = {name: x[name] for name in "qkv"}
    backends = [OP.choose(normalize(**call)).backend for call in (plain, x, plain, x)]
    dispatch._self_test.cache_clear()
    assert backends == ["triton", "xla"] * 2
    assert asked == [trial.Kind("none", False), trial.Kind("head", False)]


@pytest.mark.parametrize("decay, delta", [("none", True), ("channel", True)])
def test_the_self_test_itself_interpreted(decay, delta):
    kind = trial.Kind(decay, delta)
    assert trial.kind(trial.small_call(kind)) == kind and triton.supports(trial.small_call(kind)) is None
    results = trial.compare(triton.linear_attention, kind, interpret=True)
    assert agreement.self_test("linear_attention", lambda: results) is None


def test_traced_inside_shard_map():
    """With its check of what varies over the mesh; `jax.vmap` and gradients inside."""
    spec = jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = {name: a[None] for name, a in arguments("head", True).items()}
    attend = jax.vmap(lambda x: triton.linear_attention(normalize(**x))[0])
    loss = lambda x: jnp.sum(attend(x).astype(jnp.float32))
    run = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.tree.map(jnp.shape, jax.eval_shape(run, x)) == jax.tree.map(jnp.shape, x)


@pytest.mark.aot
@pytest.mark.parametrize("capability", triton_aot.TARGETS)
@pytest.mark.parametrize(
    "decay, delta, dim", [("channel", True, 128), ("head", True, 128), ("head", False, 256)]
)
def test_compiled_ahead_of_time(capability, decay, delta, dim, tmp_path):
    """Forward and backward."""
    place = lambda dtype, *shape: jax.ShapeDtypeStruct((2, 1024, 4, *shape), dtype)
    x = {name: place(jnp.bfloat16, dim) for name in "qkv"}
    x["log_decay"] = place(jnp.float32, *((dim,) if decay == "channel" else ()))
    if delta:
        x["beta"] = place(jnp.float32)

    def run(x):
        o, pull = jax.vjp(lambda x: triton.linear_attention(normalize(**x, qk_l2norm=delta))[0], x)
        return o, pull(o)

    kernels = triton_aot.compile_for(capability, run, [x], tmp_path)
    after = {"moves", "gradients"} if delta else {"additive"}
    assert kernels.keys() >= {"chunks", "scan", "reverse"} | after
    named = SPILLS[capability, decay]
    for name, kernel in kernels.items():
        assert kernel.spills <= named.get(name.split("__")[0], 0), (name, kernel)
