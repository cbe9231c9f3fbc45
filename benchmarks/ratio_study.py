"""A sweep whose runs share programs: every pattern of one linear mixer and attention is the same program.

    python -m benchmarks.ratio_study --config=configs/sweeps/study_mqar.py --workdir=runs/x --mixer=kda

Each layer holds the linear mixer, attention, and a flag that says which of the two it is; the MLP is as wide
as the widest and masked to the run's own width. Flags and masks are data, so that ratios, placements, seeds
and learning rates are an axis of one program, compiled once. The functions computed are those of
`hybridlm.model`, which tests/test_ratio_study.py holds it to; what a run pays for is the other mixer's time.

All runs read the same batches, in the order of the first run's seed; seeds differ in initial parameters. The
sweep's folder gets the metrics.jsonl of every run, for `launch.report`. With --turn several processes compile
side by side and train one after the other. What would not be finished --seconds after --began is not begun.

Shape legend: R runs, L layers, B rows, T tokens, D model width, H widest MLP.
"""

import argparse
import dataclasses
import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hybridlm import loss, mixers, optimizer, schema, trainer
from hybridlm import model as lm
from hybridlm.data import mqar
from hybridlm.data.source import View
from hybridlm.layers import RMSNorm, SwiGLU, normal, param
from hybridlm.program import per_token
from hybridlm.rows import Rows
from launch import grid, plan
from pallas_kernels import auto_means


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the runs of one program have in common."""

    linear: lm.Spec
    full: lm.Spec
    num_layers: int
    d_model: int
    mlp_hidden: int
    vocab_size: int
    norm_eps: float
    dtype: Any
    remat: str


class Block(nnx.Module):
    """A layer that is its linear mixer or its attention, by ``is_full``; mask_H: channels of its MLP."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        d_model = shape.d_model
        self.mixer_norm = RMSNorm(d_model, rngs=rngs, eps=shape.norm_eps)
        self.linear = mixers.load(shape.linear.kind).Mixer(shape.linear.config, d_model, rngs=rngs)
        self.full = mixers.load(shape.full.kind).Mixer(shape.full.config, d_model, rngs=rngs)
        self.mlp_norm = RMSNorm(d_model, rngs=rngs, eps=shape.norm_eps)
        self.mlp = SwiGLU(d_model, shape.mlp_hidden, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, rows: Rows, is_full: jax.Array, mask_H: jax.Array, shared: jax.Array | None
    ) -> jax.Array:
        normed = self.mixer_norm(x_BTD)
        linear, _ = self.linear(normed, rows, shared=shared)
        full, _ = self.full(normed, rows)
        x_BTD = x_BTD + jnp.where(is_full, full, linear)
        normed = self.mlp_norm(x_BTD)
        hidden = jax.nn.silu(self.mlp.gate(normed)) * self.mlp.up(normed)
        return x_BTD + self.mlp.down(hidden * mask_H.astype(hidden.dtype))


