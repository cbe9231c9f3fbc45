"""Parts of softmax attention, merged, against the whole; the ring of them is in test_context_mesh.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import H100, Device, explain
from pallas_kernels.attention_part import (
    Merged,
    attention_part,
    attention_part_gradients,
    cudnn,
    merge,
    reference,
    xla,
)
from pallas_kernels.attention_part.call import UNSEEN, PartCall

B, T, H, G, K, V = 2, 20, 4, 2, 8, 6


def arrays(*heads_and_dims, dtype=jnp.float32, length=T):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, length, *shape)), dtype) for shape in heads_and_dims]


def whole(q, k, v):
    """Of the second half of the queries: causal, their keys all before them too; by autodiff."""
    repeat = lambda x: jnp.repeat(x, H // G, axis=2)
    logits = 0.4 * jnp.einsum("bthk,bshk->bhts", q[:, T // 2 :], repeat(k))
    seen = jnp.arange(T) <= T // 2 + jnp.arange(T // 2)[:, None]
    seen &= (jnp.arange(T) >= 3) | (jnp.arange(B)[:, None, None] == 0)  # row 1's document begins at 3
    seen &= (jnp.arange(T // 2)[:, None] < 7) | (jnp.arange(B)[:, None, None] == 0)  # and ends
    p = jnp.where(seen[:, None], jnp.exp(logits), 0)
    p /= jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bhts,bshv->bthv", p, repeat(v))


def in_parts(q, k, v, do, backend):
    """The same of two blocks: (o, dq, dk, dv)."""
    half = T // 2
    own, before = (q[:, half:], k[:, half:], v[:, half:]), (q[:, half:], k[:, :half], v[:, :half])
    queries = jnp.asarray([half, 7])
    seen = (queries, None), (queries, jnp.asarray([half, half - 3]))
    parts = [
        attention_part(*x, *s, scale=0.4, backend=backend) for x, s in zip((own, before), seen, strict=True)
    ]
    o, log_sum = merge(*parts[0], *parts[1])
    merged = Merged(do, o, log_sum)
    (dq, dk, dv), (dq2, dk2, dv2) = (
        attention_part_gradients(*x, *s, merged, scale=0.4, backend=backend)
        for x, s in zip((own, before), seen, strict=True)
    )
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    return o, dq + dq2, join(dk2, dk), join(dv2, dv)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_merged_parts_are_the_whole(backend, monkeypatch):
    monkeypatch.setattr(xla, "MAX_BLOCK", 4)  # three blocks of queries, the last one padded
    q, k, v, do = arrays((H, K), (G, K), (G, V), (H, V))
    do = do[:, T // 2 :]
    o, pull = jax.vjp(whole, q, k, v)
    dq, dk, dv = pull(do)
    got = in_parts(q, k, v, do, backend)
    for one, exact in zip(got, (o, dq[:, T // 2 :], dk, dv), strict=True):
        np.testing.assert_allclose(one, exact, atol=2e-6)


def test_what_sees_nothing_adds_nothing():
    q, k, v = arrays((H, K), (G, K), (G, V))
    o, log_sum = attention_part(q, k, v, jnp.asarray([5, 0]), jnp.asarray([0, 4]), scale=1.0)
    assert not o.any() and (log_sum == UNSEEN).all()
    other = attention_part(q, k, v, jnp.asarray([T, T]), None, scale=1.0)
    for got, expected in zip(merge(o, log_sum, *other), other, strict=True):
        np.testing.assert_array_equal(got, expected)


def by_lengths(q, k, v, _, queries, keys, *rest, scale, mask_type, **options):
    """What cuDNN makes of lengths of queries and keys, forward or, with its operands, backward; what it does
    not say anything about comes out as nan."""
    end = lambda x, n: jnp.where(jnp.arange(x.shape[1])[:, None, None] < n[:, None, None, None], x, jnp.nan)
    causal = mask_type.name == "PADDING_CAUSAL"
    # A part whose last keys are all of them sees the first ones of keys that go backwards.
    seen = None if causal else keys
    turned = [x if causal else x[:, ::-1] for x in (k, v)]
    run = functools.partial(PartCall, q, *turned, queries, seen, scale)
    if len(rest) == 4:
        o, log_sum = reference.attention_part(run())
        return end(o, queries), jnp.where(jnp.arange(q.shape[1]) < queries[:, None, None], log_sum, jnp.nan)
    log_sum, o, do = rest[4:]
    dq, *dkv = reference.attention_part(run(Merged(do, o, log_sum)))
    return end(dq, queries), *(end(x if causal else x[:, ::-1], keys) for x in dkv)


def test_what_cudnn_is_told(monkeypatch):
    """Keys backwards, lengths, the merged sums; and nothing that it leaves undefined comes through."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

    class Told:
        bind = staticmethod(by_lengths)

    for way in ("fwd", "bwd"):
        monkeypatch.setattr(fused, f"_dot_product_attention_{way}_p_wrapper", Told)
    q, k, v, do = arrays((H, K), (G, K), (G, V), (H, V))
    for queries, keys in (([T, 7], None), ([T, 7], [5, T]), ([0, 9], [4, 2]), ([3, 3], [0, 1])):
        call = PartCall(q, k, v, jnp.asarray(queries), None if keys is None else jnp.asarray(keys), 0.4)
        o, log_sum = attention_part(q, k, v, call.queries, call.keys, scale=0.4, backend="reference")
        for one, exact in zip(cudnn.attention_part(call), (o, log_sum), strict=True):
            np.testing.assert_allclose(one, exact, atol=1e-6)
        merged = Merged(do, o, log_sum + 0.5)  # as if there were more keys elsewhere
        exact = attention_part_gradients(
            q, k, v, call.queries, call.keys, merged, scale=0.4, backend="reference"
        )
        for one, other in zip(
            cudnn.attention_part(dataclasses.replace(call, merged=merged)), exact, strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "dim", "device", "refusal"),
    [
        (jnp.bfloat16, 128, H100, None),
        (jnp.float32, 128, H100, "its arrays are float32"),
        (jnp.bfloat16, 272, H100, "head dims are 272"),
        (jnp.bfloat16, 64, Device("cpu"), "the platform is cpu"),
    ],
)
def test_who_computes_a_part(dtype, dim, device, refusal):
    x, n = jax.ShapeDtypeStruct((B, 256, H, dim), dtype), jax.ShapeDtypeStruct((B,), jnp.int32)
    [choice] = explain(attention_part, x, x, x, n, n, scale=0.1, device=device)
    assert choice.backend == ("xla" if refusal else "cudnn")
    assert not refusal or refusal in choice.refused[0][1]


