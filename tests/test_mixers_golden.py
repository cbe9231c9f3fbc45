"""Kinds that are more than a call of an op, against float64 vectors of public implementations, in float32."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import recurrent_mixer
from hybridlm.linear_mixer import Inputs, recurrence
from hybridlm.mixers import (
    feature_map,
    gated_delta_net2,
    lightning,
    log_linear,
    mamba,
    mamba2,
    mlstm,
    rglru,
    rwkv6,
    rwkv7,
    s4d,
)
from hybridlm.mixers.delta_product import product
from hybridlm.rows import Rows, single_document

GOLDEN = Path(__file__).parent / "golden" / "mixers"
FILES = [path for path in sorted(GOLDEN.glob("*/*.npz")) if path.parent.name != "layers"]
CASES = [f"{path.parent.name}/{path.stem}" for path in FILES]


def gated_delta_product(a, rows, meta):
    steps, (batch, length, *_) = meta["kwargs"]["nh"], a["q"].shape
    k, v, beta = (a[name].reshape(batch, length, -1, *a[name].shape[3:]) for name in ("k", "v", "beta"))
    l2norm = bool(meta["l2norm_inside"])
    o, state = product(Inputs(a["q"], k, v, a["g"], beta), steps, rows, a["h0"], qk_l2norm=l2norm)
    return {"o": o, "ht": state}


def lightning_attention(a, rows, meta):
    which, scale = ("minimax", 1.0) if meta["case"].startswith("minimax") else ("transnormer", None)
    decay = -jnp.broadcast_to(lightning.slopes(which, a["q"].shape[2], 3, 8), a["q"].shape[:3])
    o, state = recurrence(Inputs(a["q"], a["k"], a["v"], decay), rows, a["h0"], scale=scale)
    return {"o": o, "ht": state}


def ssd(a, rows, meta):
    dt = jax.nn.softplus(a["dt"] + a["dt_bias"])
    inputs = mamba2.ssd(a["C"], a["B"], a["x"], dt, a["A_log"], a["D"])
    o, state = recurrence(inputs, rows, a["h0"].swapaxes(2, 3), scale=1.0)
    return {"y": o + inputs.skip, "ht": state.swapaxes(2, 3)}


def selective_scan(a, rows, meta):
    dt = jax.nn.softplus(a["delta"] + a["delta_bias"])
    y, state = mamba.selective_scan(a["u"], dt, a["A_log"], a["B"], a["C"], rows, a["h0"])
    return {"y": (y + a["D"] * a["u"]) * jax.nn.silu(a["z"]), "ht": state}


def mlstm_cell(a, rows, meta):
    settings = meta["kwargs"]
    sigmoid = settings.get("input_gate") == "sigmoid"
    config = mlstm.Config(
        input_gate="sigmoid" if sigmoid else "exponential",
        normalizer=settings.get("normalize", True),
        eps=settings.get("eps", 1e-6),
    )
    m = jnp.zeros_like(a["n0"][..., 0]) if sigmoid else a["m0"]
    state = {"C": a["h0"], "n": a["n0"].reshape(len(m), -1), "m": m}
    o, after = mlstm.mlstm(
        Inputs(a["q"], a["k"], a["v"], jax.nn.log_sigmoid(a["f"]), a["i"]), rows, state, config
    )
    out = {"o": o, "ht": after["C"], "nt": after.get("n"), "mt": after["m"]}
    if not config.normalizer:  # nothing is then made of n
        return {name: out[name] for name in ("o", "ht")}
    out["nt"] = out["nt"].reshape(a["n0"].shape)
    return {name: out[name] for name in meta["outputs"]}


def rg_lru(a, rows, meta):
    state = a.get("h0", jnp.zeros_like(a["x"][:, 0]))
    y, last = rglru.rg_lru(a["x"], a["gate_x"], a["gate_a"], a["lam"], rows, state)
    ends = jnp.asarray([-1]) if "h0" in a else np.asarray(meta["ends"])
    return {"y": y, "ht": last if "h0" in a else y[0, ends]}


def s4d_scan(a, rows, meta):
    C = jnp.stack([a["C_re"], a["C_im"]], axis=-1)
    y, state = s4d.scan(a["u"], s4d.System(a["log_dt"], a["A_re_log"], a["A_im"], C), rows, a["h0"])
    return {"y": y + a["D"] * a["u"], "ht": state}


def log_linear_attention(a, rows, meta):
    recur = lambda inputs, rows, state: recurrence(inputs, rows, state, scale=1.0)
    count = (a["q"].shape[1] - 1).bit_length()
    return {
        "o": log_linear.levels(Inputs(a["q"], a["k"], a["v"], a["g"]), a["level_scales"], rows, count, recur)
    }


def based_attention(a, rows, meta):
    q, k = (feature_map.taylor(a[name]) for name in "qk")
    state = None
    if "h0" in a:
        state = {"S": folded(a["h0"], 2), "n": folded(a["z0"], 2).reshape(len(q), -1)}
    o, _ = feature_map.attend(Inputs(q, k, a["v"]), rows, state, "sum", 1e-6, 1.0)
    return {"o": o}


def folded(x, axis):
    """The vectors' state, of both x_i x_j and x_j x_i without factors of d, as our features read it."""
    d = int((x.shape[axis] - 1) ** 0.5)
    x = jnp.moveaxis(x, axis, 0)
    one, first, second = x[0], x[1 : d + 1], x[d + 1 :].reshape(d, d, *x.shape[1:])
    i, j = np.triu_indices(d, 1)
    pairs = (second[i, j] + second[j, i]) * 2**-0.5
    parts = [one[None], first * d**-0.25, second[np.arange(d), np.arange(d)] * d**-0.5, pairs * d**-0.5]
    return jnp.moveaxis(jnp.concatenate(parts), 0, axis)


