"""Documents and float32 log-decays in one pass each way (hopper/one_pass_steps.py) against float64."""

import dataclasses

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

import chunk_oracle
from test_hopper_channel_backward import TOLERANCE, expect, finest, make_case, relative_error
from test_hopper_one_pass import struct_call
from test_hopper_one_pass_backward import NAMES, cotangents, kept
from test_hopper_warm_up import quick

from pallas_kernels.linear_attention import hopper
from pallas_kernels.linear_attention.hopper import one_pass_forward, one_pass_steps, table
from pallas_kernels.linear_attention.hopper.channel_backward_chunks import chunk_gradients
from pallas_kernels.linear_attention.hopper.channel_tiles import SPAN, ChannelSaved, Tiles
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.one_pass import OnePass
from pallas_kernels.linear_attention.hopper.one_pass_forward import serves
from pallas_kernels.linear_attention.hopper.one_pass_reverse import ReversePass

SPILLS = {  # bytes, each counted twice, by how a kernel's name starts
    "delta_channel_gradients": 1700,
    "additive_channel_gradients": 600,
    "delta_channel_one_pass_kept": 128,
    "delta_channel_one_pass": 32,
}
GATES = {
    "slow": lambda normal: -0.1 / (1 + np.exp(-normal)),
    "steep": lambda normal: -5 / (1 + np.exp(-normal)),
    "steeper": lambda normal: -10 / (1 + np.exp(-normal)),
    "resets": lambda normal: np.where(normal > 2.5, -np.inf, np.where(normal > 2, -1e4, -np.exp(normal - 3))),
}
CASES = {  # options of `case`, whether there are hard tokens
    "packed, steep": (dict(gate="steep", tokens=100, documents=9), False),
    "one document, slow": (dict(gate="slow", tokens=128), False),
    "packed, additive, groups, keys as they are": (
        dict(gate="resets", tokens=128, documents=30, value_heads=2, delta=False, l2norm=False),
        False,
    ),
    "packed, beyond the range": (dict(gate="steeper", tokens=192, documents=12), False),
    "packed, bf16": (dict(gate="slow", tokens=128, documents=5, dtype=jnp.bfloat16), False),
    "packed, hard tokens": (dict(gate="slow", tokens=128, documents=4, beta_max=2.0), True),
}


@pytest.fixture
def one_pass(monkeypatch):
    """Such calls are one pass, of any length and on this jax."""
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: k_shape[3] == v_shape[3] == 128)
    monkeypatch.setattr(one_pass_forward, "TESTED", (jax.__version__,))


def case(gate, tokens, documents=0, dtype=jnp.float32, lengths=None, **options):
    """A call with an initial state; lengths: of its documents, else some of so many, of 1 token and more."""
    call = make_case(tokens=tokens, dim=128, **options)[0]
    log_decay = GATES[gate](np.random.default_rng(2).normal(size=(1, tokens, call.v.shape[2], 128)))
    ids = np.sort(np.random.default_rng(3).integers(0, max(documents, 1), (1, tokens)))
    if lengths is not None:
        ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    ids = jnp.asarray(chunk_oracle.segments(ids), jnp.int32) if documents or lengths is not None else None
    return dataclasses.replace(call, log_decay=jnp.asarray(log_decay, dtype), segment_ids=ids)


def results(call, do, d_state):
    leaves = {name: getattr(call, name) for name in NAMES if getattr(call, name) is not None}
    attend = lambda leaves: hopper.linear_attention(dataclasses.replace(call, **leaves))
    (o, state), pull = jax.vjp(attend, leaves)
    return dict(o=o, final=state) | pull((do, d_state))[0]


def check(call, hard, bound=1.0):
    assert serves(prepare(call))
    do, d_state = cotangents(call)
    finite = dataclasses.replace(call, log_decay=jnp.maximum(call.log_decay, -1e4))  # for the oracle's sums
    o, final, gradients, _ = expect(finite, do, d_state)
    want = dict(o=o, final=final) | {name: gradients[NAMES[name]] for name in NAMES}
    got = jax.jit(results)(call, do, d_state)
    errors = {name: relative_error(got[name], want[name]) for name in got}
    limits = dict(o=6e-3, final=6e-3) | TOLERANCE
    assert all(error < bound * limits[name] for name, error in errors.items()), errors
    assert got["log_decay"].dtype == call.log_decay.dtype
    saved = jax.jit(kept)(call)
    assert bool((saved.wrong < call.q.shape[1]).any()) == hard
    if not hard:
        check_kept(call, saved)
    return got


def check_kept(call, saved):
    """Carry is 0 where a document starts; levels are as many as gates want, or more where one starts."""
    given = prepare(call)
    ids = np.zeros(given.k.shape[:2]) if given.segment is None else np.asarray(given.segment)
    before = np.concatenate([ids[0, :1], ids[0, 63::64][:-1]])
    steps = np.maximum(np.asarray(given.log_decay, np.float64), -88.8)
    for head, n in np.ndindex(saved.tiles.norms.shape[1:3]):
        chunk, whole = steps[0, 64 * n : 64 * n + 64, head], before[n] == ids[0, 64 * n + 63]
        (span,) = np.unique(saved.tiles.norms[0, head, n, SPAN])
        need = finest(chunk)
        assert span == need or (span == 2 and need < 16) or (span < need and not whole), (n, span, need)
        carry = np.exp(chunk.sum(0)) * whole
        np.testing.assert_allclose(saved.tiles.carry[0, head, n], carry, rtol=1e-3, atol=2e-4)
        assert whole or not saved.tiles.carry[0, head, n].any()


