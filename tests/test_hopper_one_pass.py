"""KDA's forward in one pass (hopper/one_pass.py) against float64: interpreted, by threads, AOT, on a GPU."""

import dataclasses
import functools
import itertools

import hopper_aot
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

import warp_emulator
from jax.sharding import PartitionSpec as P
from test_hopper_channel import channel_case
from test_hopper_forward import TOLERANCE, oracle, relative_error
from test_hopper_warm_up import quick

from pallas_kernels.linear_attention import hopper
from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import (
    inverse,
    one_pass_chunk,
    one_pass_prepare,
    one_pass_tiles,
    table,
)
from pallas_kernels.linear_attention.hopper.channel import channel_forward
from pallas_kernels.linear_attention.hopper.forward_scan import Scanned
from pallas_kernels.linear_attention.hopper.inputs import prepare
from pallas_kernels.linear_attention.hopper.one_pass_forward import one_pass_forward, serves
from pallas_kernels.linear_attention.hopper.requirements import TESTED

BF16 = ml_dtypes.bfloat16


def swizzled(tiles, width):
    """[rows, columns] bf16 as in shared memory: tiles of 8 rows of `width` bytes, pieces swapped."""
    rows, columns = tiles.shape
    across = width // 2
    out = tiles.reshape(rows // 8, 8, columns // across, across // 8, 8).transpose(0, 2, 1, 3, 4).copy()
    for row in range(8):
        out[:, :, row] = out[:, :, row, np.arange(across // 8) ^ (row * width // 128)]
    return out


def unswizzled(words, rows, width):
    order = swizzled(np.arange(words.size).reshape(rows, -1), width).ravel()
    out = np.empty_like(words)
    out[order] = words
    return out.reshape(rows, -1)


MEMORY = one_pass_chunk.Tile(
    qk=0, g=1 << 15, beta=3 << 14, carry=(3 << 14) + 512, pairs=(3 << 14) + 4096, norms=(3 << 14) + 8192,
    starts=(3 << 14) + 9216,
)  # fmt: skip
RAW = one_pass_chunk.Raw(*(1 << 16) + (np.arange(3) << 14), strides=(256, 256))
KINDS = {  # how tiles are arranged, whether by the delta rule
    "forward": (one_pass_chunk.FORWARD, True),
    "reverse": (one_pass_chunk.REVERSE, True),
    "additive": (one_pass_chunk.FORWARD, False),
    "additive, reverse": (one_pass_chunk.ADDITIVE_REVERSE, False),
}


def prepared(monkeypatch, widths, k, q, g, beta, starts, l2norm, scale):
    """(memory after a tile is prepared, beta |k|^2 of its tokens)."""
    memory = warp_emulator.patch(monkeypatch, inverse, one_pass_tiles, one_pass_chunk, one_pass_prepare)
    stacked = np.stack([a.reshape(4, 16, 128) for a in (k, q)], 1).reshape(128, 128)
    memory.fill(MEMORY.qk, swizzled(stacked, 2 * widths.qk))
    memory.fill(MEMORY.g, swizzled(g, 2 * widths.g))
    for place, array in zip(RAW[:3], (k, q, g), strict=True):
        memory.fill(place, array)
    optional = {name: x for name, x in (("beta", beta), ("starts", starts)) if x is not None}
    places = MEMORY._replace(beta=None, starts=None)
    places = places._replace(**{name: getattr(MEMORY, name) for name in optional})
    for name, x in optional.items():
        memory.fill(getattr(MEMORY, name), x)
    sizes = one_pass_prepare._prepare(one_pass_chunk.Chunk(places, RAW, widths), l2norm, scale)
    return memory, np.stack([x[::4].reshape(4, 8) for x in sizes], 1).ravel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "l2norm, start", [(True, None), (False, None), (True, 0), (False, 4), (True, 8), (True, 12)]
)
def test_thread_by_thread(l2norm, start, kind, monkeypatch):
    """What chunks read of q, k and log-decays, and what a chunk's outputs, or gradients, are made of it.

    start: None, or log-decays are float16 and a document starts at this token of the first chunk, the next of
    the second and so on, and one more in the second.
    """
    widths, delta = KINDS[kind]
    widths = widths._replace(half=start is not None)
    rng, scale = np.random.default_rng(0), 0.3
    k, q, g = (rng.normal(size=(64, 128)).astype(BF16) for _ in range(3))
    g = (-3 / (1 + np.exp(-g.astype(np.float32)))).astype(BF16)
    g[20, :5], g[35, 7], g[47, 60:] = -np.inf, -1e30, -95.0
    if not l2norm:
        k = (k.astype(np.float32) * 0.1).astype(BF16)
    beta = rng.uniform(size=64).astype(np.float32) if delta else None
    starts, same = None, np.ones((4, 16, 16), bool)
    if start is not None:
        starts = np.stack([(np.arange(16) >= start + chunk) + 0.0 for chunk in range(4)])
        starts[1, start + 2 :] += 1  # two
        same = starts[:, :, None] == starts[:, None]
        steps = np.maximum(g.astype(np.float32) / np.log(2), -128).astype(np.float16)
        given, starts = steps.view(BF16), starts.astype(np.float32).ravel()
    else:
        given = g
        steps = np.maximum(g.astype(np.float64), np.float64(np.asarray(one_pass_chunk.LEAST, BF16))) / np.log(
            2
        )
    memory, sizes = prepared(monkeypatch, widths, k, q, given, beta, starts, l2norm, scale)

    k, q, g = (x.astype(np.float64) for x in (k, q, steps.reshape(4, 16, 128)))
    total = np.cumsum(g, 1)
    assert set((total[:, -1].min(-1) < -one_pass_prepare.RANGE).tolist()) == {True, False}
    if delta:
        np.testing.assert_allclose(sizes, beta * (1 if l2norm else (k * k).sum(1)), rtol=1e-5)
    words = lambda start, count: memory.words[start // 4 : start // 4 + count]
    norm = lambda x: 1 / np.sqrt((x * x).sum(1) + 1e-6) if l2norm else np.ones(64)
    norms = norm(k), scale * norm(q)
    eight = np.concatenate([total[:, :8], total[:, 8:] - total[:, :8]], 1).min(-1).ravel()
    np.testing.assert_allclose(
        words(MEMORY.norms, 192).view(np.float32).reshape(3, 64), [*norms, eight], rtol=1e-5
    )
    k, q, decay = k * norms[0][:, None], q * norms[1][:, None], np.exp2(total).reshape(64, 128)
    read = lambda start, rows, width: unswizzled(words(start, rows * 64).view(BF16), rows, 2 * width)
    x, z = read(MEMORY.qk, 128, widths.qk).reshape(4, 2, 16, 128).swapaxes(0, 1).reshape(2, 64, 128)
    carry = words(MEMORY.carry, 512).view(np.float32).reshape(4, 128)
    first, last, whole = same[:, 0].reshape(64, 1), same[:, -1].reshape(64, 1), same[:, 0, -1:]
    if start is not None:  # before a chunk is the document of its first token unless that starts one
        first, whole = (starts == 0)[:, None], (starts == 0)[15::16, None]
    written = k * np.exp2(total[:, -1:] - total).reshape(64, 128)
    wanted = [(z, q * decay, first), (read(MEMORY.g, 64, widths.g), written, last)]
    wanted += [(carry, decay[15::16], whole)] + [(-x if widths.reverse else x, k * decay, first)] * delta
    for got, want, keep in wanted:
        got = got.astype(np.float64)
        np.testing.assert_allclose(got, np.where(keep, want, 0), rtol=5e-3, atol=1e-37)
        assert not np.where(keep, 0, got).any()
    between = np.exp2(np.minimum(total[:, :, None] - total[:, None], 0))  # not a ratio: exact however steep
    pairs = [
        np.tril(np.einsum("wic,wjc,wijc->wij", a.reshape(4, 16, 128), k.reshape(4, 16, 128), between), n)
        * same
        for a, n in ((k, -1), (q, 0))
    ]
    check_chunks(rng, widths.reverse, beta, *pairs)


def check_chunks(rng, reverse, beta, keys, scores):
    """What chunks make of their pairs, and of random numbers; beta None: additive."""
    read, value = rng.normal(size=(64, 32)), rng.normal(size=(64, 16))
    group, pair = np.arange(128) // 32 * 16 + np.arange(128) % 32 // 4, np.arange(128) % 4 * 2
    places = lambda columns: [
        (group + row, pair + column + i)
        for column in range(0, columns, 8)
        for row in (0, 8)
        for i in range(2)
    ]
    registers = lambda tile: [np.float32(tile[place]) for place in places(tile.shape[1])]
    rounded = value.astype(BF16)
    bits = [number.view(np.uint32) >> 16 for number in registers(rounded)]
    in_pairs = [a | b << 16 for a, b in itertools.batched(bits, 2)]
    rounded = rounded.astype(np.float64)
    for chunk in range(4):
        m = one_pass_tiles.Warp(MEMORY.pairs + 1024 * chunk)
        b = 1.0 if beta is None else beta[16 * chunk : 16 * chunk + 16]
        inverted = np.eye(16) if beta is None else np.linalg.inv(np.eye(16) + b[:, None] * keys[chunk])
        by_column, early = np.broadcast_to(b, (64, 16)), registers(read[:, :16])
        moved = b * ((read[:, :16] + rounded @ scores[chunk]) @ inverted)
        if beta is None and reverse:
            results = [(one_pass_tiles._additive_gradients(m, early, in_pairs), moved)]
        elif beta is None:
            made = one_pass_tiles._outputs(m, registers(read[:, 16:]), in_pairs)
            results = [(made, read[:, 16:] + rounded @ scores[chunk].T)]
        elif reverse:
            made = one_pass_tiles._gradients(m, early, in_pairs, registers(by_column))
            results = [(made[:4], moved), (made[4:], rounded)]
        else:
            values = one_pass_tiles._values(m, *map(registers, (read, value, by_column)))
            want = b * (value - read[:, :16]) @ inverted.T
            outputs = one_pass_tiles._outputs(m, registers(read), values)
            results = [(values, want), (outputs, read[:, 16:] + want @ scores[chunk].T)]
        for block, want in results:
            got = np.zeros((64, 16))
            numbers_of = [number for register in block for number in warp_emulator.bf16(register)]
            for place, number in zip(places(16), numbers_of, strict=True):
                got[place] = number
            assert relative_error(got, want) < 4e-3


def one_pass_case(gate, steep_from=None, **options):
    """A call with log-decays in bf16; steep_from: the first head has -10 from this token on."""
    call = channel_case(dict(dim=128) | options, "none" if gate == "steep" else gate)[0]
    log_decay = np.array(call.log_decay)
    if gate == "steep":
        log_decay = -5 / (1 + np.exp(-np.random.default_rng(2).normal(size=log_decay.shape)))
    if steep_from is not None:
        log_decay[:, steep_from:, 0] = -10.0
    return dataclasses.replace(call, log_decay=jnp.asarray(log_decay, jnp.bfloat16))


def forward(call, spoilt):
    """spoilt: whether today's kernels are wanted; else they give zeros."""
    given = prepare(call)

    def otherwise():
        if spoilt:
            return channel_forward(given, final=True, keep=False, choice=table.Choice(128))[0]
        return Scanned(o=jnp.zeros_like(given.v), final=jnp.zeros((*call.v.shape[:3:2], 128, 128)))

    return one_pass_forward(given, final=True, otherwise=otherwise)


def check(call, spoilt):
    out = jax.jit(functools.partial(forward, spoilt=spoilt))(call)
    o, final, _ = oracle(call)
    assert relative_error(out.o[:, : call.q.shape[1]], o) < TOLERANCE
    assert relative_error(jnp.swapaxes(out.final, 2, 3), final) < TOLERANCE
    return out


CASES = {  # options, whether tokens are left to today's kernels
    "slow": (dict(gate="slow", tokens=100), False),
    "steep": (dict(gate="steep", tokens=192), False),
    "keys as they are, groups": (dict(gate="mild", tokens=130, value_heads=2, l2norm=False), True),
    "too steep within a chunk": (dict(gate="slow", tokens=192, value_heads=2, steep_from=72), False),
    "additive": (dict(gate="mixed", tokens=100, delta=False), False),
    "hard tokens": (dict(gate="slow", tokens=128, beta_max=2.0), True),
}


@pytest.mark.parametrize("name", quick(CASES))
def test_interpreted(name, capfd):
    options, spoilt = CASES[name]
    check(dataclasses.replace(one_pass_case(**options), interpret=True), spoilt)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "interpret", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.gpu)]
)
def test_later_tokens_move_nothing(interpret):
    """In no bit, though with a steep one the pairs of its chunk, from 32 on, are made in another way."""
    outputs = [
        check(
            dataclasses.replace(one_pass_case("slow", steep_from, tokens=128), interpret=interpret),
            spoilt=True,
        ).o
        for steep_from in (None, 40)
    ]
    np.testing.assert_array_equal(*(o[:, :40] for o in outputs))
    assert (outputs[0][:, 40:] != outputs[1][:, 40:]).any()


