"""Many runs of one small problem in one program: learning rates and seeds are a leading axis of parameters.

All runs read the same batches. The data lie on the device, so that hundreds of steps go by in one call.

Shape legend: R runs, N rows of data, S steps of a call, B rows of a batch, L tokens, P labelled tokens of a
row at most.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybridlm import layout, loss, mixers, mlps
from hybridlm import model as lm
from hybridlm.rows import Rows
from pallas_kernels import auto_means


class Data(NamedTuple):
    """Rows on the device, int32: tokens [N, L], the length of a row's examples [N], places and labels [N, P].

    Labels are -1 where a row has fewer than P.
    """

    tokens: jax.Array
    lengths: jax.Array
    places: jax.Array
    labels: jax.Array


def data(parts: Sequence[tuple[dict[str, np.ndarray], int]]) -> Data:
    """From batches of `hybridlm.data`, each with the length of its examples, packed from the left."""
    tokens = np.concatenate([batch["tokens"] for batch, _ in parts])
    targets = np.concatenate([batch["targets"] for batch, _ in parts])
    lengths = np.concatenate([np.full(len(batch["tokens"]), length) for batch, length in parts])
    width = int((targets >= 0).sum(axis=1).max())
    places = np.argsort(targets < 0, axis=1, kind="stable")[:, :width]
    labels = np.take_along_axis(targets, places, axis=1)
    return Data(*(jnp.asarray(x, jnp.int32) for x in (tokens, lengths, places, labels)))


def definition(
    layers: Sequence[tuple[str, dict[str, Any]]], *, d_model: int, vocab: int, mlp_hidden: int
) -> lm.Definition:
    """A float32 stack of (kind, settings), embeddings tied; mlp_hidden 0 leaves MLPs without channels."""
    specs = []
    for kind, settings in layers:
        config = mixers.load(kind).Config(**settings)
        config.check(d_model)
        mlp = mlps.load("swiglu").Config(hidden=mlp_hidden)
        specs.append(lm.Spec(f"{kind}{len(specs)}", kind, config, "swiglu", mlp, False))
    return lm.Definition(
        layers=tuple(specs), plan=layout.plan([spec.name for spec in specs]), d_model=d_model,
        vocab_size=vocab,
        norm_eps=1e-6, norm_unit_offset=False, tie_embeddings=True, dtype=jnp.dtype("float32"), remat="none",
        scan=True,
    )  # fmt: skip


class Problem(NamedTuple):
    """What is trained.

    init: key -> parameters.  decays: the same pytree of bools, whether weight decay applies.
    readout: (parameters, rows of `Data`) -> hidden states [B, P, D], head [D, V] and labels [B, P].
    """

    init: Callable[[jax.Array], Any]
    decays: Any
    readout: Callable[[Any, Data], tuple[jax.Array, jax.Array, jax.Array]]


def language_model(definition: lm.Definition) -> Problem:
    """Labels are predicted at their own tokens."""
    metadata = lm.metadata(definition)
    decays = jax.tree.map(lambda meta: meta.decay, metadata, is_leaf=lambda x: isinstance(x, lm.Meta))

    def readout(params: lm.Params, batch: Data) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = lm.merge(definition, params)
        hidden = hidden_states(model, batch)
        return jnp.take_along_axis(hidden, batch.places[..., None], axis=1), model.head_matrix(), batch.labels

    return Problem(functools.partial(lm.init, definition), decays, readout)


def hidden_states(model: lm.LM, batch: Data) -> jax.Array:
    """[B, L, D], documents apart."""
    index = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    rows = Rows(index // batch.lengths[:, None] + 1, index % batch.lengths[:, None])
    return model(batch.tokens, rows)[0]


def loss_and_hits(problem: Problem, params: Any, batch: Data) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy of the labels, share of them predicted right) of one run."""
    total, sums = loss.cross_entropy(*problem.readout(params, batch))
    return total / sums.tokens, sums.correct / sums.tokens


