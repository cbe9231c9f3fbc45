"""One layer of the stack: a mixer and an MLP around the residual stream; norms before, after or on it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import mixers, mlps, pattern, schema
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.layers import PASSED, STREAM, LayerNorm, Linear, RMSNorm
from hybridlm.mixers import Site


class Factors(NamedTuple):
    """Low-rank factors of the matrix ``name`` of a block: their rank, and what their product is times."""

    name: str
    rank: int
    scale: float


class Spec(NamedTuple):
    """One layer: its item of the pattern, and the settings of mixer and MLP.

    post_norm: the block's norms stand after mixer and MLP, not before.
    stream: of the halves that norm the stream itself, by name, the weights (of the stream, of what is added).
    frozen: names of its parameters that are not trained.
    lora: of the matrices that have factors (`hybridlm.lora`).
    """

    name: str
    config: mixers.Config
    mlp_config: mlps.Config
    post_norm: bool = False
    stream: tuple[tuple[str, tuple[float, float]], ...] = ()
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
        """What the layer costs beside parameters; what it reuses is kept once, by the layer that left it."""
        cost = self.config.cost(d_model, context)
        cost = cost._replace(state=cost.state + self.mlp_config.state(d_model))
        return cost._replace(cache=0) if self.reuses else cost

    @property
    def mlp_kind(self) -> str:
        return self.mlp_config.kind

    def __str__(self) -> str:
        return self.name


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or, post-norm, x + norm(mixer(x)), then x + norm(mlp(x)).

    A half that norms the stream itself (``Spec.stream``): a h + b f(h) with h = norm(x), f mixer or MLP.
    Without an MLP (kind "none") the first half is all. A mixer that norms what it is given itself has no norm
    before it.
    """

    def __init__(self, model: schema.Model, spec: Spec, site: Site, *, rngs: nnx.Rngs):
        self.post_norm, self.has_mlp = spec.post_norm, spec.mlp_kind != "none"
        self.bare = spec.config.norms_itself
        mlp = pattern.split(spec.name)[1]
        self.called = {
            "mixer": (f"mixers.{spec.mixer}.kind", spec.kind),
            "mlp": (f"mlps.{mlp}.kind", spec.mlp_kind),
        }
        self.multiplier, self.stream = model.residual_multiplier, dict(spec.stream)
        site = site._replace(leaves=spec.leaves, reuses=spec.reuses)
        if not spec.config.norms_itself:
            self.mixer_norm = norm(model, rngs)
        self.mixer = mixers.load(spec.kind)(spec.config, site, rngs=rngs)
        if self.has_mlp:
            self.mlp_norm = norm(model, rngs)
            self.mlp = mlps.load(spec.mlp_kind)(spec.mlp_config, site, rngs=rngs)
        self.keeps = self.has_mlp and getattr(self.mlp, "keeps", False)
        linears = matrices(self)
        for linear in linears.values():
            linear.fp8 = model.matmul == "fp8" and not linear.why_not_fp8()
        for one in spec.lora:
            linears[one.name].add_factors(one.rank, one.scale, rngs)

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        context.record("block.input", x_BTD)
        own, kept = cache if self.keeps and cache is not None else (cache, None)
        given = self._before("mixer", x_BTD)
        mixed, own = self._pair(self.mixer(given, context, own))
        context.record("block.mixed", mixed)
        between = checkpoint_name(self._sum("mixer", x_BTD, given, mixed), STREAM)
        y_BTD, kept = self._mlp(between, context, kept)
        context.record("block.output", y_BTD)
        return y_BTD, (own, kept) if self.keeps and cache is not None else own

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """One more token a row: x and the context's rows without the T axis."""
        own, kept = cache if self.keeps else (cache, None)
        given = self._before("mixer", x_BD)
        mixed, own = self._pair(self.mixer.step(given, context, own))
        y_BD, kept = self._mlp(self._sum("mixer", x_BD, given, mixed), context, kept)
        return y_BD, (own, kept) if self.keeps else own

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Any:
        """The mixer's, beside it the MLP's if it keeps anything."""
        own = self.mixer.init_cache(batch, max_length, dtype)
        return (own, self.mlp.init_cache(batch, dtype)) if self.keeps else own

    def _mlp(self, x: jax.Array, context: Context, kept: Any) -> tuple[jax.Array, Any]:
        if not self.has_mlp:
            return x, None
        given = self._before("mlp", x)
        if self.keeps:
            y, kept = (self.mlp if x.ndim == 3 else self.mlp.step)(given, context, kept)
        else:
            y = self.mlp(given, context)
        return self._sum("mlp", x, given, y), kept

    def _pair(self, made: Any) -> tuple[jax.Array, Any]:
        """What a mixer, perhaps one from outside, returned; an array would come apart along its batch."""
        if not isinstance(made, tuple) or len(made) != 2:
            problem = f"returned {type(made).__name__}"
            raise ConfigError(*self.called["mixer"], problem, "It must be (y, cache); without one (y, None).")
        return made

    def _norm(self, half: str) -> "Norm":
        return self.mixer_norm if half == "mixer" else self.mlp_norm

    def _before(self, half: str, x: jax.Array) -> jax.Array:
        bare = self.post_norm or (self.bare and half == "mixer")
        return x if bare else checkpoint_name(self._norm(half)(x), PASSED)

    def _sum(self, half: str, x: jax.Array, given: jax.Array, y: jax.Array) -> jax.Array:
        """The stream after ``half`` made y of what it was given; ConfigError where y is not like it."""
        if y.shape != x.shape or jnp.promote_types(x.dtype, y.dtype) != x.dtype:
            problem = f"made {y.dtype}{list(y.shape)} of {x.dtype}{list(x.shape)}"
            raise ConfigError(*self.called[half], problem, "It must be of that shape and dtype.")
        y = self._norm(half)(y) if self.post_norm else y
        y = y * self.multiplier if self.multiplier != 1 else y
        if half not in self.stream:
            return x + y
        of_stream, of_added = self.stream[half]
        return of_stream * given + of_added * y


def matrices(block: Block) -> dict[str, Linear]:
    """Every `Linear` of a block by its name in it."""
    found = nnx.iter_modules(block)
    return {".".join(map(str, path)): module for path, module in found if isinstance(module, Linear)}


def abstract(model: schema.Model, spec: Spec) -> Block:
    """The Block of a layer with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Block(model, spec, Site(model.d_model), rngs=nnx.Rngs(params=0)))


Norm = RMSNorm | LayerNorm


def norm(model: schema.Model, rngs: nnx.Rngs) -> Norm:
    if model.norm == "layer":
        return LayerNorm(model.d_model, rngs=rngs, eps=model.norm_eps)
    return RMSNorm(model.d_model, rngs=rngs, eps=model.norm_eps, unit_offset=model.norm_unit_offset)
