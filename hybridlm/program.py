"""What runs on devices: the initial state, the training step, the loss of a batch; jitted over a mesh.

The program of several runs that differ in seed and learning rate only is that of one under `jax.vmap`.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm import compiler, groups, objectives, optimizer, qk_clip, sharding, stack
from hybridlm import model as lm
from hybridlm.config import Config
from hybridlm.objectives import Batch, Sums
from hybridlm.softmax_attention import imbalance

log = logging.getLogger("hybridlm")

State = dict[str, Any]
NORMS = "squared_norms"
UPDATED = "update_finite"  # a metric where an update may be what is not: 0 then


class Program(NamedTuple):
    """The compiled parts of a run, or of R runs together, all over one mesh; R is then the leading axis of
    the state, of batches but in `evaluate`, and of what comes back.

    init: key (or keys [R]) -> state: params, opt_state, and step, the number of updates applied; with
        optimizer.ema also ema, the average of the trained parameters.
    step: (state, batch) -> (state, metrics). A loss, gradient or update that is not finite changes nothing in
        the state, on all devices alike, and shows in the metrics: scalars, and `squared_norms`.
    evaluate: (params, batch) -> sums for `per_token`.
    shapes: of the state of one run, with shardings.
    teacher: (shapes,) of the parameters, with shardings, of the objective's teacher but what the student
        lends it; `step` and `evaluate` take them after the batch, as they are, not donated; () without one.
    """

    init: Callable[[jax.Array], State]
    step: jax.stages.Wrapped
    evaluate: Callable[..., Sums]
    shapes: State
    teacher: tuple[State, ...] = ()


def build(
    config: Config,
    definition: lm.Definition,
    mesh: Mesh,
    token_bytes: np.ndarray | None,
    rates: Sequence[float] | None = None,
    begin: int = 0,
    lent: frozenset[str] = frozenset(),
) -> Program:
    """Everything that runs on devices, for a resolved ``config``; nothing is compiled yet.

    token_bytes: bytes per token id, at most vocab_size long; None leaves bits per byte out.
    rates: the learning rates of R runs together; None for one run with the config's.
    begin: the step after which a stage begins: learning rates are of what is left of train.steps.
    lent: of one run, canonical names of parameters that the teacher has of the student (`hybridlm.lent`).
    """
    metadata = lm.metadata(definition)
    trained = {name: meta for name, meta in metadata.items() if meta.trained}
    factors = groups.factors(definition, config.optimizer)
    made = lambda one: objectives.build(config.objective, one, padded(token_bytes, one.vocab_size))
    objective, trains = made(definition), made(lm.in_training(definition, config))  # measures; trains

    def transformation(rate: Any) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        settings = dataclasses.replace(config.optimizer, learning_rate=rate)
        steps = config.train.steps - begin
        return optimizer.build(settings, steps, trained, factors), optimizer.schedule(settings, steps)

    def init(key: jax.Array) -> State:
        params = lm.init(definition, key)
        opt_state = transformation(config.optimizer.learning_rate)[0].init(part(params, trained))
        average = {"ema": part(params, trained)} if config.optimizer.ema else {}
        return {"params": params, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)} | average

    shapes = jax.eval_shape(init, jax.random.key(0))
    param_shardings = sharding.param_shardings(metadata, shapes["params"], mesh)
    shardings = sharding.state_shardings(shapes, param_shardings, mesh)
    windows = lm.windows(definition) if "context" in mesh.shape else ()
    tame = optimizer.tame(config.optimizer, max(rates or (config.optimizer.learning_rate,)), factors)
    taught, lend = teaching(definition, objective.teacher, mesh, lent)
    gradients = Gradients(config, definition, trains, metadata, part(param_shardings, trained), lend)

    def step(state: State, batch: Batch, rate: Any, *teacher: lm.Params) -> tuple[State, dict[str, Any]]:
        params = state["params"]
        weights = lm.cast_to_compute(definition, params)  # once, not in each layer and microbatch
        grads, sums = gradients(weights, batch, *teacher)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["tokens"], 1), grads)
        squares = squared_norms(grads)
        grad_norm = jnp.sqrt(sum(jnp.sum(x) for x in squares.values()))
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss_sum"])
        tx, schedule = transformation(rate)
        updates, opt_state = tx.update(grads, state["opt_state"], part(params, trained))
        changed = optax.apply_updates(part(params, trained), updates)
        changed |= gradients.clipped(changed, sums) | gradients.ruled(params, sums)
        looked = {} if tame else {UPDATED: all_finite(changed)}
        finite &= looked.get(UPDATED, True)
        new = {"params": params | changed, "opt_state": opt_state}
        new |= averaged(config.optimizer.ema, part(new["params"], trained), state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, {n: state[n] for n in new})
        metrics = per_token(sums) | {"grad_norm": grad_norm, "learning_rate": schedule(state["step"])}
        metrics |= looked | gradients.measured(sums) | unevenness(batch, windows)
        return kept | {"step": state["step"] + finite}, metrics | {NORMS: squares}

    evaluate = lambda params, batch, *own: objective.evaluate(params, named(*own) | lend(params), batch)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    options = compiler.options(config, mesh)
    if rates is not None:
        return together(init, step, evaluate, rates, shapes, taught, options)
    rows, whole = sharding.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    fixed = [jax.tree.map(lambda leaf: leaf.sharding, one) for one in taught]
    return Program(
        init=drawing(jax.jit(init, out_shardings=shardings), mesh),
        step=jax.jit(
            lambda state, batch, *also: step(state, batch, config.optimizer.learning_rate, *also),
            in_shardings=(shardings, rows, *fixed), out_shardings=(shardings, whole), donate_argnums=0,
            compiler_options=options,
        ),
        evaluate=jax.jit(evaluate, in_shardings=(param_shardings, rows, *fixed), out_shardings=whole),
        shapes=shapes,
        teacher=taught,
    )  # fmt: skip


def drawing(init: Callable[[jax.Array], State], mesh: Mesh) -> Callable[[jax.Array], State]:
    """``init`` whose random bits, the same, a kernel of jax's draws on a GPU: less than half to compile.

    On one device only: XLA would not split the kernel, and draw whole parameters on each of several.
    """
    try:
        from jax._src.config import threefry_gpu_kernel_lowering as lowering  # no public door to one program
    except ImportError:  # a jax that has dropped it
        return init

    def drawn(key: jax.Array) -> State:
        with lowering(True):
            return init(key)

    return drawn if mesh.size == 1 else init


def averaged(decay: float, params: Any, state: State) -> dict[str, Any]:
    """The state's part for the average of ``params``; none where none is kept."""
    if not decay:
        return {}
    share = optimizer.ema_rate(decay, state["step"])
    return {"ema": optax.incremental_update(params, state["ema"], share)}


