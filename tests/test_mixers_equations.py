"""Whole layers against their papers' equations, token by token in float64, where no public layer was kept."""

import jax
import numpy as np
import pytest
from flax import nnx
from test_layers import close
from test_mixers import SITE, build, context, inputs, random_like, sigmoid

from hybridlm import mixers
from hybridlm.rows import single_document

LENGTH = 9


def silu(x):
    return x * sigmoid(x)


def rms(o, scale):
    return o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * scale


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def before(x):
    return np.concatenate([0 * x[:1], x[:-1]])


def conv(x, kernel):
    """Causal, depthwise, SiLU."""
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return silu(sum(padded[i : i + len(x)] * kernel[i] for i in range(len(kernel))))


def gate(x, A_log, dt_bias):
    return -np.exp(A_log) * np.log1p(np.exp(x + dt_bias))


def comba(x, p, w):
    heads = lambda x, n: x.reshape(LENGTH, n, -1)
    q, k, v = (conv(p(f"{c}_proj"), w[f"{c}_conv", "kernel"]) for c in "qkv")
    q, k, v = heads(q, 2), heads(k, 2), heads(v, 4)
    fed = k * sigmoid(w["decay",])[:, None]
    q, k, fed = (np.repeat(unit(y), 2, axis=1) for y in (q - w["D",][:, None] * fed, k, fed))
    a, beta = np.exp(gate(p("a_proj"), w["A_log",], w["dt_bias",])), sigmoid(p("b_proj"))
    S, o = np.zeros((4, 6, 5)), []
    for t in range(LENGTH):
        error = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, fed[t]))
        S = a[t][:, None, None] * S + k[t][..., None] * error[:, None]
        o.append(np.einsum("hkv,hk->hv", S, q[t]) / np.sqrt(6))
    z = sigmoid(heads(p("g_proj"), 4))
    return (rms(np.stack(o), w["o_norm", "scale"]) * z).reshape(LENGTH, -1) @ w["o_proj", "kernel"]


def gated_delta_net2(x, p, w):
    heads = lambda x, n: x.reshape(LENGTH, n, -1)
    q, k, v = (conv(p(f"{c}_proj"), w[f"{c}_conv", "kernel"]) for c in "qkv")
    q, k, v = unit(heads(q, 1)), unit(heads(k, 1)), heads(v, 2) * sigmoid(heads(p("w_proj"), 2))
    f = heads(p("f_a_proj") @ w["f_b_proj", "kernel"], 1)
    a, e = np.exp(gate(f, w["A_log",][:, None], w["dt_bias",])), 2 * sigmoid(heads(p("b_proj"), 1))
    S, o = np.zeros((2, 6, 6)), []
    for t in range(LENGTH):
        S = a[t][..., None] * S
        S = S + k[t][..., None] * (v[t] - np.einsum("hkv,hk->hv", S, np.repeat(e[t] * k[t], 2, 0)))[:, None]
        o.append(np.einsum("hkv,hk->hv", S, np.repeat(q[t], 2, 0)) / np.sqrt(6))
    z = sigmoid(heads(p("g_a_proj") @ w["g_b_proj", "kernel"] + w["g_b_proj", "bias"], 2))
    return (rms(np.stack(o), w["o_norm", "scale"]) * z).reshape(LENGTH, -1) @ w["o_proj", "kernel"]


def rwkv6(x, p, w):
    heads, xx = lambda x: x.reshape(LENGTH, 2, -1), before(x) - x
    low = np.tanh((x + xx * w["mix_x",]) @ w["mix_A",]).reshape(LENGTH, 5, -1)
    xs = {c: x + xx * (w[f"mix_{c}",] + low[:, i] @ w["mix_B",][i]) for i, c in enumerate("wkvrg")}
    r, k, v = (heads(xs[c] @ w[f"{c}_proj", "kernel"]) for c in "rkv")
    decay = w["w_proj", "bias"] + np.tanh(xs["w"] @ w["w_proj", "A"]) @ w["w_proj", "B"]
    a, u, S, o = np.exp(-np.exp(heads(decay))), w["u",].reshape(2, 6), np.zeros((2, 6, v.shape[-1])), []
    for t in range(LENGTH):
        kv = k[t][..., None] * v[t][:, None]
        o.append(np.einsum("hk,hkv->hv", r[t], S + u[..., None] * kv))
        S = a[t][..., None] * S + kv
    o = np.stack(o)
    o -= o.mean(-1, keepdims=True)
    o = (o / np.sqrt((o**2).mean(-1, keepdims=True) + 64e-5)).reshape(LENGTH, -1)
    o = o * w["o_norm", "scale"] + w["o_norm", "bias"]
    return o * silu(xs["g"] @ w["g_proj", "kernel"]) @ w["o_proj", "kernel"]