@pytest.mark.parametrize("name", quick(CASES))
def test_interpreted(name, capfd, one_pass):
    options, hard = CASES[name]
    check(dataclasses.replace(case(**options), interpret=True), hard)
    assert "RACE DETECTED" not in capfd.readouterr().out


# Every second document is of 15 tokens and starts at another token of a chunk of 16, 2 to 17.
LENGTHS = [2, 15] * 16
KEPT = np.repeat(np.arange(32) % 2 == 1, LENGTHS)


@pytest.mark.parametrize(
    "interpret", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("delta", [True, False])
def test_nothing_leaks(delta, interpret, one_pass):
    """Outputs of a document are the same bits whatever other documents have, and their gradients 0."""
    call = dataclasses.replace(case("slow", sum(LENGTHS), lengths=LENGTHS, delta=delta), interpret=interpret)
    rng = np.random.default_rng(7)
    kept = jnp.asarray(KEPT)[None, :, None, None]
    spoilt = {
        name: jnp.where(
            kept, getattr(call, name), jnp.asarray(rng.normal(size=call.q.shape), jnp.bfloat16) * 50
        )
        for name in "qkv"
    }
    state = call.initial_state * 100
    do, d_state = cotangents(call)
    do = jnp.where(kept, do, 0)
    run = jax.jit(results)
    got, again = (
        run(call, do, d_state),
        run(dataclasses.replace(call, **spoilt, initial_state=state), do, d_state),
    )
    np.testing.assert_array_equal(got["final"], again["final"])
    for name in ("o", "q", "k", "v"):
        np.testing.assert_array_equal(got[name][:, KEPT], again[name][:, KEPT], err_msg=name)
    assert (got["o"][:, ~KEPT] != again["o"][:, ~KEPT]).any()
    for name in ("q", "k", "v", "beta"):
        assert name not in got or not np.asarray(got[name], np.float32)[:, ~KEPT].any(), name
    assert not got["initial_state"].any()


def test_the_backward_pass_reads_what_the_forward_made(one_pass):
    """Whatever the log-decays that it was given have become: so a step keeps them once, in float16."""
    call = dataclasses.replace(case("slow", 128, documents=3), interpret=True)
    saved = jax.block_until_ready(jax.jit(kept)(call))
    lost = dataclasses.replace(call, log_decay=call.log_decay * jnp.nan)
    backward = jax.jit(lambda call: hopper._backward((call, saved), cotangents(call))[0])
    got, again = (jax.block_until_ready(backward(each)) for each in (call, lost))
    jax.tree.map(np.testing.assert_array_equal, got, again)
    assert np.isfinite(got.log_decay).all() and np.any(got.log_decay)


def test_the_other_kernels_get_the_same_steps():
    """From float16 in base 2 and back: what they round their log-decays to does not change in any bit."""
    given = prepare(case("resets", 128))
    read = one_pass_steps.as_read(given)
    assert read.log_decay.dtype == jnp.float16 and np.asarray(read.log_decay).min() == -128
    again = one_pass_steps.as_read(one_pass_steps.natural(read))
    np.testing.assert_array_equal(again.log_decay, read.log_decay)


@pytest.mark.aot
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("delta", [True, False])
def test_compiles_with_few_spills(delta, packed):
    """The limits of the tests without documents; of the chunk kernel those with bf16 log-decays."""
    call = struct_call(8, 4096, 16)
    ids = jax.ShapeDtypeStruct((8, 4096), jnp.int32) if packed else None
    steps = jax.ShapeDtypeStruct(call.log_decay.shape, jnp.float32)
    call = dataclasses.replace(call, log_decay=steps, segment_ids=ids, beta=call.beta if delta else None)

    def every(call):
        given = one_pass_steps.as_read(prepare(call))
        count = jnp.zeros((8, 16), jnp.int32) if delta else None
        kept = OnePass(given, count, True, keep=True)()
        ds, dv, first = ReversePass(given, count, given.v, None)()
        tiles = Tiles(None, None, kept.carry[..., 0, :], None, norms=kept.norms)  # the others are not read
        saved = ChannelSaved(tiles, kept.states, kept.values if delta else None)
        of_chunks = chunk_gradients(given, saved, ds, given.v, dv if delta else None, run=8)
        return OnePass(given, None, True)(), first, of_chunks

    kernels = hopper_aot.compile_for_hopper(every, call)
    assert len(kernels) == 4
    for kernel in kernels:
        allowed = [bytes_ for start, bytes_ in SPILLS.items() if kernel.name.startswith(start)]
        assert kernel.spills <= (allowed or [0])[0], kernel


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, one_pass):
    options, hard = CASES[name]
    call = case(**options | dict(tokens=1000))
    got, again = check(call, hard, bound=2), check(call, hard, bound=2)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, again))