def padded(token_bytes: np.ndarray | None, vocab_size: int) -> jax.Array | None:
    """Bytes of every id of the vocabulary, 0 for those without a token."""
    return None if token_bytes is None else jnp.zeros(vocab_size).at[: len(token_bytes)].set(token_bytes)


def together(
    init: Callable,
    step: Callable,
    evaluate: Callable,
    rates: Sequence[float],
    shapes: State,
    taught: tuple[State, ...],
    options: dict[str, Any],
) -> Program:
    """The program of runs with these learning rates, from the functions of one; options: of the compiler."""
    shared, each = [None for _ in taught], jnp.asarray(rates, jnp.float32)
    steps = jax.vmap(step, in_axes=(0, 0, 0, *shared))
    return Program(
        init=jax.jit(jax.vmap(init)),
        step=jax.jit(
            lambda state, batch, *also: steps(state, batch, each, *also),
            donate_argnums=0, compiler_options=options,
        ),
        evaluate=jax.jit(jax.vmap(evaluate, in_axes=(0, None, *shared))),
        shapes=shapes,
        teacher=taught,
    )  # fmt: skip


def teacher_shapes(teacher: lm.Definition, mesh: Mesh) -> State:
    """Of a teacher's parameters, with shardings: in its dtype wherever it computes in it, since they stay."""
    metadata = lm.metadata(teacher)
    shapes = jax.eval_shape(lambda: lm.cast_to_compute(teacher, lm.init(teacher, jax.random.key(0))))
    where = sharding.param_shardings(metadata, shapes, mesh)
    low = lambda name: teacher.dtype if "vocab" in metadata[name].axes else shapes[name].dtype
    return {n: jax.ShapeDtypeStruct(x.shape, low(n), sharding=where[n]) for n, x in shapes.items()}


def teaching(
    ours: lm.Definition, theirs: lm.Definition | None, mesh: Mesh, lent: frozenset[str]
) -> tuple[tuple[State, ...], Callable[[lm.Params], lm.Params]]:
    """(`Program.teacher`, the student's parameters -> the rest of the teacher's in its dtype, `named`).

    Lent are the stacks of which ``lent`` has every layer, where both models have them of the same layers.
    """
    if theirs is None:
        return (), lambda params: {}
    needed, known = teacher_shapes(theirs, mesh), lm.shapes(ours)
    layers = lambda one, name, leaf: list(stack.shapes_apart(one.layout, {name: leaf}))
    dtypes = {
        name: leaf.dtype
        for name, leaf in needed.items()
        if name in known
        and lent.issuperset(there := layers(theirs, name, leaf))
        and there == layers(ours, name, known[name])
    }
    own = {name: leaf for name, leaf in needed.items() if name not in dtypes}
    return (own,), lambda params: named({name: params[name].astype(low) for name, low in dtypes.items()})


def named(teacher: lm.Params | None = None) -> lm.Params:
    """A teacher's parameters as an objective finds them among the frozen ones."""
    return {objectives.TEACHER + name: value for name, value in (teacher or {}).items()}


def part(tree: dict[str, Any], names: Any) -> dict[str, Any]:
    """The entries of a flat dict that are called ``names``."""
    return {name: tree[name] for name in names}


