"""The Hopper forward kernels against the float64 oracle: interpreted, compiled ahead of time, on a GPU."""

import dataclasses
import functools
import itertools

import chunk_oracle
import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import warp_emulator
from jax.sharding import PartitionSpec as P

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from test_hopper_backward import less_identity, make_case, relative_error

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention import hopper
from pallas_kernels.linear_attention.hopper import inverse, table
from pallas_kernels.linear_attention.hopper.forward import forward_pass
from pallas_kernels.linear_attention.hopper.forward_scan import ROLES
from pallas_kernels.linear_attention.hopper.head_tiles import chunk_inverses
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.table import Choice

# Relative RMS error: o and V' are rounded to bf16 (1.7e-3) and made of bf16 products.
TOLERANCE = 6e-3
CASES = {
    "delta, two slices of V": (dict(tokens=100, dim=128), Choice(64)),
    "delta, two warpgroups": (dict(tokens=130, dim=128, decay=0.0), Choice(128)),
    "delta, documents, groups": (dict(documents=True, value_heads=2, tokens=100), Choice(64)),
    "delta, pieces": (dict(documents=True, tokens=128, decay=0.1), Choice(64, 2)),
    "delta, pieces, few values": (dict(tokens=128, decay=0.1, dim=128, value_dim=64), Choice(64, 2)),
    "delta, pieces, many values": (dict(tokens=128, decay=0.1, value_dim=128), Choice(64, 2)),
    "additive, pieces": (dict(delta=False, l2norm=False, tokens=256, decay=0.1), Choice(64, 4)),
    "additive, strong decay": (dict(delta=False, l2norm=False, decay=20.0), Choice(64)),
}


def oracle(call):
    """(o, final state, what the forward pass keeps), float64."""
    arguments = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    for name in ("output_final_state", "interpret", "axis", "continues", "strong"):
        del arguments[name]
    zero_o, zero_state = np.zeros(call.v.shape), np.zeros(call.initial_state.shape)
    o, final, _, kept = chunk_oracle.linear_attention_vjp(**arguments, do=zero_o, d_final_state=zero_state)
    return o, final, kept


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "delta, documents, groups"))
def test_interpreted(name, capfd):
    options, choice = CASES[name]
    call = dataclasses.replace(make_case(**options)[0], interpret=True)
    o, final, kept = oracle(call)
    inputs = prepare(call)
    out, saved = forward_pass(inputs, final=True, keep=True, choice=choice)
    length, tokens = inputs.k.shape[1], call.q.shape[1]
    assert relative_error(out.o[:, :tokens], o) < TOLERANCE
    assert relative_error(jnp.swapaxes(out.final, 2, 3), final) < TOLERANCE
    assert relative_error(jnp.swapaxes(out.states, 3, 4), kept["h"]) < TOLERANCE
    if call.beta is not None:
        np.testing.assert_allclose(out.gates, chunk_oracle.gates(call, length), rtol=1e-4, atol=1e-4)
        assert relative_error(out.values[:, :tokens], np.asarray(kept["u"])[:, :tokens]) < TOLERANCE
        want = less_identity(kept["A"])[:, :, :tokens]
        assert relative_error(saved.inverses.high[:, :, :tokens], want) < TOLERANCE
    assert "RACE DETECTED" not in capfd.readouterr().out


ALIKE = [(0.0, 0.9), (0.9, 0.9), (0.95, 1.9), (1.0, 1.9), (1.0, 2.0)]  # cosine of two keys, beta


def alike(cosine, seed=0):
    rng = np.random.default_rng(seed)
    return np.sqrt(cosine) * rng.normal(size=(1, 64)) + np.sqrt(1 - cosine) * rng.normal(size=(64, 64))


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cosine, beta", ALIKE)
def test_inverse_of_alike_keys(cosine, beta, interpret):
    """Where a Neumann product loses everything, doubling leaves the rounding of results to bf16."""
    k = jnp.asarray(alike(cosine)[None, :, None], jnp.bfloat16)
    call = make_case(tokens=64, decay=0.0)[0]
    call = dataclasses.replace(call, k=k, beta=jnp.full((1, 64, 1), beta), interpret=interpret)
    keys = np.asarray(k, np.float64)[0, :, 0]
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    want = np.linalg.inv(np.eye(64) + beta * np.tril(keys @ keys.T, -1)) - np.eye(64)
    got = chunk_inverses(prepare(call))
    assert relative_error(got.high[0, 0], want) < 3e-3
    assert got.hard[0, 0].tolist() == [[64.0 * (beta > 1)] * 64]
    if beta > 1:
        assert relative_error(np.float64(got.high) + np.float64(got.low), want[None, None]) < 2e-4


