"""Heads wider than 128 x 128 on the Hopper kernels, against float64: interpreted, compiled, on a GPU."""

import dataclasses
import zlib

import chunk_oracle
import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from test_hopper_backward import expect, make_case, relative_error
from test_hopper_forward import struct_call

from pallas_kernels.linear_attention import hopper, xla
from pallas_kernels.linear_attention.hopper import wide
from pallas_kernels.linear_attention.hopper.head_tiles import head_tiles
from pallas_kernels.linear_attention.hopper.inputs import prepare

# As in test_hopper_backward; dlog_decay too is a sum of inner products that cancel, more of them at K = 256.
TOLERANCE = dict(o=6e-3, final=6e-3, q=6e-3, k=6e-3, v=6e-3, log_decay=1e-2, initial_state=6e-3, beta=3e-2)
ADDITIVE = dict(delta=False, l2norm=False)
CASES = {  # what the mixer calls have at 1.3B, smaller
    "delta": dict(dim=256, value_dim=128),
    "delta, documents, groups, ragged": dict(
        dim=256, value_dim=64, documents=True, value_heads=2, tokens=150
    ),
    "delta, no decay, beta to 0.1, not normalised": dict(
        dim=256, value_dim=64, decay=0.0, beta_max=0.1, l2norm=False
    ),
    "delta, no decay, beta to 2": dict(dim=256, value_dim=64, decay=0.0, beta_max=2.0),
    "delta, strong decay": dict(dim=256, value_dim=64, decay=20.0),
    "delta, one chunk": dict(dim=256, value_dim=64, tokens=40),
    "delta, many values": dict(dim=128, value_dim=256, tokens=130, documents=True),
    "head decay": dict(dim=256, value_dim=256, tokens=100, **ADDITIVE),
    "head decay, documents, groups": dict(
        dim=256, value_dim=64, documents=True, value_heads=2, tokens=150, **ADDITIVE
    ),
    "no decay": dict(dim=256, value_dim=64, decay=0.0, tokens=70, **ADDITIVE),
    "channel decay, delta": dict(dim=64, value_dim=192, channel=True, tokens=70),
    "channel decay": dict(dim=256, value_dim=256, channel=True, tokens=50, **ADDITIVE),
    "channel decay, documents, groups": dict(
        dim=256, value_dim=64, channel=True, documents=True, value_heads=2, tokens=70, **ADDITIVE
    ),
}


def problem(channel=False, **options):
    """`make_case`, with `channel` a bf16 decay per key channel in the place of the head's."""
    call, do, d_state = make_case(**options)
    if channel:
        rng = np.random.default_rng(zlib.crc32(repr(options).encode()))
        shape = (*call.v.shape[:3], call.q.shape[3])
        steps = jax.nn.log_sigmoid(jnp.asarray(rng.normal(size=shape), jnp.float32)) * options.get(
            "decay", 1.0
        )
        call = dataclasses.replace(call, log_decay=steps.astype(jnp.bfloat16))
    return call, do, d_state


def leaves_of(call):
    names = "q", "k", "v", "log_decay", "beta", "initial_state"
    return {name: getattr(call, name) for name in names if getattr(call, name) is not None}


def attend(call, module=hopper):
    """(o, final state, gradients) by name, of the cotangents given."""

    def run(leaves, do, d_state):
        step = lambda leaves: module.linear_attention(dataclasses.replace(call, **leaves))
        (o, final), vjp = jax.vjp(step, leaves)
        return dict(o=o, final=final) | vjp((do, d_state))[0]

    return jax.jit(run)


def errors(got, call, do, d_state):
    o, final, want, _ = expect(call, do, d_state)
    want = dict(want, o=o, final=final, log_decay=want["g"], initial_state=want["S0"])
    return {name: relative_error(x, want[name]) for name, x in got.items()}


def too_large(found, factor=1.0):
    return {name: error for name, error in found.items() if not error < factor * TOLERANCE[name]}


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "delta, one chunk"))
@pytest.mark.slow
def test_interpreted(name, capfd):
    call, do, d_state = problem(**CASES[name])
    call = dataclasses.replace(call, interpret=True)
    assert hopper.supports(call) is None
    got = attend(call)(leaves_of(call), do, d_state)
    assert not too_large(errors(got, call, do, d_state))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    call, do, d_state = problem(**CASES[name] | {"tokens": 1000, "value_dim": 256 if "one" in name else 512})
    assert hopper.supports(call) is None
    run = attend(call)
    got, again = (run(leaves_of(call), do, d_state) for _ in range(2))
    assert not too_large(errors(got, call, do, d_state), 2.0)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, again))


