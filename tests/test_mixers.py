"""Every kind: decoding equals the whole, documents never meet, parameters and costs are what is claimed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layers import close, load

from hybridlm import fields, mixers
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.linear_mixer import softplus_decay
from hybridlm.mixers.kda import channel_decay
from hybridlm.rows import Rows, single_document

D, LAYERS = 24, 3
SITE = mixers.Site(D, 1, LAYERS)
YARN = (4.0, 8.0, 2.0, 1.0, 1.0, 0.5)
LATENT = dict(kv_lora_rank=9, qk_nope_head_dim=6, v_head_dim=5)
CASES = {
    "attention": ("attention", dict(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True)),
    "attention gated": (
        "attention",
        dict(
            num_heads=2,
            head_dim=8,
            qk_norm="head",
            norm_unit_offset=True,
            rotary_fraction=0.5,
            output_gate="sigmoid",
            yarn=YARN,
        ),
    ),
    "attention window": (
        "attention",
        dict(num_heads=2, head_dim=8, window=4, qk_norm="width", logit_scale=0.3, o_bias=True),
    ),
    "attention sink tokens": ("attention", dict(num_heads=2, head_dim=8, window=3, sink_tokens=2)),
    "attention forgets": (
        "attention",
        dict(num_heads=4, num_kv_heads=2, head_dim=8, forget_gate=True, window=4),
    ),
    "attention sinks": (
        "attention",
        dict(num_heads=2, head_dim=8, sinks=True, forget_gate=True, rope_theta=0.0),
    ),
    "mla": ("mla", dict(num_heads=2, q_lora_rank=10, qk_rope_head_dim=4, rope_groups=2, yarn=YARN, **LATENT)),
    "mla nope": ("mla", dict(num_heads=2, qk_rope_head_dim=3, rope_theta=0.0, latent_norm=False, **LATENT)),
    "mla gated": ("mla", dict(num_heads=2, qk_rope_head_dim=4, output_gate="head", **LATENT)),
    "delta_net": ("delta_net", dict(num_heads=2, head_dim=8, neg_eigval=True, output_gate="sigmoid")),
    "gated_delta_net": ("gated_delta_net", dict(num_heads=2, num_v_heads=4, head_dim=8)),
    "kda": ("kda", dict(num_heads=2, head_dim=8, v_head_dim=6)),
    "kda bounded": (
        "kda",
        dict(num_heads=1, num_v_heads=2, head_dim=8, lower_bound=-5.0, conv_size=0, output_gate_rank=-1),
    ),
    "kda full matrices": ("kda", dict(num_heads=2, head_dim=8, decay_rank=-1, output_gate_rank=-1)),
    "gla": ("gla", dict(num_heads=2, conv_size=3, gate_normalizer=2.0)),
    "hgrn": ("hgrn", dict(width=20, conv_size=3)),
    "hgrn2": ("hgrn2", dict(head_dim=8, conv_size=2)),
    "retnet": ("retnet", dict(num_heads=2, head_dim=6)),
    "mamba2": (
        "mamba2",
        dict(
            head_dim=8,
            state_size=6,
            n_groups=2,
            conv_size=3,
            dt_min=0.2,
            dt_max=2.0,
            multipliers=(0.5, 1.2, 0.8, 1.1, 0.9),
        ),
    ),
    "delta_product": ("delta_product", dict(num_heads=2, head_dim=6, num_householder=3)),
    "gated_delta_product": (
        "gated_delta_product",
        dict(num_heads=2, num_v_heads=4, head_dim=6, v_head_dim=5, conv_size=3),
    ),
    "mamba": ("mamba", dict(state_size=3, dt_rank=2, conv_size=3)),
    "mamba scaled norms": ("mamba", dict(state_size=3, conv_size=0, dbc_norm="scaled")),
    "lightning": ("lightning", dict(num_heads=2, head_dim=6)),
    "lightning transnormer": (
        "lightning",
        dict(
            num_heads=3,
            head_dim=4,
            slopes="transnormer",
            output_gate="linear",
            v_silu=False,
            norm_scale=False,
        ),
    ),
    "s4d": ("s4d", dict(state_size=6)),
    "log_linear": ("log_linear", dict(of="gated_delta_net", levels=4)),
    "mom": ("mom", dict(of="gated_delta_net", memories=3)),
    "mom mamba2": ("mom", dict(of="mamba2", shared=False, single_kv=True)),
    "mom of one": ("mom", dict(of="gated_delta_net", memories=3, single_kv=True, single_gates=True)),
    "sse": ("sse", dict(of="gla", partitions=3, top_k=2, rank=3, rows=4)),
    "sse gated_delta_net": ("sse", dict(of="gated_delta_net", partitions=2, top_k=1, rank=2)),
    "gated_conv": ("gated_conv", dict(conv_size=4)),
    "rglru": ("rglru", dict(width=20, num_heads=4, conv_size=3)),
    "mlstm": ("mlstm", dict(num_heads=2, head_dim=8, gate_cap=4.0)),
    "parallel": ("parallel", dict(branches=("gla", "attention"), multipliers=(1.0, -0.5))),
    "mlstm sigmoid": (
        "mlstm",
        dict(
            num_heads=2, head_dim=6, input_gate="sigmoid", normalizer=False, gate_cap=0.0, output_gate="none"
        ),
    ),
    "feature_map": (
        "feature_map",
        dict(num_heads=2, head_dim=6, conv_size=3, output_gate="swish", feature_map="hedgehog"),
    ),
    "feature_map mala": (
        "feature_map",
        dict(num_heads=2, head_dim=4, normalizer="mala", output_norm=False, v_head_dim=3),
    ),
    "based": ("based", dict(num_heads=3, head_dim=4)),
    "gated_delta_net2": ("gated_delta_net2", dict(num_heads=1, num_v_heads=2, head_dim=6, neg_eigval=True)),
    "rwkv6": ("rwkv6", dict(num_heads=2, head_dim=6, v_head_dim=4, mix_rank=3, decay_rank=4)),
    "rwkv7": (
        "rwkv7",
        dict(num_heads=2, head_dim=6, decay_rank=3, rate_rank=3, gate_rank=4, value_residual=False),
    ),
    "comba": ("comba", dict(num_heads=2, num_v_heads=4, head_dim=6, v_head_dim=5, conv_size=3)),
    "shared_block": (
        "shared_block",
        dict(of="mamba2", num_heads=2, head_dim=8, hidden=10, adapter_rank=2, attention_adapters=True),
    ),
    "shared_block of gla": (
        "shared_block",
        dict(of="gla", num_heads=4, num_kv_heads=2, head_dim=6, rope_theta=0.0, adapter_rank=0),
    ),
}


def random_like(abstract, seed):
    """A state with numbers in place of its shapes, nothing at its initial value."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape) + (len(leaf.shape) == 1), leaf.dtype)
    return jax.tree.map(draw, abstract)


