"""flash-linear-attention's models and their hybrids with softmax attention.

Families by model_type: delta_net, gated_deltanet, kda, gla, hgrn, hgrn2, retnet, transformer. ``attn`` is
null, one specification of the layers that attend, or a list of such. Source: fla 0.6.0, fla/models and
fla/layers.
"""

from typing import Any

from ml_collections import ConfigDict

from hybridlm import config as configs
from hybridlm.block import Spec
from hybridlm.convert.family import Architecture, Family, mlp_widths, of_kind, uniform
from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule, bias, conv, linear, norm, same, transposed
from hybridlm.errors import ConfigError
from hybridlm.model import Definition

QK_NORM_EPS = 1e-5  # fla's Attention leaves its norms at their default
KINDS = {
    "delta_net": "delta_net",
    "gated_deltanet": "gated_delta_net",
    "kda": "kda",
    "gla": "gla",
    "hgrn": "hgrn",
    "hgrn2": "hgrn2",
    "retnet": "retnet",
    "transformer": "attention",
}
CLASSES = {
    "delta_net": "DeltaNet",
    "gated_deltanet": "GatedDeltaNet",
    "kda": "KDA",
    "gla": "GLA",
    "hgrn": "HGRN",
    "hgrn2": "HGRN2",
    "retnet": "RetNet",
    "transformer": "Transformer",
}


# config.json -> config


def read(fields: Fields) -> Architecture:
    model_type, num_layers = fields.values["model_type"], fields.size("num_hidden_layers")
    d_model, eps = fields.size("hidden_size"), fields.get("norm_eps", 1e-6)
    fields.only("hidden_act", "swish")
    fields.only("elementwise_affine", True)
    fields.only("attnres_block_size", None)
    fields.only("norm_first", True, False)  # older configs; which of the two kernels, not where the norm is
    missing = 2 if model_type == "retnet" else 4  # fla's default of a field that is not there; null is 4
    ratio = fields.get("hidden_ratio", 4) if "hidden_ratio" in fields.values else missing
    fields.ignore("hidden_ratio")
    hidden = fields.get("intermediate_size") or mlp_hidden(d_model, ratio)
    name = KINDS[model_type]
    definitions = {name: READERS[model_type](fields, d_model, eps)}
    layers = [name] * num_layers
    for number, (indices, definition) in enumerate(_attention(fields, d_model, num_layers)):
        attention = f"attention_{number}"
        definitions[attention] = definition
        for index in indices:
            layers[index] = attention
    model = {
        "d_model": d_model,
        "vocab_size": fields.size("vocab_size"),
        "mlp_hidden": hidden,
        "norm_eps": eps,
        "tie_embeddings": fields.get("tie_word_embeddings", False),
    }
    fields.finish()
    return Architecture(layers, definitions, {}, model)


