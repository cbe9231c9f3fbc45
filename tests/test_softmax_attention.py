"""Softmax attention against a naive float64 softmax: reference, blockwise and what cuDNN gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Device, explain, softmax_attention
from pallas_kernels.dispatch import H100
from pallas_kernels.softmax_attention import cudnn, xla
from pallas_kernels.softmax_attention.call import AttentionCall

POSITIONS = np.stack([np.r_[np.arange(5), np.arange(1), np.arange(17)], np.r_[np.arange(3), np.arange(20)]])


def naive(q, k, v, positions, scale, window, sinks=None, log_forget=None):
    """Token by token: which keys are of the same document, not later and in the window."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    document = np.cumsum(positions == 0, axis=1)
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t in np.ndindex(*q.shape[:2]):
        seen = [
            s for s in range(t + 1) if document[b, s] == document[b, t] and (not window or t - s < window)
        ]
        scores = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) * scale
        if log_forget is not None:  # gates after the key's own, the query's included
            scores += np.stack([log_forget[b, s + 1 : t + 1].sum(0) for s in seen], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks[:, None] - scores.max(-1, keepdims=True))
        o[b, t] = np.einsum("hs,shv->hv", weights / total, v[b, seen])
    return o


def make_arrays():
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 23, 6, 4), "k": (2, 23, 2, 4), "v": (2, 23, 2, 3)}
    return [np.float32(rng.normal(size=shape)) for shape in shapes.values()]


def starts(positions=POSITIONS):
    return jnp.asarray((positions == 0) & (np.arange(positions.shape[1]) > 0))


@pytest.mark.parametrize("path", ["reference", "xla", "blocks of 8", "codes"])
@pytest.mark.parametrize("window", [0, 6])
def test_against_naive_softmax(path, window, monkeypatch):
    arrays = make_arrays()
    monkeypatch.setattr(xla, "MAX_BLOCK", 8 if path == "blocks of 8" else 1024)
    ids = np.cumsum(POSITIONS == 0, axis=1)
    backend = "reference" if path == "reference" else "xla"

    @jax.jit
    def run(q, k, v):
        if path == "codes":  # the rewriting for cuDNN, in XLA's arithmetic
            return cudnn.coded(AttentionCall(q, k, v, starts(), 0.4, window), "xla")
        return softmax_attention(q, k, v, segment_ids=ids, scale=0.4, window=window, backend=backend)

    # The document codes add up to 1000 to the scores, which costs their last digits.
    tolerance = 1e-3 if path == "codes" else 2e-6
    expected = naive(*arrays, POSITIONS, 0.4, window)
    np.testing.assert_allclose(run(*arrays), expected, atol=tolerance)
    rng = np.random.default_rng(1)
    do = rng.normal(size=expected.shape)
    grads = jax.jit(jax.grad(lambda *a: (run(*a) * np.float32(do)).sum(), (0, 1, 2)))(*arrays)
    directions = [rng.normal(size=x.shape) for x in arrays]

    def along(n, step):  # the naive loss, its nth input moved
        moved = [
            x + step * d if m == n else x for m, (x, d) in enumerate(zip(arrays, directions, strict=True))
        ]
        return (naive(*moved, POSITIONS, 0.4, window) * do).sum()

    for n, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        slope = (along(n, 1e-5) - along(n, -1e-5)) / 2e-5
        np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-4, atol=5 * tolerance)


