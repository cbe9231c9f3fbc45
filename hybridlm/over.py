"""Kinds that are made over another one: its projections and gates, and more states than one.

A definition names another of `mixers` (``of``), as `parallel` names its branches. That must be a kind whose
recurrence is the op of `linear_mixer.recurrence` as it is, one write a token.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import mixers
from hybridlm.context import Context
from hybridlm.errors import ConfigError, nearest
from hybridlm.layers import Linear
from hybridlm.linear_mixer import Inputs, LinearMixer
from hybridlm.mixers import Site


@dataclasses.dataclass(frozen=True)
class Config(mixers.Config):
    """of: the name in `mixers` of what it is made over."""

    part: ClassVar[Any] = None  # the settings that ``of`` names; a field of what `joined` returns

    of: str = "gdn"

    def needs(self) -> tuple[str, ...]:
        return (self.of,)

    def joined(self, known: Mapping[str, mixers.Config]) -> Any:
        if self.of not in known:
            raise ConfigError("of", self.of, f"no mixer named {self.of!r} in mixers", nearest(self.of, known))
        part = known[self.of]
        kind = mixers.load(part.kind)
        plain = issubclass(kind, LinearMixer) and kind.recur is LinearMixer.recur
        if part.needs() or kind.shared_class or not plain:
            problem = f"{self.of}, of kind {part.kind}, has no single matrix that a token writes to once"
            fix = "Such as mamba2, gdn, kda, deltanet, gla, retnet, lightning and comba have."
            raise ConfigError("of", self.of, problem, fix)
        cls: Any = type(self)
        return _with_part(cls)(**vars(self), part=part)

    def explicit(self, d_model: int) -> Any:
        own: Any = self  # of what `joined` returns
        if self.part is None:
            return own
        return dataclasses.replace(own, of=self.part.kind, part=self.part.explicit(d_model))

    def matrix(self, d_model: int) -> int:
        """Elements of one state of ``part``."""
        heads = self.part.heads(d_model)
        return heads.num_v * heads.key * heads.value


@functools.cache
def _with_part(config: type[Config]) -> Any:
    fields = [("part", mixers.Config, dataclasses.field(default=None, kw_only=True))]
    names = {"__module__": config.__module__}
    return dataclasses.make_dataclass("Joined", fields, bases=(config,), namespace=names, frozen=True)


def make(part: Any, site: Site, rngs: nnx.Rngs) -> LinearMixer:
    """The mixer that ``part``, of `Config`, is the settings of."""
    mixer = mixers.load(part.kind)(part, site, rngs=rngs)
    assert isinstance(mixer, LinearMixer)
    return mixer


def share(mixer: LinearMixer, source: LinearMixer, names: Iterable[str]) -> None:
    """The attributes ``names`` of ``mixer``, where it has them, become those of ``source``."""
    for name in names:
        if hasattr(mixer, name):
            setattr(mixer, name, getattr(source, name))


def weighed(inputs: Inputs, weight_BT: jax.Array) -> Inputs:
    """Writes times a weight; tokens of weight 0 leave the state as it is.

    The weight is a factor of beta where there is one (of what is written and of what is erased), else of v.
    """
    at = lambda x: weight_BT.reshape(weight_BT.shape + (1,) * (x.ndim - 2))
    log_decay, beta = inputs.log_decay, inputs.beta
    if log_decay is not None:
        log_decay = jnp.where(at(log_decay) == 0, 0, log_decay)
    if beta is not None:
        return inputs._replace(log_decay=log_decay, beta=beta * at(beta))
    return inputs._replace(log_decay=log_decay, v=inputs.v * at(inputs.v).astype(inputs.v.dtype))


def read(inputs: Inputs, o: jax.Array) -> jax.Array:
    """``o`` and what skips the recurrence, float32."""
    return o.astype(jnp.float32) + (0 if inputs.skip is None else inputs.skip)


class Choice(NamedTuple):
    """chosen: int32 [B, T, S], the parts that each token goes to.  weight: float32 [B, T, S]."""

    chosen: jax.Array
    weight: jax.Array

    def spread(self, parts: int) -> jax.Array:
        """The weight of each part, 0 where it is not chosen: [B, T, parts]."""
        return jnp.einsum("bts,btsp->btp", self.weight, jax.nn.one_hot(self.chosen, parts))


def choose(router: Linear, x_BTD: jax.Array, context: Context, top_k: int, balance: float) -> Choice:
    """The ``top_k`` = S largest of p = softmax(W x) over P parts.

    Records "loss.balance": balance * P / S * sum over parts of f p, f its choices a token and p on average.
    """
    p_BTP = jax.nn.softmax(router(x_BTD.astype(jnp.float32)))
    weight, index = jax.lax.top_k(p_BTP, top_k)
    if balance and context.wants("loss.balance"):
        parts, real = p_BTP.shape[-1], (context.rows.segment_ids != 0)[..., None]
        mean = lambda x: jnp.sum(x * real, axis=(0, 1)) / jnp.maximum(real.sum(), 1)
        chosen = jax.nn.one_hot(index, parts).sum(2)
        context.record("loss.balance", balance * parts / top_k * jnp.sum(mean(chosen) * mean(p_BTP)))
    return Choice(index, weight)
