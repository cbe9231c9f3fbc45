"""transformers' PyTorch code against imports of checkpoints that it wrote, and exports that it reads back.

Needs the `parity` extra (torch and transformers, without flash-linear-attention: where that is installed,
transformers calls its GPU kernels). Models are made here, at random, with every parameter away from its
initial value.
"""

from pathlib import Path

import numpy as np
import pytest

from hybridlm import config as configs
from hybridlm import model
from hybridlm.convert import evaluate, incoming, outgoing
from hybridlm.run import checkpoint

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

pytestmark = pytest.mark.parity

SMALL = dict(
    vocab_size=61, hidden_size=48, intermediate_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12
)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
QWEN_MOE = dict(
    num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=16
)
KIMI = dict(
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14, linear_num_heads=3, linear_head_dim=16, num_local_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=24,
)  # fmt: skip
SSD = dict(intermediate_size=None, n_groups=1)
MAMBA2 = dict(mamba_n_heads=6, mamba_n_groups=2, mamba_d_state=10)
BAMBA = dict(num_attention_heads=4, num_key_value_heads=2)
DEEPSEEK = dict(
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
    moe_intermediate_size=24, num_hidden_layers=3,
)  # fmt: skip
LING = dict(
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6,
    v_head_dim=14, head_dim=16, num_local_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
    moe_intermediate_size=24, num_hidden_layers=4,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=50.0, factor=8.0, original_max_position_embeddings=16, beta_fast=2.0)
