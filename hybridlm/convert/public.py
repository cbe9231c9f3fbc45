"""How public checkpoints say a kind of layer: what `hybridlm/mixers/<kind>.py` and `hybridlm/mlps/<kind>.py`
hold of them, so that a family here knows only the model around its layers. Imports nothing heavy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hybridlm.convert.fields import Fields
from hybridlm.convert.rules import Rule, linear
from hybridlm.errors import ConfigError

if TYPE_CHECKING:
    from hybridlm import linear_mixer

C = TypeVar("C")
EVERY = "*"  # stands for every format that a kind does not name


@dataclasses.dataclass(frozen=True)
class Format(Generic[C]):
    """One kind in one format; a kind's class names its formats in ``public``.

    read: (config.json, d_model, the model's norm_eps) -> settings of the kind that differ from its defaults.
    write: (settings in `explicit` form, d_model) -> fields of config.json that say them.
    rules: (settings, d_model) -> Rules, ours relative to the mixer or MLP, theirs to ``module``.
    module: what the layer's module is called in tensors' names.
    layer_type: what layers of this kind are called in config.json (layer_types; FLA: model_type).
    architecture: of FLA, where each kind has models of its own: the prefix of their classes.
    shared: of settings in `explicit` form, Rules of the stack-wide parameters (`TokenMixer.shared_class`),
        theirs relative to "model.".
    aliases: parts of tensors' names in circulation -> what the rules say.
    """

    read: Callable[[Fields, int, float], dict[str, Any]]
    write: Callable[[C, int], dict[str, Any]]
    rules: Callable[[C, int], list[Rule]]
    module: str
    layer_type: str = ""
    architecture: str = ""
    shared: Callable[[C], list[Rule]] = lambda config: []
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def nearby(f: Callable[[float], float], target: float, x: float) -> float:
    """``x``, or the number beside it of which f is exactly ``target``, if there is one."""
    return next(
        (one for one in (x, math.nextafter(x, 0), math.nextafter(x, math.inf)) if f(one) == target), x
    )


def told(config: object, names: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The inverse of `Fields.table`."""
    return {field: getattr(config, ours) for ours, (field, *_) in names.items()}


def linears(names: str) -> list[Rule]:
    """Linears by their first letters: "qkvo" has the same name on both sides."""
    return [linear(f"{name}_proj", f"{name}_proj") for name in names]


def conv_size(fields: Fields, default: bool) -> int:
    """FLA's way of saying it; ``default``: whether there are convolutions where nothing is said."""
    size = fields.get("conv_size", 4)
    return size if fields.get("use_short_conv", default) else 0


def conv_fields(size: int) -> dict[str, Any]:
    return {"use_short_conv": size > 0, "conv_size": size or 4}


def multi_head(fields: Fields, d_model: int, heads: int, expand_k: float, expand_v: float) -> dict[str, Any]:
    """The sizes of FLA's DeltaNet, GLA and RetNet, whose defaults are given."""
    heads = fields.get("num_heads", heads)
    return {
        "num_heads": heads,
        "head_dim": fields.part("expand_k", d_model * fields.get("expand_k", expand_k), heads),
        "v_head_dim": fields.part("expand_v", d_model * fields.get("expand_v", expand_v), heads),
    }


def head_fields(heads: int, head_dim: int, v_head_dim: int, d_model: int) -> dict[str, Any]:
    widths = {"expand_k": heads * head_dim / d_model, "expand_v": heads * v_head_dim / d_model}
    return {"num_heads": heads} | widths


def multi_head_fields(config: "linear_mixer.Config", d_model: int) -> dict[str, Any]:
    own = head_fields(config.num_heads, config.head_dim, config.v_head_dim, d_model)
    return own | conv_fields(config.conv_size)


def gated_fields(config: "linear_mixer.Config", d_model: int) -> dict[str, Any]:
    """Of FLA's GLA and RetNet."""
    return multi_head_fields(config, d_model) | {"use_output_gate": config.output_gate == "swish"}


def grouped(fields: Fields, heads: int, head_dim: int, expand_v: float) -> dict[str, Any]:
    """What FLA's Gated DeltaNet and KDA, whose defaults are given, have in common."""
    heads, head_dim = fields.get("num_heads", heads), fields.get("head_dim", head_dim)
    return {
        "num_heads": heads,
        "num_v_heads": fields.get("num_v_heads", heads),
        "head_dim": head_dim,
        "v_head_dim": fields.part("expand_v", head_dim * fields.get("expand_v", expand_v), 1),
        "conv_size": conv_size(fields, True),
        "neg_eigval": fields.get("allow_neg_eigval", False),
    }


def grouped_fields(config: "linear_mixer.GroupedConfig") -> dict[str, Any]:
    return {
        "num_heads": config.num_heads,
        "num_v_heads": config.num_v_heads,
        "head_dim": config.head_dim,
        "expand_v": config.v_head_dim / config.head_dim,
        "allow_neg_eigval": config.neg_eigval,
    } | conv_fields(config.conv_size)


def rope_fields(theta: float, yarn: tuple[float, ...], every: bool) -> dict[str, Any]:
    """The inverse of `Fields.rope` and `Fields.yarn`.  yarn: every number of it, or none."""
    if not yarn:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    factor, context, fast, slow, mscale, of_all = yarn
    said: dict[str, Any] = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
    said |= {"original_max_position_embeddings": round(context), "beta_fast": fast, "beta_slow": slow}
    if every and mscale and of_all:
        said |= {"mscale": mscale, "mscale_all_dim": of_all}
    elif (mscale, of_all) != (1, 0):
        what = "must be above 0, or 1, 0" if every else "must be 1, 0"
        raise ConfigError("yarn", yarn, f"ends with MSCALE, MSCALE_ALL, which {what} in this format")
    return {"rope_parameters": said, "max_position_embeddings": round(factor * context)}


def only_plain(fields: Fields, heads: int) -> None:
    """Refuses what FLA's GLA and RetNet can do besides."""
    fields.only("num_kv_heads", None, heads)
    for field in ("feature_map", "clamp_min"):
        fields.only(field, None)
    fields.ignore("use_gk", "use_gv")
