"""`model.remat=attention`: softmax attention runs forward once a layer, whatever way it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from hybridlm import remat
from hybridlm.ring_attention import ring_attention
from hybridlm.rows import Rows
from hybridlm.softmax_attention import attend
from pallas_kernels.attention_part import attention_part
from pallas_kernels.dispatch import H100, auto_means, compiled_for
from pallas_kernels.softmax_attention import softmax_attention

B, T, H = 2, 256, 2
AXES = ("data", "fsdp", "context", "tensor")


def count(jaxpr, name):
    """How often a jaxpr names a primitive, in whatever it calls too."""

    def inside(value):
        if isinstance(value, (tuple, list)):
            return sum(map(inside, value))
        value = getattr(value, "jaxpr", value)
        return count(value, name) if hasattr(value, "eqns") else 0

    here = sum(one.primitive.name == name for one in jaxpr.eqns)
    return here + sum(inside(value) for one in jaxpr.eqns for value in one.params.values())


def traced(policy, axis, dims, options):
    """The jaxpr of the gradient of two layers of attention in a scan, of heads of these dims of q and v."""
    dim, value_dim = dims
    x, ids = jax.ShapeDtypeStruct((B, T, 64), jnp.bfloat16), jax.ShapeDtypeStruct((B, T), jnp.int32)
    weights = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, H * dim), (64, H * value_dim))]

    def layer(x, qk, ov, ids):
        q, v = ((x @ w).reshape(B, T, H, -1) for w in (qk, ov))
        return attend(q, q, v, Rows(ids, ids), scale=0.125, **options).reshape(B, T, -1) @ ov.T

    run = layer if policy == "none" else jax.checkpoint(layer, policy=remat.POLICIES[policy])

    def loss(x, qk, ov, ids):
        return (
            jax.lax.scan(lambda x, _: (run(x, qk, ov, ids), None), x, length=2)[0].astype(jnp.float32).sum()
        )

    mesh = AbstractMesh(tuple(2 if a == axis else 1 for a in AXES), AXES, (AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh), compiled_for(H100):
        return jax.jit(jax.grad(loss, (1, 2))).trace(x, *weights, ids).jaxpr.jaxpr


@pytest.fixture
def cudnn(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)


# Whole rows have three ways behind a switch: fused, packed, coded, the last of which keeps nothing by itself.
# A ring of two has five parts; documents inside a block, in the same three ways, are computed again.
@pytest.mark.parametrize(
    ("axis", "dims", "options", "once", "again"),
    [
        ("fsdp", (64, 64), {}, 3, 3 + 1),
        ("fsdp", (192, 128), {}, 3, 3 + 1),
        ("context", (64, 64), {"window": 16}, 3, 3 + 1),
        ("context", (192, 128), {}, 5 + 3 + (3 + 1), 5 + 3),
    ],
    ids=["rows", "latent heads", "windows of pieces", "ring"],
)
@pytest.mark.usefixtures("cudnn")
def test_cudnn_runs_forward_once(axis, dims, options, once, again):
    found = {}
    for policy in ("attention", "mixer", "dots", "kernels", "full"):
        jaxpr = traced(policy, axis, dims, options)
        forward, backward = (count(jaxpr, f"dot_product_attention_{way}_wrapper") for way in ("fwd", "bwd"))
        assert backward == (5 + 3 if once > 3 else 3)
        found[policy] = forward
    assert found == dict.fromkeys(("attention", "mixer", "dots", "kernels"), once) | {"full": once + again}


@pytest.mark.parametrize(("axis", "window"), [("fsdp", 0), ("context", 0), ("context", 16)])
def test_blockwise_attention_runs_forward_once(axis, window):
    """Its backward pass computes each block of weights again, as it does where everything is kept."""
    with auto_means("xla"):
        found = {
            p: count(traced(p, axis, (64, 32), {"window": window}), "exp")
            for p in ("none", "attention", "full")
        }
    assert found["attention"] == found["none"] < found["full"]


@pytest.mark.usefixtures("cudnn")
def test_what_is_kept_of_a_ring():
    """Beside the layer's input its output and log-sums, once: not of parts, nor of documents inside."""
    first = next(
        one for one in traced("attention", "context", (192, 128), {}).eqns if one.primitive.name == "scan"
    )
    kept = sorted((x.aval.size, str(x.aval.dtype)) for x in first.outvars[1:])
    assert kept == [
        (2 * B * H * T, "float32"),
        (2 * B * T * 64, "bfloat16"),
        (2 * B * T * H * 128, "bfloat16"),
    ]


@pytest.mark.parametrize(
    ("documents", "pieces"), [("one", 4), ("over borders", 4), ("inside blocks", 4), ("over borders", 2)]
)
def test_a_ring_that_keeps_its_outputs(documents, pieces):
    """With sinks: results and gradients are those of whole rows on one device."""
    keys = jax.random.split(jax.random.key(0), 5)
    length = 64
    shapes = [(B, length, 4, 8), (B, length, 2, 8), (B, length, 2, 4)]
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    sinks, do = jax.random.normal(keys[3], (4,)), jax.random.normal(keys[4], (B, length, 4, 4))
    starts = {"one": [], "over borders": [5, 21, 45], "inside blocks": [9, 11, 14, 33, 34, 50]}[documents]
    ids = jnp.stack(
        [
            jnp.zeros(length, jnp.int32),
            jnp.zeros(length, jnp.int32).at[jnp.array(starts, int)].add(1).cumsum(),
        ]
    )

    def whole(q, k, v, sinks):
        return softmax_attention(q, k, v, segment_ids=ids, scale=0.3, sinks=sinks, backend="reference")

    def piece(q, k, v, ids, do):
        run = lambda *arrays: ring_attention(*arrays[:3], ids, arrays[3], scale=0.3, axis="context")
        o, back = jax.vjp(jax.checkpoint(run, policy=remat.POLICIES["attention"]), q, k, v, sinks)
        return o, *back(do)

    split = lambda x: jnp.moveaxis(x.reshape(B, pieces, length // pieces, *x.shape[2:]), 1, 0)
    found = jax.jit(jax.vmap(piece, axis_name="context"))(*map(split, (q, k, v, ids, do)))
    o, back = jax.vjp(whole, q, k, v, sinks)
    *arrays, d_sinks = o, *back(do)
    for one, exact in zip(found, arrays, strict=False):
        np.testing.assert_allclose(one, split(exact), atol=2e-5)
    np.testing.assert_allclose(found[-1].sum(0), d_sinks, atol=2e-5)


def test_a_part_is_not_differentiated():
    q = jnp.ones((1, 4, 1, 8))
    run = lambda q: attention_part(q, q, q, jnp.array([4]), None, scale=1.0)[0].sum()
    with pytest.raises(TypeError, match="attention_part_gradients"):
        jax.grad(run)(q)
