"""QK-Clip: after a step, the batch whose logits were too large has the largest allowed one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import member, model, program, qk_clip, sharding
from hybridlm.errors import ConfigError
from hybridlm.rows import Rows
from pallas_kernels.softmax_attention import max_logits, xla
from tests import tiny

TAU = 0.02
PATTERN = "mha mla:c mla@c heads/none mha:k mha@k/none"


def config(text, pattern=PATTERN, **fields):
    c = tiny.config(text, model__pattern=pattern, **fields)
    sizes = {"num_heads": 4, "head_dim": 4}
    c.mixers.mha = configs.mixer("attention", qkv_bias=True, **sizes)
    c.mixers.gqa = configs.mixer("attention", num_kv_heads=2, window=5, **sizes)
    c.mixers.normed = configs.mixer("attention", qk_norm="head", **sizes)
    latent = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
    c.mixers.mla = configs.mixer("mla", num_heads=2, q_lora_rank=5, **latent)
    c.mixers.heads = configs.mixer("parallel", branches=("retnet", "gqa"))
    return configs.resolve(c)


def naive(q, k, ids, scale, window):
    """Pair by pair, in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    found = np.full(q.shape[2], -np.inf)
    for b, t in np.argwhere(ids):
        first = max(np.flatnonzero(np.diff(ids[b, : t + 1], prepend=-1))[-1], t - window + 1 if window else 0)
        found = np.maximum(found, (q[b, t] * k[b, first : t + 1]).sum(-1).max(0) * scale)
    return found


@pytest.mark.parametrize("window", [0, 3])
def test_largest_logits_against_every_pair(window, monkeypatch):
    monkeypatch.setattr(xla, "MAX_BLOCK", 4)
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, 11, heads, 5)).astype(np.float32) for heads in (4, 2))
    ids = np.array([[1] * 4 + [2] * 5 + [0] * 2, [3] * 10 + [0]])
    q[:, -1], k[:, -1] = 9, 9  # padding, which is not looked at
    found = jax.jit(lambda q, k: max_logits(q, k, jnp.asarray(ids), scale=0.4, window=window))(q, k)
    np.testing.assert_allclose(found, naive(q, k, ids, 0.4, window), rtol=1e-5)


def logits(definition, taps, batch):
    """Largest logit of each head, by layer or branch, from the taps q and k of a forward pass."""
    found = {}
    for name, q in taps.items():
        if name.endswith(".q"):
            spec = definition.layers[int(name.split(".")[1])]
            window = 5 if spec.mixer in ("gqa", "heads") else 0
            k = taps[f"{name[:-1]}k"]
            found[name[:-2]] = naive(q, k, np.asarray(batch["segment_ids"]), q.shape[-1] ** -0.5, window)
    return found


@pytest.mark.slow
def test_the_step_after_has_logits_of_tau(text):
    """Without a learning rate the step only clips: the same batch then has tau where it had more."""
    fields = {"optimizer__learning_rate": 0.0, "train__microbatches": 2}
    resolved = config(text, optimizer__qk_clip=TAU, **fields)
    definition, mesh = model.build(resolved), sharding.make_mesh(resolved.mesh)
    source = member.build_data(resolved, "train")
    built = program.build(resolved, definition, mesh, None)
    batch = sharding.put_batch(source.batch(0), mesh)
    state = built.init(jax.random.key(0))
    scaled = lambda name, x: x * 8 if "mixer" in name and x.ndim > 3 else x
    state["params"] = {name: scaled(name, x) for name, x in state["params"].items()}
    rows = Rows(batch["segment_ids"], batch["positions"])
    taps = jax.jit(lambda p: model.merge(definition, p).forward(batch["tokens"], rows, ("q", "k"))[1])
    before = logits(definition, taps(state["params"]), batch)
    old = jax.tree.map(np.asarray, model.unstack(definition, state["params"]))
    state, metrics = built.step(state, batch)
    new = jax.tree.map(np.asarray, model.unstack(definition, state["params"]))
    np.testing.assert_allclose(metrics["max_logit"], max(map(np.max, before.values())), rtol=1e-4)
    # Layer 0 sees the same input as before; of the others the change is held against what was recorded.
    after = logits(definition, taps(state["params"]), batch)["layers.0"]
    np.testing.assert_allclose(after, np.minimum(before["layers.0"], TAU), rtol=1e-4)
    assert all((one > TAU).any() for one in before.values()) and len(before) == 6
    for record, largest in before.items():
        g = TAU / np.maximum(largest, TAU)
        index = int(record.split(".")[1])
        ratio = lambda name, i=index: new[f"layers.{i}.mixer.{name}"] / old[f"layers.{i}.mixer.{name}"]
        spec, heads = definition.layers[index], len(g)
        by_head = lambda x, heads=heads: x.reshape(*x.shape[:-1], heads, -1)
        if spec.mixer == "mla":
            q, up = by_head(ratio("q_proj.kernel")), by_head(ratio("kv_b_proj.kernel"))
            np.testing.assert_allclose(
                q[..., :4], np.broadcast_to(g[:, None] ** 0.5, q[..., :4].shape), rtol=1e-4
            )
            np.testing.assert_allclose(q[..., 4:], np.broadcast_to(g[:, None], q[..., 4:].shape), rtol=1e-4)
            np.testing.assert_allclose(
                up[..., :4], np.broadcast_to(g[:, None] ** 0.5, up[..., :4].shape), rtol=1e-4
            )
            np.testing.assert_array_equal(up[..., 4:], 1)
            continue
        branch = "branches.gqa." if spec.mixer == "heads" else ""
        alone = spec.mixer == "mha" and not (spec.leaves or spec.reuses)
        q = by_head(ratio(f"{branch}q_proj.kernel"))
        expected = g**0.5 if alone else g
        np.testing.assert_allclose(q, np.broadcast_to(expected[:, None], q.shape), rtol=1e-4, err_msg=record)
        if not spec.reuses:
            k = ratio(f"{branch}k_proj.kernel")
            k = by_head(k) if alone else k
            np.testing.assert_allclose(
                k, np.broadcast_to(expected[:, None] if alone else 1, k.shape), rtol=1e-4
            )
    untouched = [n for n in old if not any(part in n for part in ("q_proj", "k_proj", "kv_b_proj"))]
    for name in untouched:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_a_threshold_that_nothing_can_reach_is_refused(text):
    with pytest.raises(ConfigError, match="no layer has logits") as error:
        config(text, "retnet normed", optimizer__qk_clip=100.0)
    assert error.value.field == "optimizer.qk_clip"
    assert qk_clip.clips(model.build(config(text, "normed mha")).layers[0], 16) == {}
