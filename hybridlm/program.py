"""What runs on devices: the initial state, the training step, the loss of a batch; jitted over a mesh."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm import model as lm
from hybridlm import optimizer, sharding
from hybridlm.run import checkpoint

log = logging.getLogger("hybridlm")

State = dict[str, Any]
Batch = dict[str, jax.Array]


class Program(NamedTuple):
    """The compiled parts of a run, all over one mesh.

    init: key -> state: params, opt_state, and step, the number of updates applied.
    step: (state, batch) -> (state, metrics). A loss or gradient that is not finite changes nothing in the
        state, on all devices alike, and shows in the metrics: scalars, and `squared_norms`.
    evaluate: (params, batch) -> sums for `per_token`.
    shapes: of the state, with shardings.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[Any, Batch], dict[str, jax.Array]]
    shapes: State


def build(config: Any, definition: lm.Definition, mesh: Mesh, token_bytes: np.ndarray | None) -> Program:
    """Everything that runs on devices, for a resolved ``config``; nothing is compiled yet.

    token_bytes: bytes per token id, at most vocab_size long; None leaves bits per byte out.
    """
    train = config.train
    metadata = lm.metadata(definition)
    tx = optimizer.build(config.optimizer, train.steps, metadata)
    rate = optimizer.schedule(config.optimizer, train.steps)
    sizes = (
        None
        if token_bytes is None
        else jnp.zeros(definition.vocab_size).at[: len(token_bytes)].set(token_bytes)
    )
    loss_fn = partial(lm.loss_fn, definition, z_loss=train.z_loss, token_bytes=sizes)

    def init(key: jax.Array) -> State:
        params = lm.init(definition, key)
        return {"params": params, "opt_state": tx.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(init, jax.random.key(0))
    param_shardings = sharding.param_shardings(metadata, shapes["params"], mesh)
    shardings = sharding.state_shardings(shapes, param_shardings, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def gradients(weights: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """Gradient of the summed loss, in float32, and the sums, both over the whole batch."""
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.lax.with_sharding_constraint(grads, param_shardings), sums

    def accumulated(weights: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        # Microbatch i is every microbatches-th row from i on, so that each device splits its own rows.
        split = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, train.microbatches, *x.shape[1:]), 1, 0), batch
        )
        part = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, weights, part))

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(weights, part)), None

        return jax.lax.scan(add, zeros, split)[0]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        weights = lm.cast_to_compute(definition, state["params"])  # once, not in each layer and microbatch
        grads, sums = (accumulated if train.microbatches > 1 else gradients)(weights, batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["tokens"], 1), grads)
        squares = squared_norms(grads)
        grad_norm = jnp.sqrt(sum(jnp.sum(x) for x in squares.values()))
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["loss_sum"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}
        old = {name: state[name] for name in new}
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        metrics = per_token(sums) | {
            "grad_norm": grad_norm,
            "learning_rate": rate(state["step"]),
            "squared_norms": squares,
        }
        return kept | {"step": state["step"] + finite}, metrics

    def evaluate(params: Any, batch: Batch) -> dict[str, jax.Array]:
        return loss_fn(params, batch)[1]

    rows = sharding.batch_sharding(mesh)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step, in_shardings=(shardings, rows), out_shardings=(shardings, replicated), donate_argnums=0
        ),
        evaluate=jax.jit(evaluate, in_shardings=(param_shardings, rows), out_shardings=replicated),
        shapes=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        ),
    )


def squared_norms(grads: Any) -> dict[str, jax.Array]:
    """Squared norm of each parameter by dotted path: float32 [repeats, length] for a stack's, else []."""
    return {
        name: jnp.sum(jnp.square(g), axis=range(2 if name.startswith("segments.") else 0, g.ndim))
        for name, g in checkpoint.flatten(grads).items()
    }


def per_token(sums: dict[str, Any]) -> dict[str, Any]:
    """From the sums of `model.loss_fn`: loss (nats per target), accuracy and, with bytes, bits_per_byte."""
    targets = sums["tokens"] + (sums["tokens"] == 0)  # a batch may hold none
    means = {"loss": sums["loss_sum"] / targets, "accuracy": sums["correct"] / targets}
    if "bytes" in sums:
        means["bits_per_byte"] = sums["loss_sum"] / math.log(2) / (sums["bytes"] + (sums["bytes"] == 0))
    if "balance_loss_sum" in sums:
        means["balance_loss"] = sums["balance_loss_sum"] / targets
    return means


def compiled(
    program: Program, mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int | None = None
) -> Callable[[State, Batch], tuple]:
    """The step, compiled ahead of time for batches shaped as ``batch``, of ``batch_size`` rows in all."""
    rows = sharding.batch_sharding(mesh)
    shapes = {
        name: jax.ShapeDtypeStruct((batch_size or len(x), *x.shape[1:]), x.dtype, sharding=rows)
        for name, x in batch.items()
    }
    began = time.perf_counter()
    executable = program.step.lower(program.shapes, shapes).compile()  # type: ignore[attr-defined]
    log.info("compiled the training step in %.1f s", time.perf_counter() - began)
    return executable