@functools.cache
def build(case):
    """(graph, parameters, what is shared with other layers or None, config) of a case."""
    kind, settings = CASES[case]
    mixer, config = mixers.load(kind), make(kind, **settings)
    config.check(D)
    graph, state = nnx.split(nnx.eval_shape(lambda: mixer(config, SITE, rngs=nnx.Rngs(params=0))))
    shared = None
    if mixer.shared_class:
        stack = nnx.eval_shape(lambda: mixer.shared_class(config, SITE, rngs=nnx.Rngs(params=0)))
        stack_graph, stack_state = nnx.split(stack)
        shared = nnx.merge(stack_graph, random_like(stack_state, 5))
        shared = shared if mixers.shares_module(kind) else shared.per_layer()[1]
    return graph, random_like(state, 1), shared, config


def make(kind, **settings):
    """Checked field by field, as a config file's are."""
    made = fields.build(mixers.config_class(kind), {"kind": kind, **settings})
    return made.joined({name: make(CASES[name][0], **CASES[name][1]) for name in made.needs()})


def context(rows, shared=None, x=None):
    return Context(rows, 1, LAYERS, shared, entered=None if x is None else jnp.cos(x))


def inputs(batch, length):
    return jnp.asarray(np.random.default_rng(2).normal(size=(batch, length, D)), jnp.float32)


