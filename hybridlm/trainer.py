"""Training: one jitted step over a mesh, and the loop around it.

The whole state of a run is {"params", "opt_state", "step"}; the batch of a step is a function of the seed
and the step, and there is no other randomness. A run that was killed and resumed therefore writes the same
metrics as one that was not.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridlm import checkpoint, cost, data, generate, init_from, logbook, optimizer, report, sharding
from hybridlm import config as configs
from hybridlm import model as lm
from hybridlm.data import baselines
from hybridlm.errors import ConfigError, RunError

log = logging.getLogger("hybridlm")

State = dict[str, Any]
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


Evaluate = Callable[[lm.Definition, Any, Any, int], Metrics]  # (definition, params, tokenizer, step)


def train(
    config: Any, workdir: str | Path, resume: str = "auto", evaluate: Evaluate | None = None
) -> Metrics:
    """Trains what the resolved ``config`` describes and returns the last line of metrics.jsonl.

    workdir: gets config.json, layers.json, metrics.jsonl, loss.png, checkpoints/.
    resume: auto, must or never; see `checkpoint.choose`.
    evaluate: measures the model beside each validation; its metrics join those of the step.
    Raises ConfigError before anything is compiled, RunError when the run cannot go on.
    """
    workdir, steps = Path(workdir).absolute(), config.train.steps
    mesh = sharding.make_mesh(config.mesh)
    configs.check_batch(config.train, mesh.shape)
    train_data, val_data = (build_data(config, split) for split in ("train", "val"))
    definition = lm.build(config)
    record = {
        "config": config.to_dict(),
        "layers": cost.summary(config),
        "fingerprint": train_data.fingerprint,
    }

    keep = config.checkpoint
    with (
        jax.set_mesh(mesh),
        checkpoint.Checkpoints(
            workdir / "checkpoints", keep.keep_last, keep.keep_best, keep.best_metric
        ) as saves,
    ):
        start = checkpoint.choose(resume, saves)
        if start is not None:
            checkpoint.check_unchanged(saves.record(start), record)
        if start is not None and start > steps:
            raise ConfigError("train.steps", steps, f"the checkpoint is already at step {start}", "Raise it.")
        if start is None and config.init_from:
            init_from.check(config.init_from)
        write_json(workdir / "config.json", record["config"])
        write_json(workdir / "layers.json", record["layers"])

        program = build(config, definition, mesh, train_data.token_bytes)
        if start is None:
            start, state = 0, program.init(jax.random.key(config.train.seed))
            if config.init_from:
                state["params"] = init_from.start(config.init_from, definition, state["params"], workdir)
        else:
            state = saves.restore(start, program.shapes)
            log.info("resumed from the checkpoint at step %d", start)

        def validate(params: Any, step: int) -> Metrics:
            metrics = validation(program, mesh, val_data, config.eval.batches, params)
            return metrics | (evaluate(definition, params, train_data.tokenizer, step) if evaluate else {})

        draw = partial(sample, config, definition, train_data.tokenizer)
        metrics: Metrics = {}
        with logbook.Logbook(workdir, config, start=start) as book:
            if start < steps:
                run = compiled(program, mesh, train_data.batch(start))
            clock = Clock(config, mesh.size)
            batches = train_data.iterate(start)
            behind: tuple[int, dict] | None = None  # dispatched, its metrics not read yet
            for step in range(start + 1, steps + 1):
                batch = sharding.put_batch(clock.next(batches), mesh)
                state, now = run(state, batch)
                if behind:  # read one step late, so that the devices always have the next one queued
                    metrics = settle(*behind, clock)
                    if due(behind[0], config.log.every_steps):
                        book.write(behind[0], metrics | clock.rates())
                behind = step, now
                last = step == steps
                validates = last or due(step, config.eval.every_steps)
                samples = last or due(step, config.eval.sample_every_steps)
                saving = last or due(step, config.checkpoint.every_steps)
                if validates or samples or saving:
                    metrics = settle(*behind, clock) | clock.rates()
                    behind = None
                    if validates:
                        metrics |= validate(state["params"], step)
                    if samples:
                        metrics |= draw(state["params"])
                    book.write(step, metrics)
                    if saving:
                        saves.save(step, state, record | {"step": step}, metrics)
                    clock.restart()
            if start == steps:  # resumed a run that was finished: only its summary is wanted
                metrics = validate(state["params"], steps) | draw(state["params"])
    if jax.process_index() == 0:
        summarise(config, workdir, metrics, val_data)
    return metrics


class Program(NamedTuple):
    """The compiled parts of a run, all over one mesh. ``shapes`` is the state's, with shardings."""

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

    def gradients(params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """Gradient of the summed loss, and the sums, both over the whole batch."""
        (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        return jax.lax.with_sharding_constraint(grads, param_shardings), sums

    def accumulated(params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        # Microbatch i is every microbatches-th row from i on, so that each device splits its own rows.
        split = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, train.microbatches, *x.shape[1:]), 1, 0), batch
        )
        part = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, params, part))

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part)), None

        return jax.lax.scan(add, zeros, split)[0]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, sums = (accumulated if train.microbatches > 1 else gradients)(state["params"], batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["tokens"], 1), grads)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = per_token(sums) | {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
        }
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

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


