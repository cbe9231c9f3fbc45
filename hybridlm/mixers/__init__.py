"""Token mixers, one file a kind: `hybridlm/mixers/<kind>.py` defines a Config and a Mixer that names it.

Adding a file adds a kind; "module:Class" names one that lives elsewhere.
"""

import abc
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
from flax import nnx

from hybridlm import kinds as _kinds
from hybridlm import pattern
from hybridlm.context import Context
from hybridlm.convert.public import Format
from hybridlm.errors import ConfigError
from hybridlm.fields import under


class Cost(NamedTuple):
    """What one layer needs beyond its parameters (which cost 2 forward FLOPs each and token), in rows of one
    document of ``context`` tokens.

    state: elements of decode state that are float32 whatever the model's dtype, short-conv history included.
    cache: elements of tokens' keys and values (or latents) kept after the whole context.
    flops: forward FLOPs per token, on average over the row.
    """

    state: float = 0
    cache: float = 0
    flops: float = 0


class Site(NamedTuple):
    """Where a layer is made: width of the stream, its index in the stack, and the number of layers.

    layer may be traced, since layers of one kind are made together.
    leaves, reuses: labels of keys and values that it leaves to later layers or reuses (`hybridlm.pattern`).
    mup: whether softmax attention scales its logits as in muP (`hybridlm.mup`).
    """

    d_model: int
    layer: int | jax.Array = 0
    num_layers: int = 1
    leaves: str = ""
    reuses: str = ""
    mup: bool = False


class KeyGates(NamedTuple):
    """A decay whose logit can be made of keys (Liger): log decay = logsigmoid(keys) / 16.

    matrices: of the logit, [D, n] or a pair [D, r], [r, n].  sign: of the keys in it.
    filled: other parameters of the gates, by name, and the number that fills them.
    """

    matrices: tuple[str, ...]
    sign: int
    filled: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Config(_kinds.Settings):
    """What the settings of every kind can be asked; a kind adds its fields, each with a default."""

    @property
    def full_attention(self) -> bool:
        """Whether the layer sees its whole context token by token, that is, has a cache that no window
        bounds: what "full" means in a ratio."""
        return False

    @property
    def carries(self) -> bool:
        """Whether the layer leaves something to later layers (`Context.leave`)."""
        return False

    @property
    def norms_itself(self) -> bool:
        """Whether the mixer is given the stream as it is, and its block has no norm before it."""
        return False

    def check(self, d_model: int) -> None:
        """ConfigError, with a field relative to the definition, for settings that do not fit together."""

    def needs(self) -> tuple[str, ...]:
        """Names in `mixers` of other definitions that its layers are made of."""
        return ()

    def joined(self, known: Mapping[str, "Config"]) -> "Config":
        """With the settings of what it `needs`, which is in ``known``: what Mixer is made from."""
        return self

    def clips(
        self, d_model: int, shares: bool
    ) -> Mapping[str, tuple[str, Callable[[jax.Array, jax.Array], jax.Array]]]:
        """How parameters, by name, scale each head's attention logits: see `hybridlm.qk_clip`.

        shares: whether keys are left to other layers, or are another's.
        """
        return {}

    def near_attention(self) -> Mapping[str, float]:
        """Parameters, by name, and the number that fills them where a layer takes the place of softmax
        attention (`hybridlm.mapping`): gates that forget next to nothing and write. Empty: they are fresh."""
        return {}

    def gates_of_keys(self) -> KeyGates | None:
        """How a layer that takes the place of softmax attention has its decay made of that one's keys
        (`hybridlm.mapping`); None: it cannot."""
        return None

    def check_reuse(self, source: "Config", d_model: int) -> None:
        """ConfigError unless layers of these settings can reuse keys and values of ``source``'s layers."""
        problem = f"layers of kind {self.kind} leave and reuse no keys and values (name:label, name@label)"
        raise ConfigError("kind", self.kind, problem, "Those of kinds attention and mla do.")

    @abc.abstractmethod
    def cost(self, d_model: int, context: int) -> Cost:
        raise NotImplementedError

    def explicit(self, d_model: int) -> Any:
        """The same settings to be compared: sizes that follow from d_model are written out, and settings that
        compute nothing beside the others are what they are by default."""
        return self


