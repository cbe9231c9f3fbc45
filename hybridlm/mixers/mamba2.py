"""Mamba-2 (Dao, Gu 2024, arXiv 2405.21060): one decay per head, B and C shared by groups of heads.

S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T,   y_t = S_t^T C_t + D x_t,   A = -exp(A_log)
dt = softplus(W_dt u + dt_bias),   x, B, C = silu(conv(W u) + bias),   out = W_o rmsnorm(y * silu(W_z u))
with one norm per group. In terms of `linear_mixer` q is C, k is B, v is dt x, g is z; groups are key heads.
Its models have no MLP: pattern "mamba2/none".
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import linear_mixer, mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format, told
from hybridlm.convert.rules import Rule, bias, concatenated, conv, linear, norm, same
from hybridlm.errors import ConfigError
from hybridlm.fields import Count, Epsilon, Limits, NonNegative, Positive
from hybridlm.layers import Linear, RMSNorm, merge_heads, ones, param, uniform
from hybridlm.linear_mixer import GroupedConfig, Heads, Inputs, LinearMixer
from hybridlm.mixers import Cost, Site


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Mamba-2, with the names of its public configs.

    num_heads: 0 is expand * d_model / head_dim.  expand: inner width over d_model.
    head_dim: channels of x per head.
    state_size: state numbers per channel.
    n_groups: groups of heads that share B and C.
    conv_size: taps of the short convolutions of x, B and C; 0 for none.
    dt_min, dt_max: between which dt is held; dt_max 0: no upper limit. Prefill and decoding alike.
    norm: whether there is an output norm (none in Falcon-H1).  norm_eps: its.
    multipliers: of what z, x, B, C and dt are projected to; none: all 1 (Falcon-H1).
    """

    num_heads: Count = 0
    head_dim: Positive = 64
    expand: Positive = 2
    state_size: Positive = 128
    n_groups: Positive = 1
    conv_size: Count = 4
    dt_min: NonNegative = 0.0
    dt_max: NonNegative = 0.0
    norm: bool = True
    norm_eps: Epsilon = 1e-5
    multipliers: tuple[Annotated[float, Limits(-1e9, 1e9)], ...] = ()

    def heads(self, d_model: int) -> Heads:
        num_v = self.num_heads or self.expand * d_model // self.head_dim
        return Heads(self.n_groups, num_v, self.state_size, self.head_dim)

    def check(self, d_model: int) -> None:
        mixers.whole_heads(self, self.expand * d_model, self.head_dim)
        if (heads := self.heads(d_model)).num_v % self.n_groups:
            raise ConfigError("n_groups", self.n_groups, f"must divide the number of heads, {heads.num_v}")
        if len(self.multipliers) not in (0, 5):
            raise ConfigError("multipliers", self.multipliers, "must be none or five, of z, x, B, C and dt")
        if self.dt_max and self.dt_max < self.dt_min:
            raise ConfigError("dt_max", self.dt_max, f"must be at least dt_min = {self.dt_min}, or 0")

    def cost(self, d_model: int, context: int) -> Cost:
        return linear_mixer.cost(self.heads(d_model), self.conv_size, delta=False)

    def explicit(self, d_model: int) -> "Config":
        idle: dict[str, Any] = {} if self.norm else {"norm_eps": Config.norm_eps}
        multipliers = () if set(self.multipliers) == {1.0} else self.multipliers
        heads = self.heads(d_model).num_v
        return dataclasses.replace(self, num_heads=heads, expand=1, multipliers=multipliers, **idle)

    def near_attention(self) -> dict[str, float]:
        """dt, which also scales what is written, is 1."""
        return {
            "dt_proj.kernel": 0.0,
            "dt_bias": linear_mixer.inverse_softplus(1.0),
            "A_log": math.log(linear_mixer.NEAR_NONE),
        }


SAID = {"use_bias": False, "use_conv_bias": True, "rmsnorm": True}
INFINITE: tuple[Any, ...] = (math.inf, {"__float__": "Infinity"})  # the latter is transformers'
THEIRS = ("layer_norm_epsilon", "time_step_limit", "time_step_rank", "time_step_min")  # transformers' alone


