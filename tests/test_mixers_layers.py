"""Whole layers against the hidden states of small random public checkpoints (`golden/mixers/README.md`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_mixers_golden import GOLDEN, close

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.rows import Rows, single_document


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def split(w, sizes):
    return np.split(w, np.cumsum(sizes)[:-1])


def falcon_mamba(w):
    w = {name.removeprefix("mixer."): a for name, a in w.items()}
    x, z = split(w["in_proj.weight"], [128, 128])
    names = {"dbc_proj": "x_proj", "dt_proj": "dt_proj", "o_proj": "out_proj"}
    own = {f"{name}.kernel": w[f"{other}.weight"].T for name, other in names.items()}
    own |= {"x_proj.kernel": x.T, "z_proj.kernel": z.T, "dt_bias": w["dt_proj.bias"]}
    own |= {"x_conv.kernel": w["conv1d.weight"][:, 0].T, "x_conv.bias": w["conv1d.bias"]}
    return own | {"A_log": w["A_log"], "D": w["D"]}


def recurrent_gemma(w):
    w = {name.removeprefix("temporal_block."): a for name, a in w.items()}
    own = {"recurrent_param": w["rg_lru.recurrent_param"]}
    for name, other in (("x_proj", "linear_x"), ("y_proj", "linear_y"), ("o_proj", "linear_out")):
        own |= {f"{name}.kernel": w[f"{other}.weight"].T, f"{name}.bias": w[f"{other}.bias"]}
    own |= {"x_conv.kernel": w["conv_1d.weight"][:, 0].T, "x_conv.bias": w["conv_1d.bias"]}
    for name in ("input_gate", "recurrent_gate"):
        own |= {f"{name}.kernel": w[f"rg_lru.{name}_weight"], f"{name}.bias": w[f"rg_lru.{name}_bias"]}
    return own


def after_recurrent_gemma(w, x, mixed):
    x = x + mixed
    h = rms(x, 1 + w["channel_pre_norm.weight"], 1e-6)
    gate, up = (h @ w[f"mlp_block.{n}_proj.weight"].T + w[f"mlp_block.{n}_proj.bias"] for n in ("gate", "up"))
    gate = np.asarray(jax.nn.gelu(gate, approximate=True))
    return x + (gate * up) @ w["mlp_block.down_proj.weight"].T + w["mlp_block.down_proj.bias"]


def xlstm(w):
    w = {name.removeprefix("mlstm_layer."): a for name, a in w.items()}
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "g_proj": "ogate_preact", "o_proj": "out_proj"}
    names |= {"i_proj": "igate_preact", "f_proj": "fgate_preact"}
    own = {f"{name}.kernel": w[f"{other}.weight"].T for name, other in names.items()}
    own |= {"i_bias": w["igate_preact.bias"], "f_bias": w["fgate_preact.bias"]}
    return own | {"o_norm.scale": w["multihead_norm.weight"]}


def after_xlstm(w, x, mixed):
    x = x + mixed
    h = rms(x, w["norm_ffn.weight"], 1e-6)
    up = silu(h @ w["ffn.proj_up_gate.weight"].T) * (h @ w["ffn.proj_up.weight"].T)
    return x + up @ w["ffn.proj_down.weight"].T


def minimax(w):
    w = {name.removeprefix("self_attn."): a for name, a in w.items()}
    qkv = w["qkv_proj.weight"].reshape(4, 3, 16, 64).swapaxes(0, 1).reshape(3, 64, 64)
    own = {f"{name}_proj.kernel": a.T for name, a in zip("qkv", qkv, strict=True)}
    own |= {"g_proj.kernel": w["output_gate.weight"].T, "o_proj.kernel": w["out_proj.weight"].T}
    return own | {"o_norm.scale": w["norm.weight"]}


def after_minimax(w, x, mixed):
    x = 1.2 * rms(x, w["input_layernorm.weight"], 1e-5) + 0.8 * mixed  # its residual is the normed stream
    h = rms(x, w["post_attention_layernorm.weight"], 1e-5)
    p = np.exp(h @ w["block_sparse_moe.gate.weight"].T)
    p = np.where(p == p.min(-1, keepdims=True), 0, p)  # two of three experts
    p /= p.sum(-1, keepdims=True)
    expert = lambda n, m: w[f"block_sparse_moe.experts.{n}.w{m}.weight"].T
    outs = [(silu(h @ expert(n, 1)) * (h @ expert(n, 3))) @ expert(n, 2) * p[:, n, None] for n in range(3)]
    return 1.05 * h + 0.95 * sum(outs)


def plain(w, x, mixed):
    return x + mixed


# name: (kind, settings, norm before the mixer, its eps, layer of how many, weights, the rest of the block)
CHECKPOINTS = {
    "falcon_mamba": ("mamba", dict(dbc_norm="rms"), ("norm.weight", 0, 1e-5), (1, 2), falcon_mamba, plain),
    "recurrent_gemma": (
        "rglru",
        dict(num_heads=4),
        ("temporal_pre_norm.weight", 1, 1e-6),
        (1, 4),
        recurrent_gemma,
        after_recurrent_gemma,
    ),
    "xlstm": ("mlstm", dict(head_dim=16), ("norm_mlstm.weight", 0, 1e-6), (0, 2), xlstm, after_xlstm),
    "minimax": (
        "lightning",
        dict(head_dim=16),
        ("input_layernorm.weight", 0, 1e-5),
        (2, 4),
        minimax,
        after_minimax,
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_layer_of_a_public_checkpoint(name):
    kind, settings, (norm, offset, eps), (layer, depth), weights, after = CHECKPOINTS[name]
    w = dict(np.load(GOLDEN / "layers" / f"{name}.npz"))
    x, y = (w.pop(key).astype(np.float64) for key in ("x", "y"))
    mixer, site = mixers.load(kind), mixers.Site(x.shape[-1], layer, depth)
    config = mixer.config_class(kind=kind, **settings)
    graph, state = nnx.split(nnx.eval_shape(lambda: mixer(config, site, rngs=nnx.Rngs(params=0))))
    fill(state, weights(w))
    h = rms(x, offset + w[norm], eps).astype(np.float32)
    context = Context(single_document(1, len(x)), layer, depth)
    mixed = jax.jit(lambda state, h: nnx.merge(graph, state)(h, context)[0])(state, h[None])[0]
    close(after(w, x, np.asarray(mixed, np.float64)), y, 1e-5, "hidden states")


def fill(state, values):
    for path, leaf in nnx.to_flat_state(state):
        value = values.pop(".".join(map(str, path)))
        assert value.shape == leaf.shape, path
        leaf.set_value(jnp.asarray(value))
    assert not values


@pytest.mark.parametrize("neg_eigval, lowest", [(False, 0), (True, -1)])
def test_a_token_of_rwkv7_can_turn_its_state_around(neg_eigval, lowest):
    """What it does to a state, with a of 1 or 2, has this eigenvalue, and 1 in all other directions."""
    mixer, size = mixers.load("rwkv7"), 6
    settings = dict(num_heads=1, head_dim=size, value_residual=False, neg_eigval=neg_eigval)
    config = mixer.config_class(kind="rwkv7", **settings)
    layer = mixer(config, mixers.Site(8, 0, 1), rngs=nnx.Rngs(params=0))
    layer.v_proj.kernel.set_value(jnp.zeros_like(layer.v_proj.kernel[...]))
    layer.k_k.set_value(jnp.full_like(layer.k_k[...], 100.0))  # beside the eps of the keys' length
    layer.a_proj.bias.set_value(jnp.full_like(layer.a_proj.bias[...], 30.0))
    layer.w_proj.bias.set_value(jnp.full_like(layer.w_proj.bias[...], -30.0))
    x = jax.random.normal(jax.random.key(0), (1, 1, 8))
    before = jax.random.normal(jax.random.key(1), (1, 1, size, size))
    cache = layer.init_cache(1, 0, x.dtype)._replace(state=before)
    second = Rows(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))  # of its document
    _, after = layer(x, Context(second, 0, 1), cache)
    turn = np.asarray(after.state[0, 0], np.float64) @ np.linalg.inv(np.asarray(before[0, 0], np.float64))
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(turn).real), [lowest] + [1] * (size - 1), atol=2e-4)
