"""Seconds to trace, lower and compile the training step against depth, and beside another checkout.

    python benchmarks/compile_time.py [--pattern "kda*3 full"] [--depths 8,24,32,48,30,26] [--old DIR]

Each depth runs in a process of its own, so that nothing is warm; with --old each depth first with the code of
the checkout unpacked in that folder. "plan" is how the stack is scanned: its runs are what is compiled;
"lines", of the lowered program, say the same and do not depend on the machine. The ratio is of CPU seconds,
of all threads, to the first depth's with the same code: the wall says less where the machine is shared.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
WIDTH = {"d_model": 256, "vocab_size": 1024, "mlp_hidden": 512, "dtype": "float32"}
BATCH, LENGTH = 2, 256


def measure(pattern: str, depth: int) -> dict[str, Any]:
    """Seconds of each stage for one depth, in this process."""
    import jax
    import jax.numpy as jnp

    from hybridlm import config as configs
    from hybridlm import model, program, sharding

    config = configs.default()
    config.model.update(pattern=pattern, num_layers=depth, **WIDTH)
    config.mixers.kda.update(num_heads=4, head_dim=64)
    config.mixers.full.num_heads = 4
    config.data = configs.data("text", path="python-stdlib:")  # never opened
    config = configs.resolve(config)
    definition = model.build(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32) for name in names}
    with jax.set_mesh(mesh):
        built = program.build(config, definition, mesh, None)
        times, cpu = [time.perf_counter()], time.process_time()
        traced = built.step.trace(built.shapes, batch)  # type: ignore[attr-defined]
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
    stages = zip(("trace", "lower", "compile"), itertools.pairwise(times), strict=True)
    plan = definition.layout if hasattr(definition, "layout") else definition.plan  # its name in 0.1.0
    seconds = {name: end - start for name, (start, end) in stages}
    totals = {"total": times[-1] - times[0], "cpu": time.process_time() - cpu}
    return seconds | totals | {"lines": lowered.as_text().count("\n"), "plan": str(plan)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pattern", default="kda*3 full")
    parser.add_argument("--depths", default="8,24,32,48,30,26")
    parser.add_argument("--old", help="a folder with another checkout")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.pattern, args.one)))
        return
    trees = {"old": Path(args.old).resolve()} if args.old else {}
    trees["new"] = HERE.parents[1]
    print(
        "| layers | code | trace | lower | compile | total s | CPU s | ratio | lines | plan |\n|"
        + "---|" * 10
    )
    first: dict[str, float] = {}
    for depth, (name, tree) in itertools.product(args.depths.split(","), trees.items()):
        command = [sys.executable, str(HERE), "--pattern", args.pattern, "--one", depth]
        env = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        ratio = row["cpu"] / first.setdefault(name, row["cpu"])
        numbers = [f"{row[stage]:.1f}" for stage in ("trace", "lower", "compile", "total", "cpu")]
        print(
            f"| {' | '.join([depth, name, *numbers, f'{ratio:.2f}', str(row['lines']), row['plan']])} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