def fla_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """FLA's fields, or those of transformers, which calls its models the same and the tensors, too."""
    for name, value in SAID.items():
        fields.only(name, value)
    if set(THEIRS) & set(fields.values):
        fields.ignore("norm_before_gate", "rms_norm")  # which transformers reads not
    for name in ("norm_before_gate", "D_has_hdim"):
        if name not in fields.taken:
            fields.only(name, False)
    fields.ignore(
        "A_init_range", "conv_init", "dt_init_floor", "dt_max", "dt_min", "chunk_size", "residual_in_fp32",
        "time_step_rank", "time_step_min", "time_step_max", "time_step_floor",
    )  # fmt: skip
    low, high = _limits(fields)
    head_dim, expand = fields.size("head_dim", default=64), fields.get("expand", 2.0)
    heads = fields.part("expand", d_model * expand, head_dim)
    fields.only("num_heads", heads)
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "state_size": fields.size("state_size", default=128),
        "n_groups": fields.size("n_groups", default=8 if set(THEIRS) & set(fields.values) else 1),
        "conv_size": fields.size("conv_kernel", default=4),
        "dt_min": low,
        "dt_max": high,
        "norm_eps": eps,
    }


def _limits(fields: Fields) -> tuple[float, float]:
    """(least dt, largest or 0)."""
    found = [(name, fields.get(name)) for name in ("dt_limit", "time_step_limit")]
    found = [one for one in found if one[1] is not None] or [("", [0.0, INFINITE[0]])]
    name, given = found[0]
    finite = lambda x: type(x) in (int, float) and 0 <= x < 1e300
    pair = isinstance(given, list) and len(given) == 2 and found[-1][1] == given
    if not (pair and finite(given[0]) and (given[1] in INFINITE or (finite(given[1]) and given[1]))):
        raise fields.refuse(name, "must be two numbers, the second above 0 or Infinity, under either name")
    return float(given[0]), 0.0 if given[1] in INFINITE else float(given[1])


def fla_write(config: Config, d_model: int) -> dict[str, Any]:
    expand = config.num_heads * config.head_dim / d_model
    limit = [config.dt_min, config.dt_max or INFINITE[1]]
    limited = {"dt_limit": limit, "time_step_limit": limit} if config.dt_min or config.dt_max else {}
    return limited | {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "expand": int(expand) if expand == int(expand) else expand,
        "state_size": config.state_size,
        "n_groups": config.n_groups,
        "conv_kernel": config.conv_size,
        "residual_in_fp32": False,
        **SAID,
    }


def fla_rules(
    config: Config, d_model: int, ours: str = "", more: tuple[tuple[str, int], ...] = ()
) -> list[Rule]:
    """One projection [z, x, B, C, dt] and one convolution of x, B, C there; ``more`` of the former follow."""
    heads = config.heads(d_model)
    widths = heads.value_width, heads.key_width, heads.key_width
    names = [f"{ours}{name}_proj" for name in ("g", "v", "k", "q", "dt")] + [name for name, _ in more]
    sizes = heads.value_width, *widths, heads.num_v, *(size for _, size in more)
    convs = [f"{ours}{name}_conv" for name in "vkq"]
    return [
        concatenated(names, sizes, "in_proj", linear),
        concatenated(convs, widths, "conv1d", conv),
        concatenated(convs, widths, "conv1d", bias),
        *(same(ours + name, name) for name in ("A_log", "dt_bias", "D")),
        *([norm(f"{ours}o_norm", "norm")] if config.norm else []),
        linear(f"{ours}o_proj", "out_proj"),
    ]


