"""Sweeps of recall: which layers their points have, and that their attention is behind a convolution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import conv_attention
from hybridlm import cost
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.mixers import Site, attention
from hybridlm.rows import single_document
from launch import grid


@pytest.mark.parametrize("layers, full", [("4", [3]), ("14", [3, 7, 11])])
def test_recall(layers, full):
    sweep = grid.load(f"configs/sweeps/study_recall.py:{layers}")
    few = dataclasses.replace(sweep, keep=lambda point: (point["mixer"], point["seed"]) == ("kda", 0))
    found = {run.name: run.config for run in grid.runs(few)}
    one = found["kda_3-1_learning_rate0.001_seed0"]
    assert cost.full_layers(one) == full and isinstance(one.mixers["full"], conv_attention.Config)
    with pytest.raises(ConfigError, match="study_recall"):
        grid.load("configs/sweeps/study_recall.py:6")


def _first_of(point):
    return point["mixer"] in ("mamba2", "kda") and point["ratio"] in ("pure", "3:1", "1:1")


def _last_of(sweep):
    return [point for point in sweep.also if point["ratio"] == "full"]


def test_language_models_that_go_on(tmp_path):
    """No two parts train the same model; sessions go on from runs of theirs, by name."""
    load = lambda part: grid.load(f"configs/sweeps/study_lm_large.py:{tmp_path},{part},60e6")
    stacks = [
        tuple(point[name] for name in ("mixer", "ratio", "seed"))
        for part in ("first", "others", "seeds")
        for point in grid.points(load(part))
    ]
    assert len(set(stacks)) == len(stacks) == 10 + 8 + 9
    taught = grid.runs(grid.load(f"configs/sweeps/study_sessions.py:{tmp_path},runs"))
    before = {run.config.init_from: run.config.model for run in taught}
    known = {
        f"runs/{part}/{run.name}": run.config.model
        for part in ("others", "seeds")
        for run in grid.runs(dataclasses.replace(load(part), keep=_first_of, also=_last_of(load(part))))
    }
    assert len(taught) == 3 and before.items() <= known.items()
    with pytest.raises(ConfigError, match="places"):
        load("second")


def test_joint_recall():
    """Two layers without MLPs; the pairs that are asked for are more than a linear layer keeps."""
    sweep = grid.load("configs/sweeps/joint_recall.py")
    runs = grid.runs(dataclasses.replace(sweep, keep=lambda point: point["seed"] == 0))
    full = {tuple(cost.full_layers(run.config)) for run in runs}
    assert len(runs) == 7 * 2 and full == {(), (1,), (0, 1)}


def test_attention_behind_a_convolution():
    site = Site(16, 0, 1)
    made = lambda module, config: module(config, site, rngs=nnx.Rngs(0))
    settings = {"kind": "attention", "num_heads": 2, "head_dim": 8}
    plain = made(attention.Mixer, attention.Config(**settings))
    behind = made(conv_attention.Mixer, conv_attention.Config(**settings))
    with pytest.raises(ConfigError, match="cannot generate"):
        behind.init_cache(1, 8, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    context = lambda: Context(single_document(2, 6))
    taps = np.zeros((4, 16), np.float32)
    for back, shifted in ((0, x), (1, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1])):
        behind.conv.kernel[...] = jnp.asarray(taps).at[3 - back].set(1)
        np.testing.assert_allclose(behind(x, context())[0], plain(shifted, context())[0], atol=1e-5)
