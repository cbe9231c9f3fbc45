"""Small layers against float64 vectors of public references, and what a document boundary must cut."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.layers import Linear, RMSNorm, ShortConv, embed, param, zeros
from hybridlm.mixers import Site
from hybridlm.mlps import swiglu
from hybridlm.rotary import rotate
from hybridlm.rows import Rows, single_document

COMPONENTS = Path(__file__).parent / "golden" / "components"
RNGS = nnx.Rngs(params=0)


def load(name):
    arrays = dict(np.load(COMPONENTS / f"{name}.npz"))
    return json.loads(str(arrays.pop("meta"))), arrays


def close(actual, expected, tolerance=2e-6):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm_1p", "rmsnorm_gated_silu", "rmsnorm_gated_sigmoid"])
def test_rms_norm(name):
    _, a = load(name)
    gated = "z" in a
    act = jax.nn.sigmoid if name.endswith("sigmoid") else jax.nn.silu
    unit_offset, eps = name == "rmsnorm_1p", 1e-5 if gated else 1e-6
    norm = RMSNorm(a["w"].size, rngs=RNGS, eps=eps, unit_offset=unit_offset)
    graph, state = nnx.split(norm)

    @jax.jit
    def apply(x, z, w):
        return nnx.merge(graph, jax.tree.map(lambda _: w, state))(x, act(z) if gated else None)

    z = a.get("z", a["x"])
    y, pull = jax.vjp(apply, a["x"], z, a["w"])
    grads = pull(jnp.asarray(a["dy"]))
    close(y, a["y"])
    close(grads[0], a["grad_x"])
    close(grads[2], a["grad_w"])
    if gated:
        close(grads[1], a["grad_z"])


def conv_of(w_DW):
    conv = ShortConv(w_DW.shape[0], w_DW.shape[1], rngs=RNGS)
    graph, state = nnx.split(conv)
    return jax.jit(lambda kernel, *args: nnx.merge(graph, jax.tree.map(lambda _: kernel, state))(*args))


@pytest.mark.parametrize("name", ["short_conv_silu", "short_conv_bias_state", "short_conv_noact_T2"])
def test_short_conv(name):
    _, a = load(name)
    apply, activation = conv_of(a["w"]), (lambda x: x) if "noact" in name else jax.nn.silu
    batch, length, features = a["x"].shape
    past = a["w"].shape[1] - 1
    # The references keep as many inputs as taps, the oldest of which no later token reads.
    history = (
        np.moveaxis(a["h0"], 1, 2)[:, 1:] if "h0" in a else np.zeros((batch, past, features), np.float32)
    )
    rows = single_document(batch, length)
    rows = rows._replace(positions=rows.positions + (past if "h0" in a else 0))

    @jax.jit
    def convolve(x, w, history):
        y, history = apply(w.T, x, rows, history)
        return activation(y + a.get("b", 0)), history

    (y, after), pull = jax.vjp(convolve, a["x"], a["w"], history)
    close(y, a["y"])
    close(after, np.moveaxis(a["state"], 1, 2)[:, 1:])
    dafter = np.moveaxis(a["dstate"], 1, 2)[:, 1:] if "dstate" in a else np.zeros_like(history)
    dx, dw, dhistory = pull((jnp.asarray(a["dy"]), jnp.asarray(dafter)))
    close(dx, a["grad_x"])
    close(dw, a["grad_w"])
    if "h0" in a:
        close(dhistory, np.moveaxis(a["grad_h0"], 1, 2)[:, 1:])


def test_short_conv_packed():
    """The reference carries a history into every document: so document by document first, then packed."""
    _, a = load("short_conv_packed")
    apply, bounds = conv_of(a["w"]), a["cu_seqlens"]
    cut = [slice(low, high) for low, high in itertools.pairwise(bounds)]
    past = a["w"].shape[1] - 1
    fresh = []
    for n, at in enumerate(cut):
        rows = single_document(1, at.stop - at.start)
        history = np.moveaxis(a["h0"][n : n + 1], 1, 2)[:, 1:]
        y, _ = apply(a["w"].T, a["x"][:, at], rows._replace(positions=rows.positions + past), history)
        close(jax.nn.silu(y), a["y"][:, at])
        fresh.append(apply(a["w"].T, a["x"][:, at], rows)[0])
    positions = np.concatenate([np.arange(at.stop - at.start) for at in cut])[None]
    packed = apply(a["w"].T, a["x"], Rows(np.ones_like(positions), jnp.asarray(positions)))[0]
    np.testing.assert_array_equal(packed, np.concatenate(fresh, axis=1))


def test_rotate_turns_pairs_by_position_times_frequency():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 12)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 1000, 5]])
    angle = positions[:, :, None, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag, x[..., 8:]], axis=-1)
    close(rotate(jnp.asarray(x), jnp.asarray(positions), 100.0, rotary_dim=8), expected, 1e-4)


def test_layers_compute_in_the_activation_dtype_and_mark_their_parameters():
    linear, norm = Linear(8, 6, rngs=RNGS, bias=True), RMSNorm(8, rngs=RNGS)
    mlp = swiglu.Mlp(swiglu.Config(hidden=16), Site(8), rngs=RNGS)
    x = jnp.ones((2, 8), jnp.bfloat16)
    assert linear(x).dtype == mlp(x, context=None).dtype == norm(x).dtype == jnp.bfloat16
    assert linear.kernel.get_metadata("decay") and not linear.bias.get_metadata("decay")
    assert linear.kernel.get_metadata("axes") == ("embed", "heads")
    assert linear.bias.get_metadata("axes") == ("heads",) and linear.kernel.dtype == jnp.float32
    assert not norm.scale.get_metadata("decay")
    with pytest.raises(ValueError, match="axes"):
        param(RNGS, (2, 3), ("embed",), zeros, decay=True)


def test_the_embeddings_gradient_is_a_sum_in_float32():
    """Of 4096 ones; a sum in bfloat16 stops at 256."""
    tokens = jnp.zeros((4, 1024), jnp.int32).at[0, 0].set(2)
    total = lambda table: jnp.sum(embed(table, tokens, jnp.dtype("bfloat16")), dtype=jnp.float32)
    gradient = jax.grad(total)(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, [[4095, 4095], [0, 0], [1, 1]])
