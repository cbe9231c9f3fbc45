"""Trace, lowering and compile seconds of the train step against depth.

    python -m benchmarks.compile_time [--pattern "kda*3 full"] [--depths 8,16,32,64,30]

Each depth runs in a process of its own, so that nothing is warm. The last column is the ratio of the total to
the first depth's.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time

WIDTH = {"d_model": 256, "vocab_size": 1024, "mlp_hidden": 512, "dtype": "float32"}
BATCH, LENGTH = 2, 256


def measure(pattern: str, depth: int) -> dict[str, float]:
    """Seconds of each stage for one depth, in this process."""
    import jax
    import jax.numpy as jnp

    from hybridlm import config as configs
    from hybridlm import model, optimizer

    config = configs.default()
    config.model.update(pattern=pattern, num_layers=depth, **WIDTH)
    config.mixers.kda.update(num_heads=4, head_dim=64)
    config.mixers.full.num_heads = 4
    config.data = configs.data("text", path="python-stdlib:")
    config = configs.resolve(config)
    definition = model.build(config)
    shapes = model.shapes(definition)
    update = optimizer.build(config.optimizer, config.train.steps, model.metadata(definition))
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }

    def step(params, state, batch):
        grads = jax.grad(lambda p: model.loss_fn(definition, p, batch)[0])(params)
        updates, state = update.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = jax.eval_shape(update.init, shapes)
    times = [time.perf_counter()]
    traced = jax.jit(step).trace(shapes, state, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    trace, lower, compile_ = (b - a for a, b in itertools.pairwise(times))
    return {
        "depth": depth,
        "trace": trace,
        "lower": lower,
        "compile": compile_,
        "total": times[-1] - times[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", default="kda*3 full")
    parser.add_argument("--depths", default="8,16,32,64,30")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.pattern, args.one)))
        return
    print("layers  trace  lower  compile  total s  ratio")
    first = None
    for depth in args.depths.split(","):
        command = [sys.executable, "-m", "benchmarks.compile_time", "--pattern", args.pattern, "--one", depth]
        row = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
        first = first or row["total"]
        print(
            f"{depth:>6} {row['trace']:6.1f} {row['lower']:6.1f} {row['compile']:8.1f} {row['total']:8.1f}"
            f" {row['total'] / first:6.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
