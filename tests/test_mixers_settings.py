"""Settings of every kind: parameters as published, and what is refused."""

import math

import jax
import pytest
from flax import nnx
from test_mixers import make

from hybridlm import mixers
from hybridlm.errors import ConfigError

# Parameters of a 24-layer, 1024-wide, 32000-word, untied model of each kind: the published configurations.
MILLIONS = {"attention": 373.9, "delta_net": 374.4, "gla": 374.5, "hgrn": 373.9, "hgrn2": 373.9, "kda": 387.0}


def parameters(kind, d_model, **settings):
    mixer, config, site = mixers.load(kind), make(kind, **settings), mixers.Site(d_model, 0, 24)
    config.check(d_model)
    size = lambda make: sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(
            nnx.state(nnx.eval_shape(lambda: make(config, site, rngs=nnx.Rngs(params=0))))
        )
    )
    return size(mixer) + (size(mixer.shared_class) / 24 if mixer.shared_class else 0)


@pytest.mark.parametrize("kind", MILLIONS)
def test_default_parameters_match_published_counts(kind):
    d, layers, hidden = 1024, 24, 2816
    layer = parameters(kind, d) + 3 * d * hidden + 2 * d
    assert round((layers * layer + 2 * 32000 * d + d) / 1e6, 1) == MILLIONS[kind]


def test_parameters_of_the_other_kinds():
    d = 1024
    retnet = parameters("retnet", d) + 3 * d * 1536 + 2 * d  # paired with an MLP of ratio 2
    assert round((24 * retnet + 2 * 32000 * d + d) / 1e6, 1) == 380.2
    assert parameters("gated_delta_net", 2048) / 2048**2 == pytest.approx(6, abs=0.05)
    # Released checkpoints as others counted them: mamba-130m, mamba2-130m, xLSTM-7b (its authors).
    assert 24 * (parameters("mamba", 768) + 768) + 50280 * 768 + 768 == 129135360
    assert 24 * (parameters("mamba2", 768) + 768) + 50288 * 768 + 768 == 128989632
    xlstm = parameters("mlstm", 4096, head_dim=256) + 3 * 4096 * 10944 + 2 * 4096
    assert 32 * xlstm + 2 * 50304 * 4096 + 4096 == 6865424896
    assert parameters("gated_delta_product", 2048) / 2048**2 == pytest.approx(8.25, abs=0.05)
    # DeepSeek-V2's sizes, written out: q, latent and shared key, its norm, up-projection, output.
    rank, heads = 512, 16
    expected = 2048 * heads * 192 + 2048 * (rank + 64) + rank + rank * heads * 256 + heads * 128 * 2048
    assert parameters("mla", 2048) == expected


@pytest.mark.parametrize(
    "kind, settings, field",
    [
        ("attention", dict(head_dim=48), "num_heads"),  # 64 / 48
        ("attention", dict(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        ("attention", dict(rotary_fraction=0.0), "rotary_fraction"),
        ("attention", dict(yarn=(4.0,)), "yarn"),
        ("attention", dict(yarn=(0.5, 8.0)), "yarn"),
        ("attention", dict(yarn=(4.0, 8.0), rope_theta=0.0), "yarn"),
        ("mla", dict(num_heads=2, yarn=(4.0, 8.0, 1.0, 2.0)), "yarn"),
        ("attention", dict(head_dim=8, rotary_fraction=0.4), "rotary_fraction"),  # 3 channels
        ("attention", dict(qk_norm="l2"), "qk_norm"),
        ("attention", dict(window=-1), "window"),
        ("mla", dict(num_heads=1, qk_rope_head_dim=7), "qk_rope_head_dim"),
        ("mla", dict(kv_lora_rank=0), "kv_lora_rank"),
        ("delta_net", dict(), "num_heads"),  # 64 / 128
        ("delta_net", dict(head_dim=0), "head_dim"),
        ("gated_delta_net", dict(head_dim=64), "num_heads"),  # 48 / 64
        ("gated_delta_net", dict(num_heads=4, num_v_heads=6, head_dim=8), "num_v_heads"),
        ("kda", dict(num_heads=2, lower_bound=5.0), "lower_bound"),
        ("kda", dict(num_heads=2, output_gate="silu"), "output_gate"),
        ("kda", dict(num_heads=2, conv_size=-4), "conv_size"),
        ("gla", dict(num_heads=3), "num_heads"),
        ("gla", dict(gate_normalizer=0.0), "gate_normalizer"),
        ("hgrn", dict(width=-1), "width"),
        ("hgrn2", dict(num_heads=3, head_dim=16), "num_heads"),
        ("retnet", dict(num_heads=2, head_dim=5), "head_dim"),
        ("mamba2", dict(head_dim=48), "num_heads"),  # 128 / 48
        ("mamba2", dict(n_groups=3), "n_groups"),
        ("mamba2", dict(dt_min=0.1, dt_max=0.01), "dt_max"),
        ("mamba", dict(dbc_norm="layer"), "dbc_norm"),
        ("gated_delta_product", dict(num_householder=0), "num_householder"),
        ("lightning", dict(head_dim=64, slopes="alibi"), "slopes"),
        ("s4d", dict(state_size=5), "state_size"),
        ("log_linear", dict(of="mlstm"), "of"),
        ("mom", dict(of="retnet"), "of"),
        ("mom", dict(of="gla", top_k=5), "top_k"),
        ("sse", dict(of="gla", partitions=1, top_k=2), "top_k"),
        ("sse", dict(of="delta_net", rows=2), "rows"),
        ("log_linear", dict(of="gated_delta_product"), "of"),
        ("rglru", dict(num_heads=5), "num_heads"),
        ("mlstm", dict(input_gate="relu"), "input_gate"),
        ("feature_map", dict(feature_map="gelu"), "feature_map"),
        ("feature_map", dict(num_heads=2, output_norm=False, output_gate="swish"), "output_gate"),
        ("based", dict(num_heads=5), "num_heads"),
        ("comba", dict(num_heads=2, correction=-1.0), "correction"),
        ("rwkv6", dict(head_dim=48), "num_heads"),
        ("rwkv7", dict(gate_rank=-1), "gate_rank"),
        ("parallel", dict(branches=("gla",)), "branches"),
        ("parallel", dict(branches=("gla", "gla")), "branches"),
        ("parallel", dict(branches=("gla", "hgrn2")), "branches"),
        ("parallel", dict(branches=("gla", "parallel")), "branches"),
        ("parallel", dict(branches=("gla", "attention"), multipliers=(1.0,)), "multipliers"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, field):
    with pytest.raises(ConfigError) as error:
        make(kind, **settings).check(64)
    assert error.value.field == field
