"""Pieces that are walked in part (hopper/warm_up.py): interpreted against float64, compiled, on a GPU."""

import dataclasses

import hopper_aot
import jax
import jax.numpy as jnp
import numpy as np
import pytest

if hopper_aot.NO_KERNELS:
    pytest.skip(hopper_aot.NO_KERNELS, allow_module_level=True)

from test_hopper_channel_backward import TOLERANCE, expect, make_case, relative_error

from pallas_kernels.linear_attention import hopper
from pallas_kernels.linear_attention.call import Call
from pallas_kernels.linear_attention.hopper import inputs, table, warm_up

NAMES = dict(q="q", k="k", v="v", log_decay="g", beta="beta", initial_state="S0")
CASES = {
    "delta": dict(),
    "delta, a decay a head": dict(by_head=True),
    "additive, a decay a head": dict(by_head=True, delta=False, l2norm=False),
    "delta, documents, keys as they are": dict(documents=True, l2norm=False),
    "additive": dict(delta=False, l2norm=False),
}
LED = [name for name in CASES if not CASES[name].get("by_head")]


def quick(names):
    """All but the first are slow."""
    marks = [pytest.mark.every_jax] + [pytest.mark.slow] * len(names)
    return [pytest.param(name, marks=mark) for name, mark in zip(names, marks, strict=False)]


def steep_and_slow(tokens, by_head=False, **options):
    """A call of two value heads, of which the first forgets and the second does not; dO, dS."""
    call, do, d_state = make_case(tokens=tokens, value_heads=2, **options)
    steep = -10 / (1 + np.exp(-np.random.default_rng(2).normal(size=call.log_decay.shape)))
    slow = np.arange(2)[:, None] == 1
    log_decay = jnp.asarray(np.where(slow, 1e-3 * steep, steep))
    return dataclasses.replace(call, log_decay=log_decay[..., 0] if by_head else log_decay), do, d_state


def results(call, do, d_state):
    """o, final state and gradients, by the names of the oracle."""
    leaves = {field: getattr(call, field) for field in NAMES if getattr(call, field) is not None}
    attend = lambda leaves: hopper.linear_attention(dataclasses.replace(call, **leaves))
    (o, final), vjp = jax.vjp(attend, leaves)
    return dict(o=o, final=final) | {NAMES[name]: x for name, x in vjp((do, d_state))[0].items()}


def compare(got, call, do, d_state, tolerance=1):
    o, final, want, _ = expect(call, do, d_state)
    for name, wanted in (dict(o=o, final=final) | want).items():
        if name in got:
            bound = TOLERANCE.get({"g": "log_decay", "S0": "state"}.get(name, name), 6e-3) * tolerance
            assert relative_error(got[name], wanted) < bound, name