@pytest.mark.parametrize("key_dim", [128, pytest.param(256, marks=pytest.mark.every_jax)])
def test_what_a_chunk_needs_before_its_state_is_known(key_dim):
    call, do, d_state = problem(dim=key_dim, value_dim=64, documents=True, tokens=128)
    _, _, _, kept = expect(call, do, d_state)
    tiles = head_tiles(prepare(dataclasses.replace(call, interpret=True)))
    np.testing.assert_allclose(tiles.gates, chunk_oracle.gates(call, 128), rtol=1e-4, atol=1e-4)
    inverses = np.swapaxes(kept["A"], 1, 2) - np.tile(np.eye(64), (2, 1))
    assert relative_error(tiles.inverses.high, inverses) < 4e-3


@pytest.mark.parametrize(
    "parts", [dict(channel=True), dict(), dict(decay=0.0)], ids=["channel", "head", "none"]
)
def test_cut_heads_compute_the_same(parts):
    """In float32 on XLA, so that nothing but the cut can differ: halves of K, slices of V, groups, states."""
    call, _, _ = problem(dim=256, value_dim=192, value_heads=2, tokens=20, **ADDITIVE | parts)
    floats = {name: x.astype(jnp.float32) for name, x in leaves_of(call).items()}
    call = dataclasses.replace(call, **floats)
    assert wide.parts(call) == (2, 1 if "channel" in parts else 3)
    o, final = xla.linear_attention(call)
    got_o, got_final = wide.join(*xla.linear_attention(wide.cut(call)), call)
    assert relative_error(got_o, np.asarray(o)) < 1e-5
    assert relative_error(got_final, np.asarray(final)) < 1e-5


def test_heads_are_cut_only_where_nothing_else_takes_them():
    def parts(batch, tokens, heads, key_dim, value_dim, delta, channel=False):
        call = struct_call((batch, tokens, heads, heads, key_dim, value_dim), delta)
        if channel:
            decay = jax.ShapeDtypeStruct((batch, tokens, heads, key_dim), jnp.bfloat16)
            call = dataclasses.replace(call, log_decay=decay)
        return wide.parts(call)

    assert parts(4, 8192, 8, 128, 128, True) == parts(4, 8192, 8, 64, 64, False) == (1, 1)
    assert parts(4, 8192, 8, 128, 256, True) == parts(4, 8192, 8, 128, 256, True, channel=True) == (1, 1)
    assert parts(1, 65536, 2, 128, 256, True) == (1, 2)  # two heads of 128 x 128, in 16 pieces
    assert parts(1, 65536, 2, 256, 512, True) == (1, 1)
    assert parts(4, 8192, 8, 64, 256, True) == (1, 2)
    assert parts(4, 8192, 4, 256, 512, False) == (2, 4)
    assert parts(4, 8192, 4, 256, 512, False, channel=True) == (2, 1)


def test_refused_at_256_channels():
    call = dataclasses.replace(problem(dim=256, value_dim=64)[0], interpret=True)
    channel = problem(dim=256, value_dim=64, channel=True)[0].log_decay
    assert "delta rule and a decay per channel" in hopper.supports(
        dataclasses.replace(call, log_decay=channel)
    )
    assert "qk_l2norm" in hopper.supports(dataclasses.replace(call, beta=None))
    assert "V = 96" in hopper.supports(dataclasses.replace(call, v=jnp.zeros((1, 128, 1, 96), jnp.bfloat16)))


SHAPES = {  # B, T, H, HV, K, V
    "256 x 512": (4, 8192, 4, 4, 256, 512),
    "256 x 128, groups": (2, 4096, 2, 4, 256, 128),
    "128 x 256": (4, 8192, 8, 8, 128, 256),
}
# Bytes; the other kernels have none.
SPILLS = dict(delta_wide_chunks=200, delta_wide_scan=16, delta_output=320)


@pytest.mark.aot
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("differentiate", [False, True])
def test_compiles(shape, differentiate):
    # Half the batch forward: jax 0.12 neither compiles nor reports a kernel that this process has had before.
    batch, *sizes = SHAPES[shape]
    call = struct_call((batch if differentiate else batch // 2, *sizes), True)
    do = jax.ShapeDtypeStruct(call.v.shape, jnp.bfloat16)
    batch, _, heads, value_dim = call.v.shape
    d_state = jax.ShapeDtypeStruct((batch, heads, call.q.shape[3], value_dim), jnp.float32)
    both = lambda call, do, d_state: attend(call)(leaves_of(call), do, d_state)
    run = both if differentiate else lambda call, *_: hopper.linear_attention(call)
    kernels = hopper_aot.compile_for_hopper(run, call, do, d_state)
    assert len(kernels) == (5 if differentiate else 2)
    for kernel in kernels:
        assert kernel.spills <= SPILLS.get(kernel.name.rsplit("_", 1)[0], 0), kernels
