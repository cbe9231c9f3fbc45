"""Layers that talk: in scans and unrolled, rematerialised or not, decoded, and in their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import model
from hybridlm.context import Context
from hybridlm.rows import Rows, single_document
from tests.tiny import loss_fn

SHARED = "(full:a swa:b swa@b full@a mla:c mla@c)*2"
PATTERNS = ["(write read full)*2", "full write read*2 write read", "first*3", "full first*2 full", SHARED]


def build(pattern: str) -> model.Definition:
    config = configs.default()
    small = {"num_heads": 2, "head_dim": 8}
    config.mixers = {
        "write": configs.mixer("tests.talking:Writer", **small),
        "read": configs.mixer("tests.talking:Reader", **small),
        "first": configs.mixer("tests.talking:ValueResidual", **small),
        "full": configs.mixer("attention", **small),
        "rwkv7": configs.mixer("rwkv7", **small, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4),
        "swa": configs.mixer("attention", window=4, **small),
        "mla": configs.mixer("mla", num_heads=2, kv_lora_rank=6, qk_nope_head_dim=4, v_head_dim=4),
    }
    config.model.update(pattern=pattern, d_model=16, vocab_size=48, mlp_hidden=16, dtype="float32")
    config.data.path = "python-stdlib:"
    return model.build(configs.resolve(config))


def batch() -> dict[str, jax.Array]:
    """Two rows of packed documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (2, 24)).astype(np.int32)
    segments = np.repeat([[1, 2, 3], [1, 2, 3]], 8, axis=1).astype(np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), (2, 3))
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "segment_ids": segments,
        "positions": positions,
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.slow
def test_scanned_and_unrolled_stacks_agree(pattern):
    scanned = build(pattern)
    plain = dataclasses.replace(scanned, model=dataclasses.replace(scanned.model, scan=False, remat="none"))
    params = jax.jit(lambda key: model.init(scanned, key))(jax.random.key(0))
    run = lambda d: jax.jit(jax.value_and_grad(lambda p: loss_fn(d, p, batch())[0]))(params)
    (loss, grads), (expected, expected_grads) = run(scanned), run(plain)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(grad, expected_grads[name], atol=2e-5 * scale + 1e-9, err_msg=name)
    writers = [n for n in model.unstack(scanned, grads) if n.endswith("k_proj.kernel")]
    assert writers  # and the readers' gradients reach what the writers left
    reach = model.unstack(scanned, grads)
    assert all(np.any(reach[name]) for name in writers)


@pytest.mark.parametrize("pattern", [*PATTERNS, "full rwkv7*3"])
@pytest.mark.slow
def test_decoding_equals_the_whole(pattern):
    definition, rows = build(pattern), single_document(2, 12)
    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(1))
    wave = lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape)
    params = jax.tree.map(wave, params)  # nothing stays at 0, as an output projection may be at first
    tokens = batch()["tokens"][:, :12]

    @jax.jit
    def decoded(params):
        lm = model.merge(definition, params)
        hidden, cache = lm(tokens[:, :7], Rows(*(x[:, :7] for x in rows)), lm.init_cache(2, 12))
        blocks, found = lm.unstacked(), [hidden]
        for t in range(7, 12):
            state, cache = lm.step(tokens[:, t], Rows(*(x[:, t] for x in rows)), cache, blocks)
            found.append(state[:, None])
        return jnp.concatenate(found, 1)

    whole = jax.jit(lambda p: model.merge(definition, p)(tokens, rows)[0])(params)
    np.testing.assert_allclose(decoded(params), whole, rtol=2e-4, atol=2e-5)


def test_taps_are_what_the_layers_made_and_nobody_pays_unasked():
    definition = build("(first*2 full)*2")
    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    rows = Rows(batch()["segment_ids"], batch()["positions"])

    def run(wanted):
        forward = lambda p: model.merge(definition, p).forward(batch()["tokens"], rows, wanted)
        return jax.make_jaxpr(forward)(params), jax.jit(forward)(params)

    quiet, (hidden, nothing) = run(())
    tapped, (same, taps) = run(("q", "k"))
    assert nothing == {} and set(taps) == {f"layers.{i}.{name}" for i in (2, 5) for name in "qk"}
    assert taps["layers.2.q"].shape == (2, 24, 2, 8)
    np.testing.assert_array_equal(hidden, same)
    assert len(str(quiet)) < len(str(tapped))
    first = model.merge(definition, params).stack.blocks()[2]
    seen = Context(rows, wanted=("q",))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 16)), jnp.float32)
    first(x, seen, None)
    assert list(seen.records) == ["q"]
    with pytest.raises(ValueError, match="written twice"):
        seen.record("q", x)


def test_reading_what_nobody_wrote_is_an_error():
    definition = build("read write")
    params = model.init(definition, jax.random.key(0))
    with pytest.raises(KeyError, match="kv"):
        jax.eval_shape(
            lambda p: model.merge(definition, p)(batch()["tokens"], single_document(2, 24)), params
        )


def test_branches_of_a_layer_add_their_losses_up():
    whole = Context(single_document(1, 2), wanted=("loss.*", "q"), carried={"a": 1})
    for name in ("one", "other"):
        part = whole.branch()
        assert part.carried is whole.carried
        part.record("loss.balance", jnp.float32(2))
        part.record("q", name)
        whole.join(name, part)
    assert whole.records == {"loss.balance": 4, "one.q": "one", "other.q": "other"}
