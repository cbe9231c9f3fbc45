"""OLMo hybrid: pre-norm Gated DeltaNet blocks, post-norm attention blocks with q/k norms over all heads.

Source: transformers 5.23, models/olmo_hybrid.
"""

from typing import Any

from hybridlm import config as configs
from hybridlm.convert.family import Architecture, Family, mlp_widths, of_kind, uniform
from hybridlm.convert.fields import Fields
from hybridlm.convert.fla import swiglu
from hybridlm.convert.qwen3 import attention, attention_fields, ends
from hybridlm.convert.rules import Rule, convs, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

GDN_NORM_EPS = 1e-5  # hard-coded there
TYPES = {"linear_attention": "gdn", "full_attention": "full"}


def read(fields: Fields) -> Architecture:
    num_layers, eps = fields.size("num_hidden_layers"), fields.get("rms_norm_eps", 1e-6)
    d_model, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("head_dim", None, d_model // heads)
    fields.ignore(
        *(f"linear_{name}" for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"))
    )
    fields.only("linear_use_gate", True)
    every = fields.layers("layer_types", TYPES, num_layers)
    if every is None:
        every = ["full_attention" if index % 4 == 3 else "linear_attention" for index in range(num_layers)]
        if "full_attention" not in every:
            every[-1] = "full_attention"
    rotates = not ("rope_theta" in fields.values and fields.values["rope_theta"] is None)
    nested = fields.values.get("rope_parameters")
    if isinstance(nested, dict):
        rotates = nested.get("rope_theta") is not None
    theta, fraction = fields.rope()
    linear_heads = fields.get("linear_num_key_heads", heads)
    key_dim = fields.get("linear_key_head_dim", int(0.75 * d_model / linear_heads))
    definitions = {
        "full": configs.mixer(
            "attention",
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads", heads),
            head_dim=d_model // heads,
            rope_theta=theta if rotates else 0.0,
            rotary_fraction=fraction,
            qk_norm="width",
            norm_eps=eps,
        ),
        "gdn": configs.mixer(
            "gated_delta_net",
            num_heads=linear_heads,
            num_v_heads=fields.get("linear_num_value_heads", heads),
            head_dim=key_dim,
            v_head_dim=fields.get("linear_value_head_dim", 2 * key_dim),
            conv_size=fields.get("linear_conv_kernel_dim", 4),
            neg_eigval=fields.get("linear_allow_neg_eigval", True),
            norm_eps=GDN_NORM_EPS,
        ),
    }
    model = {
        "d_model": d_model,
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": fields.size("intermediate_size"),
        "norm_eps": eps,
        "post_norm": ("full",),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    fields.finish()
    return Architecture([TYPES[name] for name in every], definitions, {}, model)


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    d_model = definition.d_model
    full, gdn = of_kind(definition, "attention"), of_kind(definition, "gated_delta_net")
    if not full or not gdn:
        raise ConfigError("model.pattern", model_type, "has both attention and gated_delta_net layers")
    mixer, attends = uniform(gdn, "gated_delta_net", d_model), uniform(full, "attention", d_model)
    values = attention_fields(definition, attends)
    del values["head_dim"]
    if not attends.rope_theta:
        values |= {"rope_parameters": None, "rope_theta": None}
    return values | {
        "architectures": ["OlmoHybridForCausalLM"],
        "model_type": "olmo_hybrid",
        "layer_types": [
            "full_attention" if spec.kind == "attention" else "linear_attention" for spec in definition.layers
        ],
        "intermediate_size": mlp_widths(definition),
        "linear_num_key_heads": mixer.num_heads,
        "linear_num_value_heads": mixer.num_v_heads,
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.v_head_dim,
        "linear_conv_kernel_dim": mixer.conv_size,
        "linear_allow_neg_eigval": mixer.neg_eigval,
    }


def rules(definition: Definition, model_type: str) -> list[Rule]:
    found = ends(definition)
    for index, spec in enumerate(definition.layers):
        layer = attention_block() if spec.kind == "attention" else linear_block()
        layer += swiglu("mlp.", "mlp.")
        found += [rule.under(f"layers.{index}.", f"model.layers.{index}.") for rule in layer]
    return found


def attention_block() -> list[Rule]:
    norms = [norm("mixer_norm", "post_attention_layernorm"), norm("mlp_norm", "post_feedforward_layernorm")]
    return norms + attention("self_attn.")


def linear_block() -> list[Rule]:
    """The convolutions are one at run time there, which transformers 5.23 saves cut into equal parts."""
    theirs = "linear_attn."
    return [
        norm("mixer_norm", "attention_layer_norm"),
        norm("mlp_norm", "feedforward_layer_norm"),
        *(linear(f"mixer.{name}_proj", f"{theirs}{name}_proj") for name in "qkvoabg"),
        convs([f"mixer.{name}_conv" for name in "qkv"], [f"{theirs}{name}_conv1d" for name in "qkv"]),
        norm("mixer.o_norm", f"{theirs}o_norm"),
        *(same(f"mixer.{name}", f"{theirs}{name}") for name in ("A_log", "dt_bias")),
    ]


def rename(name: str) -> str:
    """Names at run time, and that under which transformers 5.23 saves the attention blocks' first norm."""
    renamed = name.replace(".input_layernorm.", ".attention_layer_norm.")
    if ".feedforward_layer_norm." in name:
        return name.replace(".feedforward_layer_norm.", ".post_attention_layernorm.")
    return renamed.replace(".post_attention_layernorm.", ".feedforward_layer_norm.")


FAMILY = Family(("olmo_hybrid",), read, write, rules, rename)
