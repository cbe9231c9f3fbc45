"""The Hopper gradients with a decay per key channel against float64: interpreted, compiled, on a GPU."""

import dataclasses

import chunk_oracle
import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_attention.call import Call

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from test_hopper_backward import inverse_parts

from pallas_kernels.linear_attention.hopper import backward, channel, inputs, table, two_parts
from pallas_kernels.linear_attention.hopper.channel_tiles import Tiles
from pallas_kernels.padding import pad_time

BF16 = jnp.bfloat16
TOLERANCE = dict(q=6e-3, k=6e-3, v=6e-3, log_decay=6e-3, state=6e-3, initial_state=6e-3, beta=3e-2)
# Additive: v and dO are bf16 as given, pairs are in two parts: little but the rounding of results is left.
ADDITIVE = TOLERANCE | dict(q=1.9e-3, k=2.1e-3, log_decay=2.4e-3)
# Bytes (each counted twice) of the chunk kernel; delta: 1072 on jax 0.11.2, 1608 on 0.12.0.1.
SPILLS = dict(delta_channel_gradients=1700, additive_channel_gradients=600)
REVERSE_SPILLS = 32  # likewise of the reverse scan
CASES = {
    "delta": dict(),
    "delta, beta to 2, gates of -5": dict(decay=5.0, beta_max=2.0),
    "delta, gates of -1e4, zero decay": dict(decay="extreme"),
    "delta, documents, groups, ragged": dict(documents=True, value_heads=2, tokens=150),
    "delta, two warpgroups, gates in bf16": dict(dim=128, gates=BF16, decay=2.0),
    "additive": dict(delta=False, l2norm=False),
    "additive, documents, gates of -20 in bf16": dict(
        delta=False, l2norm=False, documents=True, decay=20.0, gates=BF16
    ),
}


