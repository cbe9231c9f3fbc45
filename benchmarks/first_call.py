"""Seconds of the first call of linear_attention, forward and backward, without a compilation cache.

    python benchmarks/first_call.py [--op kda] [--shape 0] [--peers ours,triton,xla,jla] [--runs 2]

Each run is a process of its own, the peers in turns; op, shape and peers are those of benchmarks/kernels.py.
Counted from when the device answers to the first result: trace (with the self-test of kernels that have
one), lower, compile, and the first call of what was compiled, on arrays that are there. "processor" are
the seconds of all threads and of the assemblers that they start. Load is the host's while it runs: beside
other work the figures say little.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kernels import INDICES, SHAPES, some_of
from peers import OPS, Jax, Shape

PEERS = ("ours", "triton", "xla", "jla")
STAGES = ("trace", "lower", "compile", "call")


def measure(peer: str, op: str, shape: Shape) -> dict[str, Any]:
    """In this process, which must not have traced anything before."""
    import jax

    jax.block_until_ready(jax.numpy.zeros(1))
    run = Jax(peer)
    x = jax.block_until_ready(jax.jit(lambda: run.draw(op, shape))())
    before, times = processor_seconds(), [time.perf_counter()]
    stage: Any = jax.jit(run.both(op))
    for advance in (lambda f: f.trace(x), lambda t: t.lower(), lambda t: t.compile(), lambda f: f(x)):
        stage = jax.block_until_ready(advance(stage))
        times.append(time.perf_counter())
    row = {name: end - start for name, start, end in zip(STAGES, times, times[1:], strict=False)}
    row |= {"all": times[-1] - times[0], "processor": processor_seconds() - before}
    return row | {"load": os.getloadavg()[0], "device": jax.devices()[0].device_kind, "jax": jax.__version__}


def processor_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def table(rows: list[dict[str, Any]]) -> str:
    columns = (*STAGES, "all", "processor", "load")
    lines = [f"| peer | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        lines.append(f"| {row['peer']} | " + " | ".join(f"{row[name]:.2f}" for name in columns) + " |")
    return "\n".join(lines)


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, default="kda")
    parser.add_argument("--shape", choices=INDICES, default="0")
    parser.add_argument("--peers", type=some_of(PEERS), default=["ours", "triton"])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed(sys.argv[1:])
    if args.one:
        print(json.dumps({"peer": args.one} | measure(args.one, args.op, SHAPES[int(args.shape)])))
        return
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, path)), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    rows = []
    for peer in args.peers * args.runs:
        command = [sys.executable, __file__, "--op", args.op, "--shape", args.shape, "--one", peer]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print(f"{args.op} {SHAPES[int(args.shape)]}, {rows[0]['device']}, jax {rows[0]['jax']}\n{table(rows)}")


if __name__ == "__main__":
    main()
