"""The stack: scans against unrolled layers, packing, and metadata."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import model, stack
from hybridlm.rows import Rows
from tests.tiny import loss_fn

SMALL = {"num_heads": 2, "head_dim": 8}


def definition(pattern: str, num_layers: int = 0, **fields) -> model.Definition:
    config = configs.default()
    config.mixers = {
        "gla": configs.mixer("gla", num_heads=2, conv_size=4),
        "gdn": configs.mixer("gated_delta_net", **SMALL),
        "hgrn2": configs.mixer("hgrn2", head_dim=8),
        "full": configs.mixer("attention", num_heads=2),
    }
    config.mlps = {"experts": configs.mlp("moe", num_experts=4, hidden=8, shared_hidden=8)}
    config.model.update(
        dict(d_model=16, vocab_size=48, mlp_hidden=32, dtype="float32", remat="full", pattern=pattern),
        **fields,
    )
    config.model.num_layers = num_layers
    config.data.path = "python-stdlib:"
    return model.build(configs.resolve(config))


def unrolled(definition: model.Definition) -> model.Definition:
    settings = dataclasses.replace(definition.model, scan=False, remat="none")
    return dataclasses.replace(definition, model=settings)


# A head, a repetition, a tail, and a stack-wide parameter; planned below.
HYBRID = definition("gla (full hgrn2)*2 gdn", tie_embeddings=True)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: model.init(HYBRID, key))(jax.random.key(0))


def packed_batch() -> dict[str, np.ndarray]:
    """Two rows of 40 tokens: documents of 13, 7 and 20 tokens; one of 33 tokens, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (2, 40)).astype(np.int32)
    segments = np.array([[1] * 13 + [2] * 7 + [3] * 20, [1] * 33 + [0] * 7], np.int32)
    positions = np.array([[*range(13), *range(7), *range(20)], [*range(33), *range(7)]], np.int32)
    targets = np.roll(tokens, -1, 1)
    targets[0, [12, 19, 39]] = targets[1, 32:] = -1
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions}


def relative_error(got, want) -> float:
    """Norm of the difference over norm, over all leaves of two trees."""
    square = lambda tree: sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))
    return (square(jax.tree.map(jnp.subtract, got, want)) / square(want)) ** 0.5


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(definition, params, batch):
    return jax.value_and_grad(lambda p: loss_fn(definition, p, batch)[0])(params)


def test_the_plan_has_every_feature():
    assert [segment.repeats for segment in HYBRID.layout.segments] == [1, 2, 1]


@pytest.mark.once
def test_scanned_stack_equals_unrolled_stack(params):
    batch = packed_batch()
    loss, grads = loss_and_grad(HYBRID, params, batch)
    loss_unrolled, grads_unrolled = loss_and_grad(unrolled(HYBRID), params, batch)
    np.testing.assert_allclose(loss, loss_unrolled, rtol=1e-6)
    assert relative_error(grads, grads_unrolled) < 1e-5


def test_kinds_that_read_their_layer_scan_as_they_unroll():
    """Their index, or their row of a parameter of the stack: the same logits of the same packed rows."""
    config = configs.default()
    small = {"hgrn": {}, "hgrn2": {"head_dim": 8}, "lightning": SMALL}
    config.mixers = {kind: configs.mixer(kind, **settings) for kind, settings in small.items()}
    pattern = " ".join(f"{name}*2" for name in small)
    config.model.update(pattern=pattern, d_model=16, vocab_size=48, mlp_hidden=16, dtype="float32")
    config.data.path = "python-stdlib:"
    several = model.build(configs.resolve(config))
    params = jax.jit(lambda key: model.init(several, key))(jax.random.key(1))
    batch = packed_batch()
    rows = Rows(batch["segment_ids"], batch["positions"])
    logits = [
        jax.jit(lambda p, d=d: model.logits(d, p, batch["tokens"], rows))(params)
        for d in (several, unrolled(several))
    ]
    assert np.isfinite(logits[0]).all()
    assert relative_error(*logits) < 1e-5


@pytest.mark.once
def test_packed_documents_equal_documents_apart(params):
    """Loss and gradients of packed rows are the sums over their documents, each alone in a row."""
    batch = packed_batch()
    apart = {name: np.zeros((4, 40), np.int32) for name in batch}
    apart["targets"] -= 1
    for index, (row, start, stop) in enumerate([(0, 0, 13), (0, 13, 20), (0, 20, 40), (1, 0, 33)]):
        for name in ("tokens", "targets"):
            apart[name][index, : stop - start] = batch[name][row, start:stop]
        apart["segment_ids"][index, : stop - start] = 1
        apart["positions"][index] = np.arange(40)
    packed = loss_and_grad(HYBRID, params, batch)
    first, second = (
        loss_and_grad(HYBRID, params, {k: v[i : i + 2] for k, v in apart.items()}) for i in (0, 2)
    )
    loss, grads = jax.tree.map(jnp.add, first, second)
    np.testing.assert_allclose(packed[0], loss, rtol=1e-6)
    assert relative_error(packed[1], grads) < 1e-5