@pytest.mark.parametrize("cosine, beta", ALIKE)
def test_inverse_thread_by_thread(cosine, beta, monkeypatch):
    """The instructions that the interpreter replaces by products of blocks."""
    keys = alike(cosine)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    lower = beta * keys @ keys.T  # with what it must ignore on and above the diagonal
    warp_emulator.patch(monkeypatch, inverse)
    places = [warp_emulator.place((column, half)) for column in range(8) for half in range(2)]
    high = np.float16(-lower)
    registers = [
        [warp_emulator.pair(part[r, c], part[r, c + 1]) for r, c in places]
        for part in (high, np.float16(-lower - high))
    ]
    blocks = [tuple(part[j : j + 4] for part in registers) for j in range(0, 16, 4)]
    parts = inverse._inverse(inverse.Parts(inverse.Warp(None)), blocks)
    got = np.zeros((2, 64, 64), np.float32)
    for part, blocks in zip(got, parts, strict=True):
        for (r, c), register in zip(places, itertools.chain(*blocks), strict=True):
            part[r, c], part[r, c + 1] = ((register >> s << 16).view(np.float32) for s in (0, 16))
    want = np.linalg.inv(np.eye(64) + np.tril(lower, -1)) - np.eye(64)
    assert relative_error(got[0], want) < 3e-3
    assert relative_error(got.sum(0), want) < 2e-4
    assert not np.triu(got).any()


@pytest.mark.parametrize("delta", [True, False])
def test_only_what_ran_on_a_gpu_is_cut_into_pieces(delta):
    shape = lambda dim: (1, 65536, 8, dim)
    chosen = lambda k, v: (table.forward(shape(k), shape(v)), table.backward(shape(k), shape(v), delta))
    assert all(choice.pieces > 1 for dim in (64, 128) for choice in chosen(dim, dim))
    assert all(choice.pieces == 1 for dims in ((64, 128), (128, 64)) for choice in chosen(*dims))


def test_refusals_say_why():
    call = dataclasses.replace(make_case()[0], interpret=True)
    assert hopper.supports(call) is None
    wide = jnp.zeros((1, 128, 1, 96), jnp.bfloat16)
    refused = {
        "bfloat16 only": dict(q=call.q.astype(jnp.float32)),
        "K = 96": dict(q=wide, k=wide),
        "an empty call": dict(v=call.v[:0]),
    }
    for reason, change in refused.items():
        assert reason in hopper.supports(dataclasses.replace(call, **change))


def wide_case(value_dim, **options):
    """A call with more values than the kernels take in one head, and the gradient of its output."""
    call, _, _ = make_case(**options)
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch, tokens, heads = call.v.shape[:3]
    v, do = (normal(batch, tokens, heads, value_dim).astype(jnp.bfloat16) for _ in range(2))
    state = normal(batch, heads, call.k.shape[3], value_dim)
    return dataclasses.replace(call, v=v, initial_state=state), do


def check_wide(call, do):
    arguments = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    for name in ("output_final_state", "interpret", "axis", "continues", "strong"):
        del arguments[name]
    o, final, want, _ = chunk_oracle.linear_attention_vjp(**arguments, do=do)

    @jax.jit
    def run(q, k, v, log_decay):
        leaves = dataclasses.replace(call, q=q, k=k, v=v, log_decay=log_decay)
        return hopper.linear_attention(leaves)

    leaves = call.q, call.k, call.v, call.log_decay
    (got_o, got_final), vjp = jax.vjp(run, *leaves)
    assert relative_error(got_o, o) < TOLERANCE
    assert relative_error(got_final, final) < TOLERANCE
    for name, gradient in zip(("q", "k", "v", "g"), vjp((do, jnp.zeros_like(got_final))), strict=True):
        assert relative_error(gradient, want[name]) < TOLERANCE, name


@pytest.mark.slow
def test_many_values_a_head():
    call, do = wide_case(192, value_heads=2, tokens=64)
    check_wide(dataclasses.replace(call, interpret=True), do)


@pytest.mark.gpu
@pytest.mark.parametrize("value_dim", [192, 256])
def test_many_values_a_head_on_gpu(value_dim):
    check_wide(*wide_case(value_dim, value_heads=2, tokens=512, dim=128))


