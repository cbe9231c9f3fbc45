"""The Hopper backward kernels against float64 gradients: interpreted, compiled ahead of time, on a GPU."""

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

from pallas_kernels.linear_attention.hopper import backward, blocks, inputs, table, two_parts
from pallas_kernels.padding import pad_time

BF16 = jnp.bfloat16
# Relative RMS error. Operands, A, V', dV and states are bf16; dbeta is an inner product of two of them,
# whose terms may cancel, and under strong decay with a final-state gradient one token's dbeta is most of
# the norm.
TOLERANCE = dict(q=6e-3, k=6e-3, v=6e-3, log_decay=6e-3, state=6e-3, initial_state=6e-3, beta=3e-2)
CASES = {
    "delta": dict(),
    "delta, no decay, beta to 2": dict(decay=0.0, beta_max=2.0),
    "delta, strong decay": dict(decay=20.0),
    "delta, documents, groups, ragged": dict(documents=True, value_heads=2, tokens=150),
    "delta, pieces": dict(tokens=256, decay=0.1, pieces=4),
    "additive": dict(delta=False, l2norm=False),
    "additive, pieces, documents": dict(delta=False, l2norm=False, tokens=256, documents=True, pieces=2),
    "additive, documents": dict(delta=False, l2norm=False, documents=True),
}


