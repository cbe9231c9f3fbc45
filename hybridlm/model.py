"""The language model: embedding, a planned stack of pre-norm blocks, final norm, head.

Parameters of equal neighbours are stacked: a run of n equal layers inside a period that repeats r times is
one Block whose parameters have leading axes [r, n], and the forward pass is a scan over r of scans over n.
Trace and compile time therefore depend on the number of distinct runs, not on depth, and each layer is
rematerialised by itself (`model.remat`).

Outside this file a model is a `Definition` (static) and `params` (a nested dict of float32 arrays).

Shape legend: B rows, T tokens, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import loss, mixers, mlps, pattern
from hybridlm.layers import MLP_INNER, RMSNorm, embed, normal, param
from hybridlm.layout import Layout, plan, run_indices
from hybridlm.rows import Rows
from hybridlm.sharding import constrain

Params = dict[str, Any]
Cache = tuple[Any, ...]  # one pytree per layer, in layer order

# What the backward pass may keep of a layer, apart from its input.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # everything: no rematerialisation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of the projections
    "mixer": jax.checkpoint_policies.save_only_these_names(MLP_INNER),  # the MLP's, before its activation
    "full": jax.checkpoint_policies.nothing_saveable,  # nothing
}


class Meta(NamedTuple):
    """What is known of a parameter outside its module, `hybridlm.layers`; None: an axis of stacked layers."""

    axes: tuple[str | None, ...]
    decay: bool
    cast: bool = False


class Spec(NamedTuple):
    """One layer: its item of the pattern, and kind and settings of mixer and MLP.

    post_norm: the block's norms stand after mixer and MLP, not before.
    """

    name: str
    kind: str
    config: Any
    mlp_kind: str
    mlp_config: Any
    post_norm: bool

    @property
    def mixer(self) -> str:
        """The mixer's name in the config."""
        return pattern.split(self.name)[0]


@dataclasses.dataclass(frozen=True)
class Definition:
    """Everything static about a model: its layers in order, their plan, and sizes; built by `build`."""

    layers: tuple[Spec, ...]
    plan: Layout
    d_model: int
    vocab_size: int
    norm_eps: float
    norm_unit_offset: bool
    tie_embeddings: bool
    dtype: Any
    remat: str
    scan: bool