def _hybrid(heads: int, state: int, inner_width: str = "") -> Format[Config]:
    """Of transformers' hybrids, whose defaults are given.  inner_width: a field of it, which may be null."""
    names = {
        "num_heads": ("mamba_n_heads", heads), "n_groups": ("mamba_n_groups", 1),
        "state_size": ("mamba_d_state", state), "conv_size": ("mamba_d_conv", 4),
    }  # fmt: skip
    biases = {"mamba_proj_bias": False, "mamba_conv_bias": True}

    def read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
        for name, value in biases.items():
            fields.only(name, value)
        sizes, inner = fields.table(names), fields.get("mamba_expand", 2) * d_model
        if inner_width and not (inner_width in fields.values and fields.values[inner_width] is None):
            inner = fields.size(inner_width, default=1024)
        fields.ignore(inner_width)
        head_dim = fields.part("mamba_n_heads", inner, sizes["num_heads"])
        fields.only("mamba_d_head", "auto", head_dim)
        low, high = _limits(fields)
        return sizes | {"head_dim": head_dim, "dt_min": low, "dt_max": high, "norm_eps": eps}

    def write(config: Config, d_model: int) -> dict[str, Any]:
        inner = config.num_heads * config.head_dim
        width = {inner_width: inner} if inner_width else {"mamba_expand": _expanded(config, d_model)}
        limits = {"time_step_limit": [config.dt_min, config.dt_max or INFINITE[1]]}
        found = told(config, names) | {"mamba_d_head": config.head_dim} | width | biases
        return found | (limits if config.dt_min or config.dt_max else {})

    return Format(read, write, fla_rules, "mamba.", "linear_attention")


def _expanded(config: Config, d_model: int) -> int:
    """How many times d_model the width is, of a format that says it so and has the norm."""
    if not config.norm:
        raise ConfigError("norm", False, "this format's Mamba-2 has an output norm")
    if (inner := config.num_heads * config.head_dim) % d_model:
        problem = f"times head_dim must be a multiple of d_model = {d_model} in this format"
        raise ConfigError("num_heads", config.num_heads, problem)
    return inner // d_model


def _falcon_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    normed, into = fields.get("mamba_rms_norm", False), fields.get("ssm_in_multiplier", 1.0)
    if normed and fields.get("mamba_norm_before_gate", True):
        raise fields.refuse("mamba_norm_before_gate", "must be false where mamba_rms_norm is true")
    fields.ignore("mamba_norm_before_gate")
    each = tuple(into * one for one in fields.numbers("ssm_multipliers", 5))
    return FALCON.read(fields, d_model, eps) | {"norm": normed, "multipliers": each}


def _falcon_write(config: Config, d_model: int) -> dict[str, Any]:
    said = {"mamba_rms_norm": config.norm, "mamba_norm_before_gate": False}
    return FALCON.write(config, d_model) | said | {"ssm_multipliers": list(config.multipliers or (1.0,) * 5)}


FALCON = _hybrid(128, 256, "mamba_d_ssm")
NEMOTRON = {
    "num_heads": ("mamba_num_heads", 128), "head_dim": ("mamba_head_dim", 64), "n_groups": ("n_groups", 8),
    "state_size": ("ssm_state_size", 128), "conv_size": ("conv_kernel", 4),
}  # fmt: skip


def _nemotron_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """transformers holds dt above time_step_min, whatever time_step_limit says."""
    for name, value in (("mamba_hidden_act", "silu"), ("mamba_proj_bias", False), ("use_bias", False)):
        fields.only(name, value)
    fields.only("use_conv_bias", True)
    return fields.table(NEMOTRON) | {"dt_min": fields.get("time_step_min", 0.001), "norm_eps": eps}


def _nemotron_write(config: Config, d_model: int) -> dict[str, Any]:
    said = {"time_step_min": config.dt_min, "use_bias": False, "use_conv_bias": True}
    return told(config, NEMOTRON) | said


ZAMBA = {
    "num_heads": ("n_mamba_heads", 8), "n_groups": ("mamba_ngroups", 1), "state_size": ("mamba_d_state", 64),
    "conv_size": ("mamba_d_conv", 4),
}  # fmt: skip