def make_case(
    tokens=128, value_heads=1, dim=64, delta=True, decay=1.0, documents=False, l2norm=True, beta_max=1.0,
    gates=jnp.float32,
):  # fmt: skip
    """(Call, gradient of o, gradient of the final state)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), BF16)
    q, k = normal(1, tokens, 1, dim), normal(1, tokens, 1, dim)
    if not l2norm:
        k = k * jnp.asarray(dim**-0.5, BF16)
    v, do = normal(1, tokens, value_heads, dim), normal(1, tokens, value_heads, dim)
    gate = rng.normal(size=(1, tokens, value_heads, dim))
    if decay == "extreme":  # most tokens keep all, some forget all, in all channels and in some
        log_decay = np.where(rng.uniform(size=gate.shape) < 0.1, -1e4, np.where(gate > 0, 0.0, -0.1))
        log_decay = np.where(rng.uniform(size=(1, tokens, value_heads, 1)) < 0.05, -20.0, log_decay)
    else:
        log_decay = -decay * np.logaddexp(0, -gate)
    state, d_state = (jnp.asarray(rng.normal(size=(1, value_heads, dim, dim)), jnp.float32) for _ in range(2))
    ids = np.sort(rng.integers(0, 12, (1, tokens)))
    beta = beta_max * jnp.asarray(rng.uniform(size=gate.shape[:3]), jnp.float32)
    call = Call(
        q=q,
        k=k,
        v=v,
        log_decay=jnp.asarray(log_decay, gates),
        beta=beta if delta else None,
        initial_state=state,
        segment_ids=jnp.asarray(chunk_oracle.segments(ids), jnp.int32) if documents else None,
        scale=dim**-0.5,
        qk_l2norm=l2norm,
        output_final_state=True,
    )
    return call, do, d_state


def expect(call, do, d_state):
    arguments = {f.name: getattr(call, f.name) for f in dataclasses.fields(Call)}
    for name in ("output_final_state", "interpret", "axis", "continues", "strong"):
        del arguments[name]
    return chunk_oracle.linear_attention_vjp(**arguments, do=do, d_final_state=d_state)


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def finest(g_CK):
    """Tokens in a block of the first level at which no offset from the middle exceeds 2^96."""
    offsets = np.cumsum(np.maximum(g_CK / np.log(2), -128), 0)
    for size in (64, 32, 16, 8, 4):
        by_block = offsets.reshape(-1, size, g_CK.shape[1])
        if np.abs(by_block - by_block[:, size // 2 - 1 : size // 2]).max() <= 96:
            return size
    return 2


def make_tiles(call):
    """What the forward hands over, from the definitions in float64."""
    prepared = inputs.prepare(dataclasses.replace(call, interpret=True))
    length, heads = prepared.k.shape[1:3]
    B, HV, K = *call.v.shape[::2], call.k.shape[3]
    chunks, group = length // 64, HV // heads
    f64 = lambda x: np.asarray(x, np.float64)
    q, k, g = f64(prepared.q), f64(prepared.k), f64(prepared.log_decay)
    beta = None if call.beta is None else f64(prepared.beta)
    segment = np.zeros((B, length)) if prepared.segment is None else f64(prepared.segment)
    entering = segment if prepared.segment is None else f64(prepared.entering)
    norm = lambda x: 1 / np.sqrt((x * x).sum(-1) + 1e-6) if call.qk_l2norm else np.ones(x.shape[:-1])
    norms = np.zeros((B, HV, chunks, 3, 64))
    read_q, read_k, write = (np.zeros((B, length, HV, K)) for _ in range(3))
    carry, scores, inverses = np.zeros((B, HV, chunks, K)), *np.zeros((2, B, HV, length, 64))
    for b, h, n in np.ndindex(B, HV, chunks):
        c = slice(64 * n, 64 * n + 64)
        norms[b, h, n, 0], norms[b, h, n, 1] = (
            norm(k[b, c, h // group]),
            call.scale * norm(q[b, c, h // group]),
        )
        norms[b, h, n, 2] = finest(g[b, c, h])
        x, y = (
            q[b, c, h // group] * norms[b, h, n, 1, :, None],
            k[b, c, h // group] * norms[b, h, n, 0, :, None],
        )
        pair, read, write_C, keep = chunk_oracle._gates(g[b, c, h], segment[b, c], entering[b, c.start])
        read_q[b, c, h], read_k[b, c, h], write[b, c, h], carry[b, h, n] = (
            x * read,
            y * read,
            y * write_C,
            keep,
        )
        scores[b, h, c] = np.einsum("ic,jc,ijc->ij", x, y, pair)
        if beta is not None:
            lower = beta[b, h, c, None] * np.tril(np.einsum("ic,jc,ijc->ij", y, y, pair), -1)
            inverses[b, h, c] = np.linalg.inv(np.eye(64) + lower) - np.eye(64)
    bf16, f32 = lambda x: jnp.asarray(x, BF16), lambda x: jnp.asarray(x, jnp.float32)
    delta = dict(read_k=bf16(read_k), inverses=inverse_parts(inverses)) if beta is not None else {}
    return Tiles(bf16(read_q), bf16(write), f32(carry), bf16(scores), norms=f32(norms), **delta)


def kernel_gradients(call, kept, do, d_state, pieces=1):
    """The backward kernels fed with what the float64 forward would keep for them."""
    prepared = inputs.prepare(dataclasses.replace(call, interpret=True))
    tiles = make_tiles(call)
    moves = None
    if pieces > 1:
        carry = tiles.carry.reshape(*tiles.carry.shape[:2], pieces, -1, tiles.carry.shape[3])
        moves = jnp.swapaxes(jnp.prod(carry, axis=3), 1, 2)
    saved = channel.ChannelSaved(
        tiles=tiles,
        states=jnp.asarray(np.swapaxes(kept["h"], 3, 4), BF16),
        values=None if call.beta is None else pad_time(jnp.asarray(kept["u"], BF16), prepared.k.shape[1]),
        moves=moves,
    )
    return backward.gradients(prepared, saved, do, d_state, table.Choice(64))


def check(call, do, d_state, pieces=1):
    _, _, want, kept = expect(call, do, d_state)
    got = kernel_gradients(call, kept, do, d_state, pieces)
    errors = {}
    for field, key in zip(got._fields, ("q", "k", "v", "g", "beta", "S0"), strict=True):
        if getattr(got, field) is not None:
            errors[field] = relative_error(getattr(got, field), want[key])
    tolerance = TOLERANCE if call.beta is not None else ADDITIVE
    assert all(error < tolerance[field] for field, error in errors.items()), errors
    assert got.log_decay.dtype == call.log_decay.dtype
    return errors


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "delta, documents, groups, ragged"))
def test_interpreted_gradients(name, capfd, monkeypatch):
    monkeypatch.setattr(table, "FILL", 1)  # all chunks of a head in one block of threads
    check(*make_case(**CASES[name]))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_interpreted_pieces(capfd):
    """A sequence cut in two: the second reverse scan starts from what the short one found."""
    check(*make_case(delta=False, l2norm=False, tokens=256, decay=0.1), pieces=2)
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_finest_is_what_the_forward_finds():
    from pallas_kernels.linear_attention.hopper import channel_tiles

    call, _, _ = make_case(tokens=128, decay="extreme")
    for log_decay in (call.log_decay, 0.1 * call.log_decay.clip(-5), 5.0 * call.log_decay.clip(-1)):
        changed = dataclasses.replace(call, log_decay=log_decay, interpret=True)
        norms = channel_tiles.channel_tiles(inputs.prepare(changed), keep=True).norms
        np.testing.assert_array_equal(norms[..., channel_tiles.SPAN, :], make_tiles(changed).norms[..., 2, :])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_gradients_on_gpu(name, dim, monkeypatch):
    from pallas_kernels.linear_attention import hopper

    if dim == 128:  # chunks of a head in one block of threads; else each in its own
        monkeypatch.setattr(table, "FILL", 1)
    call, do, d_state = make_case(**{"tokens": 512} | CASES[name] | {"dim": dim})
    _, _, want, _ = expect(call, do, d_state)
    names = dict(q="q", k="k", v="v", log_decay="g", beta="beta", initial_state="S0")
    leaves = {field: getattr(call, field) for field in names if getattr(call, field) is not None}
    attend = lambda leaves: hopper.linear_attention(dataclasses.replace(call, **leaves))
    vjp = jax.jit(lambda leaves, *d: jax.vjp(attend, leaves)[1](d)[0])
    got, again = vjp(leaves, do, d_state), vjp(leaves, do, d_state)
    for field in leaves:
        assert relative_error(got[field], want[names[field]]) < 2 * TOLERANCE[field], field
        assert jnp.array_equal(got[field], again[field]), field


SHAPES = {  # B, T, H, HV, K, V, delta, documents, pieces, dtype of log-decays
    "kda": (8, 4096, 16, 16, 128, 128, True, False, 1, BF16),
    "kda, documents": (4, 4096, 16, 16, 128, 128, True, True, 1, jnp.float32),
    "gla": (8, 4096, 16, 16, 128, 128, False, False, 1, BF16),
    "gla, in pieces": (1, 65536, 4, 8, 64, 128, False, True, 8, jnp.float32),
}


@pytest.mark.aot
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_without_spills(shape):
    B, T, H, HV, K, V, delta, documents, pieces, gates = SHAPES[shape]
    f32, n = jnp.float32, T // 64
    struct = jax.ShapeDtypeStruct
    keys, square = struct((B, T, HV, K), BF16), struct((B, HV, T, 64), BF16)
    arrays = dict(
        q=struct((B, T, H, K), BF16),
        k=struct((B, T, H, K), BF16),
        v=struct((B, T, HV, V), BF16),
        log_decay=struct((B, T, HV, K), gates),
        beta=struct((B, HV, T), f32) if delta else None,
        segment=struct((B, T), f32) if documents else None,
        entering=struct((B, T), f32) if documents else None,
        state=None,
    )
    tiles = Tiles(keys, keys, struct((B, HV, n, K), f32), square, norms=struct((B, HV, n, 3, 64), f32))
    if delta:
        tiles = tiles._replace(read_k=keys, inverses=two_parts.result(B, HV, T))
    values = struct((B, T, HV, V), BF16)
    saved = channel.ChannelSaved(
        tiles,
        struct((B, HV, n, V, K), BF16),
        values if delta else None,
        struct((B, pieces, HV, *(K,) * (1 + delta)), f32) if pieces > 1 else None,
    )

    def gradients(arrays, saved, do):
        prepared = inputs.Inputs(**arrays, scale=K**-0.5, l2norm=delta, interpret=False)
        return backward.gradients(prepared, saved, do, None)

    report = hopper_aot.compile_for_hopper(gradients, arrays, saved, values)
    assert len(report) == 2 + (pieces > 1), report
    for kernel in report:
        reverse = REVERSE_SPILLS if "reverse" in kernel.name else 0
        allowed = SPILLS.get(kernel.name.rsplit("_", 1)[0], reverse)
        assert kernel.spills <= allowed, report
