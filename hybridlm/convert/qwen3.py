"""Qwen3, dense: softmax attention with q/k norms. Source: transformers 5.23, models/qwen3."""

from typing import Any

from hybridlm import config as configs
from hybridlm.convert.family import Architecture, Family, explicit, mlp_widths
from hybridlm.convert.fields import Fields
from hybridlm.convert.fla import head, swiglu
from hybridlm.convert.rules import Rule, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

TYPES = {"full_attention": "full", "sliding_attention": "swa"}


def read(fields: Fields) -> Architecture:
    num_layers, eps = fields.size("num_hidden_layers"), fields.get("rms_norm_eps", 1e-6)
    theta, fraction = fields.rope()
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    sliding = fields.get("use_sliding_window", False) and fields.values.get("sliding_window", 0) is not None
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    types = fields.layers("layer_types", TYPES, num_layers) or [
        "sliding_attention" if sliding and index >= first else "full_attention" for index in range(num_layers)
    ]
    if "sliding_attention" in types and not sliding:
        raise fields.refuse("use_sliding_window", "must be true where layer_types has sliding_attention")
    heads = fields.get("num_attention_heads", 32)
    settings = {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", 128),
        "rope_theta": theta,
        "rotary_fraction": fraction,
        "qk_norm": "head",
        "norm_eps": eps,
    }
    definitions = {"full": configs.mixer("attention", **settings)}
    definitions["swa"] = configs.mixer("attention", **settings, window=window)
    model = {
        "d_model": fields.size("hidden_size"),
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": fields.size("intermediate_size"),
        "norm_eps": eps,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    fields.finish()
    return Architecture([TYPES[name] for name in types], definitions, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    specs = [explicit(spec, definition.d_model) for spec in definition.layers]
    if any(spec.kind != "attention" for spec in definition.layers):
        raise ConfigError("model.pattern", model_type, "has attention layers only")
    windows = {config.window for config in specs if config.window}
    if len(windows) > 1:
        raise ConfigError("mixers", sorted(windows), "must have one window to be exported")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "layer_types": ["sliding_attention" if config.window else "full_attention" for config in specs],
        "use_sliding_window": bool(windows),
        "sliding_window": max(windows, default=None),
        "intermediate_size": mlp_widths(definition),
    } | attention_fields(definition, specs[0])


def attention_fields(definition: Definition, config: Any) -> dict[str, Any]:
    """What every transformers model here has in its config; ``config`` of an attention layer."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    return {
        "hidden_act": "silu",
        "hidden_size": definition.d_model,
        "num_hidden_layers": len(definition.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_parameters": rope,
        "rms_norm_eps": definition.model.norm_eps,
        "tie_word_embeddings": definition.model.tie_embeddings,
        "vocab_size": definition.vocab_size,
    }


def rules(definition: Definition, model_type: str) -> list[Rule]:
    found = ends(definition)
    for index in range(len(definition.layers)):
        layer = [*pre_norms(), *swiglu("mlp.", "mlp."), *attention("self_attn.")]
        found += [rule.under(f"layers.{index}.", f"model.layers.{index}.") for rule in layer]
    return found


def ends(definition: Definition) -> list[Rule]:
    """Embedding, final norm, head, as every transformers model here names them."""
    return [
        same("embedding", "model.embed_tokens.weight"),
        norm("final_norm", "model.norm"),
        *head(definition),
    ]


def pre_norms() -> list[Rule]:
    return [norm("mixer_norm", "input_layernorm"), norm("mlp_norm", "post_attention_layernorm")]


def attention(theirs: str) -> list[Rule]:
    """q, k, v, o projections and q/k norms."""
    found = [linear(f"mixer.{name}_proj", f"{theirs}{name}_proj") for name in "qkvo"]
    return found + [norm(f"mixer.{name}_norm", f"{theirs}{name}_norm") for name in "qk"]


FAMILY = Family(("qwen3",), read, write, rules)