def linear_attention(a, rows, meta):
    positive = lambda x: jax.nn.elu(x) + 1
    state = {"S": a["h0"], "n": a["z0"].reshape(len(a["z0"]), -1)}
    inputs = Inputs(positive(a["q"]), positive(a["k"]), a["v"])
    o, after = feature_map.attend(inputs, rows, state, "sum", 1e-10, a["q"].shape[3] ** -0.5)
    return {"o": o, "ht": after["S"], "zt": after["n"].reshape(a["z0"].shape)}


def erase(a, rows, meta):
    o, state = gated_delta_net2.erase(Inputs(a["q"], a["k"], a["w"] * a["v"], a["g"], a["b"]), rows, a["h0"])
    return {"o": o, "ht": state}


def wkv6(a, rows, meta):
    r = a["q"] * a["q"].shape[3] ** -0.5
    o, state = rwkv6.wkv(r, a["k"], a["v"], a["w"], a["u"], rows, a["h0"])
    return {"o": o, "ht": state}


def time_mix7(a, rows, meta):
    names = ("r", "w_raw", "k", "v", "rate", "k_k", "k_a", "r_k")
    raw = a | {"rate": jax.nn.sigmoid(a["a_raw"])}
    o, own, state = rwkv7.time_mix(*(raw[name] for name in names), rows, a["h0"])
    return {"o": o + own, "ht": state}


KINDS = {
    "based": based_attention,
    "feature_map": linear_attention,
    "gated_delta_net2": erase,
    "rwkv6": wkv6,
    "rwkv7": time_mix7,
    "gated_delta_product": gated_delta_product,
    "lightning": lightning_attention,
    "log_linear": log_linear_attention,
    "mamba2": ssd,
    "mamba": selective_scan,
    "mlstm": mlstm_cell,
    "rglru": rg_lru,
    "s4d": s4d_scan,
}


def load(case):
    """(inputs, outputs, cotangents, gradients, rows, meta): inputs that are not there are zero states."""
    a = dict(np.load(GOLDEN / f"{case}.npz"))
    meta = json.loads(str(a.pop("meta"))) | {"case": Path(case).name}
    outputs = meta.get("outputs", ["o", "ht"])
    gradients = {name.removeprefix("grad_"): a.pop(name) for name in list(a) if name.startswith("grad_")}
    cotangents = {name: a.pop(f"d{name}") for name in outputs}
    expected = {name: a.pop(name) for name in outputs}
    bounds = a.pop("cu_seqlens", None)
    inputs = {name: jnp.asarray(value) for name, value in a.items() if f"d{name}" in a or name in gradients}
    gradients |= {name: a[f"d{name}"] for name in inputs if f"d{name}" in a}
    first = next(iter(inputs.values()))
    rows = single_document(*first.shape[:2])
    if "h0" in inputs:
        rows = rows._replace(positions=rows.positions + 1)  # the state's document goes on
    if bounds is not None:
        meta["ends"] = [int(end) - 1 for end in bounds[1:]]
        positions = np.concatenate([np.arange(n) for n in np.diff(bounds)])[None]
        ids = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))[None] + 1
        rows = Rows(jnp.asarray(ids), jnp.asarray(positions))
    return inputs, expected, cotangents, gradients, rows, meta