def make_case(
    tokens=128, value_heads=1, dim=64, delta=True, decay=1.0, documents=False, l2norm=True, beta_max=1.0,
    pieces=1, value_dim=None,
):  # fmt: skip
    """(Call, gradient of o, gradient of the final state); decay 0 means none; value_dim: dim unless given."""
    value_dim = value_dim or dim
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), BF16)
    q, k = normal(1, tokens, 1, dim), normal(1, tokens, 1, dim)
    if not l2norm:
        k = k * jnp.asarray(dim**-0.5, BF16)
    v, do = normal(1, tokens, value_heads, value_dim), normal(1, tokens, value_heads, value_dim)
    gate = jnp.asarray(rng.normal(size=(1, tokens, value_heads)), jnp.float32)
    shape = 1, value_heads, dim, value_dim
    state, d_state = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    ids = np.sort(rng.integers(0, 12, (1, tokens)))
    call = Call(
        q=q,
        k=k,
        v=v,
        log_decay=decay * jax.nn.log_sigmoid(gate) if decay else None,
        beta=beta_max * jnp.asarray(rng.uniform(size=gate.shape), jnp.float32) if delta else None,
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


def less_identity(inverses):
    """A [B, T, HV, 64] of the oracle as A - I [B, HV, T, 64]."""
    ones = np.tile(np.eye(64), (inverses.shape[1] // 64, 1))
    return np.swapaxes(inverses, 1, 2) - ones


def inverse_parts(a):
    """A - I [B, HV, T, 64] as the forward leaves it in chunks that are not hard."""
    high = jnp.asarray(a, BF16)
    hard = jnp.zeros((*a.shape[:2], a.shape[2] // 64, 64), jnp.float32)
    return two_parts.Inverse(high, jnp.full_like(high, jnp.nan), hard)


def moves(call, kept, pieces):
    """M^T of each piece [B, pieces, HV, K, K] (a factor [B, pieces, HV] if additive), chunk by chunk."""
    gates = chunk_oracle.gates(call, call.q.shape[1])  # [B, HV, chunks, 8, 64]
    batch, heads, chunks = gates.shape[:3]
    if call.beta is None:
        return np.prod(gates[..., blocks.CARRY, 0].reshape(batch, heads, pieces, -1), -1).swapaxes(1, 2)
    keys = np.asarray(call.k, np.float64)
    out = np.zeros((batch, pieces, heads, keys.shape[3], keys.shape[3]))
    for b, p, h in np.ndindex(batch, pieces, heads):
        total = np.eye(keys.shape[3])
        for n in range(p * chunks // pieces, (p + 1) * chunks // pieces):
            rows, gate = slice(n * 64, n * 64 + 64), gates[b, h, n][:, :, None]
            k = keys[b, rows, h * keys.shape[2] // heads]
            seen = kept["A"][b, rows, h] @ (gate[blocks.BETA] * gate[blocks.READ_K] * k)
            total = gate[blocks.CARRY, 0] * total - (gate[blocks.WRITE] * k).T @ seen @ total
        out[b, p, h] = total.T
    return out


def kernel_gradients(call, kept, do, d_state, pieces):
    """The backward kernels fed with what the float64 forward would keep for them."""
    prepared = inputs.prepare(call)
    length = prepared.k.shape[1]
    saved = backward.Saved(
        gates=None if call.beta is None else jnp.asarray(chunk_oracle.gates(call, length), jnp.float32),
        states=jnp.asarray(np.swapaxes(kept["h"], 3, 4), BF16),
        inverses=None if call.beta is None else inverse_parts(less_identity(kept["A"])),
        values=None if call.beta is None else pad_time(jnp.asarray(kept["u"], BF16), length),
        moves=jnp.asarray(moves(call, kept, pieces), jnp.float32) if pieces > 1 else None,
    )
    choice = table.Choice(64, pieces)
    return backward.gradients(prepared, saved, do, d_state, choice)


@pytest.mark.parametrize("name", hopper_aot.on_every_jax(CASES, "delta, documents, groups, ragged"))
def test_interpreted_gradients(name, capfd):
    call, do, d_state = make_case(**CASES[name])
    _, _, want, kept = expect(call, do, d_state)
    got = kernel_gradients(
        dataclasses.replace(call, interpret=True), kept, do, d_state, CASES[name].get("pieces", 1)
    )
    for field, key in zip(got._fields, ("q", "k", "v", "g", "beta", "S0"), strict=True):
        value = getattr(got, field)
        if value is not None:
            assert relative_error(value, want[key]) < TOLERANCE[field], field
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_gradients_on_gpu(name, dim, monkeypatch):
    from pallas_kernels.linear_attention import hopper

    if "pieces" in CASES[name]:
        monkeypatch.setattr(table, "forward", lambda *shapes: table.Choice(64, CASES[name]["pieces"]))
        monkeypatch.setattr(table, "backward", lambda *shapes: table.Choice(dim, CASES[name]["pieces"]))
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


SHAPES = {  # B, T, H, HV, K, V, delta
    "full": (8, 4096, 16, 16, 128, 128, True),
    "mixed": (2, 4096, 16, 16, 64, 128, True),
    "additive, pieces": (1, 65536, 8, 8, 128, 128, False),
}


@pytest.mark.aot
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_without_spills(shape):
    B, T, H, HV, K, V, delta = SHAPES[shape]
    f32 = jnp.float32
    struct = jax.ShapeDtypeStruct
    arrays = dict(
        q=struct((B, T, H, K), BF16),
        k=struct((B, T, H, K), BF16),
        v=struct((B, T, HV, V), BF16),
        log_decay=struct((B, HV, T), f32),
        beta=struct((B, HV, T), f32) if delta else None,
        segment=struct((B, T), f32),
        entering=struct((B, T), f32),
        state=None,
    )
    saved = backward.Saved(
        struct((B, HV, T // 64, 8, 64), f32) if delta else None,
        struct((B, HV, T // 64, V, K), BF16),
        two_parts.result(B, HV, T) if delta else None,
        struct((B, T, HV, V), BF16) if delta else None,
        struct((B, 8, HV, K, K), f32) if delta else None,
    )

    def gradients(arrays, saved, do):
        prepared = inputs.Inputs(**arrays, scale=K**-0.5, l2norm=delta, interpret=False)
        return backward.gradients(prepared, saved, do, None)

    report = hopper_aot.compile_for_hopper(gradients, arrays, saved, struct((B, T, HV, V), BF16))
    assert report
    for kernel in report:  # the delta rule's chunk kernel is up to 10 registers over its limit, the other 3
        allowed = {"delta_chunk_gradients": 160, "additive_gradients": 48, "delta_reverse_scan": 296}.get(
            kernel.name.rsplit("_", 1)[0], 0
        )
        assert kernel.spills <= allowed, report
