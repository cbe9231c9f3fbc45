"""Families: config.json and a definition, each from the other; names and rules.

No model is computed. golden/models/shapes.json has the names and shapes of the tensors of eight families.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from hybridlm import model
from hybridlm.convert import families
from hybridlm.convert.family import same_model
from hybridlm.errors import ConfigError

SHAPES = json.loads((Path(__file__).parent / "golden" / "models" / "shapes.json").read_text())
K2 = {
    "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
EXTRA = {
    "gla": {
        "model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "fuse_norm": True,
    },
    "gla with convolutions, no gate": {
        "model_type": "gla", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "use_short_conv": True, "use_output_gate": False,
    },
    "gated_deltanet, sigmoid gate": {
        "model_type": "gated_deltanet", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 2, "head_dim": 8, "output_gate_activation": "sigmoid",
    },
    "hgrn": {
        "model_type": "hgrn", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11,
        "attn": [
            {"layers": [0], "num_heads": 2, "window_size": 8},
            {"layers": [2], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 5e5},
        ],
    },
    "transformer": {
        "model_type": "transformer", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 4, "qk_norm": True, "tie_word_embeddings": True,
    },
    "kda, safe gate, grouped values": {
        "model_type": "kda", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "num_v_heads": 4, "head_dim": 8, "safe_gate": True, "lower_bound": -5, "allow_neg_eigval": True,
    },
    "comba, grouped values": {
        "model_type": "comba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "num_v_heads": 4, "head_dim": 8, "use_inner_decay": False, "correction_factor": 0.02,
    },
    "mom": {
        "model_type": "mom", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "head_dim": 8, "expand_v": 2.0, "num_memories": 3, "topk": 3, "shared_mem": False,
        "use_output_gate": False, "aux_loss_scale": 0.001, "attn": {"layers": [1], "num_heads": 2},
    },
    "mom of one projection": {
        "model_type": "mom", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "head_dim": 8, "single_kv_proj": True, "shared_mem": False,
    },
    "log_linear_mamba2": {
        "model_type": "log_linear_mamba2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "head_dim": 16, "n_groups": 2, "dt_limit": [0.0, float("inf")], "tie_word_embeddings": True,
    },
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "head_dim": 16,
        "n_groups": 2, "dt_limit": [0.01, 2.0], "norm_eps": 1e-6, "residual_in_fp32": True,
    },
    "mamba2 of transformers": {
        "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 11, "head_dim": 16,
        "num_heads": 8, "layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "time_step_rank": 4, "time_step_floor": 1e-4, "norm_before_gate": True, "rms_norm": True,
    },
    "gated_deltaproduct": {
        "model_type": "gated_deltaproduct", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 2, "head_dim": 8, "num_householder": 2, "use_forget_gate": True,
        "allow_neg_eigval": True, "attn": {"layers": [1], "num_heads": 2},
    },
    "gated_deltaproduct without decay": {
        "model_type": "gated_deltaproduct", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "num_heads": 2, "head_dim": 8, "expand_v": 1.5, "use_output_gate": False, "use_short_conv": False,
    },
    "mla": {
        "model_type": "mla", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "qk_head_dim": 10, "v_head_dim": 5, "rope_theta": 5e5,
    },
    "rwkv6": {
        "model_type": "rwkv6", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "num_heads": 2,
        "proj_low_rank_dim": 3, "norm_first": False, "hidden_ratio": None,
    },
    "rwkv7": {
        "model_type": "rwkv7", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 11, "head_dim": None,
        "num_heads": 2, "a_low_rank_dim": None, "value_dim": [64, 64], "tie_word_embeddings": True,
    },
    "mamba": {
        "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11, "expand": 3,
        "intermediate_size": 96, "time_step_rank": "auto", "d_model": 32, "n_layer": 2,
        "fused_add_norm": True, "conv_kernel": 3, "rms_norm": True, "ssm_cfg": {},
        "tie_word_embeddings": False,
    },
    "falcon_mamba": {
        "model_type": "falcon_mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "layer_norm_epsilon": 1e-6, "mixer_rms_eps": 1e-5, "time_step_rank": 5, "state_size": 8,
    },
    "bamba": {
        "model_type": "bamba", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8,
        "mamba_d_head": "auto", "mamba_d_state": 16, "attn_layer_indices": [1], "rope_theta": 5e5,
        "time_step_limit": [0.0, {"__float__": "Infinity"}], "mamba_chunk_size": 256,
    },
    "granitemoehybrid": {
        "model_type": "granitemoehybrid", "hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 11,
        "intermediate_size": 24, "shared_intermediate_size": 20, "num_local_experts": 4,
        "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_d_state": 16, "layer_types": ["mamba", "mamba", "attention"],
        "position_embedding_type": "nope", "embedding_multiplier": 12, "residual_multiplier": 0.22,
        "attention_multiplier": 0.0078125, "logits_scaling": 6,
    },
    "jamba": {
        "model_type": "jamba", "hidden_size": 32, "num_hidden_layers": 5, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3,
        "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8,
    },
    "jamba, dense": {
        "model_type": "jamba", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 1,
        "attn_layer_period": 9, "attn_layer_offset": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11,
        "intermediate_size": 24, "first_k_dense_replace": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
        "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "rope_theta": 5e4,
        "n_shared_experts": 2, "moe_intermediate_size": 12, "scoring_func": "sigmoid", "seq_aux": True,
    },
    "minimax": {
        "model_type": "minimax", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3,
        "block_size": 4, "sliding_window": 9, "rope_theta": 1e7, "full_attn_alpha_factor": 3.5565588200778455,
        "linear_attn_alpha_factor": 3.5565588200778455, "mlp_alpha_factor": 3, "mlp_beta_factor": 1e-05,
    },
    "bailing_hybrid": {
        "model_type": "bailing_hybrid", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "intermediate_size": 24, "first_k_dense_replace": 1, "layer_group_size": 4, "num_attention_heads": 2,
        "head_dim": 8, "short_conv_kernel_size": 3, "no_kda_lora": True, "kda_lower_bound": -4,
        "linear_attention": "kda", "q_lora_rank": 6, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 8, "gated_attention_proj_granularity_type": "head_wise",
        "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 2, "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 24, "n_group": 2, "topk_group": 1, "score_function": "sigmoid",
    },
    "kimi_k2": {
        "model_type": "kimi_k2", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "intermediate_size": 24, "first_k_dense_replace": 1, "num_attention_heads": 2, "kv_lora_rank": 8,
        "q_lora_rank": 6, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "rope_theta": 5e4,
        "moe_intermediate_size": 12, "routed_scaling_factor": 2.827, "rope_scaling": K2,
    },
    "falcon_h1": {
        "model_type": "falcon_h1", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 16,
        "mlp_multipliers": [0.88, 0.3], "ssm_multipliers": [0.3, 0.25, 0.8, 1.2, 0.6], "key_multiplier": 0.1,
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.24, "attention_in_multiplier": 0.7,
        "attention_out_multiplier": 0.94, "embedding_multiplier": 5.66, "lm_head_multiplier": 0.0195,
        "rope_theta": 1e11, "mamba_expand": 2, "mamba_use_mlp": True,
    },
    "nemotron_h": {
        "model_type": "nemotron_h", "hidden_size": 32, "hybrid_override_pattern": "M-M*-ME", "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 10, "n_groups": 2, "ssm_state_size": 16,
        "n_routed_experts": 4, "moe_intermediate_size": 12, "num_hidden_layers": 7, "chunk_size": 128,
    },
    "recurrent_gemma": {
        "model_type": "recurrent_gemma", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 1, "lru_width": 48,
        "attention_bias": True, "attention_window_size": 8, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "lfm2": {
        "model_type": "lfm2", "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 11, "block_ff_dim": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "full_attn_idxs": [1], "block_multiple_of": 16,
        "tie_embedding": True, "block_dim": 32, "conv_L_cache": 4, "theta": 1e6, "rope_theta": 1e6,
    },
    "xlstm": {
        "model_type": "xlstm", "hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 2,
        "num_blocks": 2, "num_heads": 4, "vocab_size": 11, "mode": "inference", "chunk_size": 64,
    },
    "linear_attn": {
        "model_type": "linear_attn", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
    },
    "linear_attn, hedgehog": {
        "model_type": "linear_attn", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
        "feature_map": "hedgehog", "norm_feature_map": True, "attn": {"layers": [1], "num_heads": 2},
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "head_dim": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "qwen3_5_moe_text": {
        "model_type": "qwen3_5_moe_text", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 11,
        "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    },
    "olmo_hybrid": {
        "model_type": "olmo_hybrid", "hidden_size": 32, "num_hidden_layers": 5, "vocab_size": 11,
        "intermediate_size": 24, "num_attention_heads": 4, "rope_parameters": None, "rope_theta": None,
    },
}  # fmt: skip


EXTRA["kimi_linear, no shared expert"] = SHAPES["kimi_linear"]["config"] | {"num_shared_experts": 0}
EXTRA["kimi_linear, no shared expert"].pop("n_shared_experts", None)


SELDOM = ("bamba", "deepseek_v3", "falcon_mamba", "jamba, dense", "lfm2", "minimax", "xlstm")
NAMES = [*SHAPES, *(pytest.param(n, marks=pytest.mark.slow) if n in SELDOM else n for n in EXTRA)]


@pytest.mark.parametrize("name", NAMES)
def test_configs_and_rules_of(name: str) -> None:
    """config.json -> definition -> config.json -> the same; rules invert; names are the published ones."""
    values = SHAPES[name]["config"] if name in SHAPES else EXTRA[name]
    family = families.FAMILIES[values["model_type"]]
    definition = model.build(family.architecture(values).config())
    written = family.write(definition, values["model_type"])
    assert not same_model(definition, model.build(family.architecture(written).config()))
    planned = families.plan(definition, family, written)
    if name in SHAPES:
        assert planned.shapes == {key: tuple(shape) for key, shape in SHAPES[name]["shapes"].items()}
    rng, sizes = np.random.default_rng(0), model.canonical_shapes(definition)
    for rule in (rule for rule in planned.rules if rule.theirs):
        ours = [rng.normal(size=sizes[entry].shape) for entry in rule.ours]
        for before, after in zip(ours, rule.inward(rule.outward(ours)), strict=True):
            np.testing.assert_array_equal(before, after)


def test_layers_of_released_configs() -> None:
    """Kimi Linear counts its layers from 1; Qwen3-Next places attention by an interval."""
    kimi = SHAPES["kimi_linear"]["config"] | {
        "num_hidden_layers": 27,
        "layer_types": None,
        "mlp_layer_types": None,
    }
    full = [4, 8, 12, 16, 20, 24, 27]
    kda = [layer for layer in range(1, 28) if layer not in full]
    kimi["linear_attn_config"] = kimi["linear_attn_config"] | {"full_attn_layers": full, "kda_layers": kda}
    kimi |= {"rope_theta": 10000.0, "rope_scaling": None, "moe_router_activation_func": "sigmoid"}
    kimi |= {
        "use_grouped_topk": True,
        "num_nextn_predict_layers": 0,
        "mla_use_nope": True,
        "moe_layer_freq": 1,
    }
    layers = families.FAMILIES["kimi_linear"].architecture(kimi).layers
    assert layers == ["kda", *["kda/moe"] * 2, "mla/moe", *["kda/moe"] * 3, "mla/moe"] + [
        *["kda/moe"] * 3, "mla/moe",
    ] * 4 + ["kda/moe"] * 2 + ["mla/moe"]  # fmt: skip
    qwen = {
        k: v for k, v in SHAPES["qwen3_next"]["config"].items() if k not in ("layer_types", "rope_parameters")
    }
    qwen |= {
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
        "mlp_only_layers": [],
    }
    found = families.FAMILIES["qwen3_next"].architecture(qwen)
    assert found.layers == ["gdn/moe", "full/moe"] * 2
    assert found.mixers["full"].rope_theta == 1e7


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("fla_deltanet", {"qk_norm": "sum"}, "qk_norm"),
        ("fla_deltanet", {"num_heads": 5}, "expand_k"),
        ("fla_deltanet", {"hidden_act": "powlu"}, "hidden_act"),
        ("fla_deltanet", {"attn": {"layers": [7], "num_heads": 4}}, "attn: layers"),
        ("fla_kda_hybrid", {"attn": {"layers": [1], "num_heads": 4, "rope_theta": None}}, "attn: rope_theta"),
        (
            "fla_kda_hybrid",
            {"attn": {"layers": [1], "num_heads": 4, "qk_norm": True}},
            "attn: qk_norm",
        ),
        ("fla_kda_hybrid", {"attnres_block_size": 2}, "attnres_block_size"),
        ("fla_retnet", {"feature_map": "relu"}, "feature_map"),
        ("qwen3_dense", {"attention_bias": True}, "attention_bias"),
        (
            "qwen3_dense",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_parameters: rope_type",
        ),
        ("qwen3_dense", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3_dense", {"hidden_size": "64"}, "hidden_size"),
        ("qwen3_next", {"layer_types": ["linear_attention"]}, "layer_types"),
        ("mom", {"use_short_conv": False}, "use_short_conv"),
        ("mom", {"attn": {"layers": [1], "num_heads": 2, "qkv_bias": True}}, "attn: qkv_bias"),
        ("log_linear_mamba2", {"dt_limit": [0.0, 1.0]}, "dt_limit"),
        ("log_linear_mamba2", {"num_heads": 3}, "num_heads"),
        ("mamba2", {"dt_limit": [1.0]}, "dt_limit"),
        ("mamba2", {"use_conv_bias": False}, "use_conv_bias"),
        ("mamba2 of transformers", {"num_heads": 4}, "num_heads"),
        ("gated_deltaproduct", {"num_v_heads": 4}, "num_v_heads"),
        ("mla", {"window_size": 5}, "window_size"),
        ("mla", {"qk_head_dim": 12}, "qk_head_dim"),
        ("rwkv6", {"norm_bias": False}, "norm_bias"),
        ("rwkv6", {"expand_k": 0.3}, "expand_k"),
        ("rwkv7", {"value_dim": 128}, "value_dim"),
        ("rwkv7", {"attn": {"layers": [1], "num_heads": 2}}, "attn"),
        ("mamba", {"intermediate_size": 64}, "intermediate_size"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias"),
        ("falcon_mamba", {"use_bias": True}, "use_bias"),
        ("bamba", {"mamba_d_head": 8}, "mamba_d_head"),
        ("bamba", {"mlp_bias": True}, "mlp_bias"),
        ("bamba", {"time_step_limit": [0.1, 0.0]}, "time_step_limit"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("granitemoehybrid", {"logits_scaling": "6"}, "logits_scaling"),
        ("jamba", {"attn_layer_offset": 3}, "attn_layer_offset"),
        ("jamba", {"sliding_window": 8}, "sliding_window"),
        ("deepseek_v3", {"rope_scaling": {"type": "longrope", "factor": 40}}, "rope_scaling: type"),
        ("deepseek_v3", {"rope_scaling": K2 | {"factor": 0.5}}, "rope_scaling: factor"),
        ("deepseek_v3", {"rope_scaling": K2 | {"mscale": None}}, "rope_scaling: mscale_all_dim"),
        ("deepseek_v3", {"rope_scaling": K2 | {"truncate": False}}, "rope_scaling: truncate"),
        ("qwen3_dense", {"rope_parameters": K2}, "rope_parameters: mscale_all_dim"),
        ("mla", {"rope_scaling": K2}, "rope_scaling: type"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("minimax", {"mlp_alpha_factor": 0}, "mlp_alpha_factor"),
        ("minimax", {"full_attn_beta_factor": -1.0}, "full_attn_beta_factor"),
        ("minimax", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("minimax", {"rotary_dim": 4}, "rotary_dim"),
        ("minimax", {"block_size": 1 << 20}, "block_size"),
        ("falcon_h1", {"mamba_rms_norm": True}, "mamba_norm_before_gate"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ("falcon_h1", {"projectors_bias": True}, "projectors_bias"),
        ("falcon_h1", {"lm_head_multiplier": 0}, "lm_head_multiplier"),
        ("nemotron_h", {"hybrid_override_pattern": "-M"}, "layers_block_type"),
        ("nemotron_h", {"hybrid_override_pattern": "M--"}, "layers_block_type"),
        ("nemotron_h", {"layers_block_type": ["mamba", "conv"]}, "layers_block_type"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ("nemotron_h", {"moe_latent_size": 8}, "moe_latent_size"),
        ("recurrent_gemma", {"block_types": ["recurrent", "local"]}, "block_types"),
        ("recurrent_gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("recurrent_gemma", {"intermediate_size": 25}, "intermediate_size"),
        ("lfm2", {"conv_bias": True}, "conv_bias"),
        ("lfm2", {"full_attn_idxs": [3]}, "full_attn_idxs"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode"),
        ("xlstm", {"num_blocks": 3}, "num_hidden_layers"),
        ("xlstm", {"ffn_proj_factor": -1.0}, "ffn_proj_factor"),
        ("bailing_hybrid", {"kda_lower_bound": 0}, "kda_lower_bound"),
        ("bailing_hybrid", {"group_norm_size": 4}, "group_norm_size"),
        ("bailing_hybrid", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("bailing_hybrid", {"expert_swiglu_limit_list": [7.0] * 4}, "expert_swiglu_limit_list"),
        ("bailing_hybrid", {"num_shared_experts": 0}, "num_shared_experts"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope"),
        ("kimi_linear", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("kimi_linear", {"num_local_experts": 8}, "num_experts"),
        ("kimi_linear", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_a_config_may_not_ask_for(name: str, changes: dict, field: str) -> None:
    values = (SHAPES[name]["config"] if name in SHAPES else EXTRA[name]) | changes
    with pytest.raises(ConfigError) as caught:
        families.FAMILIES[values["model_type"]].architecture(values)
    assert caught.value.field == f"config.json: {field}"


def test_what_fields_that_are_missing_or_null_stand_for() -> None:
    """The defaults of the published config classes, which are not those of other families."""
    retnet = {k: v for k, v in SHAPES["fla_retnet"]["config"].items() if k not in ("hidden_ratio",)}
    retnet |= {"intermediate_size": None, "hidden_size": 768, "num_heads": 4, "temperature": 0.6}
    read = lambda values: families.FAMILIES[values["model_type"]].architecture(values)
    assert read(retnet).model["mlp_hidden"] == 1024  # fla's RetNet has a ratio of 2
    assert read(retnet | {"hidden_ratio": None}).model["mlp_hidden"] == 2048
    hgrn2 = SHAPES["fla_hgrn2"]["config"] | {"hidden_size": 64, "num_heads": 3, "expand_ratio": 16}
    assert read(hgrn2).mixers["hgrn2"].num_heads == 4  # expand_ratio counts
    assert read(hgrn2 | {"num_heads": 2, "expand_ratio": None}).mixers["hgrn2"].head_dim == 32
    qwen3 = SHAPES["qwen3_dense"]["config"] | {"layer_types": None, "max_window_layers": 0}
    qwen3 |= {"use_sliding_window": True, "sliding_window": None}
    assert set(read(qwen3).layers) == {"full"}


def test_a_multimodal_config(tmp_path: Path) -> None:
    """Qwen3.5 is released around a vision tower: its text_config is the model, tied as the outer one says."""
    text = EXTRA["qwen3_5_text"] | {"tie_word_embeddings": False}
    outer = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": True, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    source = families.read_config(tmp_path)
    assert source.model_type == "qwen3_5_text" and source.config.model.tie_embeddings
    (tmp_path / "config.json").write_text(json.dumps(outer | {"text_config": None}))
    with pytest.raises(ConfigError, match="text_config"):
        families.read_config(tmp_path)
