"""The Hopper forward with a decay per key channel against the float64 oracle: interpreted, AOT, on a GPU."""

import dataclasses
import functools

import chunk_oracle
import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from test_hopper_backward import make_case, relative_error
from test_hopper_forward import SHAPES, TOLERANCE, oracle, struct_call

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention.hopper import table
from pallas_kernels.linear_attention.hopper.channel import channel_forward
from pallas_kernels.linear_attention.hopper.channel_tiles import SPAN, channel_tiles
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.table import Choice

CASES = {
    "delta, two slices of V": (dict(tokens=100, dim=128), "mild", Choice(64)),
    "delta, two warpgroups, documents": (dict(tokens=70, dim=128, documents=True), "mixed", Choice(128)),
    "delta, groups, pieces": (dict(tokens=128, value_heads=2), "slow", Choice(64, 2)),
    "additive, pieces": (dict(delta=False, l2norm=False, tokens=256), "slow", Choice(64, 4)),
    "additive, documents": (dict(delta=False, l2norm=False, documents=True), "mixed", Choice(64)),
}
# The size of the blocks of the last level of halving that each gate needs.
SPANS = {"none": 64, "mild": 64, "bound -5": 16, "-20": 2, "-1e4": 2, "mixed": 2}


def log_decay(gate, shape):
    """Natural log-decays of one kind."""
    rng = np.random.default_rng(1)
    draw = rng.uniform(size=shape)
    mixed = np.where(draw < 0.1, -rng.choice([20.0, 100.0, 1e4], size=shape), -0.1 * (draw < 0.7))
    steps = {
        "none": np.zeros(shape),
        "slow": -0.1 * draw,
        "mild": -np.log1p(np.exp(rng.normal(size=shape))),
        "bound -5": np.full(shape, -5.0),
        "-20": np.full(shape, -20.0),
        "-1e4": np.full(shape, -1e4),
        "mixed": mixed,
    }
    return jnp.asarray(steps[gate], jnp.float32)


def channel_case(options, gate):
    call, do, d_state = make_case(**options)
    shape = (*call.v.shape[:3], call.k.shape[3])
    return dataclasses.replace(call, log_decay=log_decay(gate, shape)), do, d_state


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "delta, groups, pieces"))
def test_interpreted(name, capfd):
    options, gate, choice = CASES[name]
    call = dataclasses.replace(channel_case(options, gate)[0], interpret=True)
    o, final, kept = oracle(call)
    out, saved = channel_forward(prepare(call), final=True, keep=True, choice=choice)
    tokens = call.q.shape[1]
    assert relative_error(out.o[:, :tokens], o) < TOLERANCE
    assert relative_error(jnp.swapaxes(out.final, 2, 3), final) < TOLERANCE
    assert relative_error(jnp.swapaxes(saved.states, 3, 4), kept["h"]) < TOLERANCE
    if call.beta is not None:
        assert relative_error(saved.values[:, :tokens], np.asarray(kept["u"])[:, :tokens]) < TOLERANCE
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("gate", SPANS)
def test_tiles_of_any_gate(gate):
    """Pairs are exact whether powers of the sums would overflow or not, with as few levels as that needs."""
    call = dataclasses.replace(channel_case(dict(tokens=64), gate)[0], interpret=True)
    tiles = channel_tiles(prepare(call), keep=True)
    normal = lambda x: chunk_oracle._normalise(np.asarray(x, np.float64)[0, :, 0])[0]
    q, k = normal(call.q), normal(call.k)
    decay = np.asarray(call.log_decay, np.float64)[0, :, 0]
    # Not a difference of sums: the decay between two tokens is the sum of the steps in between.
    between = np.array([[decay[j + 1 : i + 1].sum(0) for j in range(64)] for i in range(64)])
    pairs = np.tril(np.ones((64, 64)))[..., None] * np.exp(between)
    scores = call.scale * np.einsum("ic,jc,ijc->ij", q, k, pairs)
    beta = np.asarray(call.beta, np.float64)[0, :, 0]
    lower = beta[:, None] * np.tril(np.einsum("ic,jc,ijc->ij", k, k, pairs), -1)
    assert relative_error(tiles.scores[0, 0], scores) < 4e-3
    assert np.abs(np.asarray(tiles.scores[0, 0], np.float64) - scores).max() < 8e-3 * np.abs(scores).max()
    inverse = np.eye(64) + np.float64(tiles.inverses.high[0, 0])  # kept less its diagonal
    assert relative_error(inverse, np.linalg.inv(np.eye(64) + lower)) < 3e-3
    start = np.exp(np.cumsum(decay, 0))
    close = dict(rtol=8e-3, atol=5e-5)  # log-decays are float16: exp(-x) is right to x exp(-x) 2^-11
    np.testing.assert_allclose(np.float64(tiles.read_q[0, :, 0]), call.scale * q * start, **close)
    np.testing.assert_allclose(np.float64(tiles.read_k[0, :, 0]), k * start, **close)
    np.testing.assert_allclose(np.float64(tiles.write[0, :, 0]), k * pairs[-1], **close)
    np.testing.assert_allclose(tiles.carry[0, 0, 0], start[-1], rtol=1e-3, atol=2e-4)
    assert set(np.unique(tiles.norms[0, 0, 0, SPAN])) == {SPANS[gate]}