@pytest.mark.parametrize("name", quick(CASES))
def test_interpreted(name, capfd, monkeypatch):
    """The head that forgets walks two chunks of three; the other's bits are those of whole walks."""
    call, do, d_state = steep_and_slow(384, **CASES[name])
    call = dataclasses.replace(call, interpret=True)
    for way in ("forward", "backward"):
        monkeypatch.setattr(table, way, lambda *shapes: table.Choice(64, 2))
    monkeypatch.setattr(warm_up, "chunks", lambda run: 2)
    whole = jax.jit(lambda call: hopper.linear_attention(call)[0])(call)
    monkeypatch.setattr(table, "SHORT_WALKS", True)
    walks = warm_up.walks(inputs.prepare(call), 2)
    if not CASES[name].get("documents"):
        assert walks.forgets.tolist() == [[[True, False]] * 2]
    got = results(call, do, d_state)
    compare(got, call, do, d_state)
    if name == "delta":
        np.testing.assert_array_equal(got["o"][:, :, 1], whole[:, :, 1])
        assert relative_error(got["o"], np.asarray(whole, np.float64)) < 1e-5
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("name", quick(LED))
def test_led_interpreted(name, capfd, monkeypatch):
    """Two runs of two chunks, of which the second walks one before it, or both."""
    call, do, d_state = steep_and_slow(256, **CASES[name])
    call = dataclasses.replace(call, interpret=True)
    monkeypatch.setattr(table, "forward", lambda *shapes: table.Choice(64, led=2))
    before, after = (lead.tolist() for lead in warm_up.leads(inputs.prepare(call), 2))
    if not CASES[name].get("documents"):
        assert before == [[0, 0], [1, 2]] and after == [[1, 2], [0, 0]]
    compare(results(call, do, d_state), call, do, d_state)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("choice", [table.Choice(64, 2), table.Choice(64, led=4)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name, dim, choice, monkeypatch):
    call, do, d_state = steep_and_slow(1280, dim=dim, **CASES[name])
    monkeypatch.setattr(table, "forward", lambda *shapes: choice)
    monkeypatch.setattr(table, "backward", lambda *shapes: choice._replace(value_tile=dim))
    monkeypatch.setattr(table, "SHORT_WALKS", True)
    run = jax.jit(lambda *x: results(*x))
    got, again = run(call, do, d_state), run(call, do, d_state)
    compare(got, call, do, d_state, tolerance=2)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, again))


@pytest.mark.aot
@pytest.mark.parametrize("shape", [(1, 2048, 12, 128), (1, 65536, 8, 128)], ids=["led", "walks"])
def test_compiles_without_spills(shape, monkeypatch):
    monkeypatch.setattr(table, "LED", True)
    monkeypatch.setattr(table, "SHORT_WALKS", True)
    choice = table.forward(shape, shape)
    assert (choice.led > 1) == (shape[1] == 2048) and (choice.pieces > 1) == (shape[1] == 65536)
    struct = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    B, T, H, K = shape
    state = struct((B, H, K, K), jnp.float32)
    call = Call(
        *[struct(shape)] * 3, log_decay=struct(shape), beta=struct((B, T, H)), initial_state=state,
        scale=1.0, qk_l2norm=True, output_final_state=True,
    )  # fmt: skip
    report = hopper_aot.compile_for_hopper(results, call, struct(shape), state)
    scans = [kernel for kernel in report if "tiles" not in kernel.name and "gradients" not in kernel.name]
    named = lambda scan: 176 * (choice.led > 1 and "output" in scan.name)  # on jax 0.12.0.1; none on 0.11.2
    assert len(scans) == 2 + 3 * (choice.pieces > 1), report
    assert all(scan.spills <= named(scan) for scan in scans), report


def test_bound_is_never_below_the_norm():
    """Of what stretches do to a state, for keys, beta and decays of any size; documents forget."""
    call, _, _ = make_case(tokens=512, l2norm=False, decay=0.05, beta_max=3.0)
    call = dataclasses.replace(call, k=call.k * 4, interpret=True)
    given = inputs.prepare(call)
    k, g, beta = (np.asarray(x, np.float64)[0, :, 0] for x in (call.k, call.log_decay, call.beta[..., None]))
    for last in (True, False):
        bound = np.asarray(warm_up._bound(given, 2, 2, last=last))[0, :, 0]
        for piece in range(2):
            move, begin = np.eye(k.shape[1]), 256 * piece + 128 * last
            for t in range(begin, begin + 128):
                move = (np.eye(len(move)) - beta[t] * np.outer(k[t], k[t])) @ (np.exp(g[t])[:, None] * move)
            assert np.log(np.linalg.norm(move, 2)) <= bound[piece]
    ids = jnp.asarray(np.arange(512)[None] // 200, jnp.int32)
    given = inputs.prepare(dataclasses.replace(call, segment_ids=ids))
    bounds = [np.isneginf(warm_up._bound(given, 2, 2, last=last))[0, :, 0] for last in (True, False)]
    np.testing.assert_array_equal(bounds, [[True, True], [False, False]])