# Rows of 19 tokens. Row 0: four documents packed, with ids that come back (only a change means another
# document). Rows 1 to 4: each of them alone, padded on the right. Rows 5 and 6: prompts padded on the left.
LENGTHS, LENGTH = [3, 9, 1, 6], 19
STARTS = np.cumsum([0, *LENGTHS[:-1]])
PACKED = np.concatenate([np.arange(start, start + n) for start, n in zip(STARTS, LENGTHS, strict=True)])
PAD = np.array([0, 0, 0, 0, 0, 2, 7])[:, None]  # on the left
PLACE = np.arange(LENGTH) - PAD
END = np.array([LENGTH, *LENGTHS, LENGTH, LENGTH])[:, None]
REAL = (PLACE >= 0) & (PLACE < END)
APART = REAL & np.isin(np.arange(7), [1, 2, 3, 4])[:, None]
TOKEN = np.where(REAL, np.arange(LENGTH) + np.array([0, *STARTS, 0, 0])[:, None], 0)


def rows_of_tokens():
    positions = np.where(PLACE < 0, np.arange(LENGTH), PLACE)
    positions[0] = np.concatenate([np.arange(n) for n in LENGTHS])
    ids = np.where(REAL, 1, 0)
    ids[0] = np.repeat([1, 2, 1, 2], LENGTHS)
    return Rows(jnp.asarray(ids), jnp.asarray(positions))


@functools.cache
def forward_and_backward(case):
    """(x, output, a function from a cotangent to the gradients of parameters and x) of the rows above."""
    graph, state, shared, _ = build(case)
    x, rows = inputs(1, LENGTH)[0, TOKEN], rows_of_tokens()

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grad(state, x, dy):
        y, _ = nnx.merge(graph, state)(x, context(rows, shared, x))
        return (y * dy).sum(), y

    y = grad(state, x, jnp.zeros_like(x))[1]
    return x, np.asarray(y), lambda dy: grad(state, x, dy)[0]


FAMILIES = ("attention", "mla", "kda", "hgrn", "mamba2", "rwkv7", "mlstm", "mom")  # what each jax decodes
mark = lambda case: pytest.mark.slow if " " in case else pytest.mark.once
ONE_A_KIND = [case if case in FAMILIES else pytest.param(case, marks=mark(case)) for case in CASES]

SLOW_APART = [pytest.param(case, marks=pytest.mark.slow) for case in ("kda", "hgrn", "mamba", "rwkv6")]


@pytest.mark.parametrize("case", ONE_A_KIND)
def test_decoding_equals_the_whole(case):
    """Prefill in two pieces and then token by token, against one forward pass."""
    graph, state, shared, _ = build(case)
    x, whole, _ = forward_and_backward(case)
    rows, piece = rows_of_tokens(), 6

    @jax.jit
    def decode(state, x):
        mixer = nnx.merge(graph, state)

        def prefill(cache, tokens):
            y, cache = mixer(tokens[0], context(tokens[1], shared, tokens[0]), cache)
            return cache, y

        def step(cache, token):
            y, cache = mixer.step(token[0], context(token[1], shared, token[0]), cache)
            return cache, y

        split = lambda leaf: jnp.moveaxis(leaf[:, : 2 * piece].reshape(-1, 2, piece, *leaf.shape[2:]), 1, 0)
        each = lambda leaf: jnp.moveaxis(leaf[:, 2 * piece :], 1, 0)
        cache = mixer.init_cache(len(x), LENGTH, jnp.float32)
        cache, first = jax.lax.scan(prefill, cache, jax.tree.map(split, (x, rows)))
        _, rest = jax.lax.scan(step, cache, jax.tree.map(each, (x, rows)))
        return jnp.concatenate([*first, jnp.moveaxis(rest, 0, 1)], axis=1)

    decoded = np.asarray(decode(state, x))
    assert np.isfinite(whole).all() and np.isfinite(decoded).all()  # padding included
    close(decoded[REAL], whole[REAL], 2e-5)