def gdn(x, w, own, common):
    """Gated DeltaNet's recurrence over tokens x; own projections and those that memories have in common."""
    p = lambda name: x @ w[(common if name == "q_proj" else own) + (name, "kernel")]
    q, k, v = (conv(p(f"{c}_proj"), w[(*common, f"{c}_conv", "kernel")]) for c in "qkv")
    q, k, v = (y.reshape(len(x), heads, -1) for y, heads in ((q, 2), (k, 2), (v, 4)))
    q, k = (np.repeat(unit(y), 2, axis=1) for y in (q, k))
    a = np.exp(gate(p("a_proj"), w[(*common, "A_log")], w[(*common, "dt_bias")]))
    beta, S, o = sigmoid(p("b_proj")), np.zeros((4, 8, v.shape[-1])), []
    for t in range(len(x)):
        S = a[t][:, None, None] * S
        error = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", S, k[t]))
        S = S + k[t][..., None] * error[:, None]
        o.append(np.einsum("hkv,hk->hv", S, q[t]) / np.sqrt(8))
    return np.stack(o)


def mom(x, p, w):
    inner = ("inner",)
    p = softmax(x @ w["router", "kernel"])
    chosen = np.argsort(-p, axis=1)[:, :2]
    assert len({tuple(sorted(row)) for row in chosen}) > 1  # not all tokens go the same way
    total = gdn(x, w, inner, inner)
    for m in range(3):
        own = np.flatnonzero((chosen == m).any(1))
        share = p[own, m] / np.take_along_axis(p[own], chosen[own], 1).sum(1)
        total[own] += share[:, None, None] * gdn(x[own], w, ("memories", m), inner)
    z = silu(x @ w["inner", "g_proj", "kernel"]).reshape(total.shape)
    o = rms(total, w["inner", "o_norm", "scale"]) * z
    return o.reshape(LENGTH, -1) @ w["inner", "o_proj", "kernel"]


def sse(x, p, w):
    def prepared(side):
        low = lambda c: x @ w[side, f"{c}_proj", "down", "kernel"] @ w[side, f"{c}_proj", "up", "kernel"]
        q, k = ((p(("inner", f"{c}_proj")) + (low(c) if side == "sparse" else 0)) for c in "qk")
        q, k = (
            conv(y, w[side, f"{c}_conv", "kernel"]).reshape(LENGTH, 2, -1) for y, c in ((q, "q"), (k, "k"))
        )
        f = p((side, "f_a_proj")) @ w[side, "f_b_proj", "kernel"] + w[side, "f_b_proj", "bias"]
        return q, k, sigmoid(f).reshape(k.shape) ** 0.5

    p = lambda name: x @ w[(*name, "kernel")]
    v = conv(p(("inner", "v_proj")), w["inner", "v_conv", "kernel"]).reshape(LENGTH, 2, -1)
    e = softmax(p(("router",)))
    chosen = np.argsort(-e, axis=1)[:, :2]
    (q0, k0, a0), (q, k, a) = prepared("inner"), prepared("sparse")
    least = np.sort(k, axis=-1)[..., -4:-3]
    a = np.where(k >= least, a, 1)
    k = np.where(k >= least, np.exp(k), 0)
    k /= k.sum(-1, keepdims=True)
    S, o = np.zeros((4, 2, k.shape[-1], v.shape[-1])), np.zeros(v.shape)
    for t in range(LENGTH):
        S[3] = a0[t][..., None] * S[3] + k0[t][..., None] * v[t][:, None]
        o[t] = np.einsum("hkv,hk->hv", S[3], q0[t])
        for i in chosen[t]:
            S[i] = a[t][..., None] * S[i] + e[t, i] * k[t][..., None] * v[t][:, None]
            o[t] += e[t, i] * np.einsum("hkv,hk->hv", S[i], q[t])
    z = silu(p(("inner", "g_proj"))).reshape(v.shape)
    o = rms(o / np.sqrt(k.shape[-1]), w["inner", "o_norm", "scale"]) * z
    return o.reshape(LENGTH, -1) @ w["inner", "o_proj", "kernel"]


