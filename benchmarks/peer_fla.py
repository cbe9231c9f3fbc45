"""Compiles flash-linear-attention's kernels side by side, for benchmarks/kernels.py --peers fla to time.

    python benchmarks/peer_fla.py [--ops kda,gla] [--shapes 0] [--accuracy gla] [--slices 3] [--seconds 220]

At the first call of an op FLA compiles and times every configuration of every kernel, one after another, in
150 to 270 s. Here --slices processes an op compile a slice of them each into Triton's cache and time nothing
(nor is a choice kept: FLA_CACHE_RESULTS=0), so that the timed run, alone on the GPU, only has to tune.
Sequences are cut to 1024 tokens, which no kernel is compiled for.
--accuracy: ops whose kernels for the errors' shape are compiled too.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import kernels
from peers import ACCURACY_SHAPE, OPS, Fla, FlaUnchecked


def compile_slice(number: int, slices: int) -> None:
    """From here on Triton's autotuner runs every ``slices``-th configuration, and others if those fail."""
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def mine_first(self: Any, *args: Any) -> list[Any]:
        every = prune(self, *args)
        mine = every[number % len(every) :: slices]
        self.here, self.worked = {id(config) for config in mine}, False
        return [*mine, *(config for config in every if id(config) not in self.here)]

    def compile_only(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if self.worked and id(config) not in self.here:
            return [float("inf")] * 3
        self.do_bench = once
        seconds = bench(self, *args, config=config, **meta)
        self.worked |= seconds[0] < float("inf")
        return seconds

    def once(call: Any, quantiles: Any) -> list[float]:
        call()
        return [1.0] * 3

    Autotuner.prune_configs, Autotuner._bench = mine_first, compile_only


def fill(op: str, number: int, args: argparse.Namespace) -> None:
    compile_slice(number, args.slices)
    peer: Fla = FlaUnchecked()
    for index in args.shapes:
        shape = kernels.SHAPES[int(index)]
        peer.both(op, peer.draw(op, shape._replace(tokens=min(shape.tokens, 1024))))
    if op in args.accuracy:
        peer.both(op, peer.draw(op, ACCURACY_SHAPE), final=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=kernels.some_of(OPS), default=OPS)
    parser.add_argument("--shapes", type=kernels.some_of(kernels.INDICES), default=["0"])
    parser.add_argument("--accuracy", type=kernels.some_of(OPS), default=())
    parser.add_argument("--slices", type=int, default=3, help="processes an op")
    parser.add_argument("--seconds", type=float, default=220, help="time allowed for all of it")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        fill(args.one[0], int(args.one[1]), args)
        return
    start = time.monotonic()
    path = [str(pathlib.Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"FLA_CACHE_RESULTS": "0", "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, *sys.argv, "--one"]
    tasks = [(op, str(number)) for op in args.ops for number in range(args.slices)]
    running = [(task, subprocess.Popen([*command, *task], env=env)) for task in tasks]
    for (op, number), process in running:
        try:
            status = process.wait(max(0.1, args.seconds - (time.monotonic() - start)))
            print(f"{op} {number}: status {status}, {time.monotonic() - start:.0f} s", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"{op} {number}: not done after {args.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