STRETCHED = DEEPSEEK | dict(qk_rope_head_dim=16, first_k_dense_replace=1)
MIXTRAL = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=5)
CASES = {
    "qwen3": ("Qwen3", dict(num_hidden_layers=3, **ATTENTION)),
    "qwen3 tied, sliding": (
        "Qwen3",
        dict(
            num_hidden_layers=4, tie_word_embeddings=True, use_sliding_window=True, sliding_window=7,
            max_window_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **ATTENTION,
        ),
    ),
    "qwen3_next": ("Qwen3Next", dict(num_hidden_layers=5, **ATTENTION, **LINEAR, **QWEN_MOE)),
    "qwen3_next sparse step, no renormalisation": (
        "Qwen3Next",
        dict(
            num_hidden_layers=4, norm_topk_prob=False, decoder_sparse_step=2, rms_norm_eps=1e-5,
            layer_types=["full_attention", "linear_attention"] * 2, **ATTENTION, **LINEAR, **QWEN_MOE,
        ),
    ),
    "qwen3_5": ("Qwen3_5", dict(num_hidden_layers=4, **ATTENTION, **LINEAR)),
    "qwen3_5_moe": ("Qwen3_5Moe", dict(num_hidden_layers=4, **ATTENTION, **LINEAR, **QWEN_MOE)),
    "kimi_linear": ("KimiLinear", dict(num_hidden_layers=6, **KIMI)),
    "kimi_linear groups, latent query": (
        "KimiLinear",
        dict(
            num_hidden_layers=3, q_lora_rank=20, n_group=3, topk_group=2, n_shared_experts=2,
            layer_types=["full_attention", "linear_attention", "full_attention"],
            mlp_layer_types=["sparse", "dense", "sparse"], norm_topk_prob=False, **KIMI,
        ),
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        dict(
            num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, **LINEAR,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
    "mamba": ("Mamba", dict(intermediate_size=96, num_hidden_layers=3, state_size=8)),
    "falcon_mamba": (
        "FalconMamba",
        dict(intermediate_size=96, num_hidden_layers=2, state_size=8, mixer_rms_eps=1e-5),
    ),
    "mamba2": ("Mamba2", dict(SSD, num_hidden_layers=3, num_heads=6, head_dim=16, n_groups=2, state_size=10)),
    "mamba2 one group, limits, tied": (
        "Mamba2",
        dict(
            SSD, num_hidden_layers=2, num_heads=4, head_dim=12, expand=1, state_size=16, conv_kernel=3,
            time_step_limit=(0.3, 0.9), tie_word_embeddings=True, layer_norm_epsilon=1e-6,
        ),
    ),
    "bamba": ("Bamba", dict(num_hidden_layers=4, attn_layer_indices=[1], **MAMBA2, **BAMBA)),
    "granitemoehybrid dense, NoPE": (
        "GraniteMoeHybrid",
        dict(
            num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"], num_local_experts=0,
            shared_intermediate_size=56, embedding_multiplier=12.0, residual_multiplier=0.22,
            attention_multiplier=0.015625, logits_scaling=6.0, **MAMBA2, **BAMBA,
        ),
    ),
    "granitemoehybrid experts, RoPE": (
        "GraniteMoeHybrid",
        dict(
            num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_local_experts=4,
            num_experts_per_tok=2, shared_intermediate_size=32, position_embedding_type="rope", **MAMBA2,
            **BAMBA,
        ),
    ),
    "jamba": (
        "Jamba",
        dict(
            num_hidden_layers=5, attn_layer_period=3, attn_layer_offset=1, num_experts=4, mamba_d_state=8,
            **BAMBA,
        ),
    ),
    "deepseek_v3": ("DeepseekV3", dict(first_k_dense_replace=1, q_lora_rank=14, **DEEPSEEK)),
    "deepseek_v3 direct query, no groups": (
        "DeepseekV3",
        dict(
            first_k_dense_replace=0, q_lora_rank=None, n_shared_experts=2,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5e4},
            **DEEPSEEK | dict(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0),
        ),
    ),
    "deepseek_v3 YaRN": (
        "DeepseekV3",
        dict(q_lora_rank=14, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.707), **STRETCHED),
    ),
    "deepseek_v3 YaRN, its own scales": (
        "DeepseekV3",
        dict(q_lora_rank=14, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0), **STRETCHED),
    ),
    "deepseek_v3 YaRN, betas of Kimi K2": (
        "DeepseekV3",
        dict(q_lora_rank=14, rope_parameters=YARN | dict(beta_fast=1.0, beta_slow=1.0), **STRETCHED),
    ),
    "bailing_hybrid": ("BailingHybrid", dict(layer_group_size=2, first_k_dense_replace=1, **LING)),
    "bailing_hybrid other heads, latent query, softplus": (
        "BailingHybrid",
        dict(
            layer_types=["full_attention", "linear_attention", "linear_attention", "full_attention"],
            mlp_layer_types=["sparse", "dense", "sparse", "dense"], linear_num_heads=3, linear_head_dim=10,
            short_conv_kernel_size=3, q_lora_rank=20, n_shared_experts=2, norm_topk_prob=False,
            kda_safe_gate=False, rms_norm_eps=1e-5, **LING,
        ),
    ),
    "bailing_hybrid YaRN": (
        "BailingHybrid",
        dict(
            rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.707), layer_group_size=2,
            **LING | dict(qk_rope_head_dim=16, num_hidden_layers=2),
        ),
    ),
    "qwen3 YaRN": ("Qwen3", dict(num_hidden_layers=2, rope_parameters=YARN, **ATTENTION)),
    "qwen3_next YaRN": (
        "Qwen3Next",
        dict(
            num_hidden_layers=2, layer_types=["full_attention", "linear_attention"],
            rope_parameters=YARN | dict(partial_rotary_factor=0.5), **ATTENTION, **LINEAR, **QWEN_MOE,
        ),
    ),
    "minimax": (
        "MiniMax",
        dict(
            num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_attn_alpha_factor=1.2, linear_attn_beta_factor=0.8, full_attn_alpha_factor=1.1,
            full_attn_beta_factor=0.9, mlp_alpha_factor=3.5565588200778455, block_size=16, **MIXTRAL,
        ),
    ),
    "minimax every other layer, window, tied": (
        "MiniMax",
        dict(
            num_hidden_layers=3, sliding_window=9, tie_word_embeddings=True, rms_norm_eps=1e-6,
            output_router_logits=True, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **MIXTRAL,
        ),
    ),
    "falcon_h1": (
        "FalconH1",
        dict(
            num_hidden_layers=2, mamba_d_ssm=72, embedding_multiplier=5.7, lm_head_multiplier=0.3,
            mlp_multipliers=[0.8, 0.3], key_multiplier=0.4, attention_in_multiplier=0.9,
            attention_out_multiplier=0.7, ssm_multipliers=[0.3, 0.25, 0.8, 1.2, 0.6], ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.24, **MAMBA2, **BAMBA,
        ),
    ),
    "falcon_h1 normed": (
        "FalconH1",
        dict(
            num_hidden_layers=2, mamba_d_ssm=None, mamba_rms_norm=True, mamba_norm_before_gate=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **MAMBA2, **BAMBA,
        ),
    ),
    "nemotron_h": (
        "NemotronH",
        dict(
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            mamba_num_heads=6, mamba_head_dim=10, ssm_state_size=12, n_groups=2, n_routed_experts=6,
            n_group=3, topk_group=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=20,
            **ATTENTION,
        ),
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        dict(
            num_hidden_layers=4, lru_width=48, attention_window_size=9, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True,
        ),
    ),
    "lfm2": ("Lfm2", dict(num_hidden_layers=4, full_attn_idxs=[2], block_multiple_of=8, **BAMBA)),
    "lfm2 as wide as it says": (
        "Lfm2",
        dict(
            num_hidden_layers=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
            **BAMBA,
        ),
    ),
    "xlstm": (
        "xLSTM",
        dict(hidden_size=128, intermediate_size=None, num_hidden_layers=2, num_heads=4, gate_soft_cap=5.0),
    ),
    "zamba2": (
        "Zamba2",
        dict(
            hidden_size=16, num_hidden_layers=6, mamba_d_state=10, n_mamba_heads=4, num_attention_heads=4,
            layers_block_type=["linear_attention", "hybrid", "hybrid"] * 2,
            num_mem_blocks=2, use_shared_attention_adapter=True, adapter_rank=5, use_mem_rope=True,
        ),
    ),
    "zamba2 one block, NoPE, grouped": (
        "Zamba2",
        dict(
            hidden_size=16, num_hidden_layers=3, layers_block_type=["hybrid", "mamba", "hybrid"],
            mamba_d_state=6, mamba_ngroups=2, mamba_expand=1, n_mamba_heads=4, time_step_min=0.7,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        ),
    ),
    "olmo_hybrid NoPE": (
        "OlmoHybrid",
        dict(num_hidden_layers=4, num_attention_heads=4, rope_parameters=None, linear_allow_neg_eigval=False),
    ),
}  # fmt: skip


