"""The short convolution against float64: XLA, interpreted kernels, compiled ahead of time, on a GPU."""

import functools
import importlib
import logging
import re

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_aot
from jax.sharding import PartitionSpec as P

from pallas_kernels import Device, explain, short_conv
from pallas_kernels.short_conv.call import ConvCall

kernels_only = pytest.mark.skipif(bool(hopper_aot.NO_KERNELS), reason=hopper_aot.NO_KERNELS)
by_kernels = pytest.mark.parametrize("backend", [pytest.param("hopper", marks=kernels_only), "triton"])


def make_case(tokens=100, features=256, width=4, batch=2, seed=0):
    """(x, kernel, positions, dy): documents of 1 to 40 tokens, so that some begin in one tile of tokens and
    end in the next; the second row continues a document that it does not hold."""
    rng = np.random.default_rng(seed)
    x, dy = (jnp.asarray(rng.normal(size=(batch, tokens, features)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.uniform(-(width**-0.5), width**-0.5, size=(width, features)), jnp.float32)
    lengths = rng.integers(1, 40, size=(batch, tokens))
    positions = np.stack([np.concatenate([np.arange(n) for n in row])[:tokens] for row in lengths])
    first_document = np.argmax(positions[-1, 1:] == 0) + 1
    positions[-1, :first_document] += 2
    return x, kernel, jnp.asarray(positions, jnp.int32), dy


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def oracle(x, kernel, positions, dy, silu):
    """(y, dx, dkernel), float64, a token and a tap at a time."""
    x, kernel, positions, dy = map(float64, (x, kernel, positions, dy))
    width = len(kernel)
    pairs = [
        (b, t, back)
        for b, t in np.ndindex(positions.shape)
        for back in range(width)
        if back <= min(t, positions[b, t])
    ]
    y = np.zeros_like(x)
    for b, t, back in pairs:
        y[b, t] += x[b, t - back] * kernel[width - 1 - back]
    d, gate = dy, 1 / (1 + np.exp(-y))
    if silu:
        y, d = y * gate, dy * gate * (1 + y * (1 - gate))
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for b, t, back in pairs:
        dx[b, t - back] += d[b, t] * kernel[width - 1 - back]
        dkernel[width - 1 - back] += d[b, t] * x[b, t - back]
    return y, dx, dkernel


def check(run, case, silu, tolerance):
    """``run``(x, kernel, positions) and its gradients; tolerance of (y, dx, dkernel)."""
    x, kernel, positions, dy = case
    y, pull = jax.vjp(lambda x, kernel: run(x, kernel, positions), x, kernel)
    got = (y, *pull(dy.astype(y.dtype)))
    for name, array, want, bound in zip(
        ("y", "dx", "dkernel"), got, oracle(*case, silu), tolerance, strict=True
    ):
        error = np.linalg.norm(float64(array) - want) / np.linalg.norm(want)
        assert error < bound, (name, error)
    return got


KERNEL_TOLERANCE = (2e-3, 2e-3, 1e-6)  # one rounding to bf16; dkernel stays float32
CASES = {
    "4 taps, ragged": (dict(), True),
    "3 taps, linear": (dict(width=3, tokens=64, features=512), False),
    "2 taps, short": (dict(width=2, tokens=5), True),
}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_xla(width, silu):
    case = make_case(width=width, features=8)
    x, *rest = case
    run = jax.jit(functools.partial(short_conv, silu=silu))
    check(run, (x.astype(jnp.float32), *rest), silu, (1e-6, 1e-6, 1e-5))
    check(run, case, silu, (5e-3, 8e-3, 8e-3))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_reference(width, silu):
    case = make_case(width=width, features=8)
    x, *rest = case
    run = jax.jit(functools.partial(short_conv, silu=silu, backend="reference"))
    check(run, (x.astype(jnp.float32), *rest), silu, (1e-6, 1e-6, 1e-5))
    history = jnp.asarray(np.random.default_rng(1).normal(size=(2, width - 1, 8)), jnp.float32)
    args = x.astype(jnp.float32), *rest[:2], history
    np.testing.assert_allclose(run(*args), short_conv(*args, silu=silu, backend="xla"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_ranks_need_no_promotion(backend):
    x, kernel, positions, _ = make_case(features=8, tokens=4)
    with jax.numpy_rank_promotion("raise"):
        assert short_conv(x, kernel, positions, x[:, :3], silu=True, backend=backend).shape == x.shape


def test_history_continues_a_row():
    x, kernel, positions, _ = make_case(features=8)
    whole = short_conv(x, kernel, positions, silu=True)
    past = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    for cut in (0, 1, 70):
        rest = short_conv(x[:, cut:], kernel, positions[:, cut:], past[:, cut : cut + 3], silu=True)
        np.testing.assert_array_equal(rest, whole[:, cut:])


def test_bad_shapes_are_named():
    x, kernel, positions, _ = make_case(features=8, tokens=4)
    with pytest.raises(ValueError, match="x_BTF"):
        short_conv(x[..., 1:], kernel, positions)
    with pytest.raises(ValueError, match="positions_BT"):
        short_conv(x, kernel, positions[:, 1:])
    with pytest.raises(ValueError, match="history_BPF"):
        short_conv(x, kernel, positions, x)
    with pytest.raises(ValueError, match="the kernels do not support this call"):
        short_conv(x, kernel, positions, interpret=True)
    with pytest.raises(ValueError, match=r"x_BTF\.dtype = int32"):  # it would be summed and cut off
        short_conv(jnp.ones(x.shape, jnp.int32), kernel, positions)
    with pytest.raises(ValueError, match=r"kernel_WF\.shape = \(8,\)"):
        short_conv(x, kernel[0], positions)
    with pytest.raises(ValueError, match="W >= 1"):
        short_conv(x, kernel[:0], positions)
    for wrong in (positions.tolist(), positions.astype(jnp.float32)):
        with pytest.raises(ValueError, match=r"positions_BT\.dtype = \w+: must be an integer type"):
            short_conv(x, kernel, wrong)


def test_fallback_is_logged_once(caplog):
    if jax.default_backend() == "gpu":
        pytest.skip("the kernels may run here")
    from pallas_kernels import dispatch

    dispatch._log_once.cache_clear()
    x, kernel, positions, _ = make_case(features=8, tokens=4)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            short_conv(x, kernel, positions)
    assert [r.message for r in caplog.records if "the platform is cpu" in r.message] == [
        "short_conv runs on xla; not hopper, triton: the platform is cpu"
    ]


@by_kernels
@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "3 taps, linear"))
def test_interpreted(name, backend, capfd):
    options, silu = CASES[name]
    run = functools.partial(short_conv, silu=silu, interpret=True, backend=backend)
    check(run, make_case(**options), silu, KERNEL_TOLERANCE)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_narrow_blocks_interpreted():
    """576 features, 9 blocks of 64, which Hopper's kernels do not take."""
    run = functools.partial(short_conv, silu=True, interpret=True, backend="triton")
    check(run, make_case(features=576, tokens=70), True, KERNEL_TOLERANCE)


@by_kernels
def test_documents_do_not_leak_what_is_not_a_number(backend):
    x, kernel, positions, dy = make_case(tokens=20, batch=1)
    start = int(np.argmax(positions[0] == 0)) or int(np.argmax(positions[0, 1:] == 0)) + 1
    poisoned = x.at[:, :start].set(jnp.nan)
    run = lambda x: short_conv(x, kernel, positions, silu=True, interpret=True, backend=backend)
    y, pull = jax.vjp(run, poisoned)
    assert jnp.isnan(y[:, start - 1]).all() and not jnp.isnan(y[:, start:]).any()
    assert not jnp.isnan(pull(dy)[0][:, start:]).any()


@by_kernels
def test_vmapped(backend):
    x, kernel, positions, _ = make_case(tokens=20, batch=1)
    options = dict(silu=True, interpret=True, backend=backend)
    run = functools.partial(short_conv, kernel_WF=kernel, positions_BT=positions, **options)
    together = jax.vmap(run)(jnp.stack([x, x[:, ::-1]]))
    np.testing.assert_array_equal(together[0], run(x))
    np.testing.assert_array_equal(together[1], run(x[:, ::-1]))


@kernels_only
def test_refusals_say_why():
    from pallas_kernels.short_conv import hopper

    x, kernel, positions, _ = make_case(tokens=4)
    supports = lambda x, kernel, history=None: hopper.supports(ConvCall(x, kernel, positions, history))
    assert supports(x, kernel) is None
    assert "float32 of x" in supports(x.astype(jnp.float32), kernel)
    assert "5 taps" in supports(x, jnp.zeros((5, 256)))
    assert "65536 sequences" in supports(jax.ShapeDtypeStruct((65536, 4, 256), x.dtype), kernel)
    assert "96 features" in supports(x[..., :96], kernel[:, :96])
    assert "inputs before" in supports(x, kernel, x[:, :3])
    assert supports(x[:0], kernel) == "an empty call"


def test_what_the_portable_kernels_refuse():
    x, kernel, positions, _ = make_case(tokens=4)
    run = functools.partial(explain, short_conv, backend="triton", device=Device("gpu", "8.0"))
    assert run(x[..., :64], kernel[:, :64], positions)[0].backend == "triton"
    for arrays, reason in (
        ((x[..., :96], kernel[:, :96], positions), "96 features"),
        ((x, kernel, positions, x[:, :3]), "inputs before"),
        (
            (jax.ShapeDtypeStruct((65536, 4, 256), x.dtype), kernel, jnp.zeros((65536, 4), int)),
            "65536 sequences",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            run(*arrays)


def structs(batch=8, tokens=4096, features=2048, width=4):
    shape = jax.ShapeDtypeStruct
    x = shape((batch, tokens, features), jnp.bfloat16)
    return x, shape((width, features), jnp.float32), shape((batch, tokens), jnp.int32)


def gradients_of_layers(backend, x, kernel, positions):
    """Through two checkpointed layers in a scan; the kernels directly, since dispatch looks for a GPU."""
    compute = importlib.import_module(f"pallas_kernels.short_conv.{backend}").short_conv

    def loss(x, kernel):
        layer = lambda x, _: (compute(ConvCall(x, kernel, positions, silu=True)), None)
        y = jax.lax.scan(jax.checkpoint(layer), x, length=2)[0]
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1))(x, kernel)


@by_kernels
def test_traces_under_shard_map(backend):
    """With check_vma, results and gradients must vary along the mesh axes of the arguments."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P("data"), P(), P("data")
    run = functools.partial(gradients_of_layers, backend)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    x, kernel, positions = structs(2, 64, 256)
    dx, dkernel = jax.eval_shape(jax.jit(sharded), x, kernel, positions)
    assert (dx.shape, dkernel.shape) == (x.shape, kernel.shape)


@pytest.mark.aot
@kernels_only
def test_a_kernel_is_the_same_in_every_program():
    """Else each program compiles its own: jax 0.11.2 numbers what it lowers (`blocks.unnumbered`)."""
    run = functools.partial(gradients_of_layers, "hopper")
    known = []
    for function in (run, lambda *arrays: jax.tree.map(jnp.sin, run(*arrays))):
        program = hopper_aot.lowered(function, structs(tokens=96, features=256), hopper_aot.absent())
        known.append(set(re.findall(r'kernel_hash = "([^"]+)"', program.as_text())))
    assert known[0] == known[1] and len(known[0]) == 2


@pytest.mark.aot
@kernels_only
@pytest.mark.parametrize("shape", [dict(), dict(tokens=100, features=256, width=3)])
def test_compiles_without_spills(shape):
    run = functools.partial(gradients_of_layers, "hopper")
    kernels = hopper_aot.compile_for_hopper(run, *structs(**shape))
    assert {k.name.rstrip("_0123456789") for k in kernels} == {"short_conv", "short_conv_gradients"}
    assert not any(kernel.spills for kernel in kernels), kernels
    assert max(kernel.registers for kernel in kernels) <= 128, kernels  # four blocks on a multiprocessor


@pytest.mark.aot
@pytest.mark.parametrize("capability", triton_aot.TARGETS)
@pytest.mark.parametrize("shape", [dict(), dict(tokens=100, features=576, width=3)])
def test_the_portable_kernels_compile_without_spills(capability, shape, tmp_path):
    run = functools.partial(gradients_of_layers, "triton")
    kernels = triton_aot.compile_for(capability, run, structs(**shape), tmp_path)
    for name in ("short_conv", "short_conv_gradients"):
        assert kernels[name].spills == kernels[name].shared == 0, kernels
        assert kernels[name].registers <= 128, kernels  # sixteen warps on a multiprocessor


ON_GPU = [pytest.param("hopper", n, marks=kernels_only) for n in (256, 2048)]
ON_GPU += [("triton", n) for n in (256, 576, 2048)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend, features", ON_GPU)
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, backend, features):
    options, silu = CASES[name]
    case = make_case(**options | dict(features=features))
    run = jax.jit(functools.partial(short_conv, silu=silu, backend=backend))
    first = check(run, case, silu, KERNEL_TOLERANCE)
    for a, b in zip(first, check(run, case, silu, KERNEL_TOLERANCE), strict=True):
        np.testing.assert_array_equal(a, b)