@pytest.mark.parametrize("window, everything", [(0, None), (6, -np.inf), (0, -1e38)])
def test_sinks_and_forget_gates(window, everything, monkeypatch):
    """Values in float32 and float64 and, along a direction, every gradient; some gates forget all."""
    monkeypatch.setattr(xla, "MAX_BLOCK", 8)
    rng = np.random.default_rng(3)
    arrays = [*make_arrays(), np.float32(rng.normal(size=6)), np.float32(-rng.exponential(size=(2, 23, 6)))]
    if everything is not None:
        arrays[4][rng.uniform(size=(2, 23, 6)) < 0.2] = everything
    ids = np.cumsum(POSITIONS == 0, axis=1)

    def run(q, k, v, sinks, log_forget, backend="xla"):
        options = {"segment_ids": ids, "scale": 0.4, "window": window, "backend": backend}
        return softmax_attention(q, k, v, sinks=sinks, log_forget=log_forget, **options)

    slow = lambda *arrays: naive(*arrays[:3], POSITIONS, 0.4, window, *arrays[3:])
    wide = [np.float64(x) for x in arrays]
    expected = slow(*wide)
    np.testing.assert_allclose(jax.jit(run)(*arrays), expected, atol=3e-6)
    with jax.enable_x64(True):
        exact = run(*wide, backend="reference")
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-14)
    do = rng.normal(size=expected.shape)
    grads = jax.jit(jax.grad(lambda *a: (run(*a) * np.float32(do)).sum(), range(5)))(*arrays)
    for n, grad in enumerate(grads):
        step = rng.normal(size=grad.shape)
        moved = [slow(*(x + e * step if m == n else x for m, x in enumerate(wide))) for e in (1e-5, -1e-5)]
        slope = ((moved[0] - moved[1]) * do).sum() / 2e-5
        np.testing.assert_allclose((np.asarray(grad) * step).sum(), slope, rtol=1e-4, atol=1e-5)
    call = AttentionCall(*map(jnp.bfloat16, arrays[:3]), None, 0.4, window, jnp.zeros(6))
    assert cudnn.supports(call) == "it has sinks"


def test_without_documents_and_in_float64():
    q, k, v = make_arrays()
    expected = naive(q, k, v, np.broadcast_to(np.arange(23), (2, 23)), 0.5, 0)
    for backend in ("reference", "xla"):
        np.testing.assert_allclose(softmax_attention(q, k, v, backend=backend), expected, atol=2e-6)
    whole = cudnn.fused(AttentionCall(*map(jnp.asarray, (q, k, v)), None, 0.5), "xla")
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    with jax.enable_x64(True):
        exact = softmax_attention(*(np.float64(x) for x in (q, k, v)), backend="reference")
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-14)


def test_later_tokens_and_other_documents_do_not_move_a_bit():
    q, k, v = (jnp.asarray(x) for x in make_arrays())
    ids = np.cumsum(POSITIONS == 0, axis=1)
    run = jax.jit(lambda q, k, v: softmax_attention(q, k, v, segment_ids=ids, backend="xla"))
    o = run(q, k, v)
    np.testing.assert_array_equal(run(*(x.at[:, 14:].set(9.0) for x in (q, k, v)))[:, :14], o[:, :14])
    np.testing.assert_array_equal(run(*(x.at[:, :3].set(9.0) for x in (q, k, v)))[:, 6:], o[:, 6:])


def test_long_rows_never_hold_all_scores():
    shape = jax.ShapeDtypeStruct((1, 32768, 2, 16), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 32768), jnp.int32)

    def loss(q, k, v, ids):
        return softmax_attention(q, k, v, segment_ids=ids, backend="xla").astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32768**2 * 4 / 16  # of one head's T x T float32


def structs(dim=64, value_dim=None, dtype=jnp.bfloat16, length=4096):
    shape = (2, length, 4)
    q = jax.ShapeDtypeStruct((*shape, dim), dtype)
    return q, q, jax.ShapeDtypeStruct((*shape, value_dim or dim), dtype)