def test_what_is_served(monkeypatch):
    """Through the backend: the same as by the two kernels but for rounding; other calls are theirs."""
    monkeypatch.setattr(table, "one_pass", lambda k_shape, v_shape: k_shape[3] == 128)
    call = dataclasses.replace(one_pass_case("slow", tokens=70), interpret=True)
    o, final = hopper.linear_attention(call)
    want = oracle(call)
    assert serves(prepare(call)) and o.shape == call.v.shape
    assert relative_error(o, want[0]) < TOLERANCE and relative_error(final, want[1]) < TOLERANCE
    too = (
        dict(beta=None),
        dict(segment_ids=jnp.zeros(call.q.shape[:2], jnp.int32)),
        dict(log_decay=call.log_decay.astype(jnp.float32)),
    )
    others = (
        dict(strong=True),
        dict(q=call.q[..., :64], k=call.k[..., :64], log_decay=call.log_decay[..., :64]),
    )
    asked = lambda options: [serves(prepare(dataclasses.replace(call, **each))) for each in options]
    assert all(asked(too)) and not any(asked(others))
    compiled = prepare(dataclasses.replace(call, interpret=False))
    for version, served in ((TESTED[-1], True), ("0.99.0", False)):
        monkeypatch.setattr(jax, "__version__", version)
        assert serves(compiled) == served