def _zamba_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """The output norm's eps is fixed there."""
    sizes = fields.table(ZAMBA)
    width = fields.get("mamba_expand", 2) * d_model
    sizes["head_dim"] = fields.part("n_mamba_heads", width, sizes["num_heads"])
    return sizes | {"dt_min": fields.get("time_step_min", 0.001), "norm_eps": 1e-5}


def _zamba_write(config: Config, d_model: int) -> dict[str, Any]:
    said = {"mamba_expand": _expanded(config, d_model), "time_step_min": config.dt_min}
    return told(config, ZAMBA) | said


class Mixer(LinearMixer):
    config_class = Config
    public: ClassVar = {
        "fla_backbone": Format(fla_read, fla_write, fla_rules, "mixer.", "mamba2", "Mamba2"),
        "bamba": _hybrid(128, 256),
        "granitemoehybrid": _hybrid(128, 256),
        "falcon_h1 branch": Format(_falcon_read, _falcon_write, fla_rules, "mamba."),
        "nemotron_h": Format(_nemotron_read, _nemotron_write, fla_rules, "mixer.", "linear_attention"),
        "zamba2": Format(_zamba_read, _zamba_write, fla_rules, "mamba.", "linear_attention"),
    }
    scale = 1.0
    conv_bias = True
    joined = True  # B and C are narrow: a group has state_size channels

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        heads = config.heads(site.d_model)
        common = GroupedConfig(
            heads.num, heads.key, heads.value, config.conv_size, "swish", config.norm_eps, heads.num_v
        )
        super().__init__(common, site, rngs=rngs)
        self.dt_min, self.dt_max = config.dt_min, config.dt_max or jnp.inf
        width, bound = heads.value_width, (heads.value_width * site.num_layers) ** -0.5
        self.dt_proj = Linear(site.d_model, heads.num_v, rngs=rngs)
        self.dt_bias = param(rngs, (heads.num_v,), ("heads",), linear_mixer.dt_bias_init, decay=False)
        self.A_log = param(rngs, (heads.num_v,), ("heads",), linear_mixer.log_uniform(1, 16), decay=False)
        self.D = param(rngs, (heads.num_v,), ("heads",), ones, decay=False)
        for name, multiplier in zip("gvkq", config.multipliers, strict=False):
            getattr(self, f"{name}_proj").multiplier = multiplier
        if config.multipliers:
            self.dt_proj.multiplier = config.multipliers[-1]
        del self.o_norm
        self.norm = config.norm
        if config.norm:
            self.o_norm = RMSNorm(width, rngs=rngs, eps=config.norm_eps, axis="heads", groups=heads.num)
        init = uniform(-bound, bound)  # PyTorch's default over the root of the depth, as in the authors' code
        self.o_proj = Linear(width, site.d_model, rngs=rngs, axes=("heads", "embed"), init=init)

    def inputs(self, x_BTD: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, context: Context) -> Inputs:
        dt = jax.nn.softplus(self.dt_proj(x_BTD).astype(jnp.float32) + self.dt_bias[...])
        dt = jnp.clip(dt, self.dt_min, self.dt_max)
        return ssd(q, k, v, dt, self.A_log[...], self.D[...])

    def normalize(self, o_BTHV: jax.Array, gate_BTHV: jax.Array | None) -> jax.Array:
        assert gate_BTHV is not None
        o_BTF = merge_heads(o_BTHV.astype(jnp.float32) * gate_BTHV)
        return (self.o_norm(o_BTF) if self.norm else o_BTF).astype(o_BTHV.dtype)


def ssd(C: jax.Array, B: jax.Array, x: jax.Array, dt: jax.Array, A_log: jax.Array, D: jax.Array) -> Inputs:
    """What the recurrence is given, with scale 1.

    C, B: [B, T, G, N].  x: [B, T, H, P].  dt: float32 [B, T, H], after the softplus.  A_log, D: [H].
    """
    wide = x.astype(jnp.float32)
    written = (wide * dt[..., None]).astype(x.dtype)
    return Inputs(C, B, written, -jnp.exp(A_log) * dt, skip=wide * D[:, None])