def build(config: Any) -> Definition:
    """The definition of the model that a resolved config (`hybridlm.config.resolve`) describes."""
    model = config.model

    def settings(definition: Any) -> dict[str, Any]:
        return {name: value for name, value in definition.items() if name != "kind"}

    def spec(name: str) -> Spec:
        mixer, mlp = pattern.split(name)
        of = config.mixers[mixer]
        mixer_config = mixers.load(of.kind).Config(**settings(of))
        mlp_kind, mlp_settings = "swiglu", {"hidden": 0}
        if mlp:
            mlp_kind, mlp_settings = config.mlps[mlp].kind, settings(config.mlps[mlp])
        if mlp_kind == "swiglu":
            mlp_settings = {"hidden": mlp_settings["hidden"] or model.mlp_hidden}
        mlp_config = mlps.load(mlp_kind).Config(**mlp_settings)
        return Spec(name, of.kind, mixer_config, mlp_kind, mlp_config, mixer in model.post_norm)

    names = pattern.fill(pattern.parse(model.pattern), model.num_layers)
    specs = {name: spec(name) for name in dict.fromkeys(names)}
    return Definition(
        layers=tuple(specs[name] for name in names),
        plan=plan(names),
        dtype=jnp.dtype(model.dtype),
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        norm_eps=model.norm_eps,
        norm_unit_offset=model.norm_unit_offset,
        tie_embeddings=model.tie_embeddings,
        remat=model.remat,
        scan=model.scan,
    )


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); or, post-norm, x + norm(mixer(x)), then x + norm(mlp(x))."""

    def __init__(self, definition: Definition, spec: Spec, *, rngs: nnx.Rngs):
        d_model = definition.d_model
        self.post_norm = spec.post_norm
        self.mixer_norm = norm(definition, rngs)
        self.mixer = mixers.load(spec.kind).Mixer(spec.config, d_model, rngs=rngs)
        self.mlp_norm = norm(definition, rngs)
        self.mlp = mlps.load(spec.mlp_kind).Mlp(spec.mlp_config, d_model, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, cache: Any, shared: Any
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """(x [B, T, D], cache, the MLP's load-balancing loss or None)."""
        mixed, cache = self.mixer(self._before(self.mixer_norm, x_BTD), rows, cache=cache, shared=shared)
        x_BTD, balance = self._mlp(x_BTD + self._after(self.mixer_norm, mixed), rows)
        return x_BTD, cache, balance

    def step(self, x_BD: jax.Array, rows: Rows, cache: Any, shared: Any) -> tuple[jax.Array, Any]:
        mixed, cache = self.mixer.step(self._before(self.mixer_norm, x_BD), rows, cache, shared=shared)
        return self._mlp(x_BD + self._after(self.mixer_norm, mixed), rows)[0], cache

    def _mlp(self, x: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array | None]:
        y, balance = self.mlp(self._before(self.mlp_norm, x), rows)
        return x + self._after(self.mlp_norm, y), balance

    def _before(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        return x if self.post_norm else norm(x)

    def _after(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        return norm(x) if self.post_norm else x


class LM(nnx.Module):
    """A decoder-only language model over the stack that ``definition`` plans."""

    def __init__(self, definition: Definition, *, rngs: nnx.Rngs):
        d_model, vocab = definition.d_model, definition.vocab_size
        self.definition = definition
        self.embedding = param(rngs, (vocab, d_model), ("vocab", "embed"), normal(), decay=True)
        # Lists of stacked Blocks, shaped like definition.plan.segments.
        self.segments: nnx.List = nnx.List([])
        keys = jax.random.split(rngs.params(), len(definition.layers))
        for runs in run_indices(definition.plan):
            self.segments.append(nnx.List([self._stack(indices, keys) for _, indices in runs]))
        self.shared = nnx.Dict(
            {spec.mixer: shared(definition, spec, rngs) for spec in with_shared(definition)}
        )
        self.final_norm = norm(definition, rngs)
        tied = definition.tie_embeddings
        self.head = None if tied else param(rngs, (d_model, vocab), ("embed", "vocab"), normal(), decay=True)

    def _stack(self, indices: np.ndarray, keys: jax.Array) -> Block:
        """One run's Block, parameters [repeats, length, ...]: each from its layer's key, absent ones zero."""
        spec = self.definition.layers[indices[0, 0]]
        present = indices >= 0

        def block(key: jax.Array) -> Block:
            return Block(self.definition, spec, rngs=nnx.Rngs(params=key))

        graph, _ = nnx.split(nnx.eval_shape(lambda: block(jax.random.key(0))))
        state = jax.vmap(jax.vmap(lambda key: nnx.state(block(key))))(keys[indices])
        mask = lambda leaf: jnp.where(present.reshape(present.shape + (1,) * (leaf.ndim - 2)), leaf, 0)
        return nnx.merge(graph, state if present.all() else jax.tree.map(mask, state))

    def head_matrix(self) -> jax.Array:
        """[D, V] float32."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def __call__(
        self, tokens_BT: jax.Array, rows: Rows, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states [B, T, D]; with a cache the tokens are appended to it."""
        hidden, cache, _ = self.forward(tokens_BT, rows, cache)
        return hidden, cache

    def forward(
        self, tokens_BT: jax.Array, rows: Rows, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, jax.Array | None]:
        """What `__call__` returns, and the mean load-balancing loss of the layers that have one or None."""
        definition = self.definition
        x = constrain(embed(self.embedding[...], tokens_BT, definition.dtype), ("batch", None, None))
        per_layer = self._per_layer()
        appended: list[Any] = [None] * len(definition.layers)
        balances: list[jax.Array] = []
        for planned, blocks in zip(run_indices(definition.plan), self.segments, strict=True):
            runs = []
            for (run, indices), block in zip(planned, blocks, strict=True):
                name = pattern.split(run.name)[0]
                shared_rows = per_layer[name][indices] if name in per_layer else None
                caches = None if cache is None else _gather(cache, indices)
                present = None if indices.min() >= 0 else jnp.asarray(indices >= 0)
                runs.append((*nnx.split(block), shared_rows, caches, present))
            x, outputs = self._segment(x, rows, runs)
            for (_, indices), (stack, balance) in zip(planned, outputs, strict=True):
                for place, index in _layers(indices):
                    if cache is not None:
                        appended[index] = jax.tree.map(lambda leaf, place=place: leaf[place], stack)
                    if balance is not None:
                        balances.append(balance[place])
        balance = jnp.mean(jnp.stack(balances)) if balances else None
        return self.final_norm(x), None if cache is None else tuple(appended), balance

    def _segment(self, x: jax.Array, rows: Rows, runs: Sequence[tuple]) -> tuple[jax.Array, list[Any]]:
        """One segment of the plan: a scan over its repeats of a scan over each run's layers.

        Returns x and, for each run, (caches, load-balancing losses or None) stacked as its layers are.
        """
        definition = self.definition
        policy = REMAT[definition.remat]

        def layer_of(graph: Any) -> Callable:
            def layer(x: jax.Array, xs: tuple) -> tuple[jax.Array, Any]:
                state, shared_row, cache, present = xs

                def apply(x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
                    x, cache, balance = nnx.merge(graph, state)(x, rows, cache, shared_row)
                    return constrain(x, ("batch", None, None)), (cache, balance)

                def skip(x: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
                    has_balance = jax.eval_shape(apply, x, cache)[1][1] is not None
                    return x, (cache, jnp.float32(0) if has_balance else None)

                return apply(x, cache) if present is None else jax.lax.cond(present, apply, skip, x, cache)

            if policy is None:
                return layer
            # Inside a scan nothing can be shared across the loop boundary, so the CSE barrier is not needed.
            return jax.checkpoint(layer, policy=policy, prevent_cse=not definition.scan)

        layers = [layer_of(graph) for graph, *_ in runs]

        def period(x: jax.Array, xs: list[tuple]) -> tuple[jax.Array, list[Any]]:
            outputs = []
            for layer, run in zip(layers, xs, strict=True):
                x, output = self._scan(layer, x, run)
                outputs.append(output)
            return x, outputs

        return self._scan(period, x, [tuple(xs) for _, *xs in runs])

    def _scan(self, body: Callable, x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
        if self.definition.scan:
            return jax.lax.scan(body, x, xs)
        outputs = []
        for index in range(jax.tree.leaves(xs)[0].shape[0]):
            x, output = body(x, jax.tree.map(lambda leaf, index=index: leaf[index], xs))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def _per_layer(self) -> dict[str, jax.Array]:
        """The stack-wide parameters of each mixer that has them, one row a layer of the stack."""
        shared: dict[str, Any] = dict(self.shared.items())
        return {name: module.per_layer() for name, module in shared.items()}

    def unstacked(self) -> list[tuple[Block, Any]]:
        """(Block, its row of the stack-wide parameters or None) of every layer in order, for decoding."""
        blocks: list[Any] = [None] * len(self.definition.layers)
        per_layer = self._per_layer()
        for planned, stacks in zip(run_indices(self.definition.plan), self.segments, strict=True):
            for (run, indices), stack in zip(planned, stacks, strict=True):
                graph, state = nnx.split(stack)
                for place, index in _layers(indices):
                    block = nnx.merge(graph, jax.tree.map(lambda leaf, place=place: leaf[place], state))
                    name = pattern.split(run.name)[0]
                    blocks[index] = (block, per_layer[name][index] if name in per_layer else None)
        return blocks

    def step(
        self, token_B: jax.Array, rows: Rows, cache: Cache, blocks: Sequence[tuple[Block, Any]]
    ) -> tuple[jax.Array, Cache]:
        """Final hidden state [B, D] of one more token a row; ``blocks`` from `unstacked`, made once per loop.

        Layers are unrolled: their caches stay apart, so that a decode loop updates each in place.
        """
        x = self.embedding[...][token_B].astype(self.definition.dtype)
        appended = []
        for (block, shared_row), layer_cache in zip(blocks, cache, strict=True):
            x, layer_cache = block.step(x, rows, layer_cache, shared_row)
            appended.append(layer_cache)
        return self.final_norm(x), tuple(appended)

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """Empty caches of every layer for ``batch`` rows of at most ``max_length`` tokens."""
        dtype = self.definition.dtype
        return tuple(block.mixer.init_cache(batch, max_length, dtype) for block, _ in self.unstacked())


def with_shared(definition: Definition) -> list[Spec]:
    """One layer of each mixer whose kind has parameters that belong to the whole stack."""
    specs = {spec.mixer: spec for spec in definition.layers}
    return [spec for spec in specs.values() if hasattr(mixers.load(spec.kind), "Shared")]


def norm(definition: Definition, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
        definition.d_model, rngs=rngs, eps=definition.norm_eps, unit_offset=definition.norm_unit_offset
    )


def shared(definition: Definition, spec: Spec, rngs: nnx.Rngs) -> Any:
    kind = mixers.load(spec.kind)
    return kind.Shared(spec.config, definition.d_model, len(definition.layers), rngs=rngs)


def _layers(indices: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    """(place in the stack, layer index) of the layers that are present."""
    return [(place, int(index)) for place, index in np.ndenumerate(indices) if index >= 0]


def _gather(cache: Cache, indices: np.ndarray) -> Any:
    """The caches of the layers ``indices`` [repeats, length] as one pytree with those leading axes."""
    # In the place of an absent layer stands any of its kind.
    layers = [cache[index if index >= 0 else indices.max()] for index in indices.flat]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(indices.shape + leaves[0].shape), *layers)


# Between modules and nested dicts.


def abstract(definition: Definition) -> tuple[Any, nnx.State]:
    """(graph, state of shapes): what `merge` needs and what `metadata` reads, with nothing allocated."""
    return nnx.split(nnx.eval_shape(lambda: LM(definition, rngs=nnx.Rngs(params=0))))


def init(definition: Definition, key: jax.Array) -> Params:
    """Fresh parameters; a layer's depend on ``key`` and its index only, not on the plan. Jit it."""
    return nnx.to_pure_dict(nnx.state(LM(definition, rngs=nnx.Rngs(params=key))))


def merge(definition: Definition, params: Params) -> LM:
    """The module that holds ``params``."""
    graph, state = abstract(definition)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def metadata(definition: Definition) -> dict[str, Any]:
    """A Meta for each parameter, in the tree of `init`."""
    _, state = abstract(definition)

    def meta(variable: Any) -> Meta:
        stacked = len(variable.get_value().shape) - len(variable.axes)
        return Meta((None,) * stacked + tuple(variable.axes), variable.decay, variable.cast)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(meta, state, is_leaf=is_variable))


def cast_to_compute(definition: Definition, params: Params) -> Params:
    """``params`` with every matrix that layers cast to ``definition.dtype`` in it, to be cast once and not at
    each use; the model computes the same."""
    cast = lambda meta, leaf: leaf.astype(definition.dtype) if meta.cast else leaf
    return jax.tree.map(cast, metadata(definition), params, is_leaf=lambda leaf: isinstance(leaf, Meta))


def shapes(definition: Definition) -> Params:
    """ShapeDtypeStructs in the tree of `init`."""
    return jax.eval_shape(lambda: init(definition, jax.random.key(0)))


def logits(definition: Definition, params: Params, tokens_BT: jax.Array, rows: Rows) -> jax.Array:
    """Float32 logits [B, T, V]; for evaluation of short batches, since it holds them all."""
    model = merge(definition, params)
    hidden, _ = model(tokens_BT, rows)
    head = model.head_matrix().astype(hidden.dtype)
    return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def loss_fn(
    definition: Definition,
    params: Params,
    batch: dict[str, jax.Array],
    *,
    z_loss: float = 0.0,
    token_bytes: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum to differentiate, sums {"loss_sum", "z_loss_sum", "tokens", "correct", "bytes" with token_bytes,
    and "balance_loss_sum" of a stack with experts}).

    Sums and not means, so that microbatches and hosts add up exactly; divide by the global token count.
    batch: tokens, targets (negative: no loss), segment_ids, positions, int32 [B, T].
    token_bytes: [V] bytes of text that each token stands for.
    """
    model = merge(definition, params)
    rows = Rows(batch["segment_ids"], batch["positions"])
    hidden, _, balance = model.forward(batch["tokens"], rows)
    total, sums = loss.cross_entropy(hidden, model.head_matrix(), batch["targets"], z_loss=z_loss)
    aux = {"loss_sum": sums.cross_entropy, "z_loss_sum": z_loss * sums.log_z_squared}
    aux |= {"tokens": sums.tokens, "correct": sums.correct}
    if token_bytes is not None:
        counted = jnp.where(batch["targets"] >= 0, token_bytes[batch["targets"]], 0)
        aux["bytes"] = jnp.sum(counted.astype(jnp.float32))
    if balance is not None:
        aux["balance_loss_sum"] = balance * sums.tokens
        total += aux["balance_loss_sum"]
    return total, aux