def close(actual, expected, tolerance, what):
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error <= tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, monkeypatch):
    for module in (recurrent_mixer, s4d):
        monkeypatch.setattr(module, "PIECE", 31)  # several pieces, the last one short
    inputs, expected, cotangents, gradients, rows, meta = load(case)
    kind = KINDS[case.partition("/")[0]]

    @jax.jit
    def run(inputs):
        outputs, pull = jax.vjp(lambda inputs: kind(inputs, rows, meta), inputs)
        return outputs, pull({name: jnp.asarray(cotangents[name], jnp.float32) for name in outputs})[0]

    outputs, got = run(inputs)
    tolerance = 2e-4 if "strong" in case else 1e-5
    for name, value in outputs.items():
        close(value, expected[name], tolerance, name)
    if len(outputs) == len(expected):
        for name, value in gradients.items():
            close(got[name], value, tolerance, f"gradient of {name}")


def test_delta_product_is_its_equations():
    """Without a decay, step by step in float64; heads of k, v and beta in order of the steps."""
    length, steps, heads, key, value = 5, 2, 2, 3, 4
    draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=(length, *shape))
    q, k, v = draw(0, heads, key), draw(1, steps, heads, key), draw(2, steps, heads, value)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 2 / (1 + np.exp(-draw(3, steps, heads)))
    S, o = np.zeros((heads, key, value)), []
    for t in range(length):
        for j in range(steps):
            error = v[t, j] - np.einsum("hkv,hk->hv", S, k[t, j])
            S = S + beta[t, j, :, None, None] * k[t, j, :, :, None] * error[:, None]
        o.append(np.einsum("hkv,hk->hv", S, q[t]) / np.sqrt(key))
    flat = lambda x: jnp.asarray(x.reshape(1, length, steps * heads, *x.shape[3:]), jnp.float32)
    inputs = Inputs(jnp.asarray(q[None], jnp.float32), flat(k), flat(v), None, flat(beta))
    rows, zeros = single_document(1, length), jnp.zeros((1, heads, key, value))
    run = jax.jit(lambda inputs: product(inputs, steps, rows, zeros, qk_l2norm=False))
    got, state = run(inputs)
    close(got[0], np.stack(o), 1e-5, "o")
    close(state[0], S, 1e-5, "state")


def test_lightning_slopes():
    for case in ("minimax_layer3of8", "fla_layer3of8"):
        g = np.load(GOLDEN / "lightning" / f"{case}.npz")["g"]
        slopes = lightning.slopes(
            "minimax" if "minimax" in case else "transnormer", g.shape[2], jnp.int32(3), 8
        )
        np.testing.assert_allclose(-slopes, g[0, 0], rtol=1e-6)


def test_the_selective_scan_keeps_no_states_of_a_row():
    """A gradient works in a fraction of the memory of one state a token."""
    batch, length, width, state = 1, 4096, 64, 64
    shapes = [(batch, length, width)] * 2 + [(width, state)] + [(batch, length, state)] * 2
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    rows, first = single_document(batch, length), jnp.zeros((batch, width, state))
    loss = lambda *args: jnp.sum(mamba.selective_scan(*args, rows, first)[0] ** 2)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.7 * 4 * length * width * state


def test_frequencies_of_s4d():
    """The paper's S4D-Lin is evenly spaced from 0, S4D-Inv falls from N (N - 1) / pi; N = 64."""
    lin, inv = (made(None, (2, 32), jnp.float32)[1] for made in (s4d.lin, s4d.inv))
    np.testing.assert_allclose(lin[jnp.array([0, 1, 31])], [0, 3.14159265, 97.3893723], rtol=1e-6)
    np.testing.assert_allclose(inv[jnp.array([0, 1, 31])], [1283.42546, 414.227265, 0.32336242], rtol=1e-5)