def torch_model(name: str):
    cls, settings = CASES[name]
    torch.manual_seed(len(name))
    config_class = f"{cls}TextConfig" if cls.startswith("Qwen3_5") else f"{cls}Config"
    config = getattr(transformers, config_class)(**SMALL | settings)
    return shaken(getattr(transformers, f"{cls}ForCausalLM")(config).eval())


def shaken(net):
    """With every parameter away from its initial value."""
    saved = net.state_dict()
    for key, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if key not in saved or key.endswith(("_decay", "slope_rate")):  # these follow from the config
            continue
        scale = 0.3 if tensor.ndim > 1 and "conv1d" not in key else 0.2
        if key.endswith(("A_log", "dt_bias")):
            tensor.data = torch.rand_like(tensor)
        elif tensor.ndim > 1:
            tensor.data = torch.randn_like(tensor) * scale
        else:
            tensor.data = tensor.data + torch.randn_like(tensor) * scale
    return net


def torch_logits(net, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor(ids)).logits.float().numpy()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    """...and prints the errors of the logits here, and of those that transformers makes of a new export."""
    net = torch_model(name)
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 70))
    want = torch_logits(net, ids)
    net.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    incoming.import_hf(tmp_path / "theirs", tmp_path / "run")
    errors = [error(evaluate.logits(*evaluate.load(tmp_path / "run"), ids), want)]
    assert errors[0] < 1e-4
    for folder, options in (("again", {}), ("anew", {"model_type": net.config.model_type})):
        outgoing.export_hf(tmp_path / "run", tmp_path / folder, **options)
        back, report = type(net).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        errors.append(error(torch_logits(back.eval(), ids), want))
        assert errors[-1] < 1e-5, folder
    print(f"\n{name}: {errors[0]:.1e} and {errors[-1]:.1e}")


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Qwen3.5 is released around a vision tower, which is left behind: the export is its text model."""
    small = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=48)
    text = SMALL | dict(num_hidden_layers=4, **ATTENTION, **LINEAR)
    config = transformers.Qwen3_5Config(text_config=text, vision_config=small, tie_word_embeddings=True)
    torch.manual_seed(0)
    net = shaken(transformers.Qwen3_5ForConditionalGeneration(config).eval())
    net.tie_weights()
    net.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 40))
    incoming.import_hf(tmp_path / "theirs", tmp_path / "run")
    assert error(evaluate.logits(*evaluate.load(tmp_path / "run"), ids), torch_logits(net, ids)) < 1e-4
    outgoing.export_hf(tmp_path / "run", tmp_path / "again")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert error(torch_logits(back.eval(), ids), torch_logits(net, ids)) < 1e-5


def test_a_native_run_leaves(tmp_path: Path) -> None:
    """A model that was never imported: its family is found, and transformers computes its logits."""
    config = configs.default()
    config.data.path = "python-stdlib:"
    config.mixers.update(full=configs.mixer("attention", num_heads=2, head_dim=12, qk_norm="head"))
    config.model.update(pattern="full*2", d_model=24, vocab_size=31, mlp_hidden=20, dtype="float32")
    resolved = configs.resolve(config)
    definition = model.build(resolved)
    import jax

    params = jax.jit(lambda key: model.init(definition, key))(jax.random.key(0))
    with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as saves:
        saves.save(0, {"params": model.unstack(definition, params)}, {"format": checkpoint.FORMAT})
    (tmp_path / "run" / "config.json").write_text(configs.to_json(resolved))
    ids = np.random.default_rng(0).integers(0, 31, (1, 20))
    assert outgoing.export_hf(tmp_path / "run", tmp_path / "hf", model_type="qwen3") == "qwen3"
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    definition, params = evaluate.load(tmp_path / "run")
    assert error(torch_logits(net, ids), evaluate.logits(definition, params, ids)) < 1e-4
