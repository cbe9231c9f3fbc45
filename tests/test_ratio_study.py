"""The study of ratios: which layers a case has, and that its attention is attention behind a convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import joint_recall_study, ratio_study, vmapped
from hybridlm import config as configs
from hybridlm import cost
from hybridlm.context import Context
from hybridlm.mixers import Site, attention
from hybridlm.rows import single_document


@pytest.mark.parametrize("mixer", ratio_study.LINEAR)
def test_stacks(mixer):
    full = lambda ratio, depth: [
        i for i, one in enumerate(ratio_study.stack(mixer, ratio, depth)) if one is ratio_study.FULL
    ]
    assert full("pure", 4) == [] and full("full", 3) == [0, 1, 2] and full("0,1", 4) == [0, 1]
    assert full("3:1", 4) == [3] and full("1:1", 4) == [1, 3] and full("6:1", 14) == [6, 13]
    made = vmapped.config(ratio_study.stack(mixer, "1:1", 4), mlp_hidden=16, model__d_model=64,
                          model__vocab_size=64)  # fmt: skip
    summary = cost.summary(configs.resolve(made))
    assert summary["cache_bytes"] > 0 < summary["state_bytes"]


def test_cases_and_the_plateau():
    cases = [("kda", "pure"), ("kda", "3:1"), ("gla", "pure"), ("gla", "3:1")]
    assert ratio_study.names("kda;gla", "pure;6:1;3:1", 4) == cases
    assert ratio_study.names("kda;gla", "pure; full;3:1", 4) == [("attention", "full"), *cases]
    rows = [ratio_study.rows(40, "val", pairs) for pairs in ratio_study.SLICES]
    assert [int((one["targets"] >= 0).sum()) for one in rows] == [80, 160, 320]
    assert ratio_study.plateau() == pytest.approx(1 / 4)  # 4 labels a row on average, one guessed right


def test_attention_behind_a_convolution():
    site = Site(16, 0, 1)
    made = lambda module, config: module(config, site, rngs=nnx.Rngs(0))
    settings = {"kind": "attention", "num_heads": 2, "head_dim": 8}
    plain = made(attention.Mixer, attention.Config(**settings))
    behind = made(ratio_study.Attention, ratio_study.AttentionConfig(**settings))
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    context = lambda: Context(single_document(2, 6))
    taps = np.zeros((4, 16), np.float32)
    for back, shifted in ((0, x), (1, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1])):
        behind.conv.kernel[...] = jnp.asarray(taps).at[3 - back].set(1)
        np.testing.assert_allclose(behind(x, context())[0], plain(shifted, context())[0], atol=1e-5)


def test_joint_recall_rows():
    """Targets are the values of the second half at their keys, and the first half shows each of them."""
    rows = joint_recall_study.rows(4, "val")
    tokens, targets = rows["tokens"], rows["targets"]
    assert tokens.shape == (4, 274) and ((targets >= 0).sum(axis=1) == 64).all()
    assert (targets[:, :137] < 0).all() and (np.where(targets >= 0, targets, 10) == np.where(
        targets >= 0, np.roll(tokens, -1, axis=1), 10)).all()  # fmt: skip
    assert set(joint_recall_study.LAYERS) >= {"gdn", "kda", "mamba2", "full"}