@pytest.mark.parametrize(
    ("options", "documents", "device", "refusal"),
    [
        (dict(), True, H100, None),
        (dict(dim=128), True, H100, None),
        (dict(dim=240), True, H100, None),
        (dict(dim=256), False, H100, None),
        (dict(dim=256), True, H100, None),
        (dict(dim=20), False, H100, "head dims are 20 and 20 (at most 256, multiples of 8"),
        (dict(dim=272), True, H100, "head dims are 272 and 272 (at most 256"),
        (dict(dim=128), True, Device("gpu", "8.0"), "at most 128"),
        (dict(dim=64), True, Device("gpu", "10.3"), None),
        (dict(dim=64), True, Device("gpu", "7.5"), "compute capability 7.5"),
        (dict(dim=64, value_dim=128), True, H100, "values no wider"),
        (dict(dtype=jnp.float32), True, H100, "its arrays are float32"),
        (dict(), True, Device("cpu"), "the platform is cpu"),
    ],
)
def test_who_computes_a_call(options, documents, device, refusal):
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32) if documents else None
    [choice] = explain(softmax_attention, *structs(**options), segment_ids=ids, device=device)
    assert choice.backend == ("xla" if refusal else "cudnn")
    assert not refusal or refusal in choice.refused[0][1]


def test_what_packed_sequences_are():
    """Offsets and lengths say, document by document, which tokens see each other."""
    places, lengths = cudnn.sequences(starts(), 4)
    assert (places.dtype, lengths.dtype) == (jnp.int32, jnp.int32)
    np.testing.assert_array_equal(places, [[0, 5, 6, -1, -1], [0, 3, -1, -1, -1]])
    np.testing.assert_array_equal(lengths, [[5, 1, 17, -1], [3, 20, -1, -1]])
    one = cudnn.sequences(jnp.zeros((1, 9), bool), 2)
    np.testing.assert_array_equal(one[0], [[0, -1, -1]])
    np.testing.assert_array_equal(one[1], [[9, -1]])


def packed_by_numpy(call):
    """What cuDNN makes of offsets and lengths: each document alone."""

    def run(q, k, v, places, lengths):
        arrays = [np.asarray(x) for x in (q, k, v)]
        o = np.zeros((*q.shape[:3], v.shape[-1]), np.float32)
        for b, n in np.ndindex(lengths.shape):
            if lengths[b, n] > 0:
                at = slice(places[b, n], places[b, n] + lengths[b, n])
                alone = (x[b : b + 1, at] for x in arrays)
                o[b, at] = naive(*alone, np.arange(lengths[b, n])[None], call.scale, call.window)[0]
        return o

    shape = jax.ShapeDtypeStruct((*call.q.shape[:3], call.v.shape[-1]), call.v.dtype)
    found = cudnn.sequences(call.starts, cudnn.DOCUMENTS)
    return jax.pure_callback(run, shape, call.q, call.k, call.v, *found)


