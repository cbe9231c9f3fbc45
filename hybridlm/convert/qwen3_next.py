"""Qwen3-Next and Qwen3.5's text models: Gated DeltaNet, gated attention, partial rotation, (1+w) norms.

Qwen3-Next has experts and fuses its projections by key head; Qwen3.5 keeps them apart and is dense or has
experts. Sources: transformers 5.23, models/qwen3_next, models/qwen3_5 and models/qwen3_5_moe.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm.block import Spec
from hybridlm.convert.family import Architecture, Family, mlp_widths, of_kind, uniform
from hybridlm.convert.fields import Fields
from hybridlm.convert.fla import swiglu
from hybridlm.convert.qwen3 import attention, attention_fields, ends, pre_norms
from hybridlm.convert.rules import Rule, concatenated, conv, experts, interleaved, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

TYPES = {"linear_attention": "gdn", "full_attention": "full"}
CLASSES = {"qwen3_next": "Qwen3Next", "qwen3_5_text": "Qwen3_5", "qwen3_5_moe_text": "Qwen3_5Moe"}


def read(fields: Fields) -> Architecture:
    num_layers, eps = fields.size("num_hidden_layers"), fields.get("rms_norm_eps", 1e-6)
    model_type, d_model = fields.values["model_type"], fields.size("hidden_size")
    theta, fraction = fields.rope(fraction=0.25)
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    interval = fields.get("full_attention_interval", 4)
    types = fields.layers("layer_types", TYPES, num_layers) or [
        "linear_attention" if (index + 1) % interval else "full_attention" for index in range(num_layers)
    ]
    fields.only("attn_output_gate", True)
    fields.only("output_gate_type", "swish", "silu")
    fields.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    heads = fields.get("num_attention_heads", 16)
    definitions = {
        "full": configs.mixer(
            "attention",
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", 4 if model_type == "qwen3_5_text" else 2),
            head_dim=fields.get("head_dim", 256),
            rope_theta=theta,
            rotary_fraction=fraction,
            qk_norm="head",
            norm_unit_offset=True,
            output_gate="sigmoid",
            norm_eps=eps,
        ),
        "gdn": configs.mixer(
            "gated_delta_net",
            num_heads=fields.get("linear_num_key_heads", 16),
            num_v_heads=fields.get("linear_num_value_heads", 32),
            head_dim=fields.get("linear_key_head_dim", 128),
            v_head_dim=fields.get("linear_value_head_dim", 128),
            conv_size=fields.get("linear_conv_kernel_dim", 4),
            norm_eps=eps,
        ),
    }
    layers, mlps = [TYPES[name] for name in types], {}
    if model_type == "qwen3_next":
        mlps["moe"] = _moe(fields, num_experts=512, top_k=10)
        dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
        layers = [
            name if index in dense or (index + 1) % step else f"{name}/moe"
            for index, name in enumerate(layers)
        ]
    elif model_type == "qwen3_5_moe_text":
        fields.only("norm_topk_prob", True)
        mlps["moe"] = _moe(fields, num_experts=256, top_k=8)
        layers = [f"{name}/moe" for name in layers]
    all_moe = model_type == "qwen3_5_moe_text"
    model = {
        "d_model": d_model,
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": fields.get("intermediate_size", d_model)
        if all_moe
        else fields.size("intermediate_size"),
        "norm_eps": eps,
        "norm_unit_offset": True,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    fields.finish()
    return Architecture(layers, definitions, mlps, model)


def _moe(fields: Fields, num_experts: int, top_k: int) -> Any:
    coefficient = fields.get("router_aux_loss_coef", 0.001)
    return configs.mlp(
        "moe",
        num_experts=fields.get("num_experts", num_experts),
        top_k=fields.get("num_experts_per_tok", top_k),
        hidden=fields.get("moe_intermediate_size", 512),
        normalize=fields.get("norm_topk_prob", True),
        shared_hidden=fields.get("shared_expert_intermediate_size", 512),
        shared_gate=True,
        balance_loss=coefficient
        if fields.get("output_router_logits", False)
        else 0.0,  # as transformers does
    )


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    d_model = definition.d_model
    full, gdn = of_kind(definition, "attention"), of_kind(definition, "gated_delta_net")
    if not full or not gdn:
        raise ConfigError("model.pattern", model_type, "has both attention and gated_delta_net layers")
    mixer = uniform(gdn, "gated_delta_net", d_model)
    values = {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "layer_types": [
            "full_attention" if spec.kind == "attention" else "linear_attention" for spec in definition.layers
        ],
        "intermediate_size": mlp_widths(definition) or d_model,
        "linear_num_key_heads": mixer.num_heads,
        "linear_num_value_heads": mixer.num_v_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.v_head_dim,
        "linear_conv_kernel_dim": mixer.conv_size,
    } | attention_fields(definition, uniform(full, "attention", d_model))
    if model_type == "qwen3_5_text":
        return values
    values |= _moe_fields(definition)
    if model_type == "qwen3_5_moe_text":
        for name in ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"):
            del values[name]
    return values


def _moe_fields(definition: Definition) -> dict[str, Any]:
    settings = {spec.mlp_config for spec in definition.layers if spec.mlp_kind == "moe"}
    if len(settings) != 1:
        raise ConfigError("mlps", "qwen3_next", "has expert layers, all with the same settings")
    moe = settings.pop()
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "shared_expert_intermediate_size": moe.shared_hidden,
        "norm_topk_prob": moe.normalize,
        "router_aux_loss_coef": moe.balance_loss or 0.001,
        "output_router_logits": moe.balance_loss > 0,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, spec in enumerate(definition.layers) if spec.mlp_kind != "moe"],
    }


def rules(definition: Definition, model_type: str) -> list[Rule]:
    fused = model_type == "qwen3_next"
    found = ends(definition)
    for index, spec in enumerate(definition.layers):
        mlp = moe(spec) if spec.mlp_kind == "moe" else swiglu("mlp.", "mlp.")
        mixer = (
            gated_attention(spec) if spec.kind == "attention" else delta_net(spec, fused, definition.d_model)
        )
        layer = [*pre_norms(), *mlp, *mixer]
        found += [rule.under(f"layers.{index}.", f"model.layers.{index}.") for rule in layer]
    return found


def gated_attention(spec: Spec) -> list[Rule]:
    """q_proj holds [query, gate] per head."""
    dim = spec.config.head_dim
    own = [rule for rule in attention("self_attn.") if rule.theirs != ("self_attn.q_proj.weight",)]
    return [*own, interleaved(("mixer.q_proj", "mixer.g_proj"), (dim, dim), "self_attn.q_proj")]


def delta_net(spec: Spec, fused: bool, d_model: int) -> list[Rule]:
    heads, theirs = spec.config.heads(d_model), "linear_attn."
    widths = (heads.key_width, heads.key_width, heads.value_width)
    convs = [f"mixer.{name}_conv" for name in "qkv"]
    found = [
        concatenated(convs, widths, f"{theirs}conv1d", conv),
        norm("mixer.o_norm", f"{theirs}norm"),
        linear("mixer.o_proj", f"{theirs}out_proj"),
        *(same(f"mixer.{name}", f"{theirs}{name}") for name in ("A_log", "dt_bias")),
    ]
    qkv = [f"mixer.{name}_proj" for name in "qkv"]
    if not fused:
        found.append(concatenated(qkv, widths, f"{theirs}in_proj_qkv", linear))
        names = {"g": "z", "b": "b", "a": "a"}
        return found + [linear(f"mixer.{n}_proj", f"{theirs}in_proj_{t}") for n, t in names.items()]
    share = heads.num_v // heads.num  # value heads of a key head
    value = share * heads.value
    qkvz = (*qkv, "mixer.g_proj")
    found.append(interleaved(qkvz, (heads.key, heads.key, value, value), f"{theirs}in_proj_qkvz"))
    ba = ("mixer.b_proj", "mixer.a_proj")
    return [*found, interleaved(ba, (share, share), f"{theirs}in_proj_ba")]


def moe(spec: Spec) -> list[Rule]:
    count = spec.mlp_config.num_experts
    each = [experts(f"mlp.{n}", f"mlp.experts.{{}}.{n}_proj.weight", count) for n in ("gate", "up", "down")]
    shared = [
        *swiglu("mlp.shared.", "mlp.shared_expert."),
        linear("mlp.shared_gate", "mlp.shared_expert_gate"),
    ]
    return [linear("mlp.router", "mlp.gate"), *each, *shared]


FAMILY = Family(
    tuple(CLASSES),
    read,
    write,
    rules,
    rename=lambda name: name.replace("model.language_model.", "model."),
    unused=("mtp.", "model.visual."),
    multimodal={"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"},
)
