"""The layers of a model, stacked for the scan, and unstacked for everybody else.

Parameters of equal neighbours are stacked: a run of n equal layers inside a period that repeats r times is
one Block whose parameters have leading axes [r, n], and the forward pass is a scan over r of scans over n.
Trace and compile time therefore depend on the number of distinct runs, not on depth, and each layer is
rematerialised by itself (`model.remat`).

Only this module knows the stacked names, "segments.<segment>.<run>.<path in the block>". Everywhere else a
parameter is "layers.<index>.<path in the block>": in checkpoints, conversion, rules, metrics and messages.

Shape legend: B rows, T tokens, D model width.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm import plan, remat, schema, trees
from hybridlm.block import Block, Spec
from hybridlm.context import Context
from hybridlm.mixers import Site
from hybridlm.rows import Rows
from hybridlm.sharding import constrain

Cache = tuple[Any, ...]  # one pytree per layer, in layer order
Carry = tuple[jax.Array, dict[str, Any]]  # x and `Context.carried`


class Stack(nnx.Module):
    """Lists of stacked Blocks, shaped like ``layout.segments``; a layer's parameters are made from its key.

    layout: of the Specs of the layers.
    """

    def __init__(self, model: schema.Model, layout: plan.Plan, keys: jax.Array):
        self.model, self.layout = model, layout
        self.segments: nnx.List = nnx.List([])
        for segment, indices in zip(layout.segments, layout.indices(), strict=True):
            stacks = [self._stack(run.item, i, keys) for run, i in zip(segment.runs, indices, strict=True)]
            self.segments.append(nnx.List(stacks))

    def _stack(self, spec: Any, indices: np.ndarray, keys: jax.Array) -> Block:
        def block(key: jax.Array, layer: Any) -> Block:
            site = Site(
                self.model.d_model, layer, self.layout.num_layers, mup=bool(self.model.mup_base_width)
            )
            return Block(self.model, spec, site, rngs=nnx.Rngs(params=key))

        graph, _ = nnx.split(nnx.eval_shape(lambda: block(jax.random.key(0), 0)))
        make = lambda key, layer: nnx.state(block(key, layer))
        return nnx.merge(graph, jax.vmap(jax.vmap(make))(keys[indices], jnp.asarray(indices)))

    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        cache: Cache | None,
        shared: Mapping[str, Any],
        wanted: tuple[str, ...],
        inputs_LBTD: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        """(x, cache with the tokens appended, what the layers recorded by canonical name).

        shared: mixer's name -> [num_layers, ...], of which each layer of that name gets its row; or a module,
            which they all get.
        inputs: what each layer is given in place of x, which then comes back as it was.
        """
        carry: Carry = (x_BTD, {})
        appended: list[Any] = [None] * self.layout.num_layers
        records: dict[str, jax.Array] = {}
        depth = self.layout.num_layers

        def context(spec: Spec, index: jax.Array, row: Any, carried: Mapping[str, Any]) -> Context:
            row = shared.get(spec.mixer) if row is None else row
            return Context(rows, index, depth, row, dict(carried), wanted, entered=x_BTD)

        parts = zip(self.layout.segments, self.layout.indices(), self.segments, strict=True)
        for segment, table, blocks in parts:
            runs = []
            for run, indices, block in zip(segment.runs, table, blocks, strict=True):
                row = shared.get(run.item.mixer)
                row = row[indices] if isinstance(row, jax.Array) else None
                caches = None if cache is None else _gather(cache, indices)
                given = None if inputs_LBTD is None else inputs_LBTD[indices]
                at = jnp.asarray(indices, jnp.int32)
                runs.append((run.item, *nnx.split(block), row, caches, at, given))
            carry, outputs = self._segment(carry, context, runs)
            for indices, (caches, recorded) in zip(table, outputs, strict=True):
                for place, index in np.ndenumerate(indices):
                    if cache is not None:
                        appended[index] = jax.tree.map(lambda leaf, place=place: leaf[place], caches)
                    records |= {f"layers.{index}.{name}": value[place] for name, value in recorded.items()}
        return carry[0], None if cache is None else tuple(appended), records

    def _segment(
        self, carry: Carry, context_of: Callable[..., Context], runs: Sequence[tuple]
    ) -> tuple[Carry, list[Any]]:
        """A scan over the segment's repeats of a scan over each run's layers.

        context_of: (spec, index, row of the stack-wide parameters or None, what is carried) -> a layer's.
        Returns the carry and, for each run, (caches, records) stacked as its layers are.
        """
        policy = remat.POLICIES[self.model.remat]

        def layer_of(spec: Spec, graph: Any) -> Callable:
            def layer(carry: Carry, xs: tuple) -> tuple[Carry, Any]:
                state, row, cache, index, given = xs
                context = context_of(spec, index, row, carry[1])
                x = carry[0] if given is None else given
                x, cache = nnx.merge(graph, state)(x, context, cache)
                x = x if given is None else carry[0]
                if not spec.carries and context.carried.keys() != carry[1].keys():
                    raise ValueError(
                        f"kind {spec.kind!r} leaves values to later layers: its Config must say so"
                    )
                return (constrain(x, ("batch", "time", None)), context.carried), (cache, context.records)

            if policy is None:
                return layer
            # Inside a scan nothing can be shared across the loop boundary, so the CSE barrier is not needed.
            return jax.checkpoint(layer, policy=policy, prevent_cse=not self.model.scan)

        layers = [layer_of(spec, graph) for spec, graph, *_ in runs]
        stacks = [tuple(xs) for _, _, *xs in runs]

        def once(carry: Carry) -> Carry:
            for layer, xs in zip(layers, stacks, strict=True):
                carry, _ = layer(carry, jax.tree.map(lambda leaf: leaf[0, 0], xs))
            return carry

        def period(carry: Carry, xs: list[tuple]) -> tuple[Carry, list[Any]]:
            outputs = []
            for (spec, *_), layer, run in zip(runs, layers, xs, strict=True):
                if spec.carries:
                    carry, output = jax.lax.scan(layer, carry, run)
                else:  # what is carried stays: as a constant of the scan the backward pass keeps it once
                    x, carried = carry
                    only_x = lambda x, xs, layer=layer, carried=carried: _first(layer((x, carried), xs))
                    moved, output = jax.lax.scan(only_x, x, run)
                    carry = moved, carried
                outputs.append(output)
            return carry, outputs

        if any(spec.carries for spec, *_ in runs):  # a scan wants to know all that will be carried
            later = jax.eval_shape(once, carry)[1]
            blank = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
            carry = carry[0], jax.tree.map(blank, later) | carry[1]
        if self.model.scan:
            return jax.lax.scan(period, carry, stacks)
        return _unrolled(layers, carry, stacks)

    def blocks(self) -> list[Block]:
        """Every layer's Block in order, for decoding, where layers are unrolled."""
        found: list[Any] = [None] * self.layout.num_layers
        for table, stacks in zip(self.layout.indices(), self.segments, strict=True):
            for indices, block in zip(table, stacks, strict=True):
                graph, state = nnx.split(block)
                for place, index in np.ndenumerate(indices):
                    found[index] = nnx.merge(graph, jax.tree.map(lambda leaf, p=place: leaf[p], state))
        return found


