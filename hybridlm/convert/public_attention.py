"""How public checkpoints say softmax attention; ``config`` is a `hybridlm.mixers.attention.Config`."""

import dataclasses
from typing import TYPE_CHECKING, Any

from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, linears, nearby, rope_fields
from hybridlm.convert.rules import Rule, bias, interleaved, linear, norm

if TYPE_CHECKING:
    from hybridlm.mixers.attention import Config

UNTURNED: dict[str, Any] = {"rope_theta": 0.0, "yarn": ()}
FLA_NORM_EPS = 1e-5  # fla's layer leaves its norms at their default


def _fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_heads")
    if "rope_theta" in fields.values and not fields.get("rope_theta", 0.0) > 0:
        raise fields.refuse("rope_theta", "must be a number above 0: fla's attention always rotates")
    return {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_kv_heads", heads),
        "head_dim": fields.part("num_heads", d_model, heads),
        "rope_theta": fields.get("rope_theta", 10000.0),
        "window": fields.get("window_size", 0),
        "qkv_bias": fields.get("qkv_bias", False),
        "qk_norm": "head" if fields.get("qk_norm", False) else "none",
        "norm_eps": FLA_NORM_EPS,
    }


def _fla_write(config: "Config", d_model: int) -> dict[str, Any]:
    return {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm == "head",
        "rope_theta": config.rope_theta,
        "window_size": config.window or None,
    }