class TokenMixer(nnx.Module):
    """Every kind's Mixer: a map from [B, T, D] to [B, T, D] that may carry a cache from call to call.

    Mixer(config, site, rngs=rngs).  A kind whose parameters belong to the whole stack names a module in
    ``shared_class``, made once as shared_class(config, site, rngs=rngs); layer i finds row i of what its
    `per_layer` returns, leading axis num_layers, in `Context.shared`; without `per_layer`, the module itself.
    public: how checkpoints of each public format that has this kind say it.
    """

    config_class: ClassVar[type[Config]]
    shared_class: ClassVar[Any] = None
    public: ClassVar[Mapping[str, Format[Any]]] = {}

    @abc.abstractmethod
    def __init__(self, config: Config, site: Site, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def init_cache(self, batch: int, max_length: int, dtype: Any) -> Any:
        """An empty cache, any pytree of fixed shapes, for ``batch`` rows of at most ``max_length`` tokens.

        A kind without one can be trained and validated, but generates nothing.
        """
        problem = "defines no init_cache, so that it keeps nothing from token to token and cannot generate"
        raise ConfigError("kind", type(self).__name__, problem, "docs/outside.md has an example.")

    @abc.abstractmethod
    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any]:
        """(y [B, T, D], cache): with a cache the tokens are appended to it, without one None comes back.

        All rows of a batch are appended together, so prompts of several lengths are padded on the left.
        """
        raise NotImplementedError

    def step(self, x_BD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """One more token a row: x and the context's rows without the T axis."""
        y_BTD, cache = self(x_BD[:, None], context.with_time(), cache)
        return y_BTD[:, 0], cache


def kinds() -> list[str]:
    return _kinds.names(sys.modules[__name__])


def load(kind: str) -> type[TokenMixer]:
    """The Mixer of ``kind``; ConfigError for a kind that there is not."""
    return _kinds.load(sys.modules[__name__], kind, "Mixer")


def public(kind: str) -> Mapping[str, Format[Any]]:
    """The public formats that ``kind`` names itself: a class below another's computes something else."""
    return vars(load(kind)).get("public", {})


def config_class(kind: str) -> type[Config]:
    return load(kind).config_class


def shares_module(kind: str) -> bool:
    """Whether all layers of one name go through the same module, not each with a row of its parameters."""
    shared = load(kind).shared_class
    return shared is not None and not hasattr(shared, "per_layer")


def with_parts(used: set[str], known: Mapping[str, Config]) -> set[str]:
    """``used`` and the names that those need: two deep, since what lies deeper is refused by its name."""
    for _ in range(2):
        used = used | {part for name in used & set(known) for part in known[name].needs()}
    return used


def check_together(
    layers: Sequence[str], used: Iterable[str], known: Mapping[str, Config], d_model: int
) -> None:
    """Parts of layers are there; layers that leave or reuse keys and values can, and fit each other."""
    for name in used:
        with under(f"mixers.{name}"):
            known[name].joined(known)
    mixer = [pattern.split(layer)[0] for layer in layers]
    pairs = {(mixer[to], mixer[of]) for to, of in pattern.sources(layers).items()}
    pairs |= {(mixer[i], mixer[i]) for i, layer in enumerate(layers) if pattern.labels(layer)[0]}
    for reader, source in sorted(pairs):
        with under(f"mixers.{reader}"):
            known[reader].check_reuse(known[source], d_model)


class Headed(Protocol):
    @property
    def num_heads(self) -> int: ...


def whole_heads(config: Headed, width: int, head_dim: int) -> None:
    """``width`` must split into heads of ``head_dim`` where ``config.num_heads`` is 0."""
    if config.num_heads == 0 and (width < head_dim or width % head_dim):
        raise ConfigError(
            "num_heads",
            0,
            f"0 means as many heads of {head_dim} as a width of {width} holds, which leaves a remainder",
            "Set num_heads, or a head_dim that divides the width.",
        )