def test_op_vmapped():
    call, _, _ = make_case(tokens=70, delta=False, l2norm=False)
    run = lambda q: linear_attention(q, call.k, call.v, backend="pallas", interpret=True)[0]
    queries = jnp.stack([call.q, call.q[:, ::-1]])
    together = jax.vmap(run)(queries)
    assert jnp.array_equal(together[0], run(queries[0]))
    assert jnp.array_equal(together[1], run(queries[1]))


@pytest.mark.parametrize("roles", ROLES.values(), ids=map(str, ROLES))
def test_warpgroups_take_no_more_registers_than_the_block_was_launched_with(roles):
    """`setmaxnreg` waits for ever for registers that nobody gives back."""
    launched = 65536 // (128 * roles.threads) // 8 * 8 * roles.threads
    taken = roles.state * roles.state_registers + roles.prepare * roles.prepare_registers
    assert taken + roles.copy_registers <= launched


SHAPES = {  # B, T, H, HV, K, V
    "full": (8, 4096, 16, 16, 128, 128),
    "few heads": (1, 65536, 8, 8, 128, 128),
    "mixed": (2, 4096, 8, 16, 64, 128),
}


def struct_call(shape, delta, final=True):
    B, T, H, HV, K, V = shape
    array = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    keys = array(B, T, H, K, dtype=jnp.bfloat16)
    values = array(B, T, HV, V, dtype=jnp.bfloat16)
    beta = array(B, T, HV) if delta else None
    call = make_case()[0]
    return dataclasses.replace(
        call,
        q=keys,
        k=keys,
        v=values,
        log_decay=array(B, T, HV),
        beta=beta,
        initial_state=None,
        segment_ids=array(B, T, dtype=jnp.int32),
        qk_l2norm=delta,
        output_final_state=final,
    )


@pytest.mark.aot
@pytest.mark.parametrize(
    "shape, delta, keep",
    [("full", True, True), ("full", False, False), ("few heads", True, False), ("mixed", False, True)],
)
def test_compiles_without_spills(shape, delta, keep):
    run = lambda call: forward_pass(prepare(call), final=True, keep=keep)
    kernels = hopper_aot.compile_for_hopper(run, struct_call(SHAPES[shape], delta))
    assert kernels
    for kernel in kernels:  # the branch for hard chunks (two_parts.py) may
        allowed = {"delta_output": 320, "delta_summary": 32}.get(kernel.name.rsplit("_", 1)[0], 0)
        assert kernel.spills <= allowed, kernels


def stacked_loss(call):
    """Two checkpointed layers in a scan."""

    def layer(v, _):
        return hopper.linear_attention(dataclasses.replace(call, v=v))[0], None

    v, _ = jax.lax.scan(jax.checkpoint(layer), call.v, length=2)
    return jnp.sum(v.astype(jnp.float32) ** 2)


def gradient_of_values(v, call):
    return jax.grad(lambda v: stacked_loss(dataclasses.replace(call, v=v)))(v)


def test_traces_under_shard_map():
    """With check_vma the results must vary along the mesh axes that the arguments vary along."""
    call = struct_call((2, 128, 1, 2, 64, 64), True, final=False)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        gradient_of_values, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")
    )
    assert jax.eval_shape(jax.jit(sharded), call.v, call).shape == call.v.shape


@pytest.mark.aot
def test_compiles_in_checkpointed_scanned_layers():
    call = struct_call((2, 128, 1, 2, 64, 64), True, final=False)
    kernels = hopper_aot.compile_for_hopper(gradient_of_values, call.v, call)
    assert any("delta_output" in kernel.name for kernel in kernels)


def forward_on(call, keep, choice):
    return forward_pass(prepare(call), final=True, keep=keep, choice=choice)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dim):
    options, choice = CASES[name]
    call, _, _ = make_case(**options | {"tokens": 1000 if choice.pieces == 1 else 1024, "dim": dim})
    choice = choice._replace(value_tile=min(choice.value_tile, dim))
    o, final, _ = oracle(call)
    for keep in (False, True):
        run = jax.jit(functools.partial(forward_on, keep=keep, choice=choice))
        out, again = run(call), run(call)
        assert relative_error(out.o[:, : call.q.shape[1]], o) < TOLERANCE
        assert relative_error(jnp.swapaxes(out.final, 2, 3), final) < TOLERANCE
        assert jax.tree.all(jax.tree.map(jnp.array_equal, out, again))