def _unrolled(layers: Sequence[Callable], carry: Carry, stacks: Sequence[Any]) -> tuple[Carry, list[Any]]:
    """The scan over repeats of scans over ``layers``, layer by layer."""
    repeats, each = jax.tree.leaves(stacks)[0].shape[0], [jax.tree.leaves(xs)[0].shape[1] for xs in stacks]
    apart = [_apart(xs, repeats * length) for xs, length in zip(stacks, each, strict=True)]
    outputs: list[list[Any]] = [[] for _ in stacks]
    for repeat in range(repeats):
        for layer, run, length, found in zip(layers, apart, each, outputs, strict=True):
            for xs in run[repeat * length : (repeat + 1) * length]:
                carry, output = layer(carry, xs)
                found.append(output)
    stack = lambda *leaves: jnp.stack(leaves).reshape(repeats, -1, *leaves[0].shape)
    return carry, [jax.tree.map(stack, *found) for found in outputs]


def _apart(xs: Any, count: int) -> list[Any]:
    """Of leaves [repeats, length, ...] those of each layer. One split a leaf, whose gradient is one
    concatenation: that of as many slices is a sum of as many stacks, zero but for a layer."""
    leaves, tree = jax.tree.flatten(xs)
    split = lambda leaf: jax.lax.split(leaf.reshape(count, *leaf.shape[2:]), (1,) * count)
    parts = [[part.reshape(part.shape[1:]) for part in split(leaf)] for leaf in leaves]
    return [jax.tree.unflatten(tree, of_layer) for of_layer in zip(*parts, strict=True)]