@pytest.mark.every_jax
def test_op_vmapped():
    """Through the public op: dispatch, ragged T, batching, log-decays in bf16."""
    call = channel_case(dict(tokens=70, delta=False, l2norm=False), "mild")[0]
    log_decay = call.log_decay.astype(jnp.bfloat16)

    def run(q, **backend):
        return linear_attention(q, call.k, call.v, log_decay=log_decay, **backend)[0]

    queries = jnp.stack([call.q, call.q[:, ::-1]])
    together = jax.vmap(functools.partial(run, backend="pallas", interpret=True))(queries)
    for got, q in zip(together, queries, strict=True):
        assert relative_error(got, np.asarray(run(q, backend="reference"), np.float64)) < TOLERANCE


def test_constant_left_operands_are_found():
    """What made these kernels wrong on hardware and right interpreted; `compile_for_hopper` refuses it."""
    product = "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%r1,%r2}, {%r3,%r4}, %rd1, p, 1, 1, 1;"
    made = ["mov.b32 %r9, 1006648320;", "mov.b32 %r3, %r9;", "mov.b32 %r4, 0;"]
    assert hopper_aot.constant_operands("\n".join([*made, product])) == [(3, "1006648320"), (3, "0")]
    made += ["add.s32 %r3, %r3, %r7;", "mov.b32 %r4, %r7;"]
    assert hopper_aot.constant_operands("\n".join([*made, product])) == []


def struct_channel_call(shape, delta):
    call = struct_call(SHAPES[shape], delta)
    steps = (*call.v.shape[:3], call.k.shape[3])
    return dataclasses.replace(call, log_decay=jax.ShapeDtypeStruct(steps, jnp.float32))


@pytest.mark.aot
@pytest.mark.parametrize(
    "shape, delta, keep",
    [("full", True, True), ("full", False, False), ("few heads", True, False), ("mixed", False, True)],
)
def test_compiles_without_spills(shape, delta, keep):
    call = struct_channel_call(shape, delta)
    choice = table.forward(call.k.shape, call.v.shape)  # or one pass would take it
    run = lambda call: channel_forward(prepare(call), final=True, keep=keep, choice=choice)
    kernels = hopper_aot.compile_for_hopper(run, call)
    assert kernels
    for kernel in kernels:  # a few registers of delta_channel_tiles at 128 channels
        assert kernel.spills <= (48 if "delta_channel_tiles" in kernel.name else 0), kernels


def forward_on(call, keep, choice):
    return channel_forward(prepare(call), final=True, keep=keep, choice=choice)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dim):
    options, gate, choice = CASES[name]
    options = options | {"tokens": 1000 if choice.pieces == 1 else 1024, "dim": dim}
    call, _, _ = channel_case(options, gate)
    choice = choice._replace(value_tile=min(choice.value_tile, dim))
    o, final, _ = oracle(call)
    for keep in (False, True):
        run = jax.jit(functools.partial(forward_on, keep=keep, choice=choice))
        out, again = run(call), run(call)
        assert relative_error(out.o[:, : call.q.shape[1]], o) < TOLERANCE
        assert relative_error(jnp.swapaxes(out.final, 2, 3), final) < TOLERANCE
        assert jax.tree.all(jax.tree.map(jnp.array_equal, out, again))