def _hf(
    heads: int | None = None, kv_heads: int | None = None, head_dim: int = 0,
    turned: float = 1.0, theta: float = 10000.0, **fixed: Any,
) -> Format[Any]:  # fmt: skip
    """Of transformers' models, whose defaults differ. None, 0: what Llama had.

    turned: share of the channels that turn; 1: no other is known.  fixed: what cannot be said.
    """

    rotates = fixed.get("rope_theta") != 0

    def read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
        fields.only("attention_bias", False)
        base, fraction = fields.rope(turned, theta, stretched=rotates)
        if rotates and turned == 1 and fraction != 1:  # transformers would turn all
            raise fields.refuse("partial_rotary_factor", "must be 1: all channels turn")
        count = fields.size("num_attention_heads", default=heads)
        return {
            "num_heads": count,
            "num_kv_heads": fields.get("num_key_value_heads", kv_heads or count),
            "head_dim": fields.get("head_dim", head_dim or d_model // count),
            "rope_theta": base,
            "rotary_fraction": fraction,
            "yarn": fields.yarn(every=False) if rotates else (),
            "norm_eps": eps,
        } | fixed

    def write(config: "Config", d_model: int) -> dict[str, Any]:
        rope = rope_fields(config.rope_theta, config.yarn, every=False) if rotates else {}
        if rotates and turned != 1:
            rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
        window = {"use_sliding_window": True, "sliding_window": config.window} if config.window else {}
        sizes = {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
        }
        return sizes | window | rope

    return Format(read, write, _rules, "self_attn.", "full_attention")


def _olmo_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """Without a rope_theta nothing rotates; head_dim cannot be chosen."""
    values = (fields.sub("rope_parameters") or fields).values
    rotates = values.get("rope_theta", None if values is not fields.values else 0) is not None
    settings = _hf(qk_norm="width").read(fields, d_model, eps)
    fields.only("head_dim", d_model // settings["num_heads"])
    return settings if rotates else settings | UNTURNED


def _olmo_write(config: "Config", d_model: int) -> dict[str, Any]:
    values = _hf().write(config, d_model)
    del values["head_dim"]
    return values if config.rope_theta else values | {"rope_parameters": None, "rope_theta": None}


def _granite_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    settings = _hf(heads=32).read(fields, d_model, eps)
    fields.only("position_embedding_type", None, "nope", "rope")
    settings["logit_scale"] = fields.get("attention_multiplier", 1.0)
    return settings if fields.get("position_embedding_type") == "rope" else settings | UNTURNED


def _granite_write(config: "Config", d_model: int) -> dict[str, Any]:
    values = _hf().write(config, d_model)
    if not config.rope_theta:
        del values["rope_parameters"]
    kind = "rope" if config.rope_theta else "nope"
    return values | {"attention_multiplier": config.logit_scale, "position_embedding_type": kind}


def _falcon_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """What multiplies its input multiplies its logits twice."""
    settings = _hf(heads=32, kv_heads=8).read(fields, d_model, eps)
    key = fields.get("key_multiplier", 1.0) * fields.get("attention_in_multiplier", 1.0) ** 2
    return settings | {"logit_scale": key * settings["head_dim"] ** -0.5}


def _falcon_write(config: "Config", d_model: int) -> dict[str, Any]:
    root = config.head_dim**-0.5
    key = nearby(lambda key: key * root, config.logit_scale, config.logit_scale / root)
    return _hf().write(config, d_model) | {"key_multiplier": key}


def _lfm2_rules(config: "Config", d_model: int) -> list[Rule]:
    norms = [norm(f"{name}_norm", f"{name}_layernorm") for name in "qk"]
    return [*linears("qkv"), linear("o_proj", "out_proj"), *norms]


def _gemma_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    heads = fields.size("num_attention_heads", default=10)
    theta, fraction = fields.rope(fraction=0.5)
    fields.only("head_dim", None, fields.part("num_attention_heads", d_model, heads))
    return {
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": d_model // heads,
        "rope_theta": theta,
        "rotary_fraction": fraction,
        "window": fields.size("attention_window_size", default=2048),
        "qkv_bias": fields.get("attention_bias", False),
        "o_bias": True,
    }


def _gemma_write(config: "Config", d_model: int) -> dict[str, Any]:
    values = _hf(turned=0.5).write(config, d_model)
    for name in ("use_sliding_window", "sliding_window"):
        values.pop(name, None)
    return values | {"attention_window_size": config.window, "attention_bias": config.qkv_bias}


def _rules(config: "Config", d_model: int) -> list[Rule]:
    found = linears("qkvo")
    if config.output_gate != "none":  # Qwen's q_proj holds [query, gate] per head
        both, dim = ("q_proj", "g_proj"), config.head_dim
        found = [*linears("kvo"), interleaved(both, (dim, dim), "q_proj")]
    if config.qkv_bias:
        found += [bias(f"{name}_proj", f"{name}_proj") for name in "qkv"]
    if config.o_bias:
        found.append(bias("o_proj", "o_proj"))
    if config.qk_norm != "none":
        found += [norm(f"{name}_norm", f"{name}_norm") for name in "qk"]
    return found


MINIMAX = _hf(heads=32, kv_heads=8, theta=1e6)


def _minimax_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return MINIMAX.read(fields, d_model, eps) | {"window": fields.get("sliding_window", 0)}


def _minimax_write(config: "Config", d_model: int) -> dict[str, Any]:
    values = MINIMAX.write(config, d_model) | {"sliding_window": config.window or None}
    values.pop("use_sliding_window", None)
    return values


GATED: dict[str, Any] = dict(
    turned=0.25, qk_norm="head", norm_unit_offset=True, output_gate="sigmoid"
)  # Qwen3-Next's

FORMATS: dict[str, Format[Any]] = {
    "fla": Format(_fla_read, _fla_write, _rules, "attn.", "transformer", "Transformer"),
    "qwen3": _hf(heads=32, head_dim=128, qk_norm="head"),
    "qwen3_next": _hf(heads=16, kv_heads=2, head_dim=256, **GATED),
    "qwen3_5": _hf(heads=16, kv_heads=4, head_dim=256, **GATED),
    "qwen3_5_moe": _hf(heads=16, kv_heads=2, head_dim=256, **GATED),
    "olmo_hybrid": Format(_olmo_read, _olmo_write, _rules, "self_attn.", "full_attention"),
    "bamba": _hf(heads=32, kv_heads=8, turned=0.5),
    "granitemoehybrid": Format(_granite_read, _granite_write, _rules, "self_attn.", "full_attention"),
    "recurrent_gemma": Format(_gemma_read, _gemma_write, _rules, "temporal_block.", "attention"),
    "falcon_h1 branch": Format(_falcon_read, _falcon_write, _rules, "self_attn."),
    "lfm2": dataclasses.replace(_hf(heads=32, kv_heads=8, theta=1e6, qk_norm="head"), rules=_lfm2_rules),
    "minimax": Format(_minimax_read, _minimax_write, _rules, "self_attn.", "full_attention"),
    "nemotron_h": dataclasses.replace(
        _hf(heads=32, kv_heads=8, head_dim=128, rope_theta=0.0), module="mixer."
    ),
    "jamba": _hf(heads=32, kv_heads=8, rope_theta=0.0),
}