@pytest.mark.slow
def test_matrices_cast_once_give_the_same_gradients():
    """Bit for bit in bfloat16, as which a matrix's gradient comes either way, for it is used once in a layer.

    When the cast follows at once, the compiler may leave the rounding out (it does for experts on a CPU).
    """
    small = definition("hgrn2/experts full", dtype="bfloat16", tie_embeddings=True)
    params = jax.jit(lambda key: model.init(small, key))(jax.random.key(0))
    loss = lambda params: loss_fn(small, params, packed_batch())[0]
    once = lambda params: jax.grad(loss)(model.cast_to_compute(small, params))
    found, expected = jax.jit(once)(params), jax.jit(jax.grad(loss))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    same = lambda found, expected: np.testing.assert_array_equal(found, expected.astype(found.dtype))
    jax.tree.map(same, found, expected)


def test_parameters_of_a_layer_do_not_depend_on_the_plan(params):
    """Nor does its name: layer 0 stands in the head of one plan, and in the repeated part of another."""
    other = definition("gla*6")
    alone = model.unstack(other, jax.jit(lambda key: model.init(other, key))(jax.random.key(0)))
    named = model.unstack(HYBRID, params)
    first = [name for name in named if name.startswith("layers.0.")]
    assert first
    for name in first:  # the number of layers is the same, so the keys are, too
        np.testing.assert_array_equal(alone[name], named[name])


def test_names_and_stacks_are_one_to_one(params):
    named = model.unstack(HYBRID, params)
    layers = [int(name.split(".")[1]) for name in named if name.startswith("layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(6))
    initial = jax.eval_shape(lambda: model.init(HYBRID, jax.random.key(0)))
    assert list(model.shapes(HYBRID).items()) == list(initial.items())
    assert {n: leaf.shape for n, leaf in named.items()} == {
        n: leaf.shape for n, leaf in model.canonical_shapes(HYBRID).items()
    }
    back = model.restack(HYBRID, named)
    assert back.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, back, params)
    state = {"mu": params, "count": jnp.int32(3)}
    apart = stack.apart(HYBRID.layout, state)
    assert set(apart) == {"count", *(f"mu.{name}" for name in named)}
    jax.tree.map(np.testing.assert_array_equal, stack.together(HYBRID.layout, apart, state), state)


def test_metadata_has_the_names_of_the_parameters(params):
    metadata = model.metadata(HYBRID)
    assert metadata.keys() == params.keys()
    assert all(leaf.ndim == len(metadata[name].axes) for name, leaf in params.items())
    undecayed = {name.split(".")[-1] for name, meta in metadata.items() if not meta.decay}
    assert undecayed == {"scale", "bias", "A_log", "dt_bias", "lower_bounds"}
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())


@pytest.mark.once
def test_loss_sums_count_tokens_and_bytes(params):
    batch = packed_batch()
    token_bytes = np.arange(48, dtype=np.int32) % 3
    _, sums = jax.jit(lambda p: loss_fn(HYBRID, p, batch, z_loss=0.1, token_bytes=token_bytes))(params)
    counted = batch["targets"][batch["targets"] >= 0]
    assert int(sums["tokens"]) == len(counted)
    assert int(sums["bytes"]) == token_bytes[counted].sum()
    logits = model.logits(HYBRID, params, batch["tokens"], Rows(batch["segment_ids"], batch["positions"]))
    rows, columns = np.nonzero(batch["targets"] >= 0)
    log_p = jax.nn.log_softmax(logits)[rows, columns, batch["targets"][rows, columns]]
    np.testing.assert_allclose(sums["loss_sum"], -log_p.sum(), rtol=1e-5)


def test_trace_size_does_not_grow_with_depth():
    """Equations in the jaxpr of the gradient: the same for 8 and 32 layers of one pattern."""

    def equations(depth: int) -> int:
        deep = definition("gdn*3 full", depth)
        shapes = model.shapes(deep)
        batch = {name: jax.ShapeDtypeStruct(x.shape, jnp.int32) for name, x in packed_batch().items()}
        return len(
            str(jax.make_jaxpr(jax.grad(lambda p, b: loss_fn(deep, p, b)[0]))(shapes, batch)).splitlines()
        )

    assert equations(32) == equations(8)