class Gradients:
    """(weights, batch) -> (gradient of the summed loss in the trained parameters, float32; sums): both over
    the whole batch, microbatch by microbatch.
    """

    def __init__(
        self,
        config: Config,
        definition: lm.Definition,
        objective: objectives.Objective,
        metadata: dict[str, lm.Meta],
        shardings: dict[str, NamedSharding],
        lend: Callable[[lm.Params], lm.Params],
    ):
        self.microbatches, self.layout = config.train.parts, definition.layout
        self.objective, self.shardings, self.lend = objective, shardings, lend
        self.frozen = [name for name, meta in metadata.items() if not meta.trained]
        self.rules = {name: meta.rule for name, meta in metadata.items() if meta.rule and not meta.frozen}
        self.definition, self.tau = definition, config.optimizer.qk_clip
        largest = {qk_clip.RECORD} if self.tau else set()
        self.wanted = tuple(sorted({rule.record for rule in self.rules.values()} | largest))

    def __call__(self, weights: lm.Params, batch: Batch, *teacher: lm.Params) -> tuple[lm.Params, Sums]:
        one = lambda batch: self._one(weights, batch, *teacher)
        if self.microbatches == 1:
            return one(batch)
        # Microbatch i is every microbatches-th row from i on, so that each device splits its own rows.
        split = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, self.microbatches, *x.shape[1:]), 1, 0), batch
        )
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return qk_clip.added(total, one(part)), None

        return jax.lax.scan(add, zeros, split)[0]

    def _one(self, weights: lm.Params, batch: Batch, *teacher: lm.Params) -> tuple[lm.Params, Sums]:
        frozen = part(weights, self.frozen) | named(*teacher) | self.lend(weights)
        loss = lambda trained: self.objective.loss(trained, frozen, batch, self.wanted)
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(part(weights, self.shardings))
        if self.microbatches == 1:
            grads = jax.tree.map(jax.lax.optimization_barrier, grads)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, self.shardings), sums

    def clipped(self, params: lm.Params, sums: Sums) -> lm.Params:
        """The projections that `qk_clip` scales down, after the batch that ``sums`` are of."""
        if not self.tau:
            return {}
        return qk_clip.clipped(self.layout, self.definition.d_model, params, sums["records"], self.tau)

    def measured(self, sums: Sums) -> dict[str, jax.Array]:
        """What the clipping goes by."""
        return {"max_logit": qk_clip.largest(sums["records"])} if self.tau else {}

    def ruled(self, params: lm.Params, sums: Sums) -> lm.Params:
        """The parameters that a rule changes, after the batch that ``sums`` are of."""
        found: lm.Params = {}
        for name, rule in self.rules.items():
            values = stack.unstack(self.layout, {name: params[name]})
            for canonical, value in values.items():
                record = ".".join([*canonical.split(".")[:2], rule.record])  # of the same layer
                values[canonical] = rule.update(value, sums["records"][record])
            found |= stack.restack(self.layout, values, [name])
        return found


def unevenness(batch: Batch, windows: Sequence[int]) -> dict[str, jax.Array]:
    """Of attention's work over `mesh.context`, where there are ``windows`` of it."""
    return {"attention_imbalance": imbalance(batch["positions"], windows)} if windows else {}


def all_finite(arrays: lm.Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(one).all() for one in arrays.values()]))


def squared_norms(grads: lm.Params) -> dict[str, jax.Array]:
    """Squared norm of each parameter, float32: of a stack's, of each of its layers."""
    return {
        name: jnp.sum(jnp.square(g), axis=range(stack.leading(name), g.ndim)) for name, g in grads.items()
    }


def per_token(sums: Sums) -> dict[str, Any]:
    """From an objective's sums: loss (nats per target), accuracy, with bytes bits_per_byte, and the layers'
    auxiliary losses by name."""
    targets = sums["tokens"] + (sums["tokens"] == 0)  # a batch may hold none
    means = {"loss": sums["loss_sum"] / targets}
    if "correct" in sums:
        means["accuracy"] = sums["correct"] / targets
    if "bytes" in sums:
        means["bits_per_byte"] = sums["loss_sum"] / math.log(2) / (sums["bytes"] + (sums["bytes"] == 0))
    others = [name for name in sums if name.endswith("_loss_sum") and name != "z_loss_sum"]
    return means | {name.removesuffix("_sum"): sums[name] / targets for name in others}


def by_layer(definition: lm.Definition, program: Program) -> tuple[Callable, Callable, State]:
    """(apart, join, like) of the state of one run.

    apart: state -> its entries as flat dicts by canonical names, as checkpoints have them.
    join: the inverse, which may take over the memory of what it is given.
    like: ShapeDtypeStructs, with shardings, of what `apart` returns.
    """
    layout, shapes = definition.layout, program.shapes
    like = {name: stack.shapes_apart(layout, tree) for name, tree in shapes.items()}
    where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    apart = lambda state: {name: stack.apart(layout, tree) for name, tree in state.items()}
    join = lambda flat: {name: stack.together(layout, flat[name], tree) for name, tree in shapes.items()}
    return jax.jit(apart, out_shardings=where(like)), jax.jit(join, out_shardings=where(shapes)), like