def per_token(sums: dict[str, Any]) -> dict[str, Any]:
    """From the sums of `model.loss_fn`: loss (nats per target), accuracy and, with bytes, bits_per_byte."""
    targets = sums["tokens"] + (sums["tokens"] == 0)  # a batch may hold none
    means = {"loss": sums["loss_sum"] / targets, "accuracy": sums["correct"] / targets}
    if "bytes" in sums:
        means["bits_per_byte"] = sums["loss_sum"] / math.log(2) / (sums["bytes"] + (sums["bytes"] == 0))
    if "balance_loss_sum" in sums:
        means["balance_loss"] = sums["balance_loss_sum"] / targets
    return means


def compiled(program: Program, mesh: Mesh, batch: dict[str, np.ndarray]) -> Callable[[State, Batch], tuple]:
    """The step, compiled ahead of time for batches shaped as ``batch``."""
    rows = sharding.batch_sharding(mesh)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in batch.items()}
    began = time.perf_counter()
    executable = program.step.lower(program.shapes, shapes).compile()  # type: ignore[attr-defined]
    log.info("compiled the training step in %.1f s", time.perf_counter() - began)
    return executable


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def settle(step: int, metrics: dict[str, jax.Array], clock: "Clock") -> Metrics:
    """Waits for ``step`` and returns its metrics; RunError if one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    clock.tick()
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunError(
                f"step {step}: {name} is {value}; earlier checkpoints are intact. Lower the learning rate."
            )
    return values


class Clock:
    """Where the time of the steps since the last `rates` went.

    tokens_per_second counts every position of every row. data_seconds is what the loop waited for batches,
    which are read ahead; the rest of a step is compute_seconds. Validation, samples and saves are left out.
    """

    def __init__(self, config: Any, devices: int):
        self.tokens = config.train.batch_size * config.train.seq_len
        peak = cost.peak_flops(jax.devices()[0].device_kind)
        self.mfu_of_rate = cost.train_flops_per_token(config) / (peak * devices) if peak else None
        self.steps, self.total, self.waited = 0, 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leaves out the time since the last `tick`."""
        self.mark = time.perf_counter()

    def next(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    def tick(self) -> None:
        """One more step is complete."""
        now = time.perf_counter()
        self.steps, self.total, self.mark = self.steps + 1, self.total + now - self.mark, now

    def rates(self) -> Metrics:
        """Means over the steps since the last call."""
        seconds, waited = self.total / self.steps, self.waited / self.steps
        self.steps, self.total, self.waited = 0, 0.0, 0.0
        rate = self.tokens / seconds
        mfu = {} if self.mfu_of_rate is None else {"mfu": rate * self.mfu_of_rate}
        times = {"step_seconds": seconds, "data_seconds": waited, "compute_seconds": seconds - waited}
        return {"tokens_per_second": rate, **times, **mfu}


def build_data(config: Any, split: str) -> data.Dataset:
    """One split, whole batches on every process: `sharding.put_batch` takes the rows that the mesh wants."""
    t = config.train
    sizes = {"batch_size": t.batch_size, "seq_len": t.seq_len, "vocab_size": config.model.vocab_size}
    return data.build(config.data, split=split, seed=t.seed, **sizes)


def validation(program: Program, mesh: Mesh, dataset: data.Dataset, batches: int, params: Any) -> Metrics:
    """val_loss, val_accuracy and val_bpb over the first ``batches`` held-out batches, the same every time."""
    count = min(batches, dataset.num_batches or batches)
    sums = [program.evaluate(params, sharding.put_batch(dataset.batch(i), mesh)) for i in range(count)]
    host = jax.device_get(sums)
    means = per_token({name: sum(float(one[name]) for one in host) for name in host[0]})
    names = {"loss": "val_loss", "accuracy": "val_accuracy", "bits_per_byte": "val_bpb"}
    return {names.get(name, f"val_{name}"): value for name, value in means.items()}


def sample(config: Any, definition: lm.Definition, tokenizer: Any, params: Any) -> Metrics:
    """{"sample": text}, or nothing when the config wants none or the tokens stand for no text."""
    wanted = config.eval
    if tokenizer is None or not wanted.sample_tokens:
        return {}
    tokens = generate.generate(
        definition,
        params,
        [[tokenizer.doc_id, *tokenizer.encode(wanted.sample_prompt)]],
        max_new_tokens=wanted.sample_tokens,
        sampling=generate.Sampling(temperature=wanted.temperature),
        seed=config.train.seed,
        stop=tokenizer.doc_id,
    )
    return {"sample": wanted.sample_prompt + tokenizer.decode(tokens[0])}


def summarise(config: Any, workdir: Path, metrics: Metrics, held_out: data.Dataset) -> None:
    """Draws loss.png and prints what the run came to: layers, held-out loss beside references, paths."""
    logbook.plot(logbook.read(workdir / "metrics.jsonl"), workdir / "loss.png")
    console = rich.get_console()
    console.print(report.layer_table(config))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(report.full_layers(config))
    say(f"held-out loss: {metrics['val_loss']:.4f} nats per token")
    text = held_out.held_out_bytes(config.eval.batches)
    if text:
        say(f"held-out bits per byte, on the same {len(text):,} bytes:")
        say(f"  this model       {metrics['val_bpb']:.3f}")
        say(f"  gzip -9          {baselines.gzip_bits_per_byte(text):.3f}")
        say(f"  order-0 entropy  {baselines.order0_bits_per_byte(text):.3f}")
    if "sample" in metrics:
        say(f"sample:\n{logbook.printable(metrics['sample'])}")
    say("written:")
    for name in ("metrics.jsonl", "loss.png", "config.json", "layers.json", "checkpoints"):
        say(f"  {workdir / name}")


def write_json(path: Path, value: Any) -> None:
    if jax.process_index() == 0:
        path.write_text(json.dumps(value, indent=2) + "\n")
