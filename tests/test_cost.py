"""Costs against published parameter counts, the model's own shapes, and formulas written out by hand."""

import math

import jax
import pytest
from ml_collections import FrozenConfigDict

from hybridlm import config as configs
from hybridlm import cost, model


def resolved(pattern: str, **model_fields: object) -> FrozenConfigDict:
    config = configs.default()
    config.model.update({"pattern": pattern, **model_fields})
    config.data.path = "python-stdlib:"
    return configs.resolve(config)


@pytest.mark.parametrize(
    ("pattern", "millions"),
    [("full", 373.9), ("deltanet", 374.4), ("gla", 374.5), ("hgrn", 373.9), ("hgrn2", 373.9), ("kda", 387.0)],
)
def test_published_parameter_counts(pattern: str, millions: float) -> None:
    """FLA's configs of d_model 1024, 24 layers, 32000 tokens, head not tied."""
    assert cost.parameters(resolved(pattern, num_layers=24)) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("pattern", "fields"),
    [
        ("(kda*3 full)*2 swa", {}),
        ("hgrn hgrn2 mla", {"tie_embeddings": True}),
        ("gdn*2 deltanet gla retnet", {"mlp_hidden": 80}),
    ],
)
def test_parameters_are_those_of_the_model(pattern: str, fields: dict[str, object]) -> None:
    config = resolved(pattern, d_model=1024, vocab_size=64, **fields)
    shapes = jax.tree.leaves(model.shapes(model.build(config)))
    assert cost.parameters(config) == sum(math.prod(leaf.shape) for leaf in shapes)


def test_state_and_cache_bytes_are_those_of_the_decode_cache() -> None:
    config = resolved("kda gdn full mla swa", d_model=1024, vocab_size=64)
    definition, length = model.build(config), config.train.seq_len

    def cache(params: model.Params) -> model.Cache:
        return model.merge(definition, params).init_cache(1, length)

    held = jax.eval_shape(cache, model.shapes(definition))
    for row, layer in zip(cost.layers(config), held, strict=True):
        # Scalars and positions aside, a cache is its state (counted as float32) and its keys and values.
        big = [leaf for leaf in jax.tree.leaves(layer) if leaf.dtype in ("float32", "bfloat16")]
        elements = sum(math.prod(leaf.shape) for leaf in big)
        assert row.state_bytes // 4 + row.cache_bytes // 2 == elements, row.name


def test_full_layers_have_an_unbounded_cache() -> None:
    config = resolved("kda full swa mla retnet", d_model=1024)
    assert cost.full_layers(config) == [1, 3]
    summary = cost.summary(config)
    assert (summary["num_layers"], summary["num_full_layers"], summary["full_layers"]) == (5, 2, [1, 3])
    assert summary["parameters"] == cost.parameters(config)


def test_train_flops_of_a_transformer() -> None:
    """6 per matrix parameter, and 12 d per layer and visible token (Chinchilla, appendix F, causal)."""
    config = resolved("full*3", d_model=128, mlp_hidden=256, vocab_size=100)
    matrices = 3 * (4 * 128**2 + 3 * 128 * 256) + 100 * 128
    visible = (config.train.seq_len + 1) / 2
    assert cost.train_flops_per_token(config) == pytest.approx(
        6 * matrices + 3 * 12 * 128 * visible, rel=0.01
    )


def test_window_bounds_the_context_that_is_paid_for() -> None:
    config = resolved("swa", d_model=128)
    seq_len, window = config.train.seq_len, config.mixers["swa"].window
    full = resolved("full", d_model=128)
    visible = sum(min(t, window) for t in range(1, seq_len + 1)) / seq_len
    saved = cost.train_flops_per_token(full) - cost.train_flops_per_token(config)
    assert saved == pytest.approx(12 * 128 * ((seq_len + 1) / 2 - visible))


def test_memory_is_sharded() -> None:
    config = resolved("kda*3 full", num_layers=24)
    one = cost.memory(config, {"data": 1, "fsdp": 1, "tensor": 1})
    eight = cost.memory(config, {"data": 1, "fsdp": 8, "tensor": 1})
    assert one.parameters == 4 * cost.parameters(config)
    assert one.optimizer == 2 * one.parameters
    assert eight.parameters == one.parameters / 8
    assert eight.activations < one.activations / 4


def test_matched_mlp_hidden() -> None:
    transformer, gdn = resolved("full", num_layers=24), resolved("gdn", num_layers=24)
    matched = resolved(
        "gdn", num_layers=24, mlp_hidden=cost.matched_mlp_hidden(gdn, cost.parameters(transformer))
    )
    assert cost.parameters(gdn) > 1.1 * cost.parameters(transformer)
    assert cost.parameters(matched) == pytest.approx(cost.parameters(transformer), rel=0.005)


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12), ("cpu", None)],
)
def test_peak_flops(device: str, peak: float | None) -> None:
    assert cost.peak_flops(device) == peak