@pytest.mark.parametrize("keys", [False, True])
def test_parts_reach_cudnn(keys, monkeypatch):
    """jax's functions for lengths and sums are not public and may move."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    x, n = jax.ShapeDtypeStruct((B, 256, H, 64), jnp.bfloat16), jax.ShapeDtypeStruct((B,), jnp.int32)

    def run(q, n):
        call = PartCall(q, q, q, n, n if keys else None, 0.125)
        o, log_sum = cudnn.attention_part(call)
        return cudnn.attention_part(dataclasses.replace(call, merged=Merged(o, o, log_sum)))

    text = jax.jit(run).trace(x, n).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    assert ["Backward" in line for line in calls] == [False, True]
    assert all(("PADDING_CAUSAL" in line) != keys and "PADDING" in line for line in calls)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "value_dim", "heads", "groups", "queries", "keys"),
    [
        (64, 64, 8, 2, (2048, 700, 1), None),
        (64, 64, 8, 8, (2048, 2048, 2048), (2048, 2048, 2048)),
        (128, 128, 4, 4, (2048, 700, 0), (5, 2048, 0)),
        (192, 128, 4, 4, (100, 2048, 9), (300, 1000, 2048)),
    ],
)
def test_parts_on_a_gpu(dim, value_dim, heads, groups, queries, keys):
    """o, its sums and the gradients in bf16 against float32."""
    rng = np.random.default_rng(0)
    shapes = ((heads, dim), (groups, dim), (groups, value_dim), (heads, value_dim))
    q, k, v, do = (jnp.asarray(rng.normal(size=(3, 2048, *shape)), jnp.bfloat16) for shape in shapes)
    lengths = jnp.asarray(queries), None if keys is None else jnp.asarray(keys)

    def both(path, q, k, v, do):
        call = PartCall(q, k, v, *lengths, dim**-0.5)
        o, log_sum = path(call)
        return (
            o,
            jnp.where(log_sum == UNSEEN, 0, log_sum),
            *path(dataclasses.replace(call, merged=Merged(do, o, log_sum + 0.1))),
        )

    got = jax.jit(functools.partial(both, cudnn.attention_part))(q, k, v, do)
    exact = jax.jit(functools.partial(both, xla.attention_part))(
        *(x.astype(jnp.float32) for x in (q, k, v, do))
    )
    for one, other in zip(got, exact, strict=True):
        assert jnp.linalg.norm((one - other).ravel()) < 5e-3 * jnp.linalg.norm(other.ravel())


@pytest.mark.parametrize("backend", [reference, xla])
def test_the_first_keys(backend):
    """`leading`: all of the first so many keys, as the last of the keys turned round."""
    q, k, v = arrays((H, K), (G, K), (G, V))
    queries, keys = jnp.asarray([T, 5]), jnp.asarray([7, 0])
    o, log_sum = backend.attention_part(PartCall(q, k, v, queries, keys, 0.4, leading=True))
    expected = backend.attention_part(PartCall(q, k[:, ::-1], v[:, ::-1], queries, keys, 0.4))
    np.testing.assert_allclose(o, expected[0], atol=1e-6)
    np.testing.assert_allclose(log_sum, expected[1], atol=1e-6)
    logits = 0.4 * jnp.einsum("thk,shk->hts", q[0], jnp.repeat(k[0, :7], H // G, axis=1))
    np.testing.assert_allclose(log_sum[0], jax.nn.logsumexp(logits, axis=-1), atol=1e-5)
    assert np.all(log_sum[1] == UNSEEN) and np.all(o[1] == 0)