def mlp_hidden(d_model: int, ratio: int) -> int:
    return -(-int(d_model * ratio * 2 / 3) // 256) * 256


def _attention(fields: Fields, d_model: int, num_layers: int) -> list[tuple[list[int], ConfigDict]]:
    given = fields.get("attn") or []
    found, seen = [], set()
    for spec in [given] if isinstance(given, dict) else given:
        one = Fields(spec, f"{fields.source}: attn")
        layers = one.get("layers")
        if not isinstance(layers, list) or not all(
            isinstance(i, int) and 0 <= i < num_layers and i not in seen for i in layers
        ):
            raise one.refuse("layers", f"must list layers 0 to {num_layers - 1}, each in one specification")
        seen.update(layers)
        one.only("qk_norm", False)  # fla has it in its transformer alone
        found.append((layers, _attention_mixer(one, d_model)))
        one.finish()
    return [one for one in found if one[0]]


def _attention_mixer(fields: Fields, d_model: int) -> ConfigDict:
    heads = fields.size("num_heads")
    if fields.values.get("rope_theta", 10000.0) is None:
        raise fields.refuse("rope_theta", "must be a number: fla's attention always rotates")
    return configs.mixer(
        "attention",
        num_heads=heads,
        num_kv_heads=fields.get("num_kv_heads", heads),
        head_dim=_part(fields, "num_heads", d_model, heads),
        rope_theta=fields.get("rope_theta", 10000.0),
        window=fields.get("window_size", 0),
        qkv_bias=fields.get("qkv_bias", False),
        qk_norm="head" if fields.get("qk_norm", False) else "none",
        norm_eps=QK_NORM_EPS,
    )


def _part(fields: Fields, name: str, width: float, heads: int) -> int:
    """Channels per head of a width, which must split evenly."""
    if heads < 1 or width != int(width) or int(width) % heads:
        raise fields.refuse(name, f"must split a width of {width:g} into {heads} heads evenly")
    return int(width) // heads


def _conv_size(fields: Fields, default: bool) -> int:
    size = fields.get("conv_size", 4)
    return size if fields.get("use_short_conv", default) else 0


def _delta_net(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    for field, supported in (("qk_norm", "l2"), ("qk_activation", "silu"), ("use_beta", True)):
        fields.only(field, supported)
    fields.only("use_output_norm", True)
    heads = fields.get("num_heads", 16)
    return configs.mixer(
        "delta_net",
        num_heads=heads,
        head_dim=_part(fields, "expand_k", d_model * fields.get("expand_k", 1.0), heads),
        v_head_dim=_part(fields, "expand_v", d_model * fields.get("expand_v", 1.0), heads),
        conv_size=_conv_size(fields, True),
        neg_eigval=fields.get("allow_neg_eigval", False),
        output_gate="swish" if fields.get("use_gate", False) else "none",
        norm_eps=eps,
    )


def _gated_delta_net(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    heads, head_dim = fields.get("num_heads", 6), fields.get("head_dim", 256)
    fields.only("output_gate_activation", "swish", "silu", "sigmoid")
    gate = "sigmoid" if fields.get("output_gate_activation") == "sigmoid" else "swish"
    return configs.mixer(
        "gated_delta_net",
        num_heads=heads,
        num_v_heads=fields.get("num_v_heads", heads),
        head_dim=head_dim,
        v_head_dim=_part(fields, "expand_v", head_dim * fields.get("expand_v", 2.0), 1),
        conv_size=_conv_size(fields, True),
        neg_eigval=fields.get("allow_neg_eigval", False),
        output_gate=gate if fields.get("use_gate", True) else "none",
        norm_eps=eps,
    )


def _kda(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    heads, head_dim = fields.get("num_heads", 16), fields.get("head_dim", 128)
    bound = fields.get("lower_bound", 0.0)
    if bool(bound) != fields.get("safe_gate", False):
        raise fields.refuse("safe_gate", f"must go together with lower_bound, which is {bound or None}")
    return configs.mixer(
        "kda",
        num_heads=heads,
        num_v_heads=fields.get("num_v_heads", heads),
        head_dim=head_dim,
        v_head_dim=_part(fields, "expand_v", head_dim * fields.get("expand_v", 1.0), 1),
        conv_size=_conv_size(fields, True),
        lower_bound=bound,
        neg_eigval=fields.get("allow_neg_eigval", False),
        norm_eps=eps,
    )


def _gla(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    return configs.mixer(
        "gla",
        **_multi_head(fields, d_model, heads=4, expand_k=0.5, expand_v=1.0),
        conv_size=_conv_size(fields, False),
        norm_eps=eps,
    )


def _retnet(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    fields.ignore("use_short_conv", "conv_size")  # fla's model does not hand them to its layer
    sizes = _multi_head(fields, d_model, heads=8, expand_k=1.0, expand_v=2.0)
    return configs.mixer("retnet", **sizes, norm_eps=eps)


def _multi_head(fields: Fields, d_model: int, heads: int, expand_k: float, expand_v: float) -> dict[str, Any]:
    """What GLA and RetNet have in common."""
    heads = fields.get("num_heads", heads)
    fields.only("num_kv_heads", None, heads)
    for field in ("feature_map", "clamp_min"):
        fields.only(field, None)
    fields.ignore("use_gk", "use_gv")
    return {
        "num_heads": heads,
        "head_dim": _part(fields, "expand_k", d_model * fields.get("expand_k", expand_k), heads),
        "v_head_dim": _part(fields, "expand_v", d_model * fields.get("expand_v", expand_v), heads),
        "output_gate": "swish" if fields.get("use_output_gate", True) else "none",
    }


def _hgrn(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    return configs.mixer(
        "hgrn",
        width=_part(fields, "expand_ratio", d_model * fields.get("expand_ratio", 1.0), 1),
        conv_size=_conv_size(fields, False),
        lower_bound=fields.get("use_lower_bound", True),
        norm_eps=eps,
    )


def _hgrn2(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    if fields.values.get("expand_ratio", 128) is None:
        heads = fields.size("num_heads")
        ratio = _part(fields, "num_heads", d_model, heads)
    else:  # num_heads follows, whatever it says
        ratio = fields.get("expand_ratio", 128)
        heads = d_model // ratio
    fields.ignore("num_heads", "expand_ratio")
    return configs.mixer(
        "hgrn2",
        num_heads=heads,
        head_dim=ratio,
        v_head_dim=_part(fields, "expand_ratio", d_model, heads),
        conv_size=_conv_size(fields, False),
        lower_bound=fields.get("use_lower_bound", True),
    )


def _transformer(fields: Fields, d_model: int, eps: float) -> ConfigDict:
    return _attention_mixer(fields, d_model)


READERS = {
    "delta_net": _delta_net,
    "gated_deltanet": _gated_delta_net,
    "kda": _kda,
    "gla": _gla,
    "hgrn": _hgrn,
    "hgrn2": _hgrn2,
    "retnet": _retnet,
    "transformer": _transformer,
}


# config -> config.json


def write(definition: Definition, model_type: str) -> dict[str, Any]:
    d_model = definition.d_model
    own = of_kind(definition, KINDS[model_type])
    if not own:
        raise ConfigError("model.pattern", model_type, "has no layer of this kind")
    values = {
        "architectures": [f"{CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": d_model,
        "intermediate_size": mlp_widths(definition),
        "hidden_act": "swish",
        "num_hidden_layers": len(definition.layers),
        "norm_eps": definition.model.norm_eps,
        "tie_word_embeddings": definition.model.tie_embeddings,
        "vocab_size": definition.vocab_size,
    }
    if model_type == "transformer":
        return values | _attention_fields(uniform(own, model_type, d_model))
    groups: dict[Any, list[int]] = {}
    for index, spec in enumerate(definition.layers):
        if spec.kind == "attention":
            groups.setdefault(uniform([spec], "attention", d_model), []).append(index)
    attn = [_attention_fields(config) | {"layers": layers} for config, layers in groups.items()]
    for one in attn:
        one.pop("qk_norm")
    values["attn"] = None if not attn else attn[0] if len(attn) == 1 else attn
    return values | _mixer_fields(model_type, uniform(own, model_type, d_model), d_model)


def _attention_fields(config: Any) -> dict[str, Any]:
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm == "head",
        "rope_theta": config.rope_theta,
        "window_size": config.window or None,
    }


def _mixer_fields(model_type: str, config: Any, d_model: int) -> dict[str, Any]:
    if model_type == "hgrn":
        values = {"expand_ratio": config.width / d_model, "use_lower_bound": config.lower_bound}
    elif model_type == "hgrn2":
        values = {"num_heads": config.num_heads, "expand_ratio": config.head_dim}
        values["use_lower_bound"] = config.lower_bound
    elif model_type in ("delta_net", "gla", "retnet"):
        values = {
            "num_heads": config.num_heads,
            "expand_k": config.num_heads * config.head_dim / d_model,
            "expand_v": config.num_heads * config.v_head_dim / d_model,
            "use_gate" if model_type == "delta_net" else "use_output_gate": config.output_gate == "swish",
        }
    else:
        values = {
            "num_heads": config.num_heads,
            "num_v_heads": config.num_v_heads,
            "head_dim": config.head_dim,
            "expand_v": config.v_head_dim / config.head_dim,
        }
        if model_type == "gated_deltanet":
            values["use_gate"] = config.output_gate != "none"
            values["output_gate_activation"] = "sigmoid" if config.output_gate == "sigmoid" else "swish"
        else:
            values |= {"safe_gate": bool(config.lower_bound), "lower_bound": config.lower_bound or None}
    if hasattr(config, "neg_eigval"):
        values["allow_neg_eigval"] = config.neg_eigval
    if isinstance(values.get("expand_ratio"), float) and values["expand_ratio"].is_integer():
        values["expand_ratio"] = int(values["expand_ratio"])
    return values | {"use_short_conv": config.conv_size > 0, "conv_size": config.conv_size or 4}


# tensors


def rules(definition: Definition, model_type: str) -> list[Rule]:
    found = [same("embedding", "model.embeddings.weight"), norm("final_norm", "model.norm")]
    found += head(definition)
    bounded = {spec.mixer for spec in definition.layers if getattr(spec.config, "lower_bound", None) is True}
    found += [same(f"shared.{name}.lower_bounds", "model.lower_bounds") for name in sorted(bounded)]
    for index, spec in enumerate(definition.layers):
        layer = [norm("mixer_norm", "attn_norm"), norm("mlp_norm", "mlp_norm"), *swiglu("mlp.", "mlp.")]
        layer += [rule.under("mixer.", "attn.") for rule in _mixer(spec)]
        found += [rule.under(f"layers.{index}.", f"model.layers.{index}.") for rule in layer]
    return found


def head(definition: Definition) -> list[Rule]:
    return [] if definition.model.tie_embeddings else [transposed("head", "lm_head.weight")]


def swiglu(ours: str, theirs: str) -> list[Rule]:
    return [linear(f"{ours}{name}", f"{theirs}{name}_proj") for name in ("gate", "up", "down")]


def _linears(names: str) -> list[Rule]:
    """Linears by their first letters: "qkvo" has the same name on both sides."""
    return [linear(f"{name}_proj", f"{name}_proj") for name in names]


def _mixer(spec: Spec) -> list[Rule]:
    config, kind = spec.config, spec.kind
    if kind == "attention":
        found = _linears("qkvo")
        if config.qkv_bias:
            found += [bias(f"{name}_proj", f"{name}_proj") for name in "qkv"]
        if config.qk_norm != "none":
            found += [norm("q_norm", "q_norm"), norm("k_norm", "k_norm")]
        return found
    conv_names = {"hgrn": {"i": "i", "f": "f"}, "hgrn2": {"q": "q", "k": "f", "v": "i"}}
    pairs = conv_names.get(kind, {"q": "q", "k": "k", "v": "v"})
    found = (
        [conv(f"{ours}_conv", f"{theirs}_conv1d") for ours, theirs in pairs.items()]
        if config.conv_size
        else []
    )
    found += [linear(f"{ours}_proj", f"{theirs}_proj") for ours, theirs in pairs.items()]
    found += _linears("o")
    if kind in ("hgrn", "hgrn2"):
        return found + _linears("g" if kind == "hgrn" else "") + [norm("o_norm", "g_norm")]
    gated = config.output_gate != "none"
    if kind in ("gla", "retnet"):
        found.append(norm("o_norm", "g_norm_swish_gate" if gated else "g_norm"))
    else:
        found += [norm("o_norm", "o_norm"), *_linears("b")]
    if kind == "gla":
        found += [
            linear("f_a_proj", "gk_proj.0"),
            linear("f_b_proj", "gk_proj.1"),
            bias("f_b_proj", "gk_proj.1"),
        ]
    if kind == "kda":
        found += [linear("f_a_proj", "f_proj.0"), linear("f_b_proj", "f_proj.1")]
        found += [
            linear("g_a_proj", "g_proj.0"),
            linear("g_b_proj", "g_proj.1"),
            bias("g_b_proj", "g_proj.1"),
        ]
    elif gated:
        found += _linears("g")
    if kind == "gated_delta_net":
        found += _linears("a")
    if kind in ("kda", "gated_delta_net"):
        found += [same("A_log", "A_log", loose=True), same("dt_bias", "dt_bias", loose=True)]
    return found


def rename(name: str) -> str:
    """With fuse_norm off, GLA and RetNet call their output norm g_norm; the numbers are the same."""
    return name.replace(".g_norm.", ".g_norm_swish_gate.")


FAMILY = Family(tuple(KINDS), read, write, rules, rename)
