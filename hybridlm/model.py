"""The language model: embedding, a stack of blocks (`hybridlm.stack`), final norm, head.

Outside this file a model is a `Definition` (static) and `params`, a flat dict of float32 arrays.

Shape legend: B rows, T tokens, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import fp8, lora, loss, mixers, mlps, mup, pattern, plan, schema, stack
from hybridlm.block import Block, Spec, norm
from hybridlm.context import Context
from hybridlm.errors import ConfigError
from hybridlm.layers import Rule, embed, normal, param
from hybridlm.mixers import Site
from hybridlm.rows import Rows
from hybridlm.sharding import constrain
from hybridlm.stack import Cache

if TYPE_CHECKING:
    from hybridlm.config import Config

Params = dict[str, jax.Array]
Records = dict[str, jax.Array]


class Meta(NamedTuple):
    """What is known of a parameter outside its module, `hybridlm.layers`; None: an axis of stacked layers.

    frozen: it is not trained.  rule: what changes it after each step, in place of the optimiser.
    plain: its initial deviation is that of every plain matrix, whatever its inputs (`hybridlm.mup`).
    """

    axes: tuple[str | None, ...]
    decay: bool
    cast: bool = False
    rule: Rule | None = None
    frozen: bool = False
    plain: bool = False

    @property
    def trained(self) -> bool:
        return not self.frozen and self.rule is None


@dataclasses.dataclass(frozen=True)
class Definition:
    """Everything static about a model: its settings and its layers in order, planned; built by `build`.

    model: its products are exact; only a training step's are what the config says (`in_training`).
    frozen: patterns of the names of parameters that are not trained.
    """

    model: schema.Model
    layers: tuple[Spec, ...]
    layout: plan.Plan
    frozen: tuple[str, ...] = ()

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.model.dtype)

    @property
    def d_model(self) -> int:
        return self.model.d_model

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size


@functools.lru_cache(maxsize=64)
def build(config: "Config") -> Definition:
    """The definition of the model that a resolved config (`hybridlm.config.resolve`) describes."""
    model = config.model

    def spec(name: str) -> Spec:
        mixer, mlp = pattern.split(name)
        mlp_config = config.mlps[mlp] if mlp else mlps.config_class(mlps.DEFAULT)(kind=mlps.DEFAULT)
        filled = mlp_config.filled(model.mlp_hidden)
        joined = config.mixers[mixer].joined(config.mixers)
        halves = ("mixer",) if filled.kind == "none" else ("mixer", "mlp")
        found = {half: model.stream(f"{mixer}.{half}") for half in halves}
        stream = tuple((half, weights) for half, weights in found.items() if weights)
        return Spec(name, joined, filled, mixer in model.post_norm, stream)

    names = pattern.fill(pattern.parse(model.pattern), model.num_layers)
    specs = {name: spec(name) for name in dict.fromkeys(names)}
    layers = lora.placed(config, tuple(specs[name] for name in names))
    fp8.check(model, layers)
    frozen, exact = config.optimizer.freeze, dataclasses.replace(model, matmul="dtype")
    layers = _frozen(exact, layers, frozen) if frozen else layers
    definition = Definition(exact, layers, plan.plan(layers), frozen)
    if frozen and not any(meta.trained for meta in metadata(definition).values()):
        raise ConfigError("optimizer.freeze", frozen, "leaves nothing to train")
    return definition


def in_training(definition: Definition, config: "Config") -> Definition:
    """``definition`` with the products that ``model.matmul`` asks for; its parameters are the same."""
    model = dataclasses.replace(definition.model, matmul=config.model.matmul)
    return dataclasses.replace(definition, model=model)


def _frozen(model: schema.Model, layers: tuple[Spec, ...], frozen: tuple[str, ...]) -> tuple[Spec, ...]:
    """The layers with the names of those of their parameters that a pattern freezes."""
    names = list(canonical_shapes(Definition(model, layers, plan.plan(layers))))
    if model.tie_embeddings and froze("embedding", frozen):
        names.append("head")  # it is the embedding
    for at, one in enumerate(frozen):
        wanted = one.removeprefix("!")
        named = [name for name in names if fnmatchcase(name, wanted)]
        if not named:
            fix = "Names are layers.3.mixer.q_proj.kernel, embedding, head ...; * stands for anything."
            if model.tie_embeddings and fnmatchcase("head", wanted):
                fix = "With model.tie_embeddings the head is the embedding."
            raise ConfigError("optimizer.freeze", wanted, "is the name of no parameter", fix)
        if one.startswith("!") and not any(froze(name, frozen[:at]) for name in named):
            fix = f"All but these: '*, {one}'."
            raise ConfigError("optimizer.freeze", one, "takes out what nothing before it freezes", fix)
    own: list[list[str]] = [[] for _ in layers]
    for name in names:
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            if froze(name, frozen) or rest in layers[int(index)].frozen:
                own[int(index)].append(rest)
    return tuple(spec._replace(frozen=tuple(held)) for spec, held in zip(layers, own, strict=True))


class LM(nnx.Module):
    """A decoder-only language model over the stack that ``definition`` plans."""

    def __init__(self, definition: Definition, *, rngs: nnx.Rngs):
        model = definition.model
        d_model, vocab = model.d_model, model.vocab_size
        self.definition = definition
        self.embedding = param(rngs, (vocab, d_model), ("vocab", "embed"), normal(), decay=True)
        if model.embedding_norm:
            self.embedding_norm = norm(model, rngs)
        keys = jax.random.split(rngs.params(), len(definition.layers))
        self.stack = stack.Stack(model, definition.layout, keys)
        site = Site(d_model, 0, len(definition.layers), mup=bool(model.mup_base_width))
        specs = {spec.mixer: spec for spec in definition.layers}  # a layer of each mixer
        shared = {name: mixers.load(spec.kind).shared_class for name, spec in specs.items()}
        self.shared = nnx.Dict(
            {name: made(specs[name].config, site, rngs=rngs) for name, made in shared.items() if made}
        )
        self.final_norm = norm(model, rngs)
        tied = model.tie_embeddings
        self.head = None if tied else param(rngs, (d_model, vocab), ("embed", "vocab"), normal(), decay=True)

    def head_matrix(self) -> jax.Array:
        """[D, V] float32, with the divisor of the logits in it, muP's too."""
        matrix = self.embedding[...].T if self.head is None else self.head[...]
        divisor = mup.growth(self.definition.model) * self.definition.model.logit_divisor
        return matrix / divisor if divisor != 1 else matrix

    def _entered(self, x: jax.Array) -> jax.Array:
        model = self.definition.model
        x = x * model.embedding_multiplier if model.embedding_multiplier != 1 else x
        return self.embedding_norm(x) if model.embedding_norm else x

    def __call__(
        self, tokens_BT: jax.Array, rows: Rows, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states [B, T, D]; with a cache the tokens are appended to it."""
        return self._run(tokens_BT, rows, cache, ())[:2]

    def forward(
        self,
        tokens_BT: jax.Array,
        rows: Rows,
        wanted: tuple[str, ...] = (),
        inputs_LBTD: jax.Array | None = None,
    ) -> tuple[jax.Array, Records]:
        """(final hidden states [B, T, D], the layers' records whose names match a pattern of ``wanted``).

        Records by canonical name, "layers.3.q"; see `hybridlm.context`.
        inputs: what each layer is given in place of the output of the one before, which is then for nothing,
            as are the hidden states: layers that learn alone.
        """
        hidden, _, records = self._run(tokens_BT, rows, None, wanted, inputs_LBTD)
        return hidden, records

    def _run(
        self,
        tokens_BT: jax.Array,
        rows: Rows,
        cache: Cache | None,
        wanted: tuple[str, ...],
        inputs_LBTD: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, Records]:
        x = self._entered(embed(self.embedding[...], tokens_BT, self.definition.dtype))
        x = constrain(x, ("batch", "time", None))
        x, cache, records = self.stack(x, rows, cache, self._shared(), wanted, inputs_LBTD)
        return self.final_norm(x), cache, records

    def _shared(self) -> dict[str, Any]:
        """The stack-wide parameters of each mixer that has them: a row a layer of the stack, or a module."""
        modules: dict[str, Any] = dict(self.shared.items())
        return {
            name: module.per_layer() if hasattr(module, "per_layer") else module
            for name, module in modules.items()
        }

    def unstacked(self) -> list[tuple[Block, Any]]:
        """(Block, its `Context.shared`) of every layer in order, for `step`."""
        every = self._shared()
        shared = [every.get(spec.mixer) for spec in self.definition.layers]
        own = [one[i] if isinstance(one, jax.Array) else one for i, one in enumerate(shared)]
        return list(zip(self.stack.blocks(), own, strict=True))

    def step(
        self, token_B: jax.Array, rows: Rows, cache: Cache, blocks: Sequence[tuple[Block, Any]]
    ) -> tuple[jax.Array, Cache]:
        """Final hidden state [B, D] of one more token a row; ``blocks`` from `unstacked`, made once per loop.

        Layers are unrolled: their caches stay apart, so that a decode loop updates each in place.
        """
        x = self._entered(self.embedding[...][token_B].astype(self.definition.dtype))
        appended: list[Any] = []
        carried: dict[str, Any] = {}
        entered = x
        for index, ((block, row), layer_cache) in enumerate(zip(blocks, cache, strict=True)):
            context = Context(rows, index, len(blocks), row, carried, entered=entered)
            x, layer_cache = block.step(x, context, layer_cache)
            carried = context.carried
            appended.append(layer_cache)
        return self.final_norm(x), tuple(appended)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Empty caches of every layer for ``batch`` rows of at most ``max_length`` tokens."""
        dtype = self.definition.dtype
        return tuple(block.init_cache(batch, max_length, dtype) for block in self.stack.blocks())


def windows(definition: Definition) -> tuple[int, ...]:
    """Of the layers of softmax attention, in order, how many tokens each sees; 0: the whole document."""
    seen = ((spec.config.full_attention, getattr(spec.config, "window", 0)) for spec in definition.layers)
    return tuple(window for full, window in seen if full or window)


# Between modules and flat dicts. The Stack is inlined: its parameters are named "segments....".


@functools.lru_cache(maxsize=64)
def abstract(definition: Definition) -> tuple[Any, nnx.State]:
    """(graph, state of shapes): what `merge` needs and what `metadata` reads, with nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: LM(definition, rngs=nnx.Rngs(params=0))))


def _name(path: tuple) -> str:
    return ".".join(map(str, path)).removeprefix("stack.")


def _flat(state: nnx.State) -> dict[str, Any]:
    """The variables by name."""
    return {_name(path): variable for path, variable in nnx.to_flat_state(state)}


def init(definition: Definition, key: jax.Array) -> Params:
    """Fresh parameters; a layer's depend on ``key`` and its index only, not on the plan. Jit it."""
    variables = _flat(nnx.state(LM(definition, rngs=nnx.Rngs(params=key))))
    params = {name: variable.get_value() for name, variable in variables.items()}
    if (growth := mup.growth(definition.model)) == 1:
        return params
    meta = metadata(definition)
    return {name: leaf * mup.init_factor(meta[name], growth) for name, leaf in params.items()}


def merge(definition: Definition, params: Params) -> LM:
    """The module that holds ``params``."""
    graph, state = abstract(definition)
    flat = {path: one.replace(params[_name(path)]) for path, one in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.lru_cache(maxsize=64)
def metadata(definition: Definition) -> dict[str, Meta]:
    """A Meta for each parameter, by its name in `init`."""
    found = {}
    for name, variable in _flat(abstract(definition)[1]).items():
        stacked = len(variable.get_value().shape) - len(variable.axes)
        axes = (None,) * stacked + tuple(variable.axes)
        frozen = is_frozen(definition, name)
        cast = variable.cast and not name.startswith("shared.")  # its layers' gradients add up in float32
        found[name] = Meta(axes, variable.decay, cast, variable.rule, frozen, variable.plain)
    return found


def is_frozen(definition: Definition, name: str) -> bool:
    """Whether the parameter ``name`` of `init` is not trained; the layers of a stack are all alike in it."""
    where = stack.stacked(definition.layout, name)
    if where is None:
        return froze(name, definition.frozen)
    _, indices, rest = where
    return rest in definition.layers[indices.flat[0]].frozen


def froze(name: str, patterns: Sequence[str]) -> bool:
    """Whether ``patterns`` freeze ``name``: the last that matches counts, "!PATTERN" takes out again."""
    hits = [one for one in patterns if fnmatchcase(name, one.removeprefix("!"))]
    return bool(hits) and not hits[-1].startswith("!")


def cast_to_compute(definition: Definition, params: Params) -> Params:
    """``params`` with every matrix that layers cast to ``definition.dtype`` in it, to be cast once and not at
    each use; the model computes the same."""
    meta = metadata(definition)
    return {n: leaf.astype(definition.dtype) if meta[n].cast else leaf for n, leaf in params.items()}


@functools.lru_cache(maxsize=64)
def shapes(definition: Definition) -> dict[str, jax.ShapeDtypeStruct]:
    """ShapeDtypeStructs by the names of `init`, sorted, as what passes a `jax.jit` is."""
    leaves = {name: one.get_value() for name, one in sorted(_flat(abstract(definition)[1]).items())}
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def logits(definition: Definition, params: Params, tokens_BT: jax.Array, rows: Rows) -> jax.Array:
    """Float32 logits [B, T, V]; for evaluation of short batches, since it holds them all."""
    model = merge(definition, params)
    hidden, _ = model(tokens_BT, rows)
    head = model.head_matrix().astype(hidden.dtype)
    found = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    return loss.capped(found, definition.model.logit_cap)


# By layer.


def unstack(definition: Definition, params: Params) -> dict[str, jax.Array]:
    """``params`` by canonical name: "embedding" ..., then "layers.0.mixer.q_proj.kernel" ..., in order."""
    return stack.apart(definition.layout, params)


def restack(definition: Definition, flat: dict[str, jax.Array]) -> Params:
    """The inverse of `unstack`."""
    return stack.restack(definition.layout, flat, list(shapes(definition)))


def trained_shapes(definition: Definition) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every parameter that the optimiser trains, by canonical name."""
    known, meta = shapes(definition), metadata(definition)
    return stack.shapes_apart(definition.layout, {n: known[n] for n in known if meta[n].trained})


def canonical_shapes(definition: Definition) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of every parameter by canonical name."""
    return stack.shapes_apart(definition.layout, shapes(definition))