def _first(result: tuple[Carry, Any]) -> tuple[jax.Array, Any]:
    (x, _), output = result
    return x, output


def _gather(cache: Cache, indices: np.ndarray) -> Any:
    """The caches of the layers ``indices`` [repeats, length] as one pytree with those leading axes."""
    layers = [cache[index] for index in indices.flat]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(indices.shape + leaves[0].shape), *layers)


# Names.

STACKED = re.compile(r"(?:^|(?<=\.))segments\.(\d+)\.(\d+)\.")


def leading(name: str) -> int:
    """How many leading axes of the parameter ``name`` count layers."""
    return 2 if STACKED.search(name) else 0


def stacked(layout: plan.Plan, name: str) -> tuple[str, np.ndarray, str] | None:
    """(what stands before, the layers [repeats, length], what follows) of a stacked name; None of others."""
    match = STACKED.search(name)
    if match is None:
        return None
    return name[: match.start()], layout.indices()[int(match[1])][int(match[2])], name[match.end() :]


def unstack(
    layout: plan.Plan,
    flat: Mapping[str, Any],
    take: Callable[[Any, Any], Any] = lambda leaf, place: leaf[place],
) -> dict[str, Any]:
    """``flat``, whose names may hold a stacked name, by canonical names: the layers last, in order.

    take: (leaf [repeats, length, ...], (repeat, offset)) -> the layer's part.
    """
    found: dict[str, Any] = {}
    layers: list[tuple[int, str, Any]] = []
    for name, leaf in flat.items():
        where = stacked(layout, name)
        if where is None:
            found[name] = leaf
            continue
        before, indices, rest = where
        for place, index in np.ndenumerate(indices):
            layers.append((int(index), f"{before}layers.{index}.{rest}", take(leaf, place)))
    return found | {name: leaf for _, name, leaf in sorted(layers, key=lambda one: one[0])}


def restack(layout: plan.Plan, flat: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The arrays of the stacked ``names``, made of those of ``flat``: the inverse of `unstack`."""
    found = {}
    for name in names:
        where = stacked(layout, name)
        if where is None:
            found[name] = flat[name]
            continue
        before, indices, rest = where
        parts = [flat[f"{before}layers.{index}.{rest}"] for index in indices.flat]
        found[name] = jnp.stack(parts).reshape(*indices.shape, *parts[0].shape)
    return found


def apart(layout: plan.Plan, tree: Any) -> dict[str, Any]:
    """The leaves of any tree around stacked parameters (a training state) by canonical dotted names."""
    return unstack(layout, trees.flatten(tree))


def together(layout: plan.Plan, flat: Mapping[str, Any], like: Any) -> Any:
    """The tree shaped as ``like`` of what `apart` made of it."""
    return trees.unflatten(like, restack(layout, flat, list(trees.flatten(like))))


def shapes_apart(layout: plan.Plan, shapes: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """`apart` for ShapeDtypeStructs, with shardings where they have them."""

    def layer(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[2:]))
        return jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype, sharding=sharding)

    return unstack(layout, trees.flatten(shapes), layer)