@pytest.mark.parametrize("case", ONE_A_KIND)
def test_packed_documents_equal_documents_apart(case):
    """Outputs and gradients of the packed row against those of each document in a row of its own."""
    _, y, grads = forward_and_backward(case)
    dy = np.random.default_rng(3).normal(size=(LENGTH, D)).astype(np.float32)[TOKEN]
    dstate, dx = grads(dy * (np.arange(7) == 0)[:, None, None])
    dstate_apart, dx_apart = grads(dy * APART[..., None])
    close(y[APART], y[0, PACKED], 1e-5)
    close(np.asarray(dx_apart)[APART], np.asarray(dx)[0, PACKED], 1e-5)
    for one, other in zip(jax.tree.leaves(dstate), jax.tree.leaves(dstate_apart), strict=True):
        close(other, one, 2e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(dstate))  # every parameter takes part


@pytest.mark.parametrize("case", [pytest.param("mlstm", marks=pytest.mark.once), *SLOW_APART])
def test_what_is_not_finite_stays_in_its_document(case):
    """Not the documents of softmax attention, whose weight of 0 times nan is nan (docs/kernels_other.md)."""
    graph, state, shared, _ = build(case)
    x, rows = inputs(1, LENGTH), jax.tree.map(lambda leaf: leaf[:1], rows_of_tokens())
    run = jax.jit(lambda x: nnx.merge(graph, state)(x, context(rows, shared, x))[0][0])
    outside = [*range(5), *range(12, LENGTH)]  # of document 1, from its third token on
    y, *others = (np.asarray(run(x.at[0, 5].set(value))) for value in (0.0, np.nan, np.inf))
    for other in others:
        close(other[outside], y[outside], 1e-5)
        assert not np.isfinite(other[5]).all()


@pytest.mark.parametrize("case", CASES)
def test_cost_counts_the_cache(case):
    """Elements of the real cache at two lengths against `cost`; single numbers are counters."""
    graph, state, _, config = build(case)
    mixer = nnx.merge(graph, state)
    for length in (3, 11):
        leaves = jax.tree.leaves(mixer.init_cache(1, length, jnp.bfloat16))
        cost = config.cost(D, length)
        assert sum(leaf.size for leaf in leaves if leaf.ndim) == cost.state + cost.cache
        assert cost.flops > 0


def test_only_matrices_decay():
    for case in CASES:
        for path, leaf in nnx.to_flat_state(build(case)[1]):
            assert leaf.get_metadata("decay") == (path[-1] == "kernel"), path
            assert len(leaf.get_metadata("axes")) == len(leaf.shape)


@jax.jit
def initial_gates():
    kda = lambda **settings: mixers.load("kda")(make("kda", **settings), SITE, rngs=nnx.Rngs(params=0))
    wide, bounded = kda(num_heads=64, head_dim=4), kda(num_heads=2, head_dim=4, lower_bound=-5.0)
    return jnp.exp(wide.A_log[...]), jax.nn.softplus(wide.dt_bias[...]), bounded.A_log[...]


def test_initial_gates_are_in_their_ranges():
    decay, dt, bounded = initial_gates()
    assert 1 <= decay.min() < 3 and 14 < decay.max() <= 16 and not bounded.any()
    assert 0.00099 < dt.min() < 0.002 and 0.06 < dt.max() < 0.1001


GATES = {
    "gate_gdn": softplus_decay,
    "gate_kda": lambda x, A_log, dt: channel_decay(x, A_log, dt.reshape(x.shape[2:]), 0.0),
    "gate_kda_lower_bound": lambda x, A_log, dt: channel_decay(x, A_log, dt.reshape(x.shape[2:]), -5.0),
}