class Runs(NamedTuple):
    """R = rates x seeds runs of one problem, rate first, as functions on a device.

    init: seeds [R] -> (params, optimiser state).
    call: (params, state, rows of each step's batch [S, B], factors of the learning rate [S], data) ->
        (params, state, share of the labels predicted right by each run [R]), after S steps; the first two are
        donated.
    correct: (params, data) -> labels predicted right, [R, N].
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps_per_call: int
    batch_size: int
    init: Callable
    call: Callable
    correct: Callable


def runs(
    problem: Problem,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    batch_size: int,
    weight_decay: float = 0.1,
    steps_per_call: int = 200,
) -> Runs:
    """AdamW, clipped at 1. Nothing is compiled yet."""
    every = [(rate, seed) for rate in rates for seed in seeds]
    rate_R = np.array([rate for rate, _ in every], np.float32)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98))

    @jax.vmap
    def init(seed: jax.Array) -> tuple[Any, Any]:
        params = problem.init(jax.random.key(seed))
        return params, adam.init(params)

    def update(params: Any, state: Any, rate: jax.Array, batch: Data) -> tuple:
        loss_of = functools.partial(loss_and_hits, problem)
        (_, hits), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, state = adam.update(grads, state)
        move = lambda p, u, decay: p - rate * (u + (weight_decay * p if decay else 0))
        return jax.tree.map(move, params, updates, problem.decays), state, hits

    def call(params: Any, state: Any, chosen_SB: jax.Array, scale_S: jax.Array, rows: Data) -> tuple:
        def step(carry: tuple, xs: tuple) -> tuple:
            chosen_B, scale = xs
            batch = jax.tree.map(lambda x: x[chosen_B], rows)
            params, state, hits = jax.vmap(update, in_axes=(0, 0, 0, None))(*carry, scale * rate_R, batch)
            return (params, state), hits

        (params, state), hits = jax.lax.scan(step, (params, state), (chosen_SB, scale_S))
        return params, state, jnp.mean(hits, axis=0)

    def correct(params: Any, batch: Data) -> jax.Array:
        def one(params: Any) -> jax.Array:
            return loss.per_token(*problem.readout(params, batch))[1].sum(axis=1)

        return jax.lax.map(one, params)

    return Runs(
        tuple(rates), tuple(seeds), steps_per_call, batch_size,
        jax.jit(init), jax.jit(call, donate_argnums=(0, 1)), jax.jit(correct),
    )  # fmt: skip


def compiled(runs: Runs, train: Data, test: Data) -> Runs:
    """The same, its functions compiled for these data; several may be compiled at once in threads."""
    shaped = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    with auto_means("cudnn", "xla"):  # Pallas kernels have no rule for a batch of runs
        seeds = jax.ShapeDtypeStruct((len(runs.rates) * len(runs.seeds),), jnp.int32)
        params, state = jax.eval_shape(runs.init, seeds)
        scales = jax.ShapeDtypeStruct((runs.steps_per_call,), jnp.float32)
        chosen = jax.ShapeDtypeStruct((runs.steps_per_call, runs.batch_size), jnp.int32)
        return runs._replace(
            init=runs.init.lower(seeds).compile(),
            call=runs.call.lower(params, state, chosen, scales, shaped(train)).compile(),
            correct=runs.correct.lower(params, shaped(test)).compile(),
        )


class Outcome(NamedTuple):
    """params: stacked over R.  curve: (step, training accuracy of each run [R]) per call."""

    params: Any
    curve: list[tuple[int, np.ndarray]]
    steps: int
    seconds: float


def train(
    runs: Runs,
    rows: Data,
    *,
    steps: int,
    seconds: float,
    until: float = 0.995,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Trains until ``steps`` or ``seconds`` are over, or a learning rate has all its seeds above ``until``.

    The schedule, a cosine to 0 behind a linear warm-up of 1/20, follows the clock where that is shorter. Rows
    are drawn without replacement in each epoch.
    """
    rates, seeds = len(runs.rates), len(runs.seeds)
    order = batches(rows.tokens.shape[0], runs.batch_size)

    def factor(done: float) -> float:
        return min(done / 0.05, 0.5 + 0.5 * np.cos(np.pi * (done - 0.05) / 0.95)) if done < 1 else 0.0

    params, state = runs.init(jnp.tile(jnp.array(runs.seeds, jnp.int32), rates))
    curve: list[tuple[int, np.ndarray]] = []
    step, began = 0, time.perf_counter()
    while (done := max(step / steps, (spent := time.perf_counter() - began) / seconds)) < 1:
        per_step = max(1 / steps, spent / step / seconds if step else 0)
        scales = [factor(done + per_step * i) for i in range(runs.steps_per_call)]
        chosen = jnp.array([next(order) for _ in scales], jnp.int32)
        params, state, hits = runs.call(params, state, chosen, jnp.array(scales, jnp.float32), rows)
        step += runs.steps_per_call
        curve.append((step, np.asarray(hits)))
        say(f"  step {step:6d}  {time.perf_counter() - began:5.0f} s  training accuracy {hits.max():.3f}")
        if curve[-1][1].reshape(rates, seeds).min(axis=1).max() > until:
            break
    return Outcome(params, curve, step, time.perf_counter() - began)


def batches(num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """Rows [B] of each step's batch, epoch after epoch."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(num_rows)
        yield from order[: num_rows // batch_size * batch_size].reshape(-1, batch_size)


def count_correct(runs: Runs, params: Any, rows: Data, batch_size: int) -> np.ndarray:
    """Number of labels predicted right in each row, [R, N]."""
    count = rows.tokens.shape[0]
    parts = []
    for start in range(0, count, batch_size):
        chosen = np.arange(start, start + batch_size) % count  # the last batch wraps around
        parts.append(np.asarray(runs.correct(params, jax.tree.map(lambda x, chosen=chosen: x[chosen], rows))))
    return np.concatenate(parts, axis=1)[:, :count]


def first_rows(rows: Data, count: int) -> Data:
    """Data shaped as a batch of ``count`` rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), rows)
