"""How public checkpoints say experts; ``config`` is a `hybridlm.mlps.moe.Config`."""

import functools
from typing import TYPE_CHECKING, Any

from hybridlm.convert import rules
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, told
from hybridlm.convert.rules import fused_rules, relu2_rules, swiglu_rules

if TYPE_CHECKING:
    from hybridlm.mlps.moe import Config

MAX_EXPERTS = 1 << 16
SIGMOID: dict[str, Any] = {
    "router": "sigmoid",
    "selection_bias": True,
    "balance_loss": 0.0,
}  # DeepSeek-V3's way to choose


def _qwen(num_experts: int, top_k: int, always_normal: bool = False) -> Format[Any]:
    """Of Qwen3-Next and Qwen3.5, whose defaults differ. always_normal: ``normalize`` is no choice."""
    names: dict[str, Any] = {
        "num_experts": ("num_experts", num_experts, MAX_EXPERTS),
        "top_k": ("num_experts_per_tok", top_k),
        "hidden": ("moe_intermediate_size", 512),
        "shared_hidden": ("shared_expert_intermediate_size", 512),
    }
    names |= {} if always_normal else {"normalize": ("norm_topk_prob", True)}

    def read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
        if always_normal:
            fields.only("norm_topk_prob", True)
        return fields.table(names) | {"shared_gate": True, "balance_loss": _balance(fields)}

    def write(config: "Config", d_model: int) -> dict[str, Any]:
        return told(config, names) | _balance_fields(config)

    def own_rules(config: "Config", d_model: int) -> list[rules.Rule]:
        each = _swiglus(config, LLAMA)
        shared = [
            *swiglu_rules("shared.", "shared_expert."),
            rules.linear("shared_gate", "shared_expert_gate"),
        ]
        return [rules.linear("router", "gate"), *each, *shared]

    return Format(read, write, own_rules, "mlp.", "sparse")


def _kimi_read(
    fields: Fields, d_model: int, eps: float,
    num_experts: int = 256, hidden: int = 1024, scale: float = 2.446, groups: tuple[int, int] = (1, 1),
) -> dict[str, Any]:  # fmt: skip
    """num_experts, hidden, scale, groups: where nothing is said."""
    for name, value in (("moe_router_activation_func", "sigmoid"), ("moe_layer_freq", 1)):
        fields.only(name, value)
    fields.ignore("use_grouped_topk", "topk_method", "aux_loss_alpha", "seq_aux", "output_router_logits")
    hidden = fields.get("moe_intermediate_size", hidden)
    return SIGMOID | {
        "num_experts": fields.either("num_experts", "num_local_experts", num_experts, MAX_EXPERTS),
        "top_k": fields.either("num_experts_per_token", "num_experts_per_tok", 8),
        "hidden": hidden,
        "normalize": fields.either("moe_renormalize", "norm_topk_prob", True),
        "scale": fields.get("routed_scaling_factor", scale),
        "num_groups": fields.either("num_expert_group", "n_group", groups[0]),
        "top_groups": fields.get("topk_group", groups[1]),
        "shared_hidden": hidden * fields.either("num_shared_experts", "n_shared_experts", 1),
    }


def _kimi_write(config: "Config", d_model: int) -> dict[str, Any]:
    return {KIMI.get(name, name): value for name, value in _deepseek_write(config, d_model).items()}


KIMI = {  # of DeepSeek-V3's names, which others have, those that are other words there
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
}


def _ling_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    for name in ("score_function", "scoring_func"):
        fields.only(name, "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_router_enable_expert_bias", True)
    fields.ignore("router_dtype")
    found = _kimi_read(fields, d_model, eps, num_experts=512, hidden=768, scale=2.5, groups=(8, 4))
    if not found["shared_hidden"]:
        raise fields.refuse("num_shared_experts", "must be at least 1")
    fields.only("moe_shared_expert_intermediate_size", None, found["shared_hidden"])
    return found


DEEPSEEK = {
    "num_experts": ("n_routed_experts", 256, MAX_EXPERTS),
    "top_k": ("num_experts_per_tok", 8),
    "hidden": ("moe_intermediate_size", 2048),
    "normalize": ("norm_topk_prob", True),
    "scale": ("routed_scaling_factor", 2.5),
    "num_groups": ("n_group", 8),
    "top_groups": ("topk_group", 4),
}


def _deepseek_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        fields.only(name, value)
    fields.ignore("aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits", "router_aux_loss_coef")
    found = SIGMOID | fields.table(DEEPSEEK)
    found["num_experts"] = fields.either("n_routed_experts", "num_local_experts", 256, MAX_EXPERTS)
    return found | {"shared_hidden": found["hidden"] * fields.size("n_shared_experts", default=1)}