@pytest.mark.parametrize("heads, served", [(8, False), (64, False), (128, True), (144, False), (256, True)])
def test_heads_that_fill_the_gpu(heads, served):
    shape = 1, 4096, heads, 128
    assert table.one_pass(shape, shape) == served


def struct_call(batch, tokens, heads):
    shape = batch, tokens, heads, 128
    struct = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    return Call(
        *[struct(shape)] * 3, log_decay=struct(shape), beta=struct(shape[:3]), initial_state=None, scale=1.0,
        qk_l2norm=True, output_final_state=True,
    )  # fmt: skip


def test_traces_under_shard_map_and_vmap():
    """The loop that computes wrong tokens again carries what varies along the mesh axes of the arguments."""
    call = struct_call(2, 128, 1)
    attend = functools.partial(forward, spoilt=True)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(lambda call: attend(call)[:2], mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(jax.jit(sharded), call)[0].shape == call.v.shape
    twice = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), call)
    assert jax.eval_shape(jax.vmap(attend), twice).o.shape == (3, *call.v.shape)


@pytest.mark.aot
def test_compiles_with_few_spills():
    attend = functools.partial(forward, spoilt=False)
    (kernel,) = hopper_aot.compile_for_hopper(attend, struct_call(8, 4096, 16))
    assert kernel.spills <= 32  # eight bytes, once a tile, each counted twice


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    options, spoilt = CASES[name]
    call = one_pass_case(**options | dict(tokens=1000))
    got, again = check(call, spoilt), check(call, spoilt)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, again))
