"""Times what `linear_attention/hopper/table.py` chooses between: the slice of V and the pieces of a sequence.

    python benchmarks/choices.py [--ops gated_deltanet,simple_gla] [--shapes 0,1,2,3,4]

Shapes, inputs and medians of benchmarks/kernels.py; forward, then forward and backward. Everything compiles
first, on all cores. One line a choice, the table's own marked. Needs a Hopper GPU.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from kernels import INDICES, SHAPES, some_of
from peers import OPS, Jax, median_ms

from pallas_kernels.linear_attention.hopper import table
from pallas_kernels.linear_attention.hopper.table import Choice

HEAD_OPS = [op for op in OPS if op in ("gated_deltanet", "deltanet", "simple_gla")]


def candidates(shape: tuple[int, ...]) -> list[Choice]:
    _, T, _, D = shape
    tiles = [tile for tile in (64, 128) if D % tile == 0]
    pieces = [n for n in (1, 2, 4, 8, 16) if n == 1 or T // n >= 4096]
    return [Choice(*choice) for choice in itertools.product(tiles, pieces)]


def additive(choice: Choice, shape: tuple[int, ...]) -> Choice:
    """The additive backward pass takes all values of a head at once."""
    return Choice(shape[3], choice.pieces)


def lower(function: Callable, x: Any, shape: tuple[int, ...], choice: Choice) -> Any:
    """The function with this choice in place of the table's."""
    chosen = table.forward, table.backward
    table.forward = lambda *_: choice
    table.backward = lambda *call: choice if call[-1] else additive(choice, shape)
    try:
        return jax.jit(function).lower(x)
    finally:
        table.forward, table.backward = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=some_of(HEAD_OPS), default=["gated_deltanet", "simple_gla"])
    parser.add_argument("--shapes", type=some_of(INDICES), default=INDICES)
    args = parser.parse_args()
    ours = Jax("ours")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = []
        for op, index in itertools.product(args.ops, args.shapes):
            shape = SHAPES[int(index)]
            draw = functools.partial(ours.draw, op, shape)
            x = jax.eval_shape(draw)
            for choice in candidates(shape):
                programs = [lower(f, x, shape, choice) for f in (ours.forward(op), ours.both(op))]
                waiting.append((op, shape, draw, choice, [pool.submit(p.compile) for p in programs]))
        compiled = [(*rest, [f.result() for f in futures]) for *rest, futures in waiting]
    for op, shape, draw, choice, programs in compiled:
        x = jax.jit(draw)()
        times = [median_ms(functools.partial(run, x), jax.block_until_ready) for run in programs]
        mark = " forward" * (choice == table.forward(shape, shape))
        delta = op != "simple_gla"
        mark += " backward" * (
            (choice if delta else additive(choice, shape)) == table.backward(shape, shape, delta)
        )
        print(
            f"{op} {shape} {choice}: {times[0]:.3f} {times[1]:.3f} ms{mark and ' <- table,' + mark}",
            flush=True,
        )


if __name__ == "__main__":
    main()