class Stack(nnx.Module):
    """Embedding, scanned blocks, final norm; the head is the embedding."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.shape = shape
        self.embedding = param(
            rngs, (shape.vocab_size, shape.d_model), ("vocab", "embed"), normal(), decay=True
        )
        block = lambda key: Block(shape, rngs=nnx.Rngs(params=key))
        graph, _ = nnx.split(nnx.eval_shape(lambda: block(jax.random.key(0))))
        keys = jax.random.split(rngs.params(), shape.num_layers)
        self.blocks = nnx.merge(graph, jax.vmap(lambda key: nnx.state(block(key)))(keys))
        kind = mixers.load(shape.linear.kind)
        of_stack = (shape.linear.config, shape.d_model, shape.num_layers)
        self.shared = kind.Shared(*of_stack, rngs=rngs) if hasattr(kind, "Shared") else None
        self.final_norm = RMSNorm(shape.d_model, rngs=rngs, eps=shape.norm_eps)

    def __call__(self, tokens_BT: jax.Array, rows: Rows, full_L: jax.Array, mask_H: jax.Array) -> jax.Array:
        graph, state = nnx.split(self.blocks)

        def layer(x: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
            state, is_full, shared = xs
            return nnx.merge(graph, state)(x, rows, is_full, mask_H, shared), None

        policy = lm.REMAT[self.shape.remat]
        body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
        shared = None if self.shared is None else self.shared.per_layer()
        x, _ = jax.lax.scan(
            body, self.embedding[...].astype(self.shape.dtype)[tokens_BT], (state, full_L, shared)
        )
        return self.final_norm(x)


def shape_of(runs: Sequence[grid.Run]) -> Shape:
    """Of runs that differ in pattern, MLP width, seed and learning rate only."""
    layers = [spec for run in runs for spec in lm.build(run.config).layers]
    full = next(spec for spec in layers if spec.kind in ("attention", "mla"))
    linear = next(spec for spec in layers if spec.kind != full.kind)
    model = runs[0].config.model
    return Shape(
        linear, full, model.num_layers, model.d_model, max(run.config.model.mlp_hidden for run in runs),
        model.vocab_size, model.norm_eps, jnp.dtype(model.dtype), model.remat,
    )  # fmt: skip


def flags_and_masks(runs: Sequence[grid.Run], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """full [R, L] and mask [R, H], bool."""
    full_RL = np.array([[spec.kind == shape.full.kind for spec in lm.build(r.config).layers] for r in runs])
    widths = np.array([run.config.model.mlp_hidden for run in runs])
    return full_RL, np.arange(shape.mlp_hidden) < widths[:, None]


class Program:
    """Functions over the runs; parameters and optimiser state have a leading axis R."""

    def __init__(self, runs: Sequence[grid.Run]):
        self.config, self.shape = runs[0].config, shape_of(runs)
        config, shape = self.config, self.shape
        full_RL, mask_RH = map(jnp.asarray, flags_and_masks(runs, shape))
        rates_R = jnp.array([run.config.optimizer.learning_rate for run in runs])
        self.seeds_R = jnp.array([run.config.train.seed for run in runs])
        new = lambda key: Stack(shape, rngs=nnx.Rngs(params=key))
        self.graph, self.state = nnx.split(nnx.eval_shape(lambda: new(jax.random.key(0))))
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        meta = lambda variable: lm.Meta(tuple(variable.axes), variable.decay)
        metadata = nnx.to_pure_dict(jax.tree.map(meta, self.state, is_leaf=is_variable))

        def tx(rate: Any) -> optax.GradientTransformation:
            settings = schema.Optimizer(**config.optimizer.to_dict() | {"learning_rate": rate})
            return optimizer.build(settings, config.train.steps, metadata)

        def init(seed: jax.Array) -> tuple[Any, Any]:
            params = nnx.to_pure_dict(nnx.state(new(jax.random.key(seed))))
            return params, tx(0.0).init(params)

        def sums(params: Any, full_L: jax.Array, mask_H: jax.Array, batch: dict) -> tuple[jax.Array, dict]:
            hidden = self.hidden(params, full_L, mask_H, batch)
            total, parts = loss.cross_entropy(hidden, params["embedding"].T, batch["targets"])
            return total, {"loss_sum": total, "tokens": parts.tokens, "correct": parts.correct}

        def update(params: Any, state: Any, rate: Any, full_L: Any, mask_H: Any, batch: dict) -> tuple:
            grads, parts = jax.grad(sums, has_aux=True)(params, full_L, mask_H, batch)
            grads = jax.tree.map(lambda g: g / jnp.maximum(parts["tokens"], 1), grads)
            updates, state = tx(rate).update(grads, state, params)
            return optax.apply_updates(params, updates), state, per_token(parts)

        every = jax.vmap(update, in_axes=(0, 0, 0, 0, 0, None))
        self.init = jax.jit(jax.vmap(init))
        self.step = jax.jit(
            lambda params, state, batch: every(params, state, rates_R, full_RL, mask_RH, batch),
            donate_argnums=(0, 1),
        )
        each = jax.vmap(lambda p, f, m, batch: sums(p, f, m, batch)[1], in_axes=(0, 0, 0, None))
        self.sums = jax.jit(lambda params, batch: each(params, full_RL, mask_RH, batch))

    def hidden(self, params: Any, full_L: jax.Array, mask_H: jax.Array, batch: dict) -> jax.Array:
        """Final hidden states [B, T, D] of one run."""
        state = jax.tree.map(lambda x: x, self.state)
        nnx.replace_by_pure_dict(state, params)
        rows = Rows(batch["segment_ids"], batch["positions"])
        return nnx.merge(self.graph, state)(batch["tokens"], rows, full_L, mask_H)


def slices(config: Any) -> dict[str, list[dict[str, np.ndarray]]]:
    """Held-out batches of each slice of MQAR by itself; nothing for other data."""
    if config.data.kind != "mqar":
        return {}
    found = {}
    size, count = config.train.batch_size, config.eval.batches
    for length, pairs, _ in mqar._parse(config.data.slices) if config.data.slices else []:
        own = mqar.Config(
            slices=f"({length}, {pairs})", power_a=config.data.power_a,
            random_non_queries=config.data.random_non_queries, val_examples=size * count,
        )  # fmt: skip
        source = mqar.open_source(own, View("val", config.train.seq_len, 0, config.model.vocab_size))
        found[f"{length}x{pairs}"] = [source.rows(np.arange(i * size, (i + 1) * size)) for i in range(count)]
    return found


def held_out(program: Program, params: Any, batches: Sequence[dict]) -> list[dict[str, Any]]:
    """`trainer.validation` of each run."""
    sums = jax.device_get([program.sums(params, batch) for batch in batches])
    count = len(sums[0]["tokens"])
    return [
        trainer.held_out({k: sum(float(one[k][r]) for one in sums) for k in sums[0]}) for r in range(count)
    ]


def study(runs: Sequence[grid.Run], workdir: Path, flags: argparse.Namespace) -> bool:
    """Trains ``runs`` as one program; False if there was no time to."""
    config, name = runs[0].config, flags.mixer
    steps, end = config.train.steps, flags.began + flags.seconds
    say = lambda text: print(f"[{time.time() - flags.began:5.0f} s] {name}: {text}", flush=True)
    program = Program(runs)
    source, val = trainer.build_data(config, "train"), trainer.build_data(config, "val")
    val_batches = [val.batch(i) for i in range(min(config.eval.batches, val.num_batches or 1))]
    by_slice = slices(config)
    token_bytes = None if source.tokenizer is None else source.token_bytes
    params, state = program.init(program.seeds_R)
    batches = source.iterate(0)
    batch = next(batches)
    began = time.time()
    step_fn = program.step.lower(params, state, batch).compile()
    program.sums = program.sums.lower(params, batch).compile()  # type: ignore[assignment]
    compiled = time.time() - began
    say(f"{len(runs)} runs compiled in {compiled:.0f} s; {len(val_batches)} held-out batches")
    with (Path(flags.turn) if flags.turn else workdir / f"{name}.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # the device is another process's until then
        files = [(workdir / run.name / "metrics.jsonl").open("w", buffering=1) for run in runs]
        tokens = len(runs) * config.train.batch_size * config.train.seq_len
        mark, marked = time.time(), 0
        for step in range(1, steps + 1):
            params, state, metrics = step_fn(params, state, batch)
            batch = next(batches)
            validates = step == steps or trainer.due(step, config.eval.every_steps)
            if not validates and not trainer.due(step, config.log.every_steps):
                continue
            host = jax.device_get(metrics)
            seconds = (time.time() - mark) / (step - marked)
            lines = [{"step": step} | {k: float(v[r]) for k, v in host.items()} for r in range(len(runs))]
            if validates:
                lines = [a | b for a, b in zip(lines, held_out(program, params, val_batches), strict=True)]
                for line in lines if token_bytes is not None else ():
                    line["val_bpb"] = line["val_loss"] / np.log(2)  # a token is a byte
                for part, own in by_slice.items() if step == steps else ():
                    lines = [
                        a | {f"val_accuracy@{part}": b["val_accuracy"]}
                        for a, b in zip(lines, held_out(program, params, own), strict=True)
                    ]
            for file, line in zip(files, lines, strict=True):
                file.write(
                    json.dumps(line | {"tokens_per_second": tokens / seconds, "packed": len(runs)}) + "\n"
                )
            losses = [line["loss"] for line in lines]
            best = max(line.get("val_accuracy", line["accuracy"]) for line in lines)
            say(f"step {step}/{steps}  {1000 * seconds:.0f} ms  loss {min(losses):.3f} to {max(losses):.3f}")
            say(f"  accuracy to {best:.3f}")
            mark, marked = time.time(), step
            if time.time() + seconds * (steps - step) > end:
                say(f"no time for the {steps - step} steps that are left")
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a sweep file")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--mixer", required=True, help="whose runs to train; attention alone comes with the first mixer"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--began", type=float, default=time.time(), help="Unix time from which --seconds counts"
    )
    parser.add_argument("--turn", default="", help="a file that processes lock while they train")
    flags, rest = parser.parse_known_args()
    overrides = dict(text.removeprefix("--config.").split("=", 1) for text in rest)
    runs = grid.runs(grid.load(flags.config), overrides)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    with (flags.workdir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (flags.workdir / "sweep.json").exists():
            command = f"python -m benchmarks.ratio_study --config={flags.config}"
            plan.write(runs, flags.workdir, {"command": command, "checkpoints": False})
    first = runs[0].point["mixer"]
    own = [
        r
        for r in runs
        if r.point["mixer"] == flags.mixer or (r.point["mixer"] == "full" and first == flags.mixer)
    ]
    with auto_means("cudnn", "xla"):  # Pallas kernels have no rule for a batch of runs
        done = study(own, flags.workdir, flags)
    print("done" if done else "not run", flags.mixer)


if __name__ == "__main__":
    main()
