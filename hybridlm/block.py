"""One layer of the stack: a mixer and an MLP around the residual stream, normed before or after."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from hybridlm import mixers, mlps, pattern, schema
from hybridlm.context import Context
from hybridlm.layers import Linear, RMSNorm
from hybridlm.mixers import Site


class Factors(NamedTuple):
    """Low-rank factors of the matrix ``name`` of a block: their rank, and what their product is times."""

    name: str
    rank: int
    scale: float


class Spec(NamedTuple):
    """One layer: its item of the pattern, and the settings of mixer and MLP.

    post_norm: the block's norms stand after mixer and MLP, not before.
    frozen: names of its parameters that are not trained.
    lora: of the matrices that have factors (`hybridlm.lora`).
    """

    name: str
    config: mixers.Config
    mlp_config: mlps.Config
    post_norm: bool = False
    frozen: tuple[str, ...] = ()
    lora: tuple[Factors, ...] = ()

    @property
    def mixer(self) -> str:
        """The mixer's name in the config."""
        return pattern.split(self.name)[0]

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def leaves(self) -> str:
        """Under which label it leaves its keys and values to later layers; "": it does not."""
        return pattern.labels(self.name)[0]

    @property
    def reuses(self) -> str:
        """Label of the keys and values of an earlier layer that it reuses; "": it has its own."""
        return pattern.labels(self.name)[1]

    @property
    def carries(self) -> bool:
        """Whether it leaves anything to later layers."""
        return bool(self.leaves) or self.config.carries

    def cost(self, d_model: int, context: int) -> mixers.Cost:
        """What the mixer costs here; what a layer reuses is kept once, by the layer that left it."""
        cost = self.config.cost(d_model, context)
        return cost._replace(cache=0) if self.reuses else cost

    @property
    def mlp_kind(self) -> str:
        return self.mlp_config.kind

    def __str__(self) -> str:
        return self.name


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or, post-norm, x + norm(mixer(x)), then x + norm(mlp(x)).

    Without an MLP (kind "none") the first half is all.
    """

    def __init__(self, model: schema.Model, spec: Spec, site: Site, *, rngs: nnx.Rngs):
        self.post_norm, self.has_mlp = spec.post_norm, spec.mlp_kind != "none"
        site = site._replace(leaves=spec.leaves, reuses=spec.reuses)
        self.mixer_norm = norm(model, rngs)
        self.mixer = mixers.load(spec.kind)(spec.config, site, rngs=rngs)
        if self.has_mlp:
            self.mlp_norm = norm(model, rngs)
            self.mlp = mlps.load(spec.mlp_kind)(spec.mlp_config, site, rngs=rngs)
        linears = matrices(self)
        for linear in linears.values():
            linear.fp8 = model.matmul == "fp8" and not linear.why_not_fp8()
        for one in spec.lora:
            linears[one.name].add_factors(one.rank, one.scale, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        context.record("block.input", x_BTD)
        mixed, cache = self.mixer(self._before(self.mixer_norm, x_BTD), context, cache)
        context.record("block.mixed", mixed)
        y_BTD = self._mlp(x_BTD + self._after(self.mixer_norm, mixed), context)
        context.record("block.output", y_BTD)
        return y_BTD, cache

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """One more token a row: x and the context's rows without the T axis."""
        mixed, cache = self.mixer.step(self._before(self.mixer_norm, x_BD), context, cache)
        return self._mlp(x_BD + self._after(self.mixer_norm, mixed), context), cache

    def _mlp(self, x: jax.Array, context: Context) -> jax.Array:
        if not self.has_mlp:
            return x
        return x + self._after(self.mlp_norm, self.mlp(self._before(self.mlp_norm, x), context))

    def _before(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        return x if self.post_norm else norm(x)

    def _after(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        return norm(x) if self.post_norm else x


def matrices(block: Block) -> dict[str, Linear]:
    """Every `Linear` of a block by its name in it."""
    found = nnx.iter_modules(block)
    return {".".join(map(str, path)): module for path, module in found if isinstance(module, Linear)}


def abstract(model: schema.Model, spec: Spec) -> Block:
    """The Block of a layer with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Block(model, spec, Site(model.d_model), rngs=nnx.Rngs(params=0)))


def norm(model: schema.Model, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(model.d_model, rngs=rngs, eps=model.norm_eps, unit_offset=model.norm_unit_offset)