@pytest.mark.parametrize(
    "layer", [comba, gated_delta_net2, rwkv6, mom, sse], ids=lambda layer: layer.__name__
)
def test_layer_is_its_equations(layer):
    graph, state, *_ = build(layer.__name__)
    w = {path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(state)}
    x = np.asarray(inputs(1, LENGTH), np.float64)[0]
    y = layer(x, lambda name: x @ w[name, "kernel"], w)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, context(single_document(1, LENGTH)))[0])
    close(run(state, inputs(1, LENGTH))[0], y, 1e-5)


relu = lambda x: np.maximum(x, 0)
both = lambda x: np.concatenate([x, -x], axis=-1)
softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
turn = np.pi / 2 / 12 * np.arange(LENGTH)[:, None, None]


def nalaformer(x, side):
    if side == "k":
        return relu(both(x)) ** 3
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    return relu(both(x / size)) ** (3 * (0.5 + np.tanh(size)))


# name: f(x, first matrix and bias, second ones, side)
MAPS = {
    "elu": lambda x, one, two, side: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x, one, two, side: relu(x),
    "identity": lambda x, one, two, side: x,
    "t2r": lambda x, one, two, side: relu(one(x)),
    "hedgehog": lambda x, one, two, side: softmax(both(2 * one(x))),
    "elementwise_product": lambda x, one, two, side: one(x) * two(x),
    "dpfp": lambda x, one, two, side: np.concatenate(
        [relu(both(x)) * np.roll(relu(both(x)), shift, -1) for shift in (1, 2)], axis=-1
    ),
    "cosformer": lambda x, one, two, side: np.concatenate(
        [relu(x) * np.cos(turn), relu(x) * np.sin(turn)], axis=-1
    ),
    "nalaformer": lambda x, one, two, side: nalaformer(x, side),
    "taylor": None,
}


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_are_their_equations(name):
    """As weights of all earlier tokens, with the normaliser where it cannot vanish."""
    mixer = mixers.load("feature_map")
    mala, plain = name == "elu", name in ("identity", "elementwise_product")
    config = mixer.config_class(
        num_heads=2, head_dim=4, feature_map=name, normalizer="mala" if mala else "none" if plain else "sum",
        output_norm=False, dpfp_nu=2, max_length=12,
    )  # fmt: skip
    made = nnx.eval_shape(lambda: mixer(config, SITE, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(made)
    state = random_like(state, 6)
    w = {path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(state)}
    x = np.asarray(inputs(1, LENGTH), np.float64)[0]
    q, k, v = ((x @ w[f"{c}_proj", "kernel"]).reshape(LENGTH, 2, 4) for c in "qkv")
    if name == "taylor":
        weights = np.einsum("thk,shk->hts", q, k) / 2
        weights = 1 + weights + weights**2 / 2
    else:

        def mapped(x, side):
            layer = lambda at: (
                lambda x: x @ w[f"{side}_maps", at, "kernel"] + w.get((f"{side}_maps", at, "bias"), 0)
            )
            return MAPS[name](x, layer(0), layer(1), side)

        weights = np.einsum("thk,shk->hts", mapped(q, "q"), mapped(k, "k")) / 2
    weights *= np.tril(np.ones((LENGTH, LENGTH)))
    Z = weights.sum(-1, keepdims=True)
    if mala:
        weights = (1 + 1 / Z) * weights - Z / (np.arange(LENGTH) + 1)[:, None] * (weights != 0)
    elif not plain:
        weights = weights / (Z + 1e-10)
    y = np.einsum("hts,shv->thv", weights, v).reshape(LENGTH, -1) @ w["o_proj", "kernel"]
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, context(single_document(1, LENGTH)))[0])
    close(run(state, inputs(1, LENGTH))[0], y, 2e-5)