@pytest.mark.parametrize(
    ("most", "there", "way"), [(3, True, "packed"), (2, True, "coded"), (3, False, "fused")]
)
def test_the_data_choose_how_cudnn_learns_of_documents(most, there, way, monkeypatch):
    """Rows of at most `DOCUMENTS` documents, of more, and of one; in one compiled program."""
    taken = []
    ways = {"packed": packed_by_numpy}
    ways |= {
        name: functools.partial(getattr(cudnn, name), implementation="xla") for name in ("fused", "coded")
    }
    for name, compute in ways.items():

        def told(call, *_, name=name, compute=compute):
            jax.debug.callback(lambda: taken.append(name))
            return compute(call)

        monkeypatch.setattr(cudnn, name, told)
    monkeypatch.setattr(cudnn, "DOCUMENTS", most)
    arrays = make_arrays()
    here = starts() & there

    @jax.jit
    def run(q, k, v, here):
        return cudnn.softmax_attention(AttentionCall(q, k, v, here, 0.4, 6))

    got = run(*arrays, here)
    jax.effects_barrier()
    positions = POSITIONS if there else np.broadcast_to(np.arange(23), (2, 23))
    # The document codes add up to 1000 to the scores, which costs their last digits.
    np.testing.assert_allclose(got, naive(*arrays, positions, 0.4, 6), atol=1e-3 if way == "coded" else 2e-6)
    assert taken[0] == way and set(taken[1:]) <= {"fused"}  # which `coded` is made of


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "value_dim", "heads", "groups", "window", "mean"),
    [
        (64, 64, 8, 8, 0, 300),
        (64, 64, 8, 2, 128, 300),
        (64, 64, 8, 8, 0, 40),
        (64, 64, 8, 2, 256, 1e9),
        (192, 128, 4, 4, 0, 300),
        (256, 256, 2, 1, 0, 20),
    ],
)
def test_every_way_of_cudnn_on_a_gpu(dim, value_dim, heads, groups, window, mean):
    """o and its gradients in bf16, of rows of a few documents, many and one, against float32."""
    rng = np.random.default_rng(0)
    shapes = ((heads, dim), (groups, dim), (groups, value_dim), (heads, value_dim))
    arrays = [jnp.asarray(rng.normal(size=(3, 2048, *shape)), jnp.bfloat16) for shape in shapes]
    here = jnp.asarray((rng.random((3, 2048)) < 1 / mean) & (np.arange(2048) > 0))

    def both(path, q, k, v, do):
        o, pull = jax.vjp(lambda *qkv: path(AttentionCall(*qkv, here, dim**-0.5, window)), q, k, v)
        return o, *pull(do.astype(o.dtype))

    got = jax.jit(functools.partial(both, cudnn.softmax_attention))(*arrays)
    want = jax.jit(functools.partial(both, xla.softmax_attention))(*(x.astype(jnp.float32) for x in arrays))
    for one, exact in zip(got, want, strict=True):
        assert jnp.linalg.norm((one - exact).ravel()) < 5e-3 * jnp.linalg.norm(exact.ravel())


def test_packed_documents_reach_cudnn(monkeypatch):
    """What cuDNN is asked for, forward and backward; jax's function for it is not public and may move."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    q, k, v = structs(length=256)

    def run(q, k, v, starts):
        call = AttentionCall(q, k, v, starts, 0.125, 7)
        return jax.vjp(lambda q: cudnn.packed(AttentionCall(q, k, v, starts, 0.125, 7), 3), q)[1](call.q)

    traced = jax.jit(run).trace(q, k, v, jax.ShapeDtypeStruct((2, 256), bool))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    assert ["Backward" in line for line in calls] == [False, True]
    for line in calls:
        for setting in ("PADDING_CAUSAL", "sliding_window_length\\22: 7", "max_seg_per_batch\\22: 3"):
            assert setting in line


GOOD = dict(q=jnp.zeros((2, 5, 4, 8)), k=jnp.zeros((2, 5, 2, 8)), v=jnp.zeros((2, 5, 2, 6)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", dict(q=jnp.zeros((2, 5, 4)))),
        ("q", dict(q=jnp.zeros((2, 5, 3, 8)))),
        ("k", dict(k=jnp.zeros((2, 5, 2, 7)))),
        ("v", dict(v=jnp.zeros((2, 4, 2, 6)))),
        ("v", dict(v=jnp.zeros((2, 5, 2, 6), jnp.int32))),
        ("segment_ids", dict(segment_ids=jnp.zeros((5,), jnp.int32))),
        ("window", dict(window=-1)),
        ("window", dict(window=1.5)),
        ("window", dict(window=True)),
        ("scale", dict(scale="half")),
        ("sinks", dict(sinks=jnp.zeros(3))),
        ("log_forget", dict(log_forget=jnp.zeros((2, 5)))),
        ("backend", dict(backend="fast")),
        ("backend", dict(backend="cudnn")),
    ],
)
def test_bad_arguments_are_named(name, change):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        softmax_attention(**GOOD | change)


def test_empty_calls():
    assert softmax_attention(*(x[:0] for x in GOOD.values())).shape == (0, 5, 4, 6)
    assert softmax_attention(*(x[:, :0] for x in GOOD.values())).shape == (2, 0, 4, 6)