@pytest.mark.parametrize("name", GATES)
def test_decay_gates_against_the_reference(name):
    _, a = load(name)
    y, pull = jax.vjp(jax.jit(GATES[name]), *(jnp.asarray(a[key]) for key in ("x", "A_log", "dt_bias")))
    close(y, a["y"])
    for grad, key in zip(pull(jnp.asarray(a["dy"])), ("grad_x", "grad_A_log", "grad_dt_bias"), strict=True):
        close(grad, a[key])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_gla_and_hgrn_are_their_papers_equations():
    """Token by token in float64, from the equations; there are no public vectors of these two layers."""
    x = np.asarray(inputs(1, 9), np.float64)[0]
    rms = lambda o, scale: o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * scale

    def weights(kind, **settings):
        made = lambda: mixers.load(kind)(make(kind, **settings), SITE, rngs=nnx.Rngs(params=0))
        mixer = nnx.eval_shape(made)
        graph, state = nnx.split(mixer)
        state = random_like(state, 4)
        return nnx.merge(graph, state), {
            path: np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(state)
        }

    mixer, w = weights("gla", num_heads=2)
    p = lambda name: x @ w[name, "kernel"]
    q, k, v, z = (p(name).reshape(9, 2, -1) for name in ("q_proj", "k_proj", "v_proj", "g_proj"))
    a = sigmoid(p("f_a_proj") @ w["f_b_proj", "kernel"] + w["f_b_proj", "bias"]).reshape(9, 2, 6) ** (1 / 16)
    S, o = np.zeros((2, 6, 12)), []
    for t in range(9):
        S = a[t][..., None] * S + k[t][..., None] * v[t][:, None]
        o.append(np.einsum("hkv,hk->hv", S, q[t]) / np.sqrt(6))
    y = (rms(np.stack(o), w["o_norm", "scale"]) * z * sigmoid(z)).reshape(9, -1) @ w["o_proj", "kernel"]
    close(jax.jit(lambda x: mixer(x, context(single_document(1, 9)))[0])(inputs(1, 9))[0], y, 1e-5)

    mixer, w = weights("hgrn")
    lower = np.linspace(0, 0.9, D)
    i, z, f = p("i_proj"), p("g_proj"), lower + (1 - lower) * sigmoid(p("f_proj"))
    h, o = np.zeros(D), []
    for t in range(9):
        h = f[t] * h + (1 - f[t]) * i[t] * sigmoid(i[t])
        o.append(h)
    y = (rms(np.stack(o), w["o_norm", "scale"]) * z * sigmoid(z)) @ w["o_proj", "kernel"]
    run = jax.jit(lambda x: mixer(x, context(single_document(1, 9), jnp.float32(lower)))[0])
    close(run(inputs(1, 9))[0], y, 1e-5)


@pytest.mark.parametrize("combine", ["norm", "sum"])
def test_parallel_heads_are_their_branches_combined(combine):
    """Each branch alone, from the same parameters, and the combination in float64."""
    config = make("parallel", branches=("gla", "attention"), multipliers=(2.0, -0.5), combine=combine)
    made = nnx.eval_shape(lambda: mixers.load("parallel")(config, SITE, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(made)
    layer = nnx.merge(graph, random_like(state, 6))
    x, expected = inputs(2, 9), 0.0
    whole = context(single_document(2, 9))
    whole.wanted = ("q", "k")
    for name, factor in zip(config.branches, config.multipliers, strict=True):
        y = np.asarray(layer.branches[name](x, context(single_document(2, 9)))[0], np.float64)
        if combine == "norm":
            scale = np.asarray(layer.norms[name].scale[...], np.float64)
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * scale / 2
        expected += factor * y
    close(layer(x, whole)[0], expected, 1e-5)
    assert set(whole.records) == {"attention.q", "attention.k"}


def test_every_file_is_a_kind_and_every_kind_is_tested():
    assert {kind for kind, _ in CASES.values()} == set(mixers.kinds())
    with pytest.raises(ConfigError, match="kda"):
        mixers.load("kd")
