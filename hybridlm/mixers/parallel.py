"""Heads of several kinds side by side in one layer, on the same input (Hymba, Falcon-H1).

    norm:  y = mean over branches i of m_i rmsnorm_i(f_i(x))     learned scales (Hymba, arXiv 2411.13676)
    sum:   y = sum over branches i of m_i f_i(x)                 multipliers (Falcon-H1, arXiv 2507.22448)
    gate:  y = a f_0(x) + (1 - a) f_1(x)                         a = sigmoid(gate), one a layer, 1/2 at first:
                                                                 which of two a layer is to be (FlashMorph,
                                                                 arXiv 2606.30562; `hybridlm.layer_choice`)

f_i is a whole mixer, its output projection included; Hymba norms before a projection that the branches share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.convert.fields import Fields
from hybridlm.convert.public import Format
from hybridlm.convert.rules import Rule
from hybridlm.errors import ConfigError, nearest
from hybridlm.fields import Limits, NonNegative
from hybridlm.layers import RMSNorm, param, zeros
from hybridlm.mixers import Cost, Site, TokenMixer


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """Parallel heads.

    branches: names in `mixers`, two or more, each once.
    combine: "norm" (the mean of the branches' RMS-normalised outputs, with a learned scale per channel),
        "sum", or "gate" (two branches, weighed by one learned number).
    multipliers: a fixed factor on each branch's output; none: all 1.
    gate_penalty: weight in the loss of a, the share of the first branch ("loss.gate").
    """

    branches: tuple[str, ...] = ("mamba2", "full")
    combine: Literal["norm", "sum", "gate"] = "norm"
    multipliers: tuple[Annotated[float, Limits(-1e9, 1e9)], ...] = ()
    gate_penalty: NonNegative = 0.0

    def check(self, d_model: int) -> None:
        if len(self.branches) < 2 or len(set(self.branches)) < len(self.branches):
            fix = "Two of the same settings are two names."
            raise ConfigError("branches", self.branches, "must be two or more names, each once", fix)
        if self.multipliers and len(self.multipliers) != len(self.branches):
            problem = f"must be none or {len(self.branches)}, one a branch"
            raise ConfigError("multipliers", self.multipliers, problem)
        if self.combine == "gate" and (len(self.branches) != 2 or self.multipliers):
            raise ConfigError("combine", "gate", "weighs two branches, without multipliers")
        if self.gate_penalty and self.combine != "gate":
            raise ConfigError("gate_penalty", self.gate_penalty, 'must be 0 unless combine is "gate"')

    def needs(self) -> tuple[str, ...]:
        return self.branches

    def joined(self, known: Mapping[str, mixers.Config]) -> "Joined":
        parts = []
        for name in self.branches:
            if name not in known:
                problem = f"no mixer named {name!r} in mixers"
                raise ConfigError("branches", self.branches, problem, nearest(name, known))
            part = known[name]
            if part.needs():
                raise ConfigError("branches", self.branches, f"{name} is of kind {part.kind} itself")
            if mixers.load(part.kind).shared_class:
                problem = (
                    f"{name}, of kind {part.kind}, has parameters of the whole stack and must stand alone"
                )
                raise ConfigError("branches", self.branches, problem)
            parts.append(part)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Joined(**values, parts=tuple(parts))


@dataclasses.dataclass(frozen=True)
class Joined(Config):
    """With the settings of its branches, which a config has under their own names."""

    parts: tuple[mixers.Config, ...] = ()

    @property
    def full_attention(self) -> bool:
        return any(part.full_attention for part in self.parts)

    @property
    def carries(self) -> bool:
        return any(part.carries for part in self.parts)

    def cost(self, d_model: int, context: int) -> Cost:
        return Cost(*map(sum, zip(*(part.cost(d_model, context) for part in self.parts), strict=True)))

    def clips(self, d_model: int, shares: bool) -> dict[str, Any]:
        return {
            f"branches.{name}.{parameter}": (f"{name}.{record}", scale)
            for name, part in zip(self.branches, self.parts, strict=True)
            for parameter, (record, scale) in part.clips(d_model, shares).items()
        }

    def explicit(self, d_model: int) -> "Joined":
        return dataclasses.replace(self, parts=tuple(part.explicit(d_model) for part in self.parts))


FALCON = {"mamba2": "mamba2", "full": "attention"}  # the branches of Falcon-H1 by name


def _falcon_read(fields: Fields, d_model: int, eps: float) -> dict[str, Any]:
    attention = fields.get("attention_in_multiplier", 1.0) * fields.get("attention_out_multiplier", 1.0)
    multipliers = fields.get("ssm_out_multiplier", 1.0), attention
    return {"branches": tuple(FALCON), "combine": "sum", "multipliers": multipliers}


def _falcon_write(config: Joined, d_model: int) -> dict[str, Any]:
    if {name: part.kind for name, part in zip(config.branches, config.parts, strict=True)} != FALCON:
        said = ", ".join(f"{name} of kind {kind}" for name, kind in FALCON.items())
        raise ConfigError("branches", config.branches, f"must be {said} in this format")
    ssm, full = config.multipliers or (1.0, 1.0)
    found = {"ssm_out_multiplier": ssm, "attention_out_multiplier": full}
    for part in config.parts:
        found |= mixers.public(part.kind)["falcon_h1 branch"].write(part, d_model)
    return found


def _falcon_rules(config: Joined, d_model: int) -> list[Rule]:
    found = []
    for name, part in zip(config.branches, config.parts, strict=True):
        own = mixers.public(part.kind)["falcon_h1 branch"]
        found += [rule.under(f"branches.{name}.", own.module) for rule in own.rules(part, d_model)]
    return found


class Mixer(TokenMixer):
    """A branch's records are called "<branch>.<name>", but its losses, which are added up."""

    config_class = Config
    public: ClassVar = {"falcon_h1": Format(_falcon_read, _falcon_write, _falcon_rules, "", "hybrid")}

    def __init__(self, config: Joined, site: Site, *, rngs: nnx.Rngs):
        self.names, self.combine = config.branches, config.combine
        self.multipliers = config.multipliers or (1.0,) * len(self.names)
        make = lambda part: mixers.load(part.kind)(part, site, rngs=rngs)
        self.branches = nnx.Dict(dict(zip(self.names, map(make, config.parts), strict=True)))
        self.penalty = config.gate_penalty
        if config.combine == "gate":
            self.gate = param(rngs, (1,), (None,), zeros, decay=False)
        if config.combine == "norm":
            self.norms = nnx.Dict({name: RMSNorm(site.d_model, rngs=rngs) for name in self.names})

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: tuple[Any, ...] | None = None
    ) -> tuple[jax.Array, tuple[Any, ...] | None]:
        return self._combined(lambda branch, one, own: branch(x_BTD, one, own), context, cache)

    def step(self, x_BD: jax.Array, context: Context, cache: tuple[Any, ...]) -> tuple[jax.Array, Any]:
        return self._combined(lambda branch, one, own: branch.step(x_BD, one, own), context, cache)

    def _combined(self, run: Callable, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        total: Any = 0.0
        after = []
        factors: tuple[Any, ...] = self.multipliers
        if self.combine == "gate":
            a = jax.nn.sigmoid(self.gate[0])
            factors = a, 1 - a
            if self.penalty:
                context.record("loss.gate", self.penalty * a)
        for index, (name, factor) in enumerate(zip(self.names, factors, strict=True)):
            one = context.branch()
            y, own = run(self.branches[name], one, None if cache is None else cache[index])
            context.join(name, one)
            after.append(own)
            if self.combine == "norm":
                y, factor = self.norms[name](y), factor / len(self.names)
            total += y if isinstance(factor, float) and factor == 1 else (y * factor).astype(y.dtype)
        return total, None if cache is None else tuple(after)

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> tuple[Any, ...]:
        return tuple(self.branches[name].init_cache(batch, max_length, dtype) for name in self.names)