def _deepseek_write(config: "Config", d_model: int) -> dict[str, Any]:
    return told(config, DEEPSEEK) | {"n_shared_experts": config.shared_hidden // config.hidden}


NEMOTRON = {
    "num_experts": ("n_routed_experts", 8, MAX_EXPERTS),
    "top_k": ("num_experts_per_tok", 2),
    "hidden": ("moe_intermediate_size", 7688),
    "normalize": ("norm_topk_prob", True),
    "scale": ("routed_scaling_factor", 1.0),
    "num_groups": ("n_group", 1),
    "top_groups": ("topk_group", 1),
    "shared_hidden": ("moe_shared_expert_intermediate_size", 7688),
}


def _nemotron_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("moe_latent_size", None)
    fields.ignore("n_shared_experts", "moe_shared_expert_overlap", "output_router_logits")
    return SIGMOID | fields.table(NEMOTRON) | {"expert": "relu2"}


def _nemotron_write(config: "Config", d_model: int) -> dict[str, Any]:
    return told(config, NEMOTRON) | {"n_shared_experts": 1}


def _nemotron_rules(config: "Config", d_model: int) -> list[rules.Rule]:
    each = [
        rules.experts(name, f"experts.{{}}.{name}_proj.weight", config.num_experts) for name in ("up", "down")
    ]
    router = [rules.linear("router", "gate"), rules.same("selection_bias", "gate.e_score_correction_bias")]
    return [*router, *each, *relu2_rules("shared.", "shared_experts.")]


MIXTRAL = "w1", "w3", "w2"
LLAMA = "gate_proj", "up_proj", "down_proj"


def _kimi_rules(
    config: "Config",
    d_model: int,
    names: tuple[str, str, str] = MIXTRAL,
    bias: str = "e_score_correction_bias",
) -> list[rules.Rule]:
    router = [rules.linear("router", "gate"), rules.same("selection_bias", f"gate.{bias}")]
    shared = swiglu_rules("shared.", "shared_experts.") if config.shared_hidden else []
    return [*router, *_swiglus(config, names), *shared]


def _swiglus(config: "Config", names: tuple[str, str, str]) -> list[rules.Rule]:
    """names: of gate, up and down there."""
    return [
        rules.experts(ours, f"experts.{{}}.{theirs}.weight", config.num_experts)
        for ours, theirs in zip(("gate", "up", "down"), names, strict=True)
    ]


def _balance(fields: Fields) -> float:
    weight = fields.get("router_aux_loss_coef", 0.001)
    return weight if fields.get("output_router_logits", False) else 0.0  # as transformers


def _balance_fields(config: "Config") -> dict[str, Any]:
    return {
        "router_aux_loss_coef": config.balance_loss or 0.001,
        "output_router_logits": config.balance_loss > 0,
    }


JAMBA = {
    "num_experts": ("num_experts", 16, MAX_EXPERTS),
    "top_k": ("num_experts_per_tok", 2),
    "hidden": ("intermediate_size", 14336),
}


def _jamba_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return fields.table(JAMBA) | {"normalize": False, "balance_loss": _balance(fields)}


def _jamba_write(config: "Config", d_model: int) -> dict[str, Any]:
    return told(config, JAMBA) | _balance_fields(config)


def _jamba_rules(config: "Config", d_model: int) -> list[rules.Rule]:
    return [rules.linear("router", "router"), *_swiglus(config, LLAMA)]


MINIMAX = JAMBA | {"num_experts": ("num_local_experts", 8, MAX_EXPERTS)}


def _minimax_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("router_jitter_noise", 0.0)
    experts = fields.either("num_local_experts", "num_experts", 8, MAX_EXPERTS)
    return fields.table(MINIMAX) | {"num_experts": experts, "balance_loss": _balance(fields)}


def _minimax_write(config: "Config", d_model: int) -> dict[str, Any]:
    return told(config, MINIMAX) | _balance_fields(config)


def _minimax_rules(config: "Config", d_model: int) -> list[rules.Rule]:
    return [rules.linear("router", "gate"), *_swiglus(config, MIXTRAL)]


GRANITE = {
    "num_experts": ("num_local_experts", 8, MAX_EXPERTS),
    "top_k": ("num_experts_per_tok", 2),
    "hidden": ("intermediate_size", 11008),
    "shared_hidden": ("shared_intermediate_size", 1024),
}


def _granite_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.ignore("num_experts_per_tok", "intermediate_size", "router_aux_loss_coef", "output_router_logits")
    if not fields.get("num_local_experts", 8):  # a dense model, which has no use for this
        return {}
    return fields.table(GRANITE) | {"balance_loss": _balance(fields)}


def _granite_write(config: "Config", d_model: int) -> dict[str, Any]:
    return told(config, GRANITE) | _balance_fields(config)


def _granite_rules(config: "Config", d_model: int) -> list[rules.Rule]:
    sparse = "block_sparse_moe."
    return [
        rules.linear("router", f"{sparse}router.layer"),
        rules.fused_experts(("gate", "up"), f"{sparse}input_linear.weight"),
        rules.fused_experts(("down",), f"{sparse}output_linear.weight"),
        *fused_rules(config.shared_hidden, "shared.", "shared_mlp."),
    ]


FORMATS: dict[str, Format[Any]] = {
    "qwen3_next": _qwen(num_experts=512, top_k=10),
    "qwen3_5_moe": _qwen(num_experts=256, top_k=8, always_normal=True),
    "kimi_linear": Format(_kimi_read, _kimi_write, _kimi_rules, "block_sparse_moe.", "sparse"),
    "deepseek_v3": Format(
        _deepseek_read, _deepseek_write, functools.partial(_kimi_rules, names=LLAMA), "mlp.", "sparse"
    ),
    "bailing_hybrid": Format(
        _ling_read,
        _kimi_write,
        functools.partial(_kimi_rules, names=LLAMA, bias="expert_bias"),
        "mlp.",
        "sparse",
    ),
    "nemotron_h": Format(_nemotron_read, _nemotron_write, _nemotron_rules, "mixer.", "moe"),
    "jamba": Format(_jamba_read, _jamba_write, _jamba_rules, "feed_forward.", "sparse"),
    "minimax": Format(_minimax_read, _minimax_write, _minimax_rules, "block_sparse_moe.", "sparse"),
    "granitemoehybrid": Format(_granite_read, _granite_write, _granite_rules, "", "sparse"),
}
