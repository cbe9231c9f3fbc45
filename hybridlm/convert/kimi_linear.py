"""Kimi Linear: KDA and MLA without rotation, a first dense layer, then sigmoid-routed experts.

Sources: transformers 5.23, models/kimi_linear; the checkpoint layout is that of the released weights.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm.block import Spec
from hybridlm.convert.family import Architecture, Family, mlp_widths, of_kind, uniform
from hybridlm.convert.fields import Fields
from hybridlm.convert.fla import swiglu
from hybridlm.convert.qwen3 import ends, pre_norms
from hybridlm.convert.rules import Rule, conv, experts, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

LATENT_EPS = 1e-6  # of MLA's latent norms, whatever rms_norm_eps is
TYPES = {"linear_attention": "kda", "full_attention": "mla"}
MLP_TYPES = {"dense": "", "sparse": "/moe"}


def read(fields: Fields) -> Architecture:
    num_layers, eps = fields.size("num_hidden_layers"), fields.get("rms_norm_eps", 1e-5)
    types, kda = _layer_types(fields, num_layers), _kda_sizes(fields)
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mla_use_nope", True)
    fields.only("moe_router_activation_func", "sigmoid")
    fields.only("moe_layer_freq", 1)
    fields.ignore("head_dim", "qk_head_dim", "model_max_length", "output_router_logits", "topk_method")
    fields.ignore("rope_theta", "rope_scaling", "rope_parameters", "rope_interleave")  # nothing rotates
    fields.ignore(
        "num_nextn_predict_layers", "num_mtp_layers", "use_grouped_topk", "aux_loss_alpha", "seq_aux"
    )
    heads = fields.get("num_attention_heads", 32)
    fields.only("num_key_value_heads", None, heads)
    definitions = {
        "kda": configs.mixer("kda", **kda, output_gate_bias=False, norm_eps=eps),
        "mla": configs.mixer(
            "mla",
            num_heads=heads,
            q_lora_rank=fields.get("q_lora_rank", 0),
            kv_lora_rank=fields.get("kv_lora_rank", 512),
            qk_nope_head_dim=fields.get("qk_nope_head_dim", 128),
            qk_rope_head_dim=fields.get("qk_rope_head_dim", 64),
            v_head_dim=fields.get("v_head_dim", 128),
            rope_theta=0.0,
            norm_eps=LATENT_EPS,
        ),
    }
    first_dense = fields.get("first_k_dense_replace", 1)
    mlp_types = fields.layers("mlp_layer_types", MLP_TYPES, num_layers) or [
        "dense" if index < first_dense else "sparse" for index in range(num_layers)
    ]
    layers = [TYPES[one] + MLP_TYPES[mlp] for one, mlp in zip(types, mlp_types, strict=True)]
    model = {
        "d_model": fields.size("hidden_size"),
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": fields.size("intermediate_size"),
        "norm_eps": eps,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    mlps = {"moe": _moe(fields)}
    fields.finish()
    return Architecture(layers, definitions, mlps, model)


def _either(fields: Fields, names: tuple[str, str], default: Any) -> Any:
    """A field that goes by two names."""
    values = [fields.get(name, default) for name in names if fields.values.get(name) is not None]
    if len(set(values)) > 1:
        raise fields.refuse(names[0], f"contradicts {names[1]} = {values[1]}")
    fields.ignore(*names)
    return values[0] if values else default


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    """layer_types, or the lists of linear_attn_config, which count from 1."""
    types = fields.layers("layer_types", TYPES, num_layers)
    lists = fields.values.get("linear_attn_config") or {}
    if "full_attn_layers" not in lists:
        return types or [
            "full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(num_layers)
        ]
    full, kda = lists["full_attn_layers"], lists.get("kda_layers", [])
    if sorted([*full, *kda]) != list(range(1, num_layers + 1)):
        raise fields.refuse("linear_attn_config", f"must list layers 1 to {num_layers}, each once")
    counted = ["full_attention" if index + 1 in full else "linear_attention" for index in range(num_layers)]
    if types and types != counted:
        raise fields.refuse("layer_types", "contradicts linear_attn_config")
    return counted


def _kda_sizes(fields: Fields) -> dict[str, int]:
    nested = fields.sub("linear_attn_config") or Fields({})
    nested.ignore("full_attn_layers", "kda_layers")
    sizes = {}
    for ours, inner, outer, default in (
        ("num_heads", "num_heads", "linear_num_heads", 32),
        ("head_dim", "head_dim", "linear_head_dim", 128),
        ("conv_size", "short_conv_kernel_size", "linear_conv_kernel_dim", 4),
    ):
        sizes[ours] = nested.get(inner, fields.get(outer, default))
        if fields.get(outer, sizes[ours]) != sizes[ours]:
            raise fields.refuse(outer, f"contradicts linear_attn_config.{inner} = {sizes[ours]}")
    nested.finish()
    return sizes


def _moe(fields: Fields) -> Any:
    hidden = fields.get("moe_intermediate_size", 1024)
    return configs.mlp(
        "moe",
        num_experts=_either(fields, ("num_experts", "num_local_experts"), 256),
        top_k=_either(fields, ("num_experts_per_token", "num_experts_per_tok"), 8),
        hidden=hidden,
        router="sigmoid",
        normalize=_either(fields, ("moe_renormalize", "norm_topk_prob"), True),
        scale=fields.get("routed_scaling_factor", 2.446),
        selection_bias=True,
        num_groups=_either(fields, ("num_expert_group", "n_group"), 1),
        top_groups=fields.get("topk_group", 1),
        shared_hidden=hidden * _either(fields, ("num_shared_experts", "n_shared_experts"), 1),
        balance_loss=0.0,
    )


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    d_model = definition.d_model
    kinds = [spec.kind for spec in definition.layers]
    if not {"kda", "mla"} <= set(kinds):
        raise ConfigError("model.pattern", model_type, "has both kda and mla layers")
    kda = uniform(of_kind(definition, "kda"), "kda", d_model)
    mla = uniform(of_kind(definition, "mla"), "mla", d_model)
    settings = {spec.mlp_config for spec in definition.layers if spec.mlp_kind == "moe"}
    if len(settings) != 1:
        raise ConfigError("mlps", model_type, "has expert layers, all with the same settings")
    moe = settings.pop()
    dense = [spec.mlp_kind != "moe" for spec in definition.layers]
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "vocab_size": definition.vocab_size,
        "hidden_size": d_model,
        "hidden_act": "silu",
        "num_hidden_layers": len(kinds),
        "rms_norm_eps": definition.model.norm_eps,
        "tie_word_embeddings": definition.model.tie_embeddings,
        "layer_types": ["full_attention" if kind == "mla" else "linear_attention" for kind in kinds],
        "linear_attn_config": {
            "full_attn_layers": [index + 1 for index, kind in enumerate(kinds) if kind == "mla"],
            "kda_layers": [index + 1 for index, kind in enumerate(kinds) if kind == "kda"],
            "num_heads": kda.num_heads,
            "head_dim": kda.head_dim,
            "short_conv_kernel_size": kda.conv_size,
        },
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "intermediate_size": mlp_widths(definition) or d_model,
        "mlp_layer_types": ["dense" if one else "sparse" for one in dense],
        "first_k_dense_replace": dense.index(False),
        "moe_intermediate_size": moe.hidden,
        "num_experts": moe.num_experts,
        "num_experts_per_token": moe.top_k,
        "num_shared_experts": moe.shared_hidden // moe.hidden,
        "moe_renormalize": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "num_expert_group": moe.num_groups,
        "topk_group": moe.top_groups,
    }


def rules(definition: Definition, model_type: str) -> list[Rule]:
    found = ends(definition)
    for index, spec in enumerate(definition.layers):
        mixer = kda() if spec.kind == "kda" else mla(spec)
        layer = [rule.under("mixer.", "self_attn.") for rule in mixer]
        layer += moe(spec) if spec.mlp_kind == "moe" else swiglu("mlp.", "mlp.")
        found += [rule.under(f"layers.{index}.", f"model.layers.{index}.") for rule in [*pre_norms(), *layer]]
    return found


def kda() -> list[Rule]:
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "b", "f_a", "f_b", "g_a", "g_b")]
    return [
        *(linear(name, name) for name in names),
        *(conv(f"{name}_conv", f"{name}_conv1d") for name in "qkv"),
        norm("o_norm", "o_norm"),
        same("dt_bias", "dt_bias", loose=True),
        Rule(
            ("A_log",),
            ("A_log",),
            lambda arrays: [array.reshape(-1) for array in arrays],
            lambda arrays: [array.reshape(1, 1, -1, 1) for array in arrays],
            loose=True,
        ),
    ]


def mla(spec: Spec) -> list[Rule]:
    query = [linear("q_proj", "q_proj")]
    if spec.config.q_lora_rank:
        query = [
            linear("q_a_proj", "q_a_proj"),
            norm("q_a_norm", "q_a_layernorm"),
            linear("q_proj", "q_b_proj"),
        ]
    return [
        *query,
        linear("kv_a_proj", "kv_a_proj_with_mqa"),
        norm("kv_a_norm", "kv_a_layernorm"),
        linear("kv_b_proj", "kv_b_proj"),
        linear("o_proj", "o_proj"),
    ]


def moe(spec: Spec) -> list[Rule]:
    count, theirs = spec.mlp_config.num_experts, "block_sparse_moe."
    each = [
        experts(f"mlp.{ours}", f"{theirs}experts.{{}}.{w}.weight", count)
        for ours, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ]
    router = [linear("mlp.router", f"{theirs}gate")]
    router.append(same("mlp.selection_bias", f"{theirs}gate.e_score_correction_bias"))
    shared = swiglu("mlp.shared.", f"{theirs}shared_experts.") if spec.mlp_config.shared_hidden else []
    return [*router, *each, *shared]


def rename(name: str) -> str:
    """transformers 5.23 saves a dense layer's MLP under the experts' prefix."""
    return name.replace(".block_sparse_moe.", ".mlp.")


FAMILY = Family(("kimi_linear",), read, write, rules, rename)
