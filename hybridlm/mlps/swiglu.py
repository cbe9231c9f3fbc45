"""SwiGLU (Shazeer 2020, arXiv 2002.05202): y = W_down (silu(W_gate x) * W_up x)."""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import mlps
from hybridlm.context import Context
from hybridlm.convert.fields import MAX_SIZE, Fields
from hybridlm.convert.public import EVERY, Format
from hybridlm.convert.rules import Rule, fused_rules, linear, swiglu_rules
from hybridlm.errors import ConfigError
from hybridlm.fields import Limits
from hybridlm.layers import MLP_INNER, PASSED, Linear
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(mlps.Inner):
    """SwiGLU.

    multipliers: of the gate's projection and of what comes out; none: 1 and 1 (Falcon-H1).
    """

    multipliers: tuple[Annotated[float, Limits(-1e9, 1e9)], ...] = ()

    def check(self, d_model: int) -> None:
        if len(self.multipliers) not in (0, 2):
            raise ConfigError(
                "multipliers", self.multipliers, "must be none or two, of the gate and the output"
            )

    def explicit(self) -> "Config":
        return dataclasses.replace(self, multipliers=self.multipliers or (1.0, 1.0))


def _read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    return {"hidden": fields.size("intermediate_size")}


def _write(config: Config, d_model: int) -> dict[str, Any]:
    return {"intermediate_size": config.hidden}


def _named(module: str) -> Format[Config]:
    return Format(_read, _write, lambda config, d_model: swiglu_rules(), module)


def _falcon_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    fields.only("mlp_bias", False)
    return _read(fields, d_model, eps) | {"multipliers": fields.numbers("mlp_multipliers", 2)}


def _falcon_write(config: Config, d_model: int) -> dict[str, Any]:
    return _write(config, d_model) | {"mlp_multipliers": list(config.multipliers or (1.0, 1.0))}


def _lfm2_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    """What intermediate_size says is adjusted unless block_auto_adjust_ff_dim is false."""
    hidden = fields.either("block_ff_dim", "intermediate_size", 12288)
    factor, step = fields.get("block_ffn_dim_multiplier", 1.0), fields.size("block_multiple_of", default=256)
    if not fields.get("block_auto_adjust_ff_dim", True):
        return {"hidden": hidden}
    if not 0 < factor * hidden <= MAX_SIZE:
        raise fields.refuse("block_ffn_dim_multiplier", "must be above 0, and give no more than memory holds")
    return {"hidden": -(-int(factor * int(2 * hidden / 3)) // step) * step}


def _lfm2_write(config: Config, d_model: int) -> dict[str, Any]:
    return {"intermediate_size": config.hidden, "block_auto_adjust_ff_dim": False}


def _lfm2_rules(config: Config, d_model: int) -> list[Rule]:
    return [linear("gate", "w1"), linear("up", "w3"), linear("down", "w2")]


XLSTM = "ffn_proj_factor", "ffn_round_up_to_multiple_of"


def _xlstm_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    factor, step = fields.get(XLSTM[0], 2.667), fields.size(XLSTM[1], default=64)
    if not 0 < factor * d_model <= MAX_SIZE:
        raise fields.refuse(XLSTM[0], "must be above 0, and give no more than memory holds")
    return {"hidden": int((factor * d_model + step - 1) // step * step)}


def _xlstm_rules(config: Config, d_model: int) -> list[Rule]:
    names = ("gate", "proj_up_gate"), ("up", "proj_up"), ("down", "proj_down")
    return [linear(*pair) for pair in names]


class Mlp(mlps.Mlp):
    """down(silu(gate(x)) * up(x))."""

    config_class = Config
    public: ClassVar = {
        EVERY: _named("mlp."),
        "bamba": _named("feed_forward."),
        "falcon_h1": Format(
            _falcon_read, _falcon_write, lambda config, d_model: swiglu_rules(), "feed_forward."
        ),
        "jamba": _named("feed_forward."),
        "granitemoehybrid": Format(
            lambda fields, d_model, eps: {"hidden": fields.size("shared_intermediate_size", default=1024)},
            lambda config, d_model: {"shared_intermediate_size": config.hidden, "num_local_experts": 0},
            lambda config, d_model: fused_rules(config.hidden),
            "shared_mlp.",
        ),
        "lfm2": Format(_lfm2_read, _lfm2_write, _lfm2_rules, "feed_forward."),
        "xlstm": Format(
            _xlstm_read,
            lambda config, d_model: dict(zip(XLSTM, (config.hidden / d_model, config.hidden), strict=True)),
            _xlstm_rules,
            "ffn.",
        ),
    }

    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        self.gate = Linear(site.d_model, config.hidden, rngs=rngs, axes=("embed", "mlp"))
        self.up = Linear(site.d_model, config.hidden, rngs=rngs, axes=("embed", "mlp"))
        self.down = Linear(config.hidden, site.d_model, rngs=rngs, axes=("mlp", "embed"))
        if config.multipliers:
            self.gate.multiplier, self.down.multiplier = config.multipliers

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        gate, up = (checkpoint_name(layer(x), MLP_INNER) for layer in (self.gate, self.up))
        return self.down(checkpoint_name(jax.nn.silu(gate) * up, PASSED))
